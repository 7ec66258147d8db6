"""From seconds and bytes to medians, intervals and ratios; how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import quantile_test

from echo_lora.bench.floors import Floors, Weights, floors
from echo_lora.bench.programs import VARIANTS, Batch, Case

NOTES = (
    "Medians over rounds with 95 % intervals from order statistics; below 6 rounds, the range. Ratios are taken within "
    "rounds.",
    "fastest: the fastest step, and the ratio of the fastest steps.",
    "over TRL: relative to a step of TRL's SFTTrainer with the same method (LoRA or DoRA) and checkpointing.",
    "over lora: relative to this package's LoRA step, with logits of answer tokens only and the same checkpointing.",
    "floor: arithmetic relative to this package's LoRA step, of decoder layers / output layer / both.",
    "over floor: over lora divided by the floor of both.",
    "peak GB: the most memory during a few steps in a process of its own; step GB: what the steps added.",
    "TRL computes the logits of every position without a GPU, and of answer tokens only on a GPU with Triton.",
)


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval; a format such as `.2f` applies to each number."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if self.low == self.high:
            return format(self.median, spec)
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


@dataclass(frozen=True)
class StepMemory:
    """Bytes: of the process on a CPU, of torch's tensors on a GPU."""

    before: int  # with model, adapter and optimizer made, before the first step
    peak: int  # during the steps

    @property
    def step(self) -> int:
        """What the steps added."""
        return self.peak - self.before


@dataclass
class Measured:
    """What is known of one case on one batch so far."""

    memory: StepMemory | None = None
    error: str | None = None  # why its memory could not be measured
    routed: float = 0.0  # share of steps with an echo-on pass
    seconds: list[float] = field(default_factory=list)  # one value per round

    @property
    def is_pending(self) -> bool:
        """Whether its memory is yet to be measured."""
        return self.memory is None and self.error is None


@dataclass(frozen=True)
class CaseResult:
    """One case on one batch: figures, or an error."""

    variant: str
    checkpointing: bool
    error: str | None = None
    routed: float | None = None
    floors: Floors | None = None  # none for DoRA
    seconds: list[float] = field(default_factory=list)
    step: Interval | None = None  # of the seconds
    fastest: float | None = None
    over_trl: Interval | None = None
    fastest_over_trl: float | None = None
    over_lora: Interval | None = None  # none for DoRA
    fastest_over_lora: float | None = None
    over_floors: float | None = None  # over_lora's median divided by the floor of both
    memory: StepMemory | None = None
    memory_over_trl: float | None = None  # ratio of the peaks
    memory_over_lora: float | None = None  # the same, none for DoRA


@dataclass(frozen=True)
class BenchTable:
    """All cases on one batch."""

    name: str
    rows: int
    rows_sha256: str
    prompt_tokens: int  # of all rows
    answer_tokens: int
    supervised_tokens: int
    lines: list[CaseResult]

    @property
    def title(self) -> str:
        return f"{self.name}: {self.rows} rows, {self.prompt_tokens} prompt and {self.answer_tokens} answer tokens"

    def cells(self) -> list[dict[str, str]]:
        """Seconds as text, by column."""
        return [
            {
                **_case_cells(line),
                "seconds": "failed" if line.error is not None else _text(line.step, ".3g"),
                "fastest": _text(line.fastest, ".3g"),
                "over TRL": _text(line.over_trl, ".2f"),
                "fastest/TRL": _text(line.fastest_over_trl, ".2f"),
                "over lora": _text(line.over_lora, ".2f"),
                "fastest/lora": _text(line.fastest_over_lora, ".2f"),
                "floor": "" if line.floors is None else str(line.floors),
                "over floor": _text(line.over_floors, ".2f"),
            }
            for line in self.lines
        ]

    def memory_cells(self) -> list[dict[str, str]]:
        """Memory as text, by column."""
        return [
            {
                **_case_cells(line),
                "peak GB": "failed" if line.memory is None else f"{line.memory.peak / 1e9:.2f}",
                "step GB": "" if line.memory is None else f"{line.memory.step / 1e9:.2f}",
                "peak over TRL": _text(line.memory_over_trl, ".2f"),
                "peak over lora": _text(line.memory_over_lora, ".2f"),
            }
            for line in self.lines
        ]


@dataclass(frozen=True)
class BenchReport:
    """What `bench.json` holds, from the first measurement on."""

    command: str
    arguments: dict[str, Any]
    recipe: dict[str, Any]
    seed: int  # of the adapters' weights, the random rows and the order within rounds
    versions: dict[str, str]
    commit: str | None
    machine: str
    device: str
    threads: int
    is_finished: bool
    tables: list[BenchTable]

    @property
    def failures(self) -> list[str]:
        """A line for each case without figures."""
        return [
            f"{Case(line.variant, line.checkpointing)}, {table.name}: {line.error}"
            for table in self.tables
            for line in table.lines
            if line.error is not None
        ]


def interval(values: Sequence[float]) -> Interval:
    """The median, with a 95 % interval from order statistics, which assumes no distribution.

    Below 6 values there is none, and this is their range: it holds the median in 94 % of all cases with 5 values, in
    75 % with 3.
    """
    found = quantile_test(values, p=0.5).confidence_interval(0.95)
    has_none = np.isnan(found.low)
    low, high = (min(values), max(values)) if has_none else found
    return Interval(float(np.median(values)), float(low), float(high))


def table_of(batch: Batch, measured: Mapping[Case, Measured], weights: Weights) -> BenchTable:
    """The figures of all cases, as far as they are measured. Ratios are taken within rounds."""
    return BenchTable(
        batch.name,
        len(batch.rows),
        batch.sha256,
        batch.prompt_tokens,
        batch.answer_tokens,
        batch.supervised_tokens,
        [_result(case, batch, measured, weights) for case in measured],
    )


def _result(case: Case, batch: Batch, measured: Mapping[Case, Measured], weights: Weights) -> CaseResult:
    own, trl, lora = measured[case], measured.get(case.trl), measured.get(case.lora)
    figures: dict[str, Any] = {"error": own.error, "memory": own.memory}
    if own.memory is not None and trl is not None and trl.memory is not None:
        figures["memory_over_trl"] = own.memory.peak / trl.memory.peak
    is_dora = VARIANTS[case.variant].is_dora
    if own.memory is not None and lora is not None and lora.memory is not None and not is_dora:
        figures["memory_over_lora"] = own.memory.peak / lora.memory.peak
    if own.seconds:
        figures |= {"routed": own.routed, "seconds": own.seconds}
        figures |= {"step": interval(own.seconds), "fastest": min(own.seconds)}
        if trl is not None and trl.seconds:
            figures["over_trl"] = interval(_paired(own.seconds, trl.seconds))
            figures["fastest_over_trl"] = min(own.seconds) / min(trl.seconds)
        if not is_dora:
            figures["floors"] = floor = floors(weights, case, batch, own.routed)
            if lora is not None and lora.seconds:
                figures["over_lora"] = ratio = interval(_paired(own.seconds, lora.seconds))
                figures["fastest_over_lora"] = min(own.seconds) / min(lora.seconds)
                figures["over_floors"] = ratio.median / floor.both
    return CaseResult(case.variant, case.checkpointing, **figures)


def to_markdown(report: BenchReport) -> str:
    """The tables, and what they were measured on."""
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines = [
        "# What a step costs",
        "",
        f"    {report.command}",
        "",
        f"{report.recipe['model']} on {report.device}; {report.machine}.",
        f"Commit {report.commit or 'unknown'}; {packages}.",
    ]
    for table in report.tables:
        lines += ["", f"## {table.title}"]
        for cells in (table.cells(), table.memory_cells()):
            lines.append("")
            for row in ([*cells[0]], ["---" for _ in cells[0]], *([*row.values()] for row in cells)):
                lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"- {note}" for note in NOTES), *(f"- failed: {failure}" for failure in report.failures)]
    return "\n".join(lines) + "\n"


def plot(report: BenchReport, path: Path) -> None:
    """A PNG of seconds of each step, in a panel for each batch and checkpointing setting: every round, and the median.

    Dashed: our LoRA step times the floor of an echo step, layers and output layer together.
    """
    from matplotlib.figure import Figure

    settings = sorted({line.checkpointing for line in report.tables[0].lines})
    names = [name for name in VARIANTS if any(line.variant == name for line in report.tables[0].lines)]
    height = 0.8 + len(settings) * (0.7 + 0.35 * len(names))
    figure = Figure(figsize=(1.5 + 3.6 * len(report.tables), height), layout="constrained")
    panels = figure.subplots(len(settings), len(report.tables), sharex="col", sharey=True, squeeze=False)
    for column, table in enumerate(report.tables):
        for axes, checkpointing in zip(panels[:, column], settings, strict=True):
            lines = {line.variant: line for line in table.lines if line.checkpointing is checkpointing}
            for y, name in enumerate(names):
                line = lines[name]
                if line.step is None:
                    axes.annotate("failed", (0, y), fontsize=8)
                    continue
                axes.plot(line.seconds, [y] * len(line.seconds), "|", color="0.6", markersize=9)
                axes.plot(line.step.median, y, "o", color="black", markersize=5)
                above: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 6), "ha": "center"}
                axes.annotate(f"{line.step.median:.3g}", (line.step.median, y), fontsize=8, **above)
            lora, echo = lines.get("lora"), lines.get("echo")
            if lora is not None and lora.step is not None and echo is not None and echo.floors is not None:
                axes.axvline(lora.step.median * echo.floors.both, color="black", linewidth=1, linestyle="--")
            axes.set_title(f"{table.name}, checkpointing {'on' if checkpointing else 'off'}", fontsize=9)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.8)
            axes.set_xlim(left=0)
        panels[-1, column].set_xlabel("seconds of a step\n(dashed: floor of a step with echo)")
    figure.savefig(path, format="png", dpi=120)


def _case_cells(line: CaseResult) -> dict[str, str]:
    return {"step": line.variant, "checkpointing": "on" if line.checkpointing else "off"}


def _paired(own: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(own, other, strict=True)]


def _text(value: Interval | float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
