"""Where raw rows come from: files, and the procedural tasks of reasoning-gym."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from echo_lora.errors import EchoConfigError, EchoDataError, nearest

ROW = "_echo_row"  # column with the row's number in its file; a user's columns may have any other name

KEPT_NAME = f"a column {ROW!r}, a name that is reserved for row numbers. Rename the column."
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST_LINE = 100_000_000  # bytes
_VARIABLE = re.compile(r"\$\w|\$\{|%\w+%")


def where_is(source: str, row: int) -> str:
    """`train.jsonl:18: row 17`, or without the line number if the file is not JSON Lines."""
    return f"{source}:{row + 1}: row {row}" if source.endswith(".jsonl") else f"{source}: row {row}"


def expanded(path: str | Path) -> Path:
    """The path with `~` expanded to the home folder.

    Raises EchoConfigError for the home of an unknown user, and for an environment variable: a recipe must mean the same
    everywhere, so variables are not expanded, and a folder of that name is hardly meant.
    """
    if _VARIABLE.search(str(path)) and not os.path.exists(path):
        raise EchoConfigError(
            f"{path}: environment variables are not expanded in paths. Write the path out, or let your shell expand "
            'the variable, as in --set "output=$HOME/runs".'
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise EchoConfigError(f"{path}: there is no such home folder. Write the path out.") from error


@dataclass(frozen=True)
class RowFile:
    """The rows of a JSON Lines file, a JSON list, or a Parquet file: each loop reads the file, never all at once.

    columns: our name → the file's name, as in `{"prompt": "instruction", "completion": "output"}`; other columns keep
    their names. part: keep the rows whose column `part` has this value, with their number in the file as ROW. limit:
    read only the first rows. Iterating raises EchoDataError with file and line.
    """

    path: Path
    columns: Mapping[str, str] | None = None
    part: str | None = None
    limit: int | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self._all(), self.limit)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _all(self) -> Iterator[dict[str, Any]]:
        source, parts, is_empty = str(self.path), set(), True
        for index, row in enumerate(_read(self.path)):
            if not isinstance(row, dict):
                raise EchoDataError(
                    f"{where_is(source, index)} is a {type(row).__name__}, not a JSON object. "
                    'Write each row as {"prompt": ..., "completion": ...}.'
                )
            if ROW in row or ROW in (self.columns or {}):
                raise EchoDataError(f"{where_is(source, index)} has {KEPT_NAME}")
            if self.part is not None:
                parts |= {str(row["part"])} if "part" in row else set()
                if row.get("part") != self.part:
                    continue
                row = row | {ROW: index}
            is_empty = False
            yield _rename(row, self.columns, source, index) if self.columns else row
        if is_empty and self.part is not None:
            known = nearest(self.part, sorted(parts)) if parts else " The file has no column 'part'. Leave part out."
            raise EchoDataError(f"{source}: no row has part = {self.part!r}.{known}")
        if is_empty:
            raise EchoDataError(f"{source} has no row. Name a file with at least one.")


def read_rows(
    path: str | Path, columns: Mapping[str, str] | None = None, part: str | None = None
) -> list[dict[str, Any]]:
    """All rows of a file; see RowFile."""
    return list(RowFile(Path(path), columns, part))


def _read(path: Path) -> Iterator[Any]:
    path = expanded(path)
    if not os.path.isfile(path):
        raise EchoDataError(f"{path}: there is no such file. Correct the path, or put the file there.")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    with path.open("rb") as file:
        start = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    return _read_json_list(path) if start.startswith(b"[") else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[Any]:
    offset, blank = 0, None
    with path.open("rb") as file:
        # only \n ends a line: U+2028 may occur inside a string
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
            if len(line) == _LONGEST_LINE:
                raise EchoDataError(f"{path}:{number}: the line is longer than {_LONGEST_LINE:,} bytes. Split its row.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_text(path, offset + error.start) from error
            offset += len(line)
            if not text.strip():
                blank = blank or number
                continue
            if blank is not None:  # blank lines are fine at the end of the file only
                raise EchoDataError(f"{path}:{blank}: the line is empty. Remove it, or write its row.")
            try:
                row = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                raise EchoDataError(
                    f"{path}:{number}: not JSON: {_problem(error)}. Write one complete JSON object on each line."
                ) from error
            yield row


def _read_json_list(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file, path)
        text.take("[")
        if text.peek() == "]":
            text.take("]")
        else:
            yield text.item()
            while text.take(",]") == ",":
                yield text.item()
        if text.peek():
            raise text.error("text after the end of the list")


class _Text:
    """Reads a JSON text with at most one item in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line = "", 0, 1  # line: that of text[0]

    def peek(self) -> str:
        """The next non-blank character; empty at the end."""
        while True:
            match = _NOT_BLANK.search(self.text, self.at)
            if match is not None:
                self.at = match.start()
                return match[0]
            self.at = len(self.text)
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Consume one of these characters. Raises EchoDataError for any other."""
        character = self.peek()
        if not character or character not in expected:
            raise self.error(f"Expecting {' or '.join(map(repr, expected))}")
        self.at += 1
        return character

    def item(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except (ValueError, RecursionError) as error:
                if (
                    isinstance(error, RecursionError) or not self._more()
                ):  # else the item may continue in the next chunk
                    self.at = getattr(error, "pos", self.at)
                    raise self.error(_problem(error)) from error

    def error(self, problem: str) -> EchoDataError:
        line = self.line + self.text.count("\n", 0, self.at)
        return EchoDataError(f"{self.path}:{line}: not JSON: {problem}. Correct the list.")

    def _more(self) -> bool:
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        try:
            chunk = self.file.read(max(_CHUNK, len(self.text)))  # doubling keeps a long item linear
        except UnicodeDecodeError as error:
            raise _not_text(self.path, None) from error
        self.text += chunk
        return bool(chunk)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if a name occurs twice, of which json would drop one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_named_once)

_NOT_BLANK = re.compile(r"[^ \t\n\r]")


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _not_text(path: Path, byte: int | None) -> EchoDataError:
    where = "" if byte is None else f" (byte {byte})"
    return EchoDataError(f"{path} is not UTF-8 text{where}. Use JSON Lines, a JSON list or Parquet.")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise EchoDataError(f"{path} has the column {twice[0]!r} twice. Rename or remove one of them.")
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield {name: without_nulls(value) for name, value in row.items()}
    except EchoDataError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        raise EchoDataError(f"{path} can't be read as Parquet: {error}. Write or download it again.") from error


def without_nulls(value: Any) -> Any:
    """The value without the null keys that Arrow adds to give all objects of a column the same keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _rename(row: dict[str, Any], columns: Mapping[str, str], source: str, index: int) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise EchoDataError(
                f"{where_is(source, index)} has no column {theirs!r}, which columns maps to "
                f"{ours!r}.{nearest(theirs, list(row))} Present: {', '.join(name for name in row if name != ROW)}."
            )
        if ours in row and ours not in columns.values() and row[ours]:
            raise EchoDataError(
                f"{where_is(source, index)} already has a column {ours!r}, which columns would replace with "
                f"{theirs!r}. Leave this entry of columns out, or remove one of the two columns from the file."
            )
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}
