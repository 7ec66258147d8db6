"""`echo-lora data import`: write benchmarks, from a local folder or the hub, as rows for recipes and lm-eval.

    OUTPUT/<task>/train.jsonl, validation.jsonl, test.jsonl     rows with complete prompts
    OUTPUT/tasks/*.yaml                                         for `lm_eval --include_path OUTPUT/tasks`
    OUTPUT/recipe.yaml                                          trains on and scores the imported rows
    OUTPUT/counts.json                                          found and published row counts, and the warnings

The local source is a folder with one folder per task, such as `dataset/` of LLM-Adapters, which holds train,
validation, test (or test_public) and dev as .json, .jsonl or .parquet; or LLM-Adapters' file commonsense_170k.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from echo_lora.benchmarks.folder import COLUMNS, Splits, check_columns, from_folder
from echo_lora.benchmarks.hub import from_hub
from echo_lora.benchmarks.protocols import (
    BENCHMARKS,
    COMMONSENSE,
    UNION,
    UNION_ROWS,
    Row,
    benchmark_named,
    benchmark_rows,
)
from echo_lora.data.sources import read_rows
from echo_lora.errors import EchoDataError
from echo_lora.files import new_folder, refuse_existing

TASK_FILES = Path(__file__).parent.parent / "evaluate" / "lm_eval_tasks"


@dataclass(frozen=True)
class SplitCount:
    """Row counts of one split of one benchmark."""

    task: str
    split: str
    source: str  # file in the local folder, or hub id
    rows: int
    published: int | None  # None if no count is published
    repeats: int  # rows that duplicate an earlier one

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "rows": self.rows, "published": self.published, "repeats": self.repeats}

    def table_row(self) -> dict[str, str]:
        return {
            "task": self.task,
            "split": self.split,
            "rows": f"{self.rows:,}",
            "published": f"{self.published:,}" if self.published else "-",
            "from": self.source,
        }


@dataclass(frozen=True)
class ImportReport:
    """What was imported. `warnings` name every count that differs from the published one."""

    output: Path
    counts: list[SplitCount]
    warnings: list[str]
    notes: list[str]


def import_data(
    source: str | Path | None, output: str | Path, *, tasks: Sequence[str] = (), hold_out: int = 0
) -> ImportReport:
    """Import benchmarks from a local source, or from the hub if `source` is None, into a new folder.

    tasks: names; default: all in the source. hold_out: prompts of each train split to move to validation.jsonl with
    their duplicates, chosen by a hash. The folder is complete or absent.
    Raises EchoDataError for missing or malformed files or rows, EchoConfigError for an unknown task,
    EchoCheckpointError if the folder exists or can't be written.
    """
    refuse_existing(output)
    tasks = list(dict.fromkeys(tasks))
    for name in tasks:
        benchmark_named(name)
    counts: list[SplitCount] = []
    warnings: list[str] = []
    notes: list[str] = []
    with new_folder(output) as folder:
        for name, splits in _benchmarks(source, tasks):
            counts += [_count(name, split, where, raw) for split, (where, raw) in splits.items()]
            _write_rows(folder / name, name, splits, hold_out)
        for count in counts:
            _compare(count, warnings, notes)
        _compare_union(counts, warnings)
        names = list(dict.fromkeys(count.task for count in counts))
        scored = [count.task for count in counts if count.split == "test"]
        _write_tasks(folder / "tasks", Path(output).absolute(), scored)
        _write_recipe(folder, names, scored)
        by_task: dict[str, Any] = {name: {} for name in names}
        for count in counts:
            by_task[count.task][count.split] = count.to_dict()
        record = json.dumps({"tasks": by_task, "warnings": warnings, "notes": notes}, indent=2)
        (folder / "counts.json").write_text(record + "\n", encoding="utf-8")
    return ImportReport(Path(output), counts, warnings, notes)


# --------------------------------------------------------------------------------------------------- reading


def _benchmarks(source: str | Path | None, tasks: Sequence[str]) -> Iterable[tuple[str, Splits]]:
    """Each benchmark with its splits, one at a time to save memory."""
    if source is None:
        yield from ((name, from_hub(name)) for name in tasks or BENCHMARKS)
        return
    source = Path(source)
    if os.path.isfile(source):
        if tasks:
            raise EchoDataError(f"{source} is one file whose rows don't name their task. Leave --task out.")
        raw = read_rows(source)
        check_columns(UNION, raw, str(source))
        yield UNION, {"train": (source.name, raw)}
        return
    if not os.path.isdir(source):
        raise EchoDataError(f"{source}: there is no such folder or file. Correct the path, or put the data there.")
    known = [name for name in BENCHMARKS if os.path.isdir(source / name)]
    if not known:
        raise EchoDataError(
            f"{source} has no folder of a known task. Name a folder that holds some of {', '.join(BENCHMARKS)}."
        )
    for name in tasks or known:
        if name not in known:
            raise EchoDataError(f"{source / name}: there is no such folder. Present: {', '.join(known)}.")
        yield name, from_folder(source, name)


# ------------------------------------------------------------------------------------------------- the counts


def _count(name: str, split: str, where: str, raw: list[Row]) -> SplitCount:
    published = UNION_ROWS if name == UNION else BENCHMARKS[name].published.get(split)
    columns = COLUMNS.get(name, ("instruction", "output"))
    distinct = {tuple(map(str, (row[column] for column in columns))) for row in raw}
    return SplitCount(name, split, where, len(raw), published, len(raw) - len(distinct))


def _compare(count: SplitCount, warnings: list[str], notes: list[str]) -> None:
    where, rows, published, repeats = count.source, count.rows, count.published, count.repeats
    if published is not None and rows != published:
        if count.split == "test" and rows < published:
            warnings.append(
                f"{where}: {rows:,} of {published:,} published test rows. Scores on them can't be compared with scores "
                "on the whole test set: say which rows were used."
            )
        else:
            warnings.append(f"{where}: {rows:,} rows, but {published:,} are published. Is the file complete?")
    known = BENCHMARKS[count.task].repeats if count.task in BENCHMARKS else None
    if count.split == "train" and rows == published and known is not None and repeats != known:
        warnings.append(f"{where}: {repeats:,} duplicate rows, but {known:,} are published. Is it the right file?")
    elif count.split == "train" and repeats:
        duplicates = "1 duplicate row" if repeats == 1 else f"{repeats:,} duplicate rows"
        hint = "; part: xl leaves nearly all duplicates out" if count.task == "winogrande" else ""
        notes.append(f"{where}: {duplicates}, as published; {rows - repeats:,} of {rows:,} are distinct{hint}.")


def _compare_union(counts: list[SplitCount], warnings: list[str]) -> None:
    rows = {count.task: count.rows for count in counts if count.split == "train" and count.task in COMMONSENSE}
    total = sum(rows.values())
    if len(rows) == len(COMMONSENSE) and total != UNION_ROWS:
        warnings.append(f"the eight train splits: {total:,} rows together, but {UNION_ROWS:,} are published.")


# --------------------------------------------------------------------------------------------------- writing


def _write_rows(folder: Path, name: str, splits: Splits, hold_out: int) -> None:
    folder.mkdir()
    dev = splits["dev"][1] if "dev" in splits else []  # few-shot examples in the prompts of the other splits
    for split, (where, raw) in splits.items():
        if split == "dev":
            continue
        try:
            # the union's eight tasks share one template
            rows = benchmark_rows(COMMONSENSE[0] if name == UNION else name, split, raw, dev)
        except EchoDataError as error:
            raise EchoDataError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EchoDataError(f"{where}: a row is not one of {name}: {error!r}. Is this its file?") from error
        if split == "train" and hold_out:
            if "validation" in splits:
                raise EchoDataError(f"{where}: {name} has its own validation split. Leave --hold-out out.")
            rows, held_out = _held_out(rows, hold_out, where)
            _write_lines(folder / "validation.jsonl", held_out)
        _write_lines(folder / f"{split}.jsonl", rows)


def _held_out(rows: list[Row], count: int, where: str) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those with the `count` prompts of lowest hash."""
    order = sorted({row["prompt"] for row in rows}, key=lambda prompt: sha256(prompt.encode()).digest())
    if count >= len(order):
        raise EchoDataError(f"{where}: {count} prompts can't be held out of {len(order)}. Hold out fewer.")
    held_out = set(order[:count])
    return [row for row in rows if row["prompt"] not in held_out], [row for row in rows if row["prompt"] in held_out]


def _write_lines(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_tasks(folder: Path, output: Path, scored: list[str]) -> None:
    """Copy the shipped task files of the imported benchmarks, with the paths of the rows filled in."""
    folder.mkdir()
    names = [*scored, "_rows", "_llm_adapters"]
    if all(name in scored for name in COMMONSENSE):
        names.append("llm_adapters_commonsense")
    for name in names:
        text = (TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8")
        text = re.sub(r"IMPORTED/(\S+)", lambda match: json.dumps(str(output / match[1])), text)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _write_recipe(folder: Path, names: list[str], scored: list[str]) -> None:
    """Write a recipe that trains on and scores the imported rows, unless there are none to train on."""
    trained = [name for name in names if (folder / name / "train.jsonl").is_file()]
    if not trained:
        return
    data: dict[str, Any] = {"train": [f"{name}/train.jsonl" for name in trained]}
    validation = [f"{name}/validation.jsonl" for name in trained if (folder / name / "validation.jsonl").is_file()]
    if validation:
        data["validation"] = validation
    # prompt and completion contain them, or they are not trained on
    data["ignore_columns"] = ["question", "choices", "answer", "task_id", "canonical_solution"]
    data |= {"max_length": 256, "on_overlength": "drop"}
    tasks = [{"name": name, "data": f"{name}/test.jsonl", **BENCHMARKS[name].scored} for name in scored]
    document = {"model": "packaged:smollm2-135m", "data": data, "evaluation": {"tasks": tasks}}
    head = "# The imported rows. Set your model, and what else a run needs. Use test rows for the final score only.\n"
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(head + body, encoding="utf-8")
