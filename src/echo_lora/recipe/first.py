"""The first recipe for a model and rows of one's own: what `echo-lora init` writes, and `train --model --data` runs.

It fits the rows and the machine: the format, the longest row, and the largest batch that the dry run expects to fit in
memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from echo_lora.data.prepared import PreparedData
from echo_lora.environment import gigabytes, memory_size
from echo_lora.errors import EchoConfigError
from echo_lora.models import load_tokenizer
from echo_lora.progress import stage
from echo_lora.recipe.load import SCHEMA, override, validated
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.plan import PeakMemory, shape_of, step_count
from echo_lora.recipe.prepare import limits_of, prepare
from echo_lora.recipe.rows import source_rows, sources_of
from echo_lora.recipe.schema import Recipe, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_STEP = (4, 16)  # fewest and most
FEWEST_STEPS = 100  # few rows are taken in smaller steps, or the training ends before it has learned them
EPOCHS = 3
LONGEST = 4096  # tokens; longer rows are left out
HELD_OUT = 0.05  # share of the rows for validation, if there are enough
FEWEST_HELD_OUT = 10  # rows
USED_MEMORY = 0.8  # share of the memory that the estimate may reach

Document = dict[str, Any]
Comments = dict[tuple[str, str], str]  # by section and key; a key of the document itself is a section with the key ""


@dataclass(frozen=True)
class FirstRecipe:
    """A commented YAML recipe, the recipe that it is, and the rows that it was made for."""

    text: str
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: list[PreparedData]


def first_recipe(model: str, data: str, folder: Path, overrides: Sequence[str] = ()) -> FirstRecipe:
    """The recipe for a model and rows, as it lies in `folder`.

    data: what `data.train` takes as a string, relative to the working directory. overrides: as for `load_recipe`; they
    are written into the file. Raises the EchoErrors that training would raise before its first step.
    """
    what = f"the recipe for {data}"
    names = {text: text.partition("=")[0].strip() for text in overrides}
    for text, name in names.items():
        if name in ("model", "data", "data.train"):
            raise EchoConfigError(f"--set {text}: the model and the rows have options of their own. Use those.")
    source = source_of(data, Path())
    given: Document = {"model": model, "data": {"train": source}, "output": f"runs/{name_of(data)}"}
    # the validation rows that this needs may be added below
    now = [text for text, name in names.items() if name != "training.evaluate_every"]
    recipe = validated(Recipe, _copy(given), what, None, now)
    require_packages(recipe, trains=True)
    asked: Document = {}
    override(asked, overrides)
    document, comments, tokenizer, rows = _fitted(recipe, given, asked)
    for section, _, key in (".".join(keys).partition(".") for keys in override(document, overrides)):
        comments.pop((section, key), None)  # it gives the reason for another value
    recipe = validated(Recipe, _copy(document), what, None)
    if "file" in source:
        document["data"]["train"] = _path_from(folder, source["file"])
    if os.path.isdir(os.path.expanduser(model)):
        document["model"] = _path_from(folder, model, is_model=True)
    return FirstRecipe(_rendered(document, comments), recipe, tokenizer, rows)


def name_of(data: str) -> str:
    """A name for the run: that of the file, the folder or the data set."""
    stems = [part.partition(".")[0] for part in reversed(Path(data).parts)]
    names = [re.sub(r"[^\w-]+", "-", stem).strip("-") for stem in stems]
    return next(filter(None, names), "data")


def _fitted(
    recipe: Recipe, given: Document, asked: Document
) -> tuple[Document, Comments, PreTrainedTokenizerBase, list[PreparedData]]:
    """The recipe with the settings that fit, the reason for each, and the rows. asked: keys that have their value."""
    wanted, data_wanted = asked.get("training") or {}, asked.get("data") or {}
    limit = min(LONGEST, limits_of(recipe).positions or LONGEST)
    reading = {
        "chat": load_tokenizer(recipe.model, recipe.trust_remote_code).chat_template is not None,
        "max_length": limit,
        "on_overlength": "drop",
    }
    recipe = _changed(recipe, "data", **{key: value for key, value in reading.items() if key not in data_wanted})
    with stage("Reading rows"):
        tokenizer, parts = prepare(recipe, ("train",))
        prepared = parts["train"]
        lengths = [len(row.labels) for part in prepared for row in part.rows]
        held_out = _held_out(recipe, len(lengths))
    with stage("Estimating memory"):
        batch, is_checkpointed, size = _fitting_batch(recipe, prepared, len(lengths), wanted)

    longest, dropped = max(lengths), sum(part.counts.dropped for part in prepared)
    max_length = limit if dropped else min(64 * math.ceil(longest / 64), limit)
    data: Document = {"train": given["data"]["train"], "chat": recipe.data.chat, "max_length": max_length}
    length: Document = {"steps": wanted["steps"]} if wanted.get("steps") else {"epochs": wanted.get("epochs") or EPOCHS}
    accumulation = wanted.get("gradient_accumulation") or max(1, _rows_per_step(len(lengths)) // batch)
    training = length | {"batch_size": batch, "gradient_accumulation": accumulation}
    steps = step_count(_changed(recipe, "training", **training), len(lengths) - held_out)
    training |= {"learning_rate": 2e-4, "warmup_steps": min(steps // 10, 100)}
    comments: Comments = {
        ("data", "train"): f"{len(lengths) + dropped} rows, {prepared[0].format or 'generated'}",
        ("data", "chat"): "strings go through the model's chat template"
        if recipe.data.chat
        else "the model has no chat template: strings are used as they are",
        ("data", "max_length"): f"tokens; longer rows: {dropped}" if dropped else f"tokens; the longest row: {longest}",
        ("echo", ""): "true trains with the echo, which our studies have not shown to help: compare the two",
        ("training", "epochs"): f"{steps} steps",
        ("training", "batch_size"): f"an estimated {gigabytes(size)} of memory, of {gigabytes(memory_size())}",
        ("training", "learning_rate"): "the setting that matters most: also try 1e-4 and 5e-4",
    }
    if dropped:
        data["on_overlength"] = "drop"
        comments["data", "on_overlength"] = "truncate_prompt keeps longer rows, shortened"
    if held_out:
        data["validation_share"] = HELD_OUT
        comments["data", "validation_share"] = f"{held_out} rows are held out, for eval_loss"
    if held_out or sources_of(recipe, "validation"):
        training["evaluate_every"] = max(1, steps // 10)
    if is_checkpointed:
        training["gradient_checkpointing"] = True
        comments["training", "gradient_checkpointing"] = "slower, for less memory"
    training |= {"save_every": max(1, steps // 5), "log_every": max(1, min(10, steps // 20))}
    lora = {"r": recipe.lora.r, "alpha": recipe.lora.alpha, "target_modules": recipe.lora.target_modules}
    document = {"model": given["model"], "echo": False, "lora": lora, "data": data, "training": training}
    document["output"] = given["output"]
    return document, comments, tokenizer, prepared


def _held_out(recipe: Recipe, rows: int) -> int:
    """How many rows `validation_share` holds out, if there are enough and the recipe has no validation rows yet."""
    if HELD_OUT * rows < FEWEST_HELD_OUT or sources_of(recipe, "validation"):
        return 0
    recipe = _changed(recipe, "data", validation_share=HELD_OUT)
    parts = [part for source in recipe.data.train for part in source_rows(recipe, source, "validation")]
    count = sum(map(len, parts))
    return count if count < rows else 0  # if all prompts are equal, they are on one side


def _rows_per_step(rows: int) -> int:
    fewest, most = ROWS_PER_STEP
    wanted = 2 ** math.floor(math.log2(EPOCHS * rows / FEWEST_STEPS))
    return min(max(fewest, min(wanted, most)), rows)


def _fitting_batch(recipe: Recipe, prepared: list[PreparedData], rows: int, asked: Document) -> tuple[int, bool, int]:
    """The largest batch that is expected to fit, whether it needs checkpointing, and its bytes; else the smallest."""
    most = math.floor(math.log2(_rows_per_step(rows)))
    sizes = [asked["batch_size"]] if asked.get("batch_size") else [2**power for power in range(most, -1, -1)]
    peak_memory, shape = PeakMemory(recipe), shape_of(prepared)
    for is_checkpointed in [True] if asked.get("gradient_checkpointing") else [False, True]:
        if is_checkpointed:
            peak_memory.checkpoint()
        for batch in sizes:
            size = peak_memory(shape, batch).total
            if size <= USED_MEMORY * memory_size():
                return batch, is_checkpointed, size
    return batch, is_checkpointed, size


def _changed(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})


def _copy(document: Document) -> Document:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}


def _path_from(folder: Path, path: str, *, is_model: bool = False) -> str:
    """A path as a recipe in `folder` writes it: relative if it is inside the folder."""
    absolute = Path(os.path.expanduser(path)).absolute()
    if not absolute.is_relative_to(folder.absolute()):
        return str(absolute)
    relative = absolute.relative_to(folder.absolute()).as_posix()
    return f"./{relative}" if is_model else relative  # a model without ./ is a hub id


def _rendered(document: Document, comments: Comments) -> str:
    """The document as YAML, one line for each key of a section, with the comments behind the values."""
    lines = [f"# yaml-language-server: $schema={SCHEMA.as_uri()}"]
    for section, values in document.items():
        if not isinstance(values, dict):
            lines.append(_line(section, values, comments.get((section, ""))))
            continue
        lines.append(f"{section}:")
        lines += ["  " + _line(key, value, comments.get((section, key))) for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, comment: str | None) -> str:
    return f"{key}: {_value(value)}" + (f"  # {comment}" if comment else "")


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
