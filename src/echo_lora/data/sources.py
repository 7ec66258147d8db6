"""Where raw rows come from: files, patterns of files, folders, data sets of the hub.

JSON, tables and Parquet have strict readers of our own (`json_file.py` and `loaded.py` say why); `datasets` reads all
the rest.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from echo_lora.data.json_file import COMPRESSED, DAMAGED, read_json
from echo_lora.data.loaded import TABLES, Loaded, ending, read_file, read_parquet, read_table
from echo_lora.errors import EchoConfigError, EchoDataError, nearest

ROW = "_echo_row"  # column with the row's number in its file; a user's columns may have any other name

KEPT_NAME = f"a column {ROW!r}, a name that is reserved for row numbers. Rename the column."
BUILDERS = {".arrow": "arrow", ".txt": "text"}  # of `datasets`, by the ending of the file
KNOWN = (".json", ".jsonl", ".ndjson", ".parquet", *TABLES, *BUILDERS)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VARIABLE = re.compile(r"\$\w|\$\{|%\w+%")


def where_is(source: str, row: int) -> str:
    """`train.jsonl:18: row 17`, or without the line number if the file is not JSON Lines."""
    has_lines = ending(source) == ".jsonl"
    return f"{source}:{row + 1}: row {row}" if has_lines else f"{source}: row {row}"


def is_hub_name(text: str, folder: Path) -> bool:
    """Whether a text is `owner/name` of the hub: it looks like one, and is no file, folder or pattern in `folder`."""
    return bool(_HUB_NAME.fullmatch(text)) and ending(text) not in KNOWN and not os.path.exists((folder / text).parent)


def files_of(path: str) -> list[str]:
    """The files that a pattern such as `data/*.jsonl` means, sorted; any other path as it is.

    Raises EchoDataError if a pattern matches none.
    """
    path = str(expanded(path))
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    if not (found := sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))):
        raise EchoDataError(f"{path}: no file matches this pattern. Correct it, or put the files there.")
    return found


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
    """The rows of a file, a folder or a data set of the hub: each loop reads it anew, never all at once.

    columns: our name → the file's name, as in `{"prompt": "instruction", "completion": "output"}`; other columns keep
    their names. part: keep the rows whose column `part` has this value, with their number in the file as ROW. limit:
    read only the first rows. Iterating raises EchoDataError with file and line.
    """

    path: Path | Loaded
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


def _read(rows: Path | Loaded) -> Iterator[Any]:
    if isinstance(rows, Loaded):
        return iter(rows)
    path = expanded(rows)
    if os.path.isdir(path):
        return iter(Loaded(str(path), "train"))
    if not os.path.isfile(path):
        raise EchoDataError(f"{path}: there is no such file. Correct the path, or put the file there.")
    kind = ending(path)
    if kind == ".parquet":
        return read_parquet(path)
    if kind in BUILDERS:
        return read_file(path, BUILDERS[kind])
    return _undamaged(path, read_table if kind in TABLES else read_json)


def _undamaged(path: Path, read: Callable[[Path], Iterator[Any]]) -> Iterator[Any]:
    """The rows, with an EchoDataError if a compressed file is damaged."""
    if path.suffix.lower() not in COMPRESSED:
        yield from read(path)
        return
    try:
        yield from read(path)
    except DAMAGED as error:
        raise EchoDataError(f"{path} can't be decompressed: {error}. Write or download it again.") from error


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
