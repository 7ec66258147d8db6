"""What a study's folder holds, read and checked: the design in study.json, a record per run in runs.jsonl.gz."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.files import write_file

STUDY_FILE, RUNS_FILE = "study.json", "runs.jsonl.gz"
NUMBER = (int, float)
STUDY_KEYS: dict[str, Any] = {"title": str, "baseline": str, "arms": dict, "comparisons": list, "learning_rates": dict}
STUDY_KEYS |= {"tuning_seeds": list, "seeds": list, "smallest_effect": NUMBER}
RUN_KEYS: dict[str, Any] = {"stage": str, "arm": str, "learning_rate": NUMBER, "seed": int}
RUN_KEYS |= {"scores": list, "history": list}
RESULT_KEYS: dict[str, Any] = {"task": str, "accuracy": NUMBER, "correct_per_row": list}

Record = dict[str, Any]  # one run


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
        """The arm's runs that count, by seed, in the order of the seeds."""
        found = {run["seed"]: run for run in self.runs if run["stage"] == "confirmation" and run["arm"] == arm}
        return {seed: found[seed] for seed in self.seeds if seed in found}

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
    about = _read_about(folder / STUDY_FILE)
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


def _read_about(path: Path) -> dict[str, Any]:
    hint = "Name a folder that `echo-lora compare` wrote."
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EchoConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}. {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EchoConfigError(f"{path} can't be read: {error}. {hint}") from error
    problem = _problem(about, STUDY_KEYS)
    if problem is None:
        problem = next(_disagreements(about), None)
    if problem is not None:
        raise EchoConfigError(f"{path} is not a study's: {problem}. {hint}")
    return about


def _disagreements(about: dict[str, Any]) -> Iterator[str]:
    names = [("baseline", about["baseline"])]
    for pair in about["comparisons"]:
        if not isinstance(pair, list) or len(pair) != 2:
            yield f"comparisons holds {pair!r}, which is not a pair of arms"
            return
        names += [("comparisons", name) for name in pair]
    for arm, arm_about in about["arms"].items():
        if not isinstance(arm_about, dict):
            yield f"arms.{arm} is not an object"
    for key, name in names:
        if name not in about["arms"]:
            yield f"{key} names {name!r}, which is none of its arms"


def read_runs(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and records of runs.jsonl.gz; none if there is no such file yet. Raises EchoDataError."""
    if not path.is_file():
        return
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise EchoDataError(
            f"{path} can't be read: {error}. Remove it, then `echo-lora compare` gathers the records anew."
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise EchoDataError(
                    f"{path}:{number}: not JSON: {error.msg}. Remove it, then `echo-lora compare` gathers the records "
                    "anew."
                ) from error


def _check_run(run: Any, about: dict[str, Any], where: str) -> None:
    problem = _problem(run, RUN_KEYS)
    if problem is None and run["stage"] not in ("tuning", "confirmation"):
        problem = f"stage = {run['stage']!r} is neither tuning nor confirmation"
    if problem is None and run["arm"] not in about["arms"]:
        problem = f"arm = {run['arm']!r} is none of the study's: {', '.join(about['arms'])}"
    if problem is None:
        for i, score in enumerate(run["scores"]):
            found = _problem(score, {"result": dict}) or _problem(score["result"], RESULT_KEYS)
            problem = problem or (f"scores[{i}]: {found}" if found else None)
    if problem is not None:
        raise EchoDataError(f"{where}: not the record of a run: {problem}. Call `echo-lora compare` to write it anew.")


def _problem(value: Any, keys: dict[str, Any]) -> str | None:
    if not isinstance(value, dict):
        return f"it is a {type(value).__name__}, not an object"
    for key, kind in keys.items():
        if key not in value:
            return f"{key} is missing"
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            return f"{key} = {str(value[key])[:40]} has the wrong type"
    return None
