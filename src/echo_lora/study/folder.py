"""A study's folder: its file, the records of its runs, and what is missing.

study.json       the design, versions and machine, the chosen learning rates, the power estimate
runs/            one folder per run: its record, its adapter, its log
runs.jsonl.gz    all records, one per line: with study.json, all that a report needs
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from echo_lora.errors import EchoConfigError, EchoDataError, EchoError, first_problem
from echo_lora.files import write_file, write_text
from echo_lora.study.design import Design, RunKey, Study, side_of
from echo_lora.study.power import PowerEstimate
from echo_lora.study.records import (
    RUNS_FILE,
    OurFile,
    Pairing,
    Record,
    problem_of_run,
    read_record,
    read_runs,
    record_path,
    results,
)

STUDY_FILE = "study.json"
LARGEST_FILE = 10_000_000  # bytes of study.json


class StudyFile(OurFile):
    """The content of study.json. Raises ValidationError."""

    design: Design
    recipe: dict[str, Any] = Field(default_factory=dict)  # of the baseline's first run, without output
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    processor: str | None = None
    started: str | None = None
    chosen: dict[str, float] | None = None  # each arm's learning rate; None until tuning is complete
    power: PowerEstimate | None = None

    @model_validator(mode="after")
    def _agrees(self) -> StudyFile:
        for name in self.chosen or {}:
            if name not in self.design.arms:
                raise ValueError(f"chosen names {name!r}, which is not an arm")
        return self

    @classmethod
    def read(cls, folder: str | Path) -> StudyFile:
        """Read that of a study's folder. Raises EchoConfigError, which names file and line."""
        path = Path(folder) / STUDY_FILE
        hint = "Name a folder that `echo-lora compare` wrote."
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise OSError("it is not a file")
            if os.path.isfile(path) and os.path.getsize(path) > LARGEST_FILE:
                raise OSError(f"it has {os.path.getsize(path):,} bytes")
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise EchoConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}. {hint}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise EchoConfigError(f"{path} can't be read: {error}. {hint}") from error
        if not isinstance(values, dict):
            raise EchoConfigError(f"{path} is not a study file: it is a {type(values).__name__}, not an object. {hint}")
        try:
            if isinstance(values.get("design"), dict):  # separately, so that an error does not quote all of it
                values["design"] = Design.model_validate(values["design"])
            return cls.model_validate(values)
        except ValidationError as error:
            raise EchoConfigError(f"{path} is not a study file: {first_problem(error).rstrip('.')}. {hint}") from error

    def write(self, folder: str | Path) -> None:
        """Write it into a study's folder. Raises EchoCheckpointError if that fails."""
        text = json.dumps(self.model_dump(mode="json", exclude_unset=True), indent=2, ensure_ascii=False) + "\n"
        write_text(Path(folder) / STUDY_FILE, text)


@dataclass(frozen=True)
class StudyRecords:
    """A study, complete or not. Made by `read_study`."""

    folder: Path
    file: StudyFile
    runs: list[Record]

    @property
    def design(self) -> Design:
        return self.file.design

    @property
    def arms(self) -> list[str]:
        """The baseline, then the others in the study's order."""
        baseline = self.design.baseline
        return [baseline, *(arm for arm in self.design.arms if arm != baseline)]

    @property
    def sides(self) -> list[str]:
        """The arms, and those that a comparison names with the echo kept on."""
        named = dict.fromkeys(side for pair in self.design.pairs for side in pair)
        return [*self.arms, *(side for side in named if side not in self.design.arms)]

    @property
    def others(self) -> list[tuple[str, str]]:
        """Each arm with the baseline, unless declared."""
        pairs = [(arm, self.design.baseline) for arm in self.arms[1:]]
        return [pair for pair in pairs if pair not in self.design.pairs]

    @property
    def looks(self) -> list[int]:
        """Numbers of seeds after which the study may be decided; empty if it declares none."""
        return self.design.looks or []

    @property
    def look(self) -> int:
        """How many looks are complete: every arm has a run at each of their seeds."""
        done = {(run["arm"], run["seed"]) for run in self.runs if run["stage"] == "confirmation"}
        return sum(
            all((arm, seed) in done for arm in self.design.arms for seed in self.design.seeds[:number])
            for number in self.looks
        )

    @property
    def counted_seeds(self) -> list[int]:
        """The seeds that results are computed from: those of the last complete look; without looks, all."""
        return self.design.seeds[: [0, *self.looks][self.look]] if self.looks else self.design.seeds

    @property
    def chosen(self) -> dict[str, float]:
        """Each arm's learning rate; empty until tuning is complete."""
        return self.file.chosen or {}

    @property
    def has_echo(self) -> bool:
        """Whether an arm trains with the echo."""
        baseline = self.design.arms[self.design.baseline].set
        # of the recipe file, only what the baseline's recipe shows is known
        shared = self.design.set.get("echo", True if "echo" in baseline else self.file.recipe.get("echo", True))
        found = {arm: own.set.get("echo", shared) for arm, own in self.design.arms.items()}
        found |= {run["arm"]: run["recipe"]["echo"] for run in self.runs if "echo" in run.get("recipe", {})}
        return any(found.values())

    def label(self, side: str) -> str:
        """The name for readers of an arm, or of a side of a comparison."""
        arm, is_kept = side_of(side)
        return (self.design.arms[arm].label or arm) + " (echo on)" * is_kept

    def confirmation(self, side: str) -> dict[int, Record]:
        """An arm's confirmation runs by seed, in order. Those after the last complete look don't count yet."""
        arm, _ = side_of(side)
        found = {run["seed"]: run for run in self.runs if run["stage"] == "confirmation" and run["arm"] == arm}
        return {seed: found[seed] for seed in self.counted_seeds if seed in found}

    def tuning(self, arm: str) -> dict[float, list[Record]]:
        """The arm's tuning runs, by learning rate."""
        runs = [run for run in self.runs if run["stage"] == "tuning" and run["arm"] == arm]
        rates = sorted({run["learning_rate"] for run in runs})
        return {rate: [run for run in runs if run["learning_rate"] == rate] for rate in rates}

    @property
    def tasks(self) -> list[str]:
        """The tasks of the confirmation runs, in their order."""
        names: dict[str, None] = {}
        for arm in self.arms:
            for run in self.confirmation(arm).values():
                names.update((result["task"], None) for result in results(run))
        return list(names)

    @property
    def expected(self) -> list[RunKey]:
        """All runs of the design."""
        return self.design.runs(self.file.chosen)

    @property
    def missing(self) -> list[RunKey]:
        """The runs of the design without a record."""
        there = {RunKey.of(run).identity for run in self.runs}
        return [key for key in self.expected if key.identity not in there]


def read_study(folder: str | Path) -> StudyRecords:
    """Read a study's folder, with or without records.

    Raises EchoConfigError if study.json is missing or invalid, EchoDataError for a damaged record. Both name file and
    line.
    """
    folder = Path(folder)
    file = StudyFile.read(folder)
    runs: list[Record] = []
    lines: dict[Any, int] = {}
    for number, run in read_runs(folder / RUNS_FILE):
        where = f"{folder / RUNS_FILE}:{number}"
        problem = problem_of_run(run)
        if problem is None and run["arm"] not in file.design.arms:
            problem = f"arm = {run['arm']!r} is not an arm of the study: {', '.join(file.design.arms)}"
        if problem is not None:
            raise EchoDataError(
                f"{where}: not the record of a run: {problem}. Run `echo-lora compare` to write it again."
            )
        first = lines.setdefault(RunKey.of(run).identity, number)
        if first != number:
            raise EchoDataError(
                f"{where}: a second record of {run['stage']} {run['arm']} seed {run['seed']}; the first is in "
                f"line {first}. Remove one of them, or run `echo-lora compare` to gather the records again."
            )
        runs.append(run)
    return StudyRecords(folder, file, runs)


def restorable(study: Study) -> list[tuple[RunKey, Record]]:
    """The runs of runs.jsonl.gz, which may be all that is left of them, as after a clone.

    A record names its run, and a run its folder: only names of the design become paths. Raises EchoDataError for a
    record with other names, and for what is not a record.
    """
    path = Path(study.output) / RUNS_FILE
    rates = [dict(zip(study.arms, chosen, strict=True)) for chosen in zip(*map(study.rates, study.arms), strict=True)]
    keys = {key for chosen in rates for key in study.runs(chosen)}
    found = []
    for number, record in read_runs(path):
        problem = problem_of_run(record)
        if problem is None and RunKey.of(record) not in keys:
            problem = "no run of this study has this stage, arm, learning rate and seed"
        if problem is not None:
            raise EchoDataError(f"{path}:{number}: {problem}. Remove the line, or choose another output.")
        found.append((RunKey.of(record), record))
    return found


class Archive:
    """runs.jsonl.gz of a running study. It is rewritten as records come in; each record is read once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._pairing = Pairing()
        self._seen: set[RunKey] = set()
        self._lines: dict[RunKey, bytes] = {}  # of runs that were done out of order
        self._packer = zlib.compressobj(9, wbits=31)  # gzip without a time stamp
        self._packed = b""  # the runs of the design before the first missing one
        self._turn = 0  # the number of that run

    def gather(self, chosen: dict[str, float] | None) -> None:
        """Add new records, in the order of the design. Raises EchoError if runs are not paired."""
        keys = [key for key in self._study.runs(chosen) if key.learning_rate is not None]
        path = Path(self._study.output) / RUNS_FILE
        places = {key: record_path(self._study.output, key) for key in keys if key not in self._seen}
        new = {key: read_record(place) for key, place in places.items() if place.is_file()}
        for key, record in new.items():
            self._seen.add(key)
            self._pairing.add(record)
            self._lines[key] = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        for what, by_value in self._pairing.broken:
            one, other = (runs[0] for runs in list(by_value.values())[:2])
            raise EchoError(
                f"arms {one.arm} (seed {one.seed}) and {other.arm} (seed {other.seed}) did not {what}, so they can't "
                "be compared. If something changed between their runs, remove the older ones and run compare again."
            )
        while self._turn < len(keys) and keys[self._turn] in self._lines:
            self._packed += self._packer.compress(self._lines.pop(keys[self._turn]))
            self._turn += 1
        if new or not path.is_file():
            packer = self._packer.copy()
            rest = [packer.compress(self._lines[key]) for key in keys if key in self._lines]
            content = b"".join([self._packed, *rest, packer.flush()])
            write_file(path, lambda file: file.write_bytes(content))
