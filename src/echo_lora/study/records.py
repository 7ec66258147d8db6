"""The record of a run: what it holds, what it says, where it is.

Each run writes a record into its folder. `runs.jsonl.gz` has all records of a study, one per line.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

from echo_lora.errors import EchoCheckpointError, EchoDataError, first_problem
from echo_lora.files import write_file
from echo_lora.study.design import RunKey, Stage

RECORD, RUNS_FILE = "record.json.gz", "runs.jsonl.gz"
LARGEST_ARCHIVE = 200_000_000  # bytes of all records, unpacked

Record = dict[str, Any]  # one run


class OurFile(BaseModel):
    """A file that this package wrote; it may have more keys than are read."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Result(OurFile):
    task: Annotated[str, Field(min_length=1)]
    accuracy: float = Field(ge=0, le=1)
    correct_per_row: list[bool] = Field(min_length=1)
    unreadable: float = Field(0.0, ge=0, le=1)
    predictions: list[str] = []


class _Score(OurFile):
    result: _Result
    echo: bool = False


class _General(OurFile):
    before: float
    after: float
    tokens: int = 0


class _Run(OurFile):
    """A record. Raises ValidationError."""

    stage: Stage
    arm: str
    learning_rate: float = Field(gt=0)
    seed: NonNegativeInt
    scores: list[_Score]
    history: list[dict[str, Annotated[float, Field(allow_inf_nan=True)]]]
    seconds: NonNegativeFloat = 0
    peak_memory: NonNegativeFloat = 0
    steps: NonNegativeInt = 0
    deployed_parameters: NonNegativeInt = 0
    echo_parameters: NonNegativeInt = 0
    general: _General | None = None
    versions: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    rows: list[str] = []
    device: str = "unknown"
    diverged: str = ""
    initial_adapter_sha256: str = ""
    data_sha256: str = ""
    questions_sha256: str = ""


def problem_of_run(run: Any) -> str | None:
    """Why a value is not the record of a run; None if it is one."""
    try:
        _Run.model_validate(run)
    except ValidationError as error:
        return first_problem(error)
    return None


# -------------------------------------------------------------- what it says


def results(run: Record, *, echo: bool = False) -> list[dict[str, Any]]:
    """The TaskResults of a run; echo: those with the echo kept on while generating."""
    return [score["result"] for score in run["scores"] if bool(score.get("echo")) == echo]


def run_accuracy(run: Record, *, echo: bool = False) -> float:
    """Mean over tasks; NaN for a run that was not scored."""
    return mean_of(result["accuracy"] for result in results(run, echo=echo))


def tuned_on(run: Record, what: str) -> float:
    """The validation accuracy, or the last validation `loss`, that a rate is chosen by; NaN if training diverged."""
    if what == "accuracy":
        return run_accuracy(run)
    losses = [entry["eval_loss"] for entry in run["history"] if "eval_loss" in entry]
    return losses[-1] if losses else math.nan


def mean_of(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def correct_by_task(runs: Iterable[Record], *, echo: bool = False) -> dict[str, list[list[bool]]]:
    """By task, whether each answer of each run is right, in the order of the questions; echo: as in `results`."""
    found: dict[str, list[list[bool]]] = {}
    for run in runs:
        for result in results(run, echo=echo):
            found.setdefault(result["task"], []).append(result["correct_per_row"])
    return found


# ---------------------------------------------------------- whether runs are paired


class Pairing:
    """What runs must have in common to be compared, and whether they have it.

    Within a seed, adapters of one kind start from the same weights. Arms with the same `data` section train on the
    same rows. All answer the same questions. The base model has the same loss on the general text. What a record
    lacks, for example after training diverged, is not checked.

    groups: for each property and each group of runs that must share it, the runs by their value.
    """

    def __init__(self, runs: Iterable[Record] = ()) -> None:
        self.groups: dict[tuple[str, str], dict[str, list[RunKey]]] = {}
        for run in runs:
            self.add(run)

    def add(self, run: Record) -> None:
        recipe, general = run.get("recipe", {}), run.get("general")
        model, data = recipe.get("model"), recipe.get("data")
        start = [run["seed"], model, recipe.get("method"), recipe.get("lora")]
        for what, group, value in (
            (START, start, run.get("initial_adapter_sha256")),
            ("train on the same rows", [data, model], run.get("data_sha256")),
            ("answer the same questions", [run["stage"]], run.get("questions_sha256")),
            ("have the same base model", [model], general and f"{general['before']:.4f}"),
        ):
            if value:
                found = self.groups.setdefault((what, json.dumps(group, sort_keys=True)), {})
                found.setdefault(value, []).append(RunKey.of(run))

    @property
    def broken(self) -> list[tuple[str, dict[str, list[RunKey]]]]:
        """The properties in which runs of one group differ, such as START, and these runs by their value."""
        return [(what, by_value) for (what, _), by_value in self.groups.items() if len(by_value) > 1]


START = "start from the same adapter"

# --------------------------------------------------------------- where it is


def record_path(output: str | Path, key: RunKey) -> Path:
    """The record of a run in a study's folder; it exists once the run is done."""
    return Path(output) / key.folder / RECORD


def write_record(path: Path, record: Record) -> None:
    """Write the record of a run. Raises EchoCheckpointError if that fails."""
    write_archive(path, json.dumps(record, ensure_ascii=False))


def read_record(path: Path) -> Record:
    """The record of a run. Raises EchoCheckpointError for a damaged one."""
    try:
        record = json.loads(gzip.decompress(path.read_bytes()))
        if (problem := problem_of_run(record)) is not None:
            raise ValueError(problem)
        return record
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise EchoCheckpointError(f"{path} can't be read: {error}. Remove it to run this again.") from error


def write_archive(path: Path, text: str) -> None:
    """Write compressed text without a time stamp: the same text gives the same file. Raises EchoCheckpointError."""
    write_file(path, lambda file: file.write_bytes(gzip.compress(text.encode(), mtime=0)))


def read_runs(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of runs.jsonl.gz; none if there is no such file yet. Raises EchoDataError."""
    if not os.path.exists(path):
        return
    hint = "Remove it and run `echo-lora compare` to gather the records again."
    try:
        if not os.path.isfile(path):
            raise OSError("it is not a file")
        if os.path.getsize(path) > LARGEST_ARCHIVE:
            raise OSError(f"it has more than {LARGEST_ARCHIVE:,} bytes")
        with gzip.open(path) as file:
            packed = file.read(LARGEST_ARCHIVE + 1)
        if len(packed) > LARGEST_ARCHIVE:
            raise OSError(f"it holds more than {LARGEST_ARCHIVE:,} bytes")
        text = packed.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise EchoDataError(f"{path} can't be read: {error}. {hint}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EchoDataError(f"{path}:{number}: not JSON: {error}. {hint}") from error
