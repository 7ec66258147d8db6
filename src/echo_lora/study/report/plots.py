"""Small figures as SVG text: axes, lines, bands, intervals and labels, in panels that fit a phone.

A panel is 360 units wide with text of size 12, so it is legible at the width of a phone; wider pages put panels side by
side. Series differ in their marker, their dashes and the label at their end, and only additionally in colour. Text has
the page's font and colour. Why not matplotlib: its panels are several times as large, depend on its release, repeat ids
within a page, and have neither the page's font nor descriptions for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH = 360

TOP, BOTTOM, LEFT, RIGHT = 46, 40, 46, 14  # space for title and unit, for the x axis, for the y axis

TOP_OF_ROWS, ROW = 30, 38  # a row of intervals has its label above and its interval below

LETTER, LINE = 6.1, 14  # width of an average letter of 11.5 units, height of a label

Marker = Literal["circle", "square", "triangle", "diamond", "cross", "plus"]

Point = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How a series looks."""

    marker: Marker
    dash: str  # stroke-dasharray, "" for a solid line
    color: str
    is_filled: bool = True


STYLES = (
    Style("circle", "", "#3a3a3a", False),
    Style("circle", "", "#0b4f9c"),
    Style("square", "7 3", "#a14600", False),
    Style("triangle", "2 3", "#0b6b5d"),
    Style("diamond", "9 3 2 3", "#7a2a96", False),
    Style("cross", "4 2", "#b0173a"),
    Style("plus", "12 4", "#4c6310"),
    Style("square", "1 4", "#5b4a00"),
    Style("triangle", "5 2 1 2 1 2", "#1c5d77", False),
)


def style_of(index: int) -> Style:
    """The style of an arm by its index; the first is the baseline."""
    return STYLES[0] if index == 0 else STYLES[1 + (index - 1) % (len(STYLES) - 1)]


@dataclass(frozen=True)
class Axis:
    """A range of values, and its ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def axis(values: Iterable[float], *, include: Iterable[float] = (), count: int = 5) -> Axis:
    """A linear axis around the finite values, with round ticks."""
    found = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if high - low < 1e-12:
        pad = max(abs(high) * 0.1, 1e-6)
        low, high = low - pad, high + pad
    pad = (high - low) * 0.06
    low, high = low - pad, high + pad
    step = _round_step((high - low) / count)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Axis(low, high, [(n * step, _number(n * step, digits)) for n in numbers])


def log_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis with a tick at each of the values, which are positive."""
    found = sorted(set(values))
    low, high = found[0] / 1.25, found[-1] * 1.25
    return Axis(low, high, [(value, f"{value:g}") for value in found], is_log=True)


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(factor * size for factor in (1, 2, 5, 10) if factor * size >= step * 0.999)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _n(value: float) -> str:
    """A coordinate, as short as it can be."""
    return f"{value:.1f}".removesuffix(".0")


class Panel:
    """One figure with two axes."""

    def __init__(
        self,
        name: str,
        title: str,
        description: str,
        x: Axis,
        y: Axis,
        *,
        unit: str = "",
        x_label: str = "",
        height: int = 250,
        labels: Sequence[str] = (),
    ) -> None:
        """name: unique in the page. labels: those that the ends of lines will have."""
        self.name, self.title, self.description, self.x, self.y = name, title, description, x, y
        self.height = height
        self.left = LEFT
        room = max((len(label) for label in labels), default=0) * LETTER
        self.right = WIDTH - (min(room, 112) + 26 if labels else RIGHT)
        self.parts: list[str] = []
        self.ends: list[tuple[float, float, str, Style]] = []
        self._grid(unit, x_label)

    def _grid(self, unit: str, x_label: str) -> None:
        bottom = self.height - BOTTOM
        for value, label in self.y.ticks:
            y = self._y(value)
            self.parts.append(f'<path class="grid" d="M{self.left} {_n(y)}H{_n(self.right)}"/>')
            self.text(self.left - 6, y + 4, label, anchor="end")
        self._x_ticks(bottom)
        if unit:
            self.text(4, 36, unit)
        if x_label:
            self.text((self.left + self.right) / 2, self.height - 5, x_label, anchor="middle")

    def _x_ticks(self, bottom: float) -> None:
        self.parts.append(f'<path class="axis" d="M{self.left} {_n(bottom)}H{_n(self.right)}"/>')
        free = -math.inf
        for value, label in self.x.ticks:
            x, half = self._x(value), len(label) * LETTER / 2
            self.parts.append(f'<path class="axis" d="M{_n(x)} {_n(bottom)}v4"/>')
            if x - half > free + 4:
                self.text(x, bottom + 17, label, anchor="middle")
                free = x + half

    def _x(self, value: float) -> float:
        return self.left + self.x.at(value) * (self.right - self.left)

    def _y(self, value: float) -> float:
        return self.height - BOTTOM - self.y.at(value) * (self.height - BOTTOM - TOP)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> None:
        """Text at a position in units of the panel."""
        kinds = f' class="{kind}"' if kind else ""
        end = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{_n(x)}" y="{_n(y)}"{end}{kinds}>{escape(text)}</text>')

    def line(self, points: Sequence[Point], style: Style, label: str = "", *, markers: bool = True) -> None:
        """A line with a marker at each point, or at the last only, and a label at its end."""
        places = [(self._x(x), self._y(y)) for x, y in points if math.isfinite(y)]
        if not places:
            return
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
        dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
        self.parts.append(f'<path class="line" d="{path}" stroke="{style.color}"{dash}/>')
        self.parts += [marker(x, y, style) for x, y in (places if markers else places[-1:])]
        if label:
            self.ends.append((*places[-1], label, style))

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], style: Style) -> None:
        """The area between two lines."""
        rows = [row for row in zip(xs, low, high, strict=True) if all(map(math.isfinite, row))]
        if len(rows) < 2:
            return
        there = "L".join(f"{_n(self._x(x))} {_n(self._y(b))}" for x, _, b in rows)
        back = "L".join(f"{_n(self._x(x))} {_n(self._y(a))}" for x, a, _ in reversed(rows))
        self.parts.append(f'<path class="band" d="M{there}L{back}Z" fill="{style.color}"/>')

    def ring(self, x: float, y: float, style: Style) -> None:
        """A circle around a point."""
        self.parts.append(
            f'<circle cx="{_n(self._x(x))}" cy="{_n(self._y(y))}" r="9" fill="none" stroke="{style.color}" '
            'stroke-width="1.6"/>'
        )

    def level(self, y: float) -> None:
        """A horizontal line across the panel."""
        self.parts.append(f'<path class="zero" d="M{self.left} {_n(self._y(y))}H{_n(self.right)}"/>')

    def _end_labels(self) -> list[str]:
        """The labels at the ends of lines, each with its marker, moved apart where they would overlap."""
        found = sorted(self.ends, key=lambda end: end[1])
        places = _apart([y for _, y, _, _ in found], LINE, TOP, self.height - BOTTOM)
        column = self.right + 14
        parts = []
        for (x, y, label, style), place in zip(found, places, strict=True):
            if abs(place - y) > 2 or column - x > 20:
                parts.append(f'<path class="leader" d="M{_n(x + 5)} {_n(y)}L{_n(column - 6)} {_n(place)}"/>')
            parts.append(marker(column, place, style, size=3.2))
            parts.append(f'<text class="end" x="{_n(column + 8)}" y="{_n(place + 4)}">{escape(label)}</text>')
        return parts

    def svg(self) -> str:
        """The panel as an element of a page, with title and description for screen readers."""
        return "\n".join(
            [
                f'<svg class="panel" viewBox="0 0 {WIDTH} {self.height}" role="img" '
                f'aria-labelledby="{self.name}-title {self.name}-text">',
                f'<title id="{self.name}-title">{escape(self.title)}</title>',
                f'<desc id="{self.name}-text">{escape(self.description)}</desc>',
                f'<text class="head" x="4" y="16">{escape(self.title)}</text>',
                *self.parts,
                *self._end_labels(),
                "</svg>",
            ]
        )


class Rows(Panel):
    """A panel of rows on one x axis, each with its label above at the left and its numbers at the right."""

    def __init__(
        self, name: str, title: str, description: str, x: Axis, count: int, *, x_label: str = "", ends: str = ""
    ) -> None:
        """count: number of rows. ends: text at the right end of the x axis; x_label is then at the left."""
        self._ends = ends
        height = TOP_OF_ROWS + ROW * count + 6 + BOTTOM
        super().__init__(name, title, description, x, Axis(0, 1, ()), x_label=x_label, height=height)
        self.row = 0

    def _grid(self, unit: str, x_label: str) -> None:
        self.left, self.right = 14, WIDTH - 14
        bottom = self.height - BOTTOM
        for value, _ in self.x.ticks:
            self.parts.append(f'<path class="grid" d="M{_n(self._x(value))} {TOP_OF_ROWS}V{bottom}"/>')
        self._x_ticks(bottom)
        if self._ends:
            self.text(4, self.height - 5, x_label)
            self.text(WIDTH - 4, self.height - 5, self._ends, anchor="end")
        else:
            self.text(WIDTH / 2, self.height - 5, x_label, anchor="middle")

    def rule(self, x: float) -> None:
        """A vertical line across all rows."""
        self.parts.append(f'<path class="zero" d="M{_n(self._x(x))} {TOP_OF_ROWS}V{self.height - BOTTOM}"/>')

    def shade(self, low: float, high: float) -> None:
        """Mark a range of x."""
        a, b = self._x(max(low, self.x.low)), self._x(min(high, self.x.high))
        self.parts.append(
            f'<rect class="shade" x="{_n(a)}" y="{TOP_OF_ROWS}" width="{_n(b - a)}" '
            f'height="{self.height - BOTTOM - TOP_OF_ROWS}"/>'
        )

    def add(
        self,
        label: str,
        numbers: str,
        points: Sequence[float],
        style: Style,
        *,
        interval: tuple[float, float] | None = None,
        mean: float | None = None,
        is_strong: bool = False,
        last: Style | None = None,
    ) -> None:
        """Add a row: markers, and an interval or a tick at the mean. last: another style for the last marker."""
        y = TOP_OF_ROWS + ROW * self.row + 27
        self.row += 1
        kind = "strong" if is_strong else ""
        self.text(6, y - 11, label, kind=kind)
        self.text(WIDTH - 6, y - 11, numbers, anchor="end", kind=kind)
        if interval is not None and all(map(math.isfinite, interval)):
            low, high = (self._x(value) for value in interval)
            width = 3 if is_strong else 1.8
            path = f"M{_n(low)} {_n(y)}H{_n(high)}M{_n(low)} {_n(y - 4)}v8M{_n(high)} {_n(y - 4)}v8"
            self.parts.append(f'<path d="{path}" fill="none" stroke="{style.color}" stroke-width="{width}"/>')
        for i, value in enumerate(points):
            if math.isfinite(value):
                used = last if last is not None and i == len(points) - 1 else style
                self.parts.append(marker(self._x(value), y, used, size=6 if is_strong else 4.5))
        if mean is not None and math.isfinite(mean):
            at = _n(self._x(mean))
            self.parts.append(f'<path class="mean" d="M{at} {_n(y - 8)}v16"/>')


def _apart(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the sorted targets, at least `gap` apart, between low and high if there is room."""
    groups: list[list[float]] = []  # targets of labels that touch

    def first(group: list[float]) -> float:
        middle = sum(group) / len(group)
        return max(low, min(middle - gap * (len(group) - 1) / 2, high - gap * (len(group) - 1)))

    for target in targets:
        groups.append([target])
        while len(groups) > 1 and first(groups[-1]) < first(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [first(group) + gap * i for group in groups for i in range(len(group))]


def marker(x: float, y: float, style: Style, size: float = 4) -> str:
    """One marker around (x, y) as SVG."""
    a, b, s = _n(x), _n(y), size
    look = f'stroke="{style.color}" stroke-width="1.6" fill="{style.color if style.is_filled else "var(--paper)"}"'
    match style.marker:
        case "circle":
            return f'<circle cx="{a}" cy="{b}" r="{_n(s)}" {look}/>'
        case "square":
            return f'<rect x="{_n(x - s)}" y="{_n(y - s)}" width="{_n(2 * s)}" height="{_n(2 * s)}" {look}/>'
        case "triangle":
            return f'<path d="M{a} {_n(y - 1.2 * s)}L{_n(x + 1.1 * s)} {_n(y + 0.8 * s)}H{_n(x - 1.1 * s)}Z" {look}/>'
        case "diamond":
            d = 1.3 * s
            return f'<path d="M{a} {_n(y - d)}L{_n(x + d)} {b}L{a} {_n(y + d)}L{_n(x - d)} {b}Z" {look}/>'
        case "cross":
            side = _n(2 * s)
            return f'<path d="M{_n(x - s)} {_n(y - s)}l{side} {side}m0 -{side}l-{side} {side}" {look}/>'
        case "plus":
            return f'<path d="M{_n(x - s)} {b}h{_n(2 * s)}M{a} {_n(y - s)}v{_n(2 * s)}" {look}/>'


def swatch(style: Style) -> str:
    """A line with its marker, for a legend."""
    dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    line = f'<path class="line" d="M2 8H38" stroke="{style.color}"{dash}/>'
    return f'<svg class="swatch" viewBox="0 0 40 16" aria-hidden="true">{line}{marker(20, 8, style)}</svg>'
