"""`echo-lora data import`: the benchmarks from a local copy, or from the hub, as rows that recipes and lm-eval read.

    OUTPUT/<task>/train.jsonl, validation.jsonl, test.jsonl     complete prompts; see evaluate/benchmarks.py
    OUTPUT/tasks/*.yaml                                         for `lm_eval --include_path OUTPUT/tasks`
    OUTPUT/recipe.yaml                                          trains on and scores what was imported
    OUTPUT/counts.json                                          found and published numbers of rows, and every warning

A local copy is a folder with a folder for each task (train, test, validation, dev as .json, .jsonl or .parquet; `test`
may be the part `test_public`), as `dataset/` of LLM-Adapters, or their one file commonsense_170k.json.
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

from echo_lora.benchmarks.folder import COLUMNS, Found, check_columns, from_folder
from echo_lora.benchmarks.hub import from_hub
from echo_lora.benchmarks.protocols import (
    BENCHMARKS,
    COMMONSENSE,
    UNION,
    UNION_ROWS,
    Benchmark,
    Row,
    benchmark_named,
    benchmark_rows,
)
from echo_lora.data.sources import read_rows
from echo_lora.errors import EchoDataError
from echo_lora.files import new_folder, refuse_existing

TASK_FILES = Path(__file__).parent.parent / "evaluate" / "lm_eval_tasks"


@dataclass(frozen=True)
class Part:
    """One part of one benchmark as it was found."""

    task: str
    part: str
    source: str  # file in the local copy, or hub id
    rows: int
    published: int | None  # None where nothing is published
    repeats: int  # rows that stand in it before

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "rows": self.rows, "published": self.published, "repeats": self.repeats}

    def table_row(self) -> dict[str, str]:
        published = f"{self.published:,}" if self.published else "-"
        return {
            "task": self.task,
            "part": self.part,
            "rows": f"{self.rows:,}",
            "published": published,
            "from": self.source,
        }


@dataclass(frozen=True)
class ImportReport:
    """What was imported; `warnings` name every count that is not the published one."""

    output: Path
    parts: list[Part]
    warnings: list[str]
    notes: list[str]


def import_data(
    source: str | Path | None, output: str | Path, *, tasks: Sequence[str] = (), hold_out: int = 0
) -> ImportReport:
    """Import benchmarks from a local copy, or from the hub where `source` is None, into a new folder.

    tasks: names; default: all that are there. hold_out: rows of each train part to write to validation.jsonl instead,
    chosen by a hash of their prompt, repeats together. The folder is complete or absent.
    Raises EchoDataError for files or rows that are missing or malformed, EchoConfigError for an unknown task,
    EchoCheckpointError if the folder exists or can't be written.
    """
    refuse_existing(output)
    tasks = list(dict.fromkeys(tasks))
    for name in tasks:
        benchmark_named(name)
    parts: list[Part] = []
    warnings: list[str] = []
    notes: list[str] = []
    with new_folder(output) as folder:
        for name, found in _all_found(source, tasks):
            for part, (where, raw) in found.items():
                parts.append(_count(name, part, where, raw))
            _write_rows(folder / name, name, found, hold_out)
        for found_part in parts:
            _compare(found_part, warnings, notes)
        _compare_union(parts, warnings)
        names = list(dict.fromkeys(part.task for part in parts))
        scored = [part.task for part in parts if part.part == "test"]
        _write_tasks(folder / "tasks", Path(output).absolute(), scored)
        _write_recipe(folder, names, scored)
        counts: dict[str, Any] = {"tasks": {name: {} for name in names}, "warnings": warnings, "notes": notes}
        for found_part in parts:
            counts["tasks"][found_part.task][found_part.part] = found_part.to_dict()
        (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return ImportReport(Path(output), parts, warnings, notes)


# --------------------------------------------------------------------------------------------------- reading


def _all_found(source: str | Path | None, tasks: Sequence[str]) -> Iterable[tuple[str, Found]]:
    """Each benchmark with its parts, one at a time: all of them together are large."""
    if source is None:
        yield from ((name, from_hub(name)) for name in tasks or BENCHMARKS)
        return
    source = Path(source)
    if os.path.isfile(source):
        if tasks:
            raise EchoDataError(f"{source} is one file of all tasks, which can't be told apart. Leave --task out.")
        raw = read_rows(source)
        check_columns(UNION, raw, str(source))
        yield UNION, {"train": (source.name, raw)}
        return
    if not os.path.isdir(source):
        raise EchoDataError(f"{source}: there is no such folder or file. Correct the path, or put the data there.")
    known = [name for name in BENCHMARKS if os.path.isdir(source / name)]
    if not known:
        raise EchoDataError(
            f"{source} has no folder of a known task. Name the folder that has {', '.join(BENCHMARKS)}."
        )
    for name in tasks or known:
        if name not in known:
            raise EchoDataError(f"{source / name}: there is no such folder. Present: {', '.join(known)}.")
        yield name, from_folder(source, name)


# ------------------------------------------------------------------------------------------------- the counts


def _count(name: str, part: str, where: str, raw: list[Row]) -> Part:
    published = UNION_ROWS if name == UNION else BENCHMARKS[name].published.get(part)
    columns = COLUMNS.get(name, ("instruction", "output"))
    distinct = {tuple(map(str, (row[column] for column in columns))) for row in raw}
    return Part(name, part, where, len(raw), published, len(raw) - len(distinct))


def _compare(found: Part, warnings: list[str], notes: list[str]) -> None:
    where, rows, published = found.source, found.rows, found.published
    is_whole = rows == published
    if published is not None and not is_whole:
        if found.part == "test" and rows < published:
            warnings.append(
                f"{where}: {rows:,} of {published:,} published test rows. Numbers on them are not those of the whole "
                "test set: say which they are."
            )
        else:
            warnings.append(f"{where}: {rows:,} rows, but {published:,} are published. Is the file whole?")
    known = BENCHMARKS[found.task].repeats if found.task in BENCHMARKS else None
    if found.part == "train" and is_whole and known is not None and found.repeats != known:
        warnings.append(
            f"{where}: {found.repeats:,} rows repeat others, but {known:,} do as published. Is it the file?"
        )
    elif found.part == "train" and found.repeats:
        rest = f"{rows - found.repeats:,} of {rows:,} are distinct"
        hint = "; part: xl leaves nearly all repeats out" if found.task == "winogrande" else ""
        repeat = "row repeats another" if found.repeats == 1 else "rows repeat others"
        notes.append(f"{where}: {found.repeats:,} {repeat}, as published; {rest}{hint}.")


def _compare_union(parts: list[Part], warnings: list[str]) -> None:
    rows = {part.task: part.rows for part in parts if part.part == "train" and part.task in COMMONSENSE}
    total = sum(rows.values())
    if len(rows) == len(COMMONSENSE) and total != UNION_ROWS:
        warnings.append(f"the eight train parts: {total:,} rows together, but {UNION_ROWS:,} are published.")


# --------------------------------------------------------------------------------------------------- writing


def _write_rows(folder: Path, name: str, found: Found, hold_out: int) -> None:
    folder.mkdir()
    examples = found["dev"][1] if "dev" in found else []
    for part, (where, raw) in found.items():
        if part == "dev":
            continue
        try:
            rows = _union_rows(raw) if name == UNION else benchmark_rows(name, part, raw, examples)
        except EchoDataError as error:
            raise EchoDataError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EchoDataError(
                f"{where}: a row does not read as one of {name}: {error!r}. Is this its file?"
            ) from error
        if part == "train" and hold_out:
            if "validation" in found:
                raise EchoDataError(f"{where}: {name} has a validation part of its own. Leave --hold-out out.")
            rows, held = _held_out(rows, hold_out, where)
            _write_lines(folder / "validation.jsonl", held)
        _write_lines(folder / f"{part}.jsonl", rows)


def _union_rows(raw: list[Row]) -> list[Row]:
    return benchmark_rows(COMMONSENSE[0], "train", raw)  # one template for all eight


def _held_out(rows: list[Row], count: int, where: str) -> tuple[list[Row], list[Row]]:
    """The rows without, and those with, the prompts of lowest hash; equal prompts stay together."""
    if count >= len(rows):
        raise EchoDataError(f"{where}: {count} rows can't be held out of {len(rows)}. Hold out fewer.")
    order = sorted({row["prompt"] for row in rows}, key=lambda prompt: sha256(prompt.encode()).digest())
    held = set(order[:count])
    return [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]


def _write_lines(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_tasks(folder: Path, output: Path, scored: list[str]) -> None:
    """The shipped task files of what was imported, with the path of its rows."""
    folder.mkdir()
    names = [*scored, "_rows", "_llm_adapters"]
    if all(name in scored for name in COMMONSENSE):
        names.append("llm_adapters_commonsense")
    for name in names:
        text = (TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8")
        text = re.sub(r"IMPORTED/(\S+)", lambda match: json.dumps(str(output / match[1])), text)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _write_recipe(folder: Path, names: list[str], scored: list[str]) -> None:
    """A recipe of what was imported, in which a cutoff drops rows and says so."""
    train = [f"{name}/train.jsonl" for name in names if (folder / name / "train.jsonl").is_file()]
    held = [path.replace("train", "validation") for path in train]
    held = [path for path in held if (folder / path).is_file()]
    if not train:  # no recipe is without rows to train on
        return
    data: dict[str, Any] = {"train": train}
    if held:
        data["validation"] = held
    # prompt and completion hold these, or no one trains on them
    data["ignore_columns"] = ["question", "choices", "answer", "task_id", "canonical_solution"]
    data |= {"max_length": 256, "on_overlength": "drop"}
    tasks = [{"name": name, "data": f"{name}/test.jsonl"} | _plain(BENCHMARKS[name]) for name in scored]
    document = {"model": "packaged:smollm2-135m", "data": data, "evaluation": {"tasks": tasks}}
    head = (
        "# What was imported. Name your model, and set what else a run needs. Test rows are for the last number only.\n"
    )
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(head + body, encoding="utf-8")


def _plain(benchmark: Benchmark) -> dict[str, Any]:
    return json.loads(json.dumps(dict(benchmark.scored)))  # YAML must not alias lists that tasks share
