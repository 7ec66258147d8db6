"""JSON Lines and JSON lists, read one row at a time, each error with file and line.

`datasets` reads them too, but it merges the types of all rows, fills keys that a row does not have, keeps one of two
equal names, and names no line.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from echo_lora.errors import EchoDataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what the libraries raise for a damaged archive
LONGEST_LINE = 100_000_000  # bytes
_CHUNK = 1 << 20  # bytes read at a time


def opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if the ending of its name says that it is compressed."""
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.input_stream(str(path), compression="zstd")))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending, open)
    return opener(path, "rb")


def read_json(path: Path) -> Iterator[Any]:
    """The rows of a JSON list or of JSON Lines, whichever the file holds. Raises EchoDataError with file and line."""
    with opened(path) as file:
        start = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    return _read_json_list(path) if start.startswith(b"[") else _read_json_lines(path)


def not_text(path: Path, byte: int | None = None) -> EchoDataError:
    """The error for a file that is not UTF-8 text."""
    where = "" if byte is None else f" (byte {byte})"
    return EchoDataError(f"{path} is not UTF-8 text{where}. Use JSON Lines, a JSON list or Parquet.")


def _read_json_lines(path: Path) -> Iterator[Any]:
    offset, blank = 0, None
    with opened(path) as file:
        # only \n ends a line: U+2028 may occur inside a string
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                raise EchoDataError(f"{path}:{number}: the line is longer than {LONGEST_LINE:,} bytes. Split its row.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_text(path, offset + error.start) from error
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
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
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
            raise not_text(self.path) from error
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
