"""Where raw rows come from: files, and the procedural tasks of reasoning-gym."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_lora.config import nearest
from echo_lora.errors import EchoDataError


def where_is(source: str, row: int) -> str:
    """`train.jsonl:18: row 17`; only JSON Lines has a row on each line."""
    return f"{source}:{row + 1}: row {row}" if source.endswith(".jsonl") else f"{source}: row {row}"


def read_rows(
    path: str | Path, columns: Mapping[str, str] | None = None, part: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, a JSON list, or a Parquet file.

    columns: our name → the file's name, as in `{"prompt": "instruction", "completion": "output"}`; other
    columns keep their names. part: keep the rows whose column `part` has this value; they then carry their
    place in the file as `row`. Raises EchoDataError with file and line.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise EchoDataError(f"{path}: there is no such file. Correct the path, or put the file there.")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if not rows:
        raise EchoDataError(f"{path} has no row. Name a file with at least one.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise EchoDataError(
                f"{where_is(str(path), index)} is a {type(row).__name__}, not an object with named columns. "
                'Write each row as {"prompt": ..., "completion": ...}.'
            )
    if part is not None:
        rows = _select_part(rows, part, str(path))
    return [_rename(row, columns, str(path), index) for index, row in enumerate(rows)] if columns else rows


def _read_json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EchoDataError(
            f"{path} is not UTF-8 text (byte {error.start}). Use JSON Lines, a JSON list or Parquet."
        ) from error
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise EchoDataError(f"{path}:{error.lineno}: not JSON: {error.msg}. Correct the list.") from error
    rows = []
    for number, line in enumerate(text.rstrip().split("\n"), start=1):  # U+2028 may stand inside a string
        if not line.strip():
            raise EchoDataError(f"{path}:{number}: the line is empty. Remove it, or write its row.")
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise EchoDataError(
                f"{path}:{number}: not JSON: {error.msg} at column {error.colno}. "
                "Write one complete JSON object on each line."
            ) from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise EchoDataError(f"{path} can't be read as Parquet: {error}. Write or fetch it again.") from error


def _select_part(rows: list[dict[str, Any]], part: str, source: str) -> list[dict[str, Any]]:
    selected = [{**row, "row": index} for index, row in enumerate(rows) if row.get("part") == part]
    if not selected:
        parts = sorted({str(row["part"]) for row in rows if "part" in row})
        known = nearest(part, parts) if parts else " The file has no column 'part': leave part out."
        raise EchoDataError(f"{source}: no row has part = {part!r}.{known}")
    return selected


def _rename(row: dict[str, Any], columns: Mapping[str, str], source: str, index: int) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise EchoDataError(
                f"{where_is(source, row.get('row', index))} has no column {theirs!r}, which columns names for "
                f"{ours!r}.{nearest(theirs, list(row))} Present: {', '.join(name for name in row if name != 'row')}."
            )
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


_SEEDS_PER_SPLIT = 1_000_000


def reasoning_gym_rows(
    task: str, count: int, seed: int, params: Mapping[str, Any] | None = None
) -> list[dict[str, str]]:
    """`count` rows of a reasoning-gym task: `prompt` the question, `completion` the answer.

    Row i is drawn with seed + i, so that neighbouring seeds share rows; `reasoning_gym_splits` gives parts
    that don't. Raises EchoDataError for an unknown task or parameter.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise EchoDataError(
            f"the task {task!r} needs the package reasoning-gym, which is not installed. "
            "Run `pip install reasoning-gym`."
        ) from error
    names = list(reasoning_gym.factory.DATASETS)
    if task not in names:
        raise EchoDataError(f"{task!r} is not a task of reasoning-gym.{nearest(task, names)}")
    for field in dataclasses.fields(reasoning_gym.factory.DATASETS[task][1]):
        value = (params or {}).get(field.name)
        usual = abs(field.default) if isinstance(field.default, (int, float)) else 1
        if isinstance(value, (int, float)) and abs(value) > max(10_000, 1000 * usual):
            raise EchoDataError(
                f"{task!r} with {field.name} = {value!r} would make questions that no model can read; the default is "
                f"{field.default!r}. Lower it."
            )
    try:
        items = list(reasoning_gym.create_dataset(task, size=count, seed=seed, **params or {}))
    except (TypeError, ValueError, AssertionError) as error:
        fields = [f.name for f in dataclasses.fields(reasoning_gym.factory.DATASETS[task][1])]
        raise EchoDataError(
            f"reasoning-gym can't make {task!r} with {dict(params or {})} and seed {seed}: {error}. "
            f"Its parameters: {', '.join(sorted(set(fields) - {'seed', 'size'}))}."
        ) from error
    if not all(isinstance(item["answer"], str) for item in items):
        raise EchoDataError(
            f"the task {task!r} has questions without a written answer. Choose another, like chain_sum."
        )
    return [{"prompt": item["question"], "completion": item["answer"]} for item in items]


def reasoning_gym_splits(
    task: str, sizes: Mapping[str, int], seed: int, params: Mapping[str, Any] | None = None
) -> dict[str, list[dict[str, str]]]:
    """Parts of a task, by name, from disjoint seeds, in which no question occurs twice.

    The last part is drawn first: with test named last, its rows don't depend on the size of train.
    Raises EchoDataError if the task has too few different questions.
    """
    seen: set[str] = set()
    splits = {}
    for place, (name, size) in reversed(list(enumerate(sizes.items()))):
        start = (seed * len(sizes) + place) * _SEEDS_PER_SPLIT
        fresh: dict[str, dict[str, str]] = {}
        for drawn in range(0, min(20 * size + 1000, _SEEDS_PER_SPLIT), size):
            for row in reasoning_gym_rows(task, size, start + drawn, params):
                if row["prompt"] not in seen and len(fresh) < size:
                    fresh.setdefault(row["prompt"], row)
            if len(fresh) == size:
                break
        else:
            raise EchoDataError(
                f"{task!r} has only {len(fresh)} different questions left for the {size} of {name!r}. "
                "Ask for fewer rows, or set params that allow more questions."
            )
        seen |= fresh.keys()
        splits[name] = list(fresh.values())
    return {name: splits[name] for name in sizes}
