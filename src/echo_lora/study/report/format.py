"""What the page of a report is made of, and how numbers and arms look in it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from echo_lora.study.folder import StudyRecords
from echo_lora.study.records import mean_of, results
from echo_lora.study.report.plots import Axis, Style, axis, style_of, swatch
from echo_lora.study.statistics import Effect


@dataclass(frozen=True)
class Table:
    """Texts in rows."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    is_text: bool = False  # long texts, which may be broken into lines

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [
            not self.is_text and any(row[i] for row in self.rows) and all(_is_number(row[i]) for row in self.rows)
            for i in range(len(self.head))
        ]


@dataclass(frozen=True)
class Figure:
    """Panels of SVG, what they show in one plain sentence, and their numbers."""

    caption: str
    panels: list[str]
    table: Table | None
    legend: list[tuple[str, str]] = field(default_factory=list)  # swatch and label


@dataclass(frozen=True)
class Section:
    """One heading and what stands under it; `warnings` are set apart."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    items: list[str] = field(default_factory=list)


def arm_style(study: StudyRecords, arm: str) -> Style:
    """How an arm looks in every figure."""
    return style_of(study.arms.index(arm))


def legend(study: StudyRecords, arms: Container[str]) -> list[tuple[str, str]]:
    return [(swatch(arm_style(study, arm)), study.label(arm)) for arm in study.arms if arm in arms]


def short_label(study: StudyRecords, arm: str) -> str:
    """The label where there is little room."""
    label = study.label(arm)
    return label if len(label) <= 14 or len(label) <= len(arm) else arm


OVERALL = "mean of the tasks"


def accuracies(study: StudyRecords, arm: str, task: str) -> dict[int, float]:
    """By seed; of one task, or the mean of all."""
    found: dict[int, float] = {}
    for seed, run in study.confirmation(arm).items():
        values = {result["task"]: result["accuracy"] for result in results(run)}
        if task == OVERALL and values:
            found[seed] = mean_of(values.values())
        elif task in values:
            found[seed] = values[task]
    return found


def with_minus(text: str) -> str:
    return text.replace("-", "−")


def points_text(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return with_minus(f"{100 * share:+.2f}") if math.isfinite(share) else "–"


def is_known(effect: Effect) -> bool:
    """One seed gives the interval from -1 to 1, which says nothing."""
    return effect.low > -1 or effect.high < 1


def ends_of(effect: Effect) -> tuple[float, float] | None:
    """The interval in points, for a figure."""
    return (100 * effect.low, 100 * effect.high) if is_known(effect) else None


def range_text(effect: Effect) -> str:
    if not is_known(effect):
        return "unknown"
    return f"{points_text(effect.low)} to {points_text(effect.high)}"


def with_range(effect: Effect) -> str:
    return points_text(effect.estimate) + (f" ({range_text(effect)})" if is_known(effect) else "")


def points_axis(study: StudyRecords, effects: Iterable[Effect]) -> Axis:
    """A common axis for differences in points, which shows 0 and the smallest effect of interest."""
    smallest = 100 * study.design.smallest_effect
    values = [value for effect in effects for value in (*(ends_of(effect) or ()), 100 * effect.estimate)]
    return axis(values, include=(0, smallest, -smallest), count=6)


def percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def percent_text(confidence: float) -> str:
    """A confidence with two digits of what it lacks: 95 %, 99.26 %, 99.99989 %."""
    digits = max(1 - math.floor(math.log10(100 * (1 - confidence))), 0)
    return f"{100 * confidence:.{digits}f}".rstrip("0").rstrip(".") + " %"


def number_text(value: float) -> str:
    return with_minus(f"{value:.4g}") if math.isfinite(value) else "–"


def p_text(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def mean_and_range(values: Sequence[float], spec: str) -> str:
    """Mean, lowest and highest."""
    if not values:
        return "–"
    mean = format(mean_of(values), spec)
    if len(values) > 1:
        return with_minus(f"{mean} ({min(values):{spec}} to {max(values):{spec}})")
    return with_minus(mean)


def counts_text(values: Iterable[int | None]) -> str:
    return " or ".join(f"{value:,}" for value in sorted({value for value in values if value is not None}))


def count_of(count: float, what: str) -> str:
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {what}{'' if number == '1' else 's'}"


def _is_number(cell: str) -> bool:
    return not cell or cell[0] in "+−<–" or cell[0].isdigit()


def listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
