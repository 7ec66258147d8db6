"""From a recipe's sources to rows: raw, tokenised for training, or rendered for scoring."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from echo_lora.data.check import refuse_unfit_tokens
from echo_lora.data.forms import check_forms, is_learned, row_number, texts_of
from echo_lora.data.generated import reasoning_gym_splits
from echo_lora.data.prepared import PreparedData, prepare_rows
from echo_lora.data.sources import ROW, RowFile, where_is
from echo_lora.data.tokenize import end_token_ids, render_prompt
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.evaluate.tasks import EvalTask
from echo_lora.models import empty_model, has_position_table, load_config, load_tokenizer
from echo_lora.recipe.schema import SPLITS, EvaluationTask, Recipe, Source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


Row = dict[str, Any]

LOOKED_AT = 100  # rows of a source, to tell chats from plain strings


def source_rows(recipe: Recipe, source: Source, split: str) -> RowFile | list[Row]:
    """The raw rows of one source of `data.train`, `data.validation` or `data.test`.

    Splits of one task with equal seed and parameters share no question, and the test rows depend neither on the number
    of training rows nor on other sources. Raises EchoDataError.
    """
    if source.file is not None:
        return RowFile(Path(source.file), recipe.data.columns, source.part, recipe.data.limit)
    sizes = dict.fromkeys(SPLITS, 1)  # every split has its place, so that adding one changes no other
    for name, other in _all_sources(recipe):
        if other.rows_key == source.rows_key:
            sizes[name] = max(sizes[name], other.count or 1)
    params = json.dumps(source.params or {})
    splits = _generated(str(source.task), source.seed or 0, params, tuple(sizes.values()))
    return splits[split][: source.count][: recipe.data.limit]


def check_rows(recipe: Recipe) -> None:
    """Check the form of every training and validation row, without a tokenizer. Raises EchoDataError."""
    for split in ("train", "validation"):
        for source in getattr(recipe.data, split) or []:
            if source.file is not None:  # generated rows are valid
                rows = source_rows(recipe, source, split)
                check_forms(rows, source.file, recipe.data.ignore_columns, chat=recipe.data.chat)


def prepare_split(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: str) -> list[PreparedData]:
    """The tokenised and checked rows of each source of a split. Call `check_rows` first."""
    return [
        prepare_rows(
            source_rows(recipe, source, split),
            tokenizer,
            max_length=recipe.data.max_length,
            on_overlength=recipe.data.on_overlength,
            chat=recipe.data.chat,
            train_on_prompt=recipe.data.train_on_prompt,
            source=source.file or source.name,
            forms_are_checked=True,
        )
        for source in getattr(recipe.data, split) or []
    ]


def prepare(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, dict[str, list[PreparedData]]]:
    """The tokenizer and the rows of data.train and data.validation, checked as far as possible without weights.

    Cheap checks come first: the form of all rows, then their tokens, then the model's embeddings. Raises EchoDataError.
    """
    check_rows(recipe)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    prepared = {split: prepare_split(recipe, tokenizer, split) for split in ("train", "validation")}
    config = load_config(recipe.model, recipe.trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    for data in itertools.chain(*prepared.values()):
        refuse_unfit_tokens(
            data.dataset,
            data.source,
            vocabulary=config.vocab_size,
            positions=positions,
            has_table=lambda: has_position_table(
                empty_model(recipe.model, trust_remote_code=recipe.trust_remote_code), positions or 0
            ),
        )
    return tokenizer, prepared


def prompts_are_chats(recipe: Recipe) -> bool | None:
    """Whether training puts prompts through the chat template; None if some rows are chats and others plain strings.

    Looks at the first rows of each source.
    """
    if recipe.data.chat:
        return True
    first = (
        row for source in recipe.data.train for row in itertools.islice(source_rows(recipe, source, "train"), LOOKED_AT)
    )
    forms = {not isinstance(row.get("prompt"), str) for row in first}
    return forms.pop() if len(forms) == 1 else None


def join(prepared: list[PreparedData]) -> Dataset:
    """All sources as one dataset; with several, the rows are renumbered consecutively."""
    from datasets import concatenate_datasets

    if len(prepared) == 1:
        return prepared[0].dataset
    whole = concatenate_datasets([data.dataset.remove_columns(ROW) for data in prepared])
    return whole.add_column(ROW, np.arange(len(whole)))


def evaluation_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: Literal["validation", "test"] = "test"
) -> list[tuple[EvalTask, list[Row]]]:
    """Tasks and their rows for `evaluate.score`.

    Without `evaluation.tasks`, each source of `data.test` is a task that generates an answer. Tasks without `stop` end
    at the model's end-of-turn tokens. split: `validation` scores the rows of `data.validation` instead. Raises
    EchoConfigError if there is nothing to score.
    """
    tasks = recipe.evaluation.tasks or _default_tasks(recipe, split)
    ends = tokenizer.convert_ids_to_tokens(sorted(end_token_ids(tokenizer)))
    scored = []
    for task in tasks:
        if task.data and recipe.evaluation.tasks and split != "test":
            raise EchoConfigError(
                f"evaluation task {task.name!r} has its own test rows, so it can't be scored on data.{split}. Leave "
                "out the task's data, or score the test rows."
            )
        sources = task.data or getattr(recipe.data, split)
        if not sources:
            raise EchoConfigError(f"evaluation task {task.name!r} has no rows. Set its data, or data.{split}.")
        rendered = []
        for source in sources:
            where, rows = source.file or source.name, source_rows(recipe, source, split)
            check_forms(rows, where, recipe.data.ignore_columns, chat=recipe.data.chat, is_scored=True)
            for index, row in enumerate(rows):
                place = where_is(where, row_number(row, index))
                rendered.append(_scored(task, row, tokenizer, recipe.data.chat, place))
        files = ", ".join(source.file or source.name for source in sources)
        stop = task.stop or (ends if task.kind != "choice" else [])
        scored.append((task.build(file=files, stop=stop), rendered))
    return scored


def _all_sources(recipe: Recipe) -> list[tuple[str, Source]]:
    """Every source with its split; the sources of evaluation tasks count as test rows."""
    sources = [(split, source) for split in SPLITS for source in getattr(recipe.data, split) or []]
    return sources + [("test", source) for task in recipe.evaluation.tasks for source in task.data or []]


@cache
def _generated(task: str, seed: int, params: str, sizes: tuple[int, ...]) -> dict[str, list[Row]]:
    """The splits of a task, cached; params is JSON, sizes are in the order of SPLITS."""
    return reasoning_gym_splits(task, dict(zip(SPLITS, sizes, strict=True)), seed, json.loads(params))


def _default_tasks(recipe: Recipe, split: str) -> list[EvaluationTask]:
    sources: list[Source] = getattr(recipe.data, split) or []
    if not sources:
        raise EchoConfigError(f"the recipe has nothing to score. Set data.{split}, or evaluation.tasks with data.")
    names: list[str] = []
    for source in sources:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(source.name).stem)
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return [EvaluationTask(name=name, data=[source.model_dump()]) for name, source in zip(names, sources, strict=True)]


def _scored(
    task: EvaluationTask, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, where: str
) -> Row:
    """A row in the form that its kind of task needs: the rendered prompt, and the reference."""
    rendered = {"prompt": render_prompt(row, tokenizer, chat, where)}
    if task.kind in ("generate", "number"):
        rendered["answer"] = _answer(row, where)
    names = {"choice": ("choices", "label"), "code": ("test", "entry_point")}.get(task.kind, ())
    return rendered | {name: row[name] for name in (*names, "group") if row.get(name) is not None}


def _answer(row: Mapping[str, Any], where: str) -> str:
    turns = row.get("messages") or row.get("completion")
    if row.get("answer") is not None:
        return row["answer"]
    if isinstance(turns, list):  # the prompt ends at the first answer
        turns = next(("".join(texts_of(turn)) or None for turn in turns if is_learned(turn)), None)
    if not isinstance(turns, str):
        present = ", ".join(name for name in row if name != ROW)
        raise EchoDataError(f"{where} has no answer to compare with. Present: {present}. Add a completion.")
    return turns
