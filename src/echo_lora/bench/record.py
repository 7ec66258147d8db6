"""The output folder of a measurement: bench.json is written after every round, and read again to resume.

A measurement resumes where everything that decides its numbers is the same: settings, rows, versions, commit, machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from echo_lora.bench.floors import Weights
from echo_lora.bench.programs import Batch, Case
from echo_lora.bench.report import BenchReport, Measured, plot, table_of, to_markdown
from echo_lora.errors import EchoCheckpointError, first_problem
from echo_lora.files import refuse_existing, remove_leftovers, write_file, write_text

BENCH_FILE, PAGE_FILE, PLOT_FILE = "bench.json", "bench.md", "bench.png"
SHOWN = 5  # differences in a message


@dataclass
class Record:
    """What is measured so far, and the folder it is written to.

    settings: the fields of the report that are known before anything is measured. measured: by batch and case.
    """

    output: Path
    settings: dict[str, Any]
    batches: list[Batch]
    weights: Weights
    measured: list[dict[Case, Measured]]

    def report(self, *, is_finished: bool = False) -> BenchReport:
        tables = [
            table_of(batch, found, self.weights) for batch, found in zip(self.batches, self.measured, strict=True)
        ]
        return BenchReport(**self.settings, is_finished=is_finished, tables=tables)

    def write(self) -> None:
        """Write bench.json as far as it is known. Raises EchoCheckpointError."""
        self._write(self.report())

    def finish(self) -> BenchReport:
        """Write the page, the plot, and then bench.json, which says that all is there."""
        report = self.report(is_finished=True)
        write_text(self.output / PAGE_FILE, to_markdown(report))
        write_file(self.output / PLOT_FILE, lambda path: plot(report, path))
        self._write(report)
        return report

    def _write(self, report: BenchReport) -> None:
        write_text(self.output / BENCH_FILE, json.dumps(dataclasses.asdict(report), indent=2) + "\n")

    def resume(self) -> bool:
        """Take over what an interrupted measurement left in the folder; False if the folder is new.

        Raises EchoCheckpointError for any other content: other files, a finished measurement, or one of other settings.
        """
        old = unfinished(self.output)
        if old is None:
            return False
        if differences := list(_differences(_identity(old), _identity(self.report()))):
            more = f"\n  and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            again = f"To complete it, run `{old.command}` as it was then. " if old.command else ""
            raise EchoCheckpointError(
                f"{self.output} holds an unfinished measurement of another kind:\n"
                + "\n".join(f"  {line}" for line in differences[:SHOWN])
                + f"{more}\n{again}For a new one choose another folder, or remove this one."
            )
        self.measured = [
            {
                Case(line.variant, line.checkpointing): Measured(
                    line.memory, line.error, line.routed or 0.0, line.seconds
                )
                for line in table.lines
            }
            for table in old.tables
        ]
        return True


def unfinished(output: Path) -> BenchReport | None:
    """The report of an interrupted measurement; None for a new folder. Raises EchoCheckpointError for anything else."""
    path = output / BENCH_FILE
    if not os.path.isfile(path):
        refuse_existing(output)
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("is_finished", True):  # others have no such key
            refuse_existing(output)
        report = TypeAdapter(BenchReport).validate_python(values)
        for table in report.tables:
            if [str(Case(line.variant, line.checkpointing)) for line in table.lines] != report.arguments.get("cases"):
                raise ValueError(f"{table.name} has other cases than its arguments")
            if len({len(line.seconds) for line in table.lines if line.error is None}) > 1:
                raise ValueError(f"{table.name} has rounds that lack a case")
        return report
    except (OSError, ValueError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise EchoCheckpointError(
            f"{path} can't be resumed from: {reason}. Choose another folder, or remove this one."
        ) from error


def tidy(output: Path) -> None:
    """Remove what a killed process left of a file. Call it under the output's lock."""
    for name in (BENCH_FILE, PAGE_FILE, PLOT_FILE):
        remove_leftovers(output / name)


def _identity(report: BenchReport) -> dict[str, Any]:
    """What must be the same for two measurements to be one. Names and order of a command's arguments need not be."""
    chosen = {name: report.arguments.get(name) for name in ("shapes", "rows", "rounds", "cases")}
    fields = ("recipe", "versions", "commit", "machine", "device", "threads")
    return json.loads(
        json.dumps(
            chosen
            | {name: getattr(report, name) for name in fields}
            | {f"tokens of the rows ({table.name})": table.rows_sha256 for table in report.tables}
        )
    )


def _differences(old: dict[str, Any], new: dict[str, Any], place: str = "") -> Iterator[str]:
    """A line for each value that differs, by its name."""
    for key in old | new:
        before, now, name = old.get(key), new.get(key), f"{place}{key}"
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{name}.")
        elif before != now:
            yield f"{name}: {before} then, {now} now"
