"""Rows of everything but JSON: tables, Parquet, and through `datasets` Arrow, text, folders and data sets of the hub.

CSV is read here, every cell as the text it is: `datasets` would read an answer "None" as missing and "007" as 7, and
shift the cells of a row that has one too many. Parquet is read here because `datasets` keeps one of two columns with
equal names. Nothing is read whole: `datasets` streams files, and maps folders and downloads into memory.
"""

from __future__ import annotations

import csv
import glob
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from echo_lora.data.json_file import COMPRESSED, DAMAGED, LONGEST_LINE, not_text, opened
from echo_lora.errors import EchoDataError

TABLES = (".csv", ".tsv")
FORMATS = ("JSON Lines", "JSON list", "CSV", "TSV", "Parquet", "Arrow", "text")


@lru_cache(1024)  # asked for each row
def ending(path: str | Path) -> str:
    """The ending of a file's name that says what it holds, in lower case: that of `rows.csv.gz` is `.csv`."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV or TSV file with a header, every cell as text. Raises EchoDataError with file and line."""
    csv.field_size_limit(LONGEST_LINE)  # the limit is Python's, of 131,072 characters
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
        try:
            header = file.readline()
            comma = "\t" if ending(path) == ".tsv" else ";" if ";" in header and "," not in header else ","
            names = next(csv.reader([header], delimiter=comma, strict=True), [])
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise EchoDataError(f"{path} has the column {twice[0]!r} twice. Rename or remove one of them.")
            rows = csv.reader(file, delimiter=comma, strict=True)
            for cells in rows:
                if len(cells) != len(names) and cells:
                    raise EchoDataError(
                        f"{path}:{rows.line_num + 1}: the row that ends here has {len(cells)} cells, but the header "
                        f"names {len(names)} columns. Put cells that hold {comma!r} or a line break into quotes."
                    )
                if cells:  # a blank line is none
                    yield dict(zip(names, cells, strict=True))
        except UnicodeDecodeError as error:
            raise not_text(path) from error
        except csv.Error as error:
            raise EchoDataError(f"{path} is not a table: {error}. Write it again, with quotes doubled.") from error


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
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


def read_file(path: Path, builder: str) -> Iterator[dict[str, Any]]:
    """The rows of a file that `datasets` reads with this builder: `arrow` or `text`. Raises EchoDataError."""
    from datasets import load_dataset

    try:
        rows = load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True)
        for row in rows:
            yield {name: without_nulls(value) for name, value in row.items()}
    except (*DAMAGED, ValueError) as error:
        raise EchoDataError(f"{path} can't be read as {builder}: {error}. Write or download it again.") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


@dataclass(frozen=True)
class Loaded:
    """A folder, or a data set of the hub, as `datasets` loads it.

    name: the folder (written by `save_to_disk`, or holding data files), or `owner/name`. split: of a data set that has
    several. stream: read a data set of the hub without downloading it first.
    """

    name: str
    split: str
    config: str | None = None
    revision: str | None = None
    is_hub: bool = False
    stream: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self._load()
        try:
            for row in rows.with_format(None):
                yield {name: without_nulls(value) for name, value in row.items()}
        except (*DAMAGED, ValueError, ImportError) as error:  # ImportError: of a library that decodes images or audio
            raise EchoDataError(f"{self} can't be read: {error}. Download or write it again.") from error

    def _load(self) -> Any:
        from datasets import DatasetDict, load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError

        if self.is_hub and os.path.isdir(self.name):  # `datasets` would take the folder
            raise EchoDataError(
                f"{self.name} is a folder here, not a data set of the hub. Write it as file: {self.name}."
            )
        try:
            if not self.is_hub and is_saved_dataset(Path(self.name)):
                found = load_from_disk(self.name)
                if not isinstance(found, DatasetDict):
                    return found
                if self.split not in found:
                    raise ValueError(f"Unknown split {self.split!r}. It has {', '.join(found)}")
                return found[self.split]
            options: dict[str, Any] = {"split": self.split, "streaming": self.stream or not self.is_hub}
            return load_dataset(self.name, self.config, revision=self.revision, **options)
        except (*DAMAGED, ValueError, IndexError, DatasetsError) as error:  # IndexError: of the folder /
            raise EchoDataError(self._reason(error)) from error

    def _reason(self, error: BaseException) -> str:
        error = error.__cause__ or error  # `datasets` wraps what went wrong
        if str(error).startswith(("Bad split", "Unknown split")):
            return f"{self.name} has no split {self.split!r}: {str(error).rstrip('.')}. Set split to one that it has."
        if not self.is_hub:
            formats = ", ".join(FORMATS)
            return (
                f"{self.name} can't be loaded as a folder of rows: {str(error).rstrip('.')}. Name a folder that "
                f"save_to_disk wrote, a folder of data files, or one file ({formats})."
            )
        return (
            f"{self.name} is neither a file nor a folder here, and could not be loaded from the hub: "
            f"{str(error).rstrip('.')}. Correct the name, the config or the revision, or go online "
            "(HF_HUB_OFFLINE=0, `hf auth login` for a private data set)."
        )


def without_nulls(value: Any) -> Any:
    """The value without the null keys that Arrow adds to give all objects of a column the same keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
