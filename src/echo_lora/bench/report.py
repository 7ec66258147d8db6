"""From seconds and bytes to medians, intervals and ratios; how they are shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from echo_lora.bench.programs import CASES, VARIANTS, Batch, Case
from echo_lora.files import new_folder

NOTES = (
    "Medians over rounds with 95 % bootstrap intervals; ratios are taken within rounds.",
    "over TRL: relative to a step of TRL's SFTTrainer with the same method (LoRA or DoRA) and checkpointing.",
    "over floor: that ratio relative to the arithmetic floor, (P + (1 + p)·A) / (P + A); p = 0 without the echo.",
    "over lora: relative to this package's LoRA step, with logits of answer tokens only and the same checkpointing.",
    "peak GB: the most memory during a few steps in a process of its own; step GB: what the steps added.",
    "TRL computes the logits of every position without a GPU, and of answer tokens only on a GPU with Triton.",
)


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % bootstrap interval; a format such as `.2f` applies to each number."""

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


@dataclass(frozen=True)
class CaseResult:
    """One case on one batch: figures, or an error."""

    variant: str
    checkpointing: bool
    error: str | None = None
    routed: float | None = None  # share of steps with an echo-on pass
    floor: float | None = None  # arithmetic relative to a step without the echo
    seconds: list[float] = field(default_factory=list)  # one value per round
    step: Interval | None = None  # of the seconds
    over_trl: Interval | None = None
    over_floor: Interval | None = None
    over_lora: Interval | None = None  # none for DoRA
    memory: StepMemory | None = None
    memory_over_trl: float | None = None  # ratio of the peaks


@dataclass(frozen=True)
class BenchTable:
    """All cases on one batch."""

    name: str
    rows: int
    prompt_tokens: int  # of all rows
    answer_tokens: int
    floor: float  # of a step with an echo-on pass
    lines: list[CaseResult]

    @property
    def title(self) -> str:
        return (
            f"{self.name}: {self.rows} rows, {self.prompt_tokens} prompt and {self.answer_tokens} answer tokens, "
            f"floor {self.floor:.2f}"
        )

    def cells(self) -> list[dict[str, str]]:
        """The lines as text, by column."""
        return [
            {
                "step": line.variant,
                "checkpointing": "on" if line.checkpointing else "off",
                "seconds": "failed" if line.step is None else f"{line.step:.3g}",
                "over TRL": _text(line.over_trl, ".2f"),
                "over floor": "" if line.over_floor is None else f"{line.over_floor.median:.2f}",
                "over lora": _text(line.over_lora, ".2f"),
                "peak GB": "" if line.memory is None else f"{line.memory.peak / 1e9:.2f}",
                "step GB": "" if line.memory is None else f"{line.memory.step / 1e9:.2f}",
                "peak over TRL": _text(line.memory_over_trl, ".2f"),
            }
            for line in self.lines
        ]


@dataclass(frozen=True)
class BenchReport:
    """What `bench.json` holds."""

    command: str
    arguments: dict[str, Any]
    recipe: dict[str, Any]
    seed: int  # of the adapters' weights, the random rows and the order within rounds
    versions: dict[str, str]
    commit: str | None
    machine: str
    device: str
    threads: int
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
    """The median of two or more values, with its percentile bootstrap interval."""
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.median, confidence_level=0.95, method="percentile", rng=rng).confidence_interval
    return Interval(float(np.median(values)), float(found.low), float(found.high))


def table_of(
    batch: Batch,
    seconds: Mapping[Case, list[float]],
    routed: Mapping[Case, float],
    memory: Mapping[Case, StepMemory | str],
) -> BenchTable:
    """The figures of all cases. memory: an error if it could not be measured. Ratios are taken within rounds."""
    lines = []
    for case in CASES:
        figures: dict[str, Any] = {}
        own, trl = memory[case], memory[case.trl]
        if isinstance(own, str):
            figures["error"] = own
        else:
            figures["memory"] = own
            figures["memory_over_trl"] = None if isinstance(trl, str) else own.peak / trl.peak
        if case in seconds:
            floor = batch.floor(routed[case])
            figures |= {"routed": routed[case], "floor": floor, "seconds": seconds[case]}
            figures |= {"step": interval(seconds[case])}
            if case.trl in seconds:
                ratios = _paired(seconds[case], seconds[case.trl])
                figures |= {"over_trl": interval(ratios), "over_floor": interval([ratio / floor for ratio in ratios])}
            if case.lora in seconds and not VARIANTS[case.variant].is_dora:
                figures["over_lora"] = interval(_paired(seconds[case], seconds[case.lora]))
        lines.append(CaseResult(case.variant, case.checkpointing, **figures))
    return BenchTable(batch.name, len(batch.rows), batch.prompt_tokens, batch.answer_tokens, batch.floor(1.0), lines)


def write_bench(report: BenchReport, output: str | Path) -> None:
    """Write bench.json, bench.md and bench.png into the new folder `output`: all of them or none."""
    with new_folder(output) as folder:
        (folder / "bench.json").write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
        (folder / "bench.md").write_text(to_markdown(report), encoding="utf-8")
        plot(report, folder / "bench.png")


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
        cells = table.cells()
        lines += ["", f"## {table.title}", ""]
        for row in ([*cells[0]], ["---" for _ in cells[0]], *([*row.values()] for row in cells)):
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"- {note}" for note in NOTES), *(f"- failed: {failure}" for failure in report.failures)]
    return "\n".join(lines) + "\n"


def plot(report: BenchReport, path: Path) -> None:
    """A PNG of ratios to TRL's step with intervals, in a panel for each batch and checkpointing setting."""
    from matplotlib.figure import Figure

    names = [name for name in VARIANTS if not name.startswith("trl")]
    figure = Figure(figsize=(1.5 + 3.6 * len(report.tables), 5.2), layout="constrained")
    panels = figure.subplots(2, len(report.tables), sharex="col", sharey=True, squeeze=False)
    for column, table in enumerate(report.tables):
        for axes, checkpointing in zip(panels[:, column], (False, True), strict=True):
            ratios = {line.variant: line.over_trl for line in table.lines if line.checkpointing is checkpointing}
            axes.axvline(1.0, color="0.7", linewidth=1)
            axes.axvline(table.floor, color="black", linewidth=1, linestyle="--")
            for y, name in enumerate(names):
                ratio = ratios[name]
                if ratio is None:
                    axes.annotate("failed", (1.0, y), fontsize=8)
                    continue
                ends = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
                axes.errorbar(ratio.median, y, xerr=ends, fmt="o", color="black", markersize=5, capsize=4)
                above: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
                axes.annotate(f"{ratio.median:.2f}", (ratio.median, y), fontsize=8, **above)
            axes.set_title(f"{table.name}, checkpointing {'on' if checkpointing else 'off'}", fontsize=9)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.8)
            axes.margins(x=0.15)
        panels[1, column].set_xlabel("seconds over TRL's step\n(dashed: floor of a step with echo)")
    figure.savefig(path, format="png", dpi=120)


def _paired(own: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(own, other, strict=True)]


def _text(value: Interval | float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
