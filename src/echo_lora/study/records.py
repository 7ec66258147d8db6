"""What a study's folder holds, read and checked: the design in study.json, a record per run in runs.jsonl.gz."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from echo_lora.errors import EchoConfigError, EchoDataError, first_problem
from echo_lora.files import write_file
from echo_lora.study.looks import problem_of_looks

STUDY_FILE, RUNS_FILE = "study.json", "runs.jsonl.gz"
LARGEST_FILE, LARGEST_ARCHIVE = 10_000_000, 200_000_000  # bytes, of study.json and of the records, unpacked

Record = dict[str, Any]  # one run


class _Read(BaseModel):
    """What is read of a file of ours; it may hold more."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _ArmFile(_Read):
    label: str | None = None
    role: str = "method"
    overrides: dict[str, Any] = {}


class _Power(_Read):
    power: float = 0.0
    effect: float = 0.0
    smallest_detectable: float | None = None


class _StudyFile(_Read):
    """study.json. Raises ValidationError."""

    title: str
    question: str = ""
    baseline: str
    arms: dict[str, _ArmFile] = Field(min_length=1)
    comparisons: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(min_length=1)
    learning_rates: dict[str, list[float]]
    tuning_seeds: list[NonNegativeInt]
    seeds: list[NonNegativeInt]
    smallest_effect: float = Field(gt=0, lt=1)
    margin: float | None = Field(None, gt=0, lt=1)
    looks: list[int] | None = None
    chosen: dict[str, float] | None = None
    score_on: str = "test"
    command: str | None = None
    started: str | None = None
    processor: str | None = None
    design: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    versions: dict[str, str] = {}
    power: _Power | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _StudyFile:
        named = [("baseline", self.baseline), *(("comparisons", name) for pair in self.comparisons for name in pair)]
        named += [(key, name) for key in ("learning_rates", "chosen") for name in getattr(self, key) or {}]
        for key, name in named:
            if name not in self.arms:
                raise ValueError(f"{key} names {name!r}, which is none of its arms")
        if self.looks is not None and (problem := problem_of_looks(self.looks, len(self.seeds))):
            raise ValueError(problem)
        return self


class _Result(_Read):
    task: Annotated[str, Field(min_length=1)]
    accuracy: float = Field(ge=0, le=1)
    correct_per_row: list[bool] = Field(min_length=1)
    unreadable: float = Field(0.0, ge=0, le=1)
    predictions: list[str] = []


class _Score(_Read):
    result: _Result
    echo: bool = False


class _General(_Read):
    before: float
    after: float
    tokens: int = 0


class _Run(_Read):
    """A record. Raises ValidationError."""

    stage: Literal["tuning", "confirmation"]
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


class RunName(NamedTuple):
    """One run of a design; its learning rate is None as long as it has not been chosen."""

    stage: str
    arm: str
    learning_rate: float | None
    seed: int


@dataclass(frozen=True)
class StudyRecords:
    """A study, finished or not. Made by `read_study`."""

    folder: Path
    about: dict[str, Any]  # study.json
    runs: list[Record]

    @property
    def baseline(self) -> str:
        return self.about["baseline"]

    @property
    def arms(self) -> list[str]:
        """The baseline, then the others in the study's order."""
        return [self.baseline, *(arm for arm in self.about["arms"] if arm != self.baseline)]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons that the study declared, the primary one first."""
        return [(first, second) for first, second in self.about["comparisons"]]

    @property
    def others(self) -> list[tuple[str, str]]:
        """Each arm with the baseline, where that was not declared."""
        return [(arm, self.baseline) for arm in self.arms[1:] if (arm, self.baseline) not in self.pairs]

    @property
    def seeds(self) -> list[int]:
        return self.about["seeds"]

    @property
    def looks(self) -> list[int]:
        """Numbers of seeds after which the result may be looked at; none where the study declares none."""
        return self.about.get("looks") or []

    @property
    def look(self) -> int:
        """How many looks have been reached: all arms have been run at all of their seeds."""
        done = {(run["arm"], run["seed"]) for run in self.runs if run["stage"] == "confirmation"}
        return sum(
            all((arm, seed) in done for arm in self.about["arms"] for seed in self.seeds[:number])
            for number in self.looks
        )

    @property
    def counted_seeds(self) -> list[int]:
        """The seeds that results rest on: those of the last look that was reached, all where there are no looks."""
        return self.seeds[: [0, *self.looks][self.look]] if self.looks else self.seeds

    @property
    def chosen(self) -> dict[str, float] | None:
        """Each arm's learning rate; None as long as tuning is not over."""
        return self.about.get("chosen")

    @property
    def part(self) -> str:
        """The rows that the runs that count are scored on: test, or validation in a search for settings."""
        return self.about.get("score_on", "test")

    @property
    def tunes_on_accuracy(self) -> bool:
        """Whether learning rates are chosen by accuracy on validation rows, else by their loss."""
        return self.about.get("design", {}).get("tune_on", "accuracy") == "accuracy"

    def label(self, arm: str) -> str:
        """The arm's name for readers."""
        return self.about["arms"][arm].get("label") or arm

    def is_control(self, arm: str) -> bool:
        return self.about["arms"][arm].get("role") == "control"

    def confirmation(self, arm: str) -> dict[int, Record]:
        """The arm's runs that count, by seed, in the order of the seeds. Runs after the last look don't count yet."""
        found = {run["seed"]: run for run in self.runs if run["stage"] == "confirmation" and run["arm"] == arm}
        return {seed: found[seed] for seed in self.counted_seeds if seed in found}

    def tuning(self, arm: str) -> dict[float, list[Record]]:
        """The arm's runs that choose a learning rate, by learning rate."""
        runs = [run for run in self.runs if run["stage"] == "tuning" and run["arm"] == arm]
        rates = sorted({run["learning_rate"] for run in runs})
        return {rate: [run for run in runs if run["learning_rate"] == rate] for rate in rates}

    @property
    def tasks(self) -> list[str]:
        """The tasks that confirmation runs were scored on, in their order."""
        names: dict[str, None] = {}
        for arm in self.arms:
            for run in self.confirmation(arm).values():
                names.update((result["task"], None) for result in results(run))
        return list(names)

    @property
    def expected(self) -> list[RunName]:
        """All runs of the design."""
        about, chosen = self.about, self.chosen or {}
        tuning = [
            RunName("tuning", arm, rate, seed)
            for seed in about["tuning_seeds"]
            for arm in about["arms"]
            for rate in about["learning_rates"].get(arm, [])
        ]
        return tuning + [
            RunName("confirmation", arm, chosen.get(arm), seed) for seed in self.seeds for arm in about["arms"]
        ]

    @property
    def missing(self) -> list[RunName]:
        """The runs of the design that have no record."""
        there = {_key(run["stage"], run["arm"], run["learning_rate"], run["seed"]) for run in self.runs}
        return [run for run in self.expected if _key(*run) not in there]


def _key(stage: str, arm: str, learning_rate: float | None, seed: int) -> tuple[Any, ...]:
    """What tells runs apart: an arm is confirmed at one learning rate."""
    return stage, arm, seed, learning_rate if stage == "tuning" else None


def results(run: Record, *, echo: bool = False) -> list[dict[str, Any]]:
    """The TaskResults of a run; echo: of the diagnosis in which the echo was kept on while generating."""
    return [score["result"] for score in run["scores"] if bool(score.get("echo")) == echo]


def run_accuracy(run: Record, *, echo: bool = False) -> float:
    """Mean over the tasks; NaN for a run that was not scored."""
    return mean_of(result["accuracy"] for result in results(run, echo=echo))


def mean_of(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def correct_by_task(runs: Iterable[Record]) -> dict[str, list[list[bool]]]:
    """By task, the answers of each run: whether they are right, in the order of the questions."""
    found: dict[str, list[list[bool]]] = {}
    for run in runs:
        for result in results(run):
            found.setdefault(result["task"], []).append(result["correct_per_row"])
    return found


def write_archive(path: Path, text: str) -> None:
    """Compressed without a time stamp: the same text is the same file. Raises EchoCheckpointError."""
    write_file(path, lambda file: file.write_bytes(gzip.compress(text.encode(), mtime=0)))


def read_study(folder: str | Path) -> StudyRecords:
    """Read a study's folder. A study without a single record is one too.

    Raises EchoConfigError if study.json is missing or not a study's, EchoDataError for a damaged record. Both name
    file and line.
    """
    folder = Path(folder)
    about = read_about(folder / STUDY_FILE)
    runs: list[Record] = []
    lines: dict[tuple[Any, ...], int] = {}
    for number, run in read_runs(folder / RUNS_FILE):
        where = f"{folder / RUNS_FILE}:{number}"
        _check_run(run, about, where)
        first = lines.setdefault(_key(run["stage"], run["arm"], run["learning_rate"], run["seed"]), number)
        if first != number:
            raise EchoDataError(
                f"{where}: a second record of {run['stage']} {run['arm']} seed {run['seed']}; line {first} has the "
                "first. Remove one of them, or gather the records anew with `echo-lora compare`."
            )
        runs.append(run)
    return StudyRecords(folder, about, runs)


def read_about(path: Path) -> dict[str, Any]:
    """What study.json holds. Raises EchoConfigError."""
    hint = "Name a folder that `echo-lora compare` wrote."
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is not a file")
        if os.path.isfile(path) and os.path.getsize(path) > LARGEST_FILE:
            raise OSError(f"it has {os.path.getsize(path):,} bytes")
        about = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EchoConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}. {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EchoConfigError(f"{path} can't be read: {error}. {hint}") from error
    try:
        if not isinstance(about, dict):
            raise EchoConfigError(f"{path} is not a study's: it is a {type(about).__name__}, not an object. {hint}")
        _StudyFile.model_validate(about)
    except ValidationError as error:
        raise EchoConfigError(f"{path} is not a study's: {first_problem(error)}. {hint}") from error
    return about


def read_runs(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and records of runs.jsonl.gz; none if there is no such file yet. Raises EchoDataError."""
    if not os.path.exists(path):
        return
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
        raise EchoDataError(
            f"{path} can't be read: {error}. Remove it, then `echo-lora compare` gathers the records anew."
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EchoDataError(
                    f"{path}:{number}: not JSON: {error}. Remove it, then `echo-lora compare` gathers the records anew."
                ) from error


def _check_run(run: Any, about: dict[str, Any], where: str) -> None:
    problem = problem_of_run(run)
    if problem is None and run["arm"] not in about["arms"]:
        problem = f"arm = {run['arm']!r} is none of the study's: {', '.join(about['arms'])}"
    if problem is not None:
        raise EchoDataError(f"{where}: not the record of a run: {problem}. Call `echo-lora compare` to write it anew.")


def problem_of_run(run: Any) -> str | None:
    """Why a value is not the record of a run; None if it is one."""
    try:
        _Run.model_validate(run)
    except ValidationError as error:
        return first_problem(error)
    return None
