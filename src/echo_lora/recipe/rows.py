"""From a recipe's sources to rows: raw, tokenised for training, or rendered for scoring."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from echo_lora.data.formats import LOOKED_AT, Format, FormattedRows, find_format
from echo_lora.data.forms import check_forms, is_learned, row_number, texts_of
from echo_lora.data.generated import reasoning_gym_splits
from echo_lora.data.loaded import Loaded
from echo_lora.data.prepared import PreparedData, prepare_rows
from echo_lora.data.shares import held_out
from echo_lora.data.sources import ROW, RowFile, files_of, where_is
from echo_lora.data.tokenize import end_token_ids, render_prompt
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.evaluate.tasks import EvalTask
from echo_lora.recipe.schema import SPLITS, DataSection, EvaluationTask, Recipe, Source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


Row = dict[str, Any]


def sources_of(recipe: Recipe, split: str) -> list[Source]:
    """The sources of a split; with `data.validation_share`, validation rows are some of the training sources'."""
    is_share = split == "validation" and recipe.data.validation_share is not None
    return getattr(recipe.data, "train" if is_share else split) or []


def source_rows(recipe: Recipe, source: Source, split: str) -> list[FormattedRows]:
    """The rows of one source of `data.train`, `data.validation` or `data.test`: one part for each of its files.

    Splits of one task with equal seed and parameters share no question, and the test rows depend neither on the number
    of training rows nor on other sources. With `data.validation_share` the training and validation rows of a source are
    disjoint, and so are their prompts. Raises EchoDataError.
    """
    share, seed = recipe.data.validation_share, recipe.seeds.validation
    if share is None or split == "test":
        return _whole_source(recipe, source, split)
    is_held_out = split == "validation"
    parts = _whole_source(recipe, source, "train")
    return [replace(part, keeps=lambda row: held_out(row, share, seed) == is_held_out) for part in parts]


def training_parts(recipe: Recipe) -> list[FormattedRows]:
    """The rows of all sources of `data.train`, one part for each file."""
    return [part for source in recipe.data.train for part in source_rows(recipe, source, "train")]


def _whole_source(recipe: Recipe, source: Source, split: str) -> list[FormattedRows]:
    data = recipe.data
    if source.task is None:
        files = [RowFile(part, data.columns, source.part, data.limit) for part in _places(recipe, source, split)]
        return [_formatted(data, rows, str(rows.path)) for rows in files]
    sizes = dict.fromkeys(SPLITS, 1)  # every split has its place, so that adding one changes no other
    for name, other in _all_sources(recipe):
        if other.rows_key == source.rows_key:
            sizes[name] = max(sizes[name], other.count or 1)
    params = json.dumps(source.params or {})
    splits = _generated(str(source.task), source.seed or 0, params, tuple(sizes.values()))
    rows = splits[split][: source.count][: recipe.data.limit]
    return [FormattedRows(rows, Format(None, "", lambda row, where: {**row}), source.name)]


def _formatted(data: DataSection, rows: RowFile, source: str) -> FormattedRows:
    found = find_format(rows, data.format, chat=data.chat, ignore=data.ignore_columns, source=source)
    return FormattedRows(rows, found, source)


def _places(recipe: Recipe, source: Source, split: str) -> Sequence[Path | Loaded]:
    """The files of a source, or its data set."""
    split = source.split or split
    if source.hub is not None:
        stream = recipe.data.stream
        return [Loaded(source.hub, split, source.config, source.revision, is_hub=True, stream=stream)]
    files = files_of(str(source.file))
    if len(files) == 1 and os.path.isdir(files[0]):
        return [Loaded(files[0], split, source.config)]
    if source.split is not None or source.config is not None:
        raise EchoDataError(f"{source.file} is a file: it has no splits and no configs. Leave them out of its source.")
    return [Path(name) for name in files]


def check_rows(recipe: Recipe, splits: tuple[str, ...] = ("train", "validation")) -> None:
    """Check the form of every row of these splits, without a tokenizer. Raises EchoDataError."""
    for split in splits:
        for source in getattr(recipe.data, split) or []:
            if source.task is None:  # generated rows are valid
                for part in _whole_source(recipe, source, split):
                    check_forms(part, part.source, recipe.data.ignore_columns, chat=recipe.data.chat)


def prepare_split(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: str) -> list[PreparedData]:
    """The tokenised and checked rows of each file of a split, as often as weights say. Call `check_rows` first.

    Raises EchoDataError, also if `data.validation_share` leaves no row for the split.
    """
    prepared: list[PreparedData] = []
    for place, source in enumerate(sources_of(recipe, split)):
        for part in source_rows(recipe, source, split):
            if part.keeps is not None and next(iter(part), None) is None:
                continue  # the share leaves none of this file
            data = prepare_rows(
                part,
                tokenizer,
                max_length=recipe.data.max_length,
                on_overlength=recipe.data.on_overlength,
                chat=recipe.data.chat,
                train_on_prompt=recipe.data.train_on_prompt,
                source=part.source,
                forms_are_checked=True,
            )
            data = replace(data, format=part.format.reason)
            if source.weight is not None and split == "train":
                data = data.weighted(source.weight, [recipe.seeds.data_order, place, len(prepared)])
            prepared.append(data)
    if not prepared and sources_of(recipe, split):
        raise EchoDataError(
            f"data.validation_share = {recipe.data.validation_share:g} leaves no row for {split} with seeds.validation "
            f"= {recipe.seeds.validation}. Choose another share or seed, or more rows."
        )
    return prepared


def prompts_are_chats(recipe: Recipe) -> bool | None:
    """Whether training puts prompts through the chat template; None if some rows are chats and others plain strings.

    Looks at the first rows of each source.
    """
    if recipe.data.chat:
        return True
    rows = (row for part in training_parts(recipe) for row in islice(part, LOOKED_AT))
    forms = {not isinstance(row.get("prompt"), str) for row in rows}
    return forms.pop() if len(forms) == 1 else None


def prompts_are_alpaca(recipe: Recipe) -> bool:
    """Whether training puts all prompts into Alpaca's layout."""
    return not recipe.data.chat and {part.format.name for part in training_parts(recipe)} == {"alpaca"}


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
        sources = task.data or sources_of(recipe, split)
        if not sources:
            raise EchoConfigError(f"evaluation task {task.name!r} has no rows. Set its data, or data.{split}.")
        rendered = []
        for source in sources:
            for part in source_rows(recipe, source, split):
                check_forms(part, part.source, recipe.data.ignore_columns, chat=recipe.data.chat, is_scored=True)
                for index, row in enumerate(part):
                    place = where_is(part.source, row_number(row, index))
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
    sources = sources_of(recipe, split)
    if not sources:
        raise EchoConfigError(f"the recipe has nothing to score. Set data.{split}, or evaluation.tasks with data.")
    names: list[str] = []
    for source in sources:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(source.name).stem)
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    sources = [source.model_copy(update={"weight": None}) for source in sources]
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
