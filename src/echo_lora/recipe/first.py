"""The first recipe for a model and rows of one's own: what `echo-lora init` writes, and `train --model --data` runs.

It fits the rows and the machine: the format, the longest row, and the largest batch that the dry run expects to fit in
memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from echo_lora.data.prepared import PreparedData
from echo_lora.environment import gigabytes, memory_size
from echo_lora.models import load_tokenizer
from echo_lora.progress import stage
from echo_lora.recipe.load import SCHEMA, override, validated
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.plan import peak_memory_of, shape_of, step_count
from echo_lora.recipe.prepare import limits_of, prepare
from echo_lora.recipe.schema import Recipe, source_of

ROWS_PER_STEP = 16
EPOCHS = 3
LONGEST = 4096  # tokens; longer rows are left out
HELD_OUT = 0.05  # share of the rows for validation, if there are enough
FEWEST_HELD_OUT = 10  # rows
USED_MEMORY = 0.8  # share of the memory that the estimate may reach

Document = dict[str, Any]
Comments = dict[tuple[str, str], str]  # by section and key


def first_recipe(model: str, data: str, folder: Path, overrides: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A commented YAML recipe to lie in `folder`, and the recipe that it is.

    data: what `data.train` takes as a string, relative to the working directory. overrides: as for `load_recipe`; they
    are written into the file. Raises the EchoErrors that training would raise before its first step.
    """
    what = f"the recipe for {data}"
    source = source_of(data, Path())
    given: Document = {"model": model, "data": {"train": source, "max_length": None}, "output": f"runs/{name_of(data)}"}
    # what decides how rows are read; the rest may contradict defaults that are replaced below
    reads = [
        text for text in overrides if text.partition("=")[0].strip().split(".")[0] in ("data", "trust_remote_code")
    ]
    recipe = validated(Recipe, _copy(given), what, None, reads)
    require_packages(recipe, trains=True)
    asked: Document = {}
    override(asked, overrides)
    document, comments = _fitted(recipe, given, asked.get("training") or {})
    for section, _, key in (".".join(keys).partition(".") for keys in override(document, overrides)):
        comments.pop((section, key), None)  # it gives the reason for another value
    recipe = validated(Recipe, _copy(document), what, None)
    if "file" in source:
        document["data"]["train"] = _path_from(folder, source["file"])
    if os.path.isdir(os.path.expanduser(model)):
        document["model"] = _path_from(folder, model, is_model=True)
    return _rendered(document, comments), recipe


def name_of(data: str) -> str:
    """A name for the run: that of the file, the folder or the data set."""
    stems = [part.partition(".")[0] for part in reversed(Path(data).parts)]
    names = [re.sub(r"[^\w-]+", "-", stem).strip("-") for stem in stems]
    return next(filter(None, names), "data")


def _fitted(recipe: Recipe, given: Document, asked: Document) -> tuple[Document, Comments]:
    """The recipe with the settings that fit, and the reason for each. asked: what `training` must have."""
    has_template = load_tokenizer(recipe.model, recipe.trust_remote_code).chat_template is not None
    recipe = _changed(recipe, "data", chat=recipe.data.chat or has_template)
    with stage("Reading rows"):
        prepared = prepare(recipe, ("train",))[1]["train"]
        lengths = [len(row.labels) for part in prepared for row in part.rows]
    longest = max(lengths)
    max_length = min(64 * math.ceil(longest / 64), LONGEST, limits_of(recipe).positions or LONGEST)
    rows = sum(length <= max_length for length in lengths)
    with stage("Estimating memory"):
        batch, is_checkpointed, size = _fitting_batch(recipe, prepared, rows, asked.get("batch_size"))
    held_out = int(HELD_OUT * rows) if HELD_OUT * rows >= FEWEST_HELD_OUT else 0

    data: Document = {"train": given["data"]["train"], "chat": recipe.data.chat, "max_length": max_length}
    length: Document = {"steps": asked["steps"]} if asked.get("steps") else {"epochs": asked.get("epochs") or EPOCHS}
    accumulation = asked.get("gradient_accumulation") or max(1, min(ROWS_PER_STEP, rows) // batch)
    training = length | {"batch_size": batch, "gradient_accumulation": accumulation}
    steps = step_count(_changed(recipe, "training", **training), rows - held_out)
    training |= {"learning_rate": 2e-4, "warmup_steps": min(steps // 10, 100)}
    comments: Comments = {
        ("data", "train"): f"{len(lengths)} rows, {prepared[0].format or 'generated'}",
        ("data", "chat"): "strings go through the model's chat template"
        if recipe.data.chat
        else "the model has no chat template: strings are used as they are",
        ("data", "max_length"): f"tokens; the longest row has {longest}",
        ("training", "epochs"): f"{steps} steps",
        ("training", "batch_size"): f"an estimated {gigabytes(size)} of memory, of {gigabytes(memory_size())}",
        ("training", "learning_rate"): "the setting that matters most: also try 1e-4 and 5e-4",
    }
    if rows < len(lengths):
        data["on_overlength"] = "drop"
        longer = len(lengths) - rows
        comments["data", "on_overlength"] = f"rows that are longer: {longer}; truncate_prompt keeps them, shortened"
    if held_out:
        data["validation_share"] = HELD_OUT
        comments["data", "validation_share"] = f"about {held_out} rows are held out, for eval_loss"
        training["evaluate_every"] = max(1, steps // 10)
    if is_checkpointed:
        training["gradient_checkpointing"] = True
        comments["training", "gradient_checkpointing"] = "slower, for less memory"
    training |= {"save_every": max(1, steps // 5), "log_every": max(1, min(10, steps // 20))}
    lora = {"r": recipe.lora.r, "alpha": recipe.lora.alpha, "target_modules": recipe.lora.target_modules}
    return {
        "model": given["model"],
        "lora": lora,
        "data": data,
        "training": training,
        "output": given["output"],
    }, comments


def _fitting_batch(recipe: Recipe, prepared: list[PreparedData], rows: int, asked: int | None) -> tuple[int, bool, int]:
    """The largest batch that is expected to fit, whether it needs checkpointing, and its bytes; else the smallest."""
    most = math.floor(math.log2(max(1, min(ROWS_PER_STEP, rows))))
    sizes = [asked] if asked else [2**power for power in range(most, -1, -1)]
    tries = [(batch, is_checkpointed) for is_checkpointed in (False, True) for batch in sizes]
    shape = shape_of(prepared)
    for batch, is_checkpointed in tries:
        tried = _changed(recipe, "training", batch_size=batch, gradient_checkpointing=is_checkpointed)
        size = peak_memory_of(tried, shape)
        if size <= USED_MEMORY * memory_size():
            break
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
            lines.append(f"{section}: {_value(values)}")
            continue
        lines.append(f"{section}:")
        for key, value in values.items():
            comment = comments.get((section, key))
            lines.append(f"  {key}: {_value(value)}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
