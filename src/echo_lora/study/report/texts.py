"""Numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from echo_lora.study.records import mean_of
from echo_lora.study.statistics import Effect


def with_minus(text: str) -> str:
    return text.replace("-", "−")


def points_text(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return with_minus(f"{100 * share:+.2f}") if math.isfinite(share) else "–"


def is_known(effect: Effect) -> bool:
    """False for one seed, whose interval is -1 to 1."""
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


def percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def percent_text(confidence: float) -> str:
    """A confidence, with two significant digits of its distance from 100 %: 95 %, 99.26 %, 99.99989 %."""
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


def joined(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
