"""What a page is made of: sections, figures, tables, and how an arm looks in them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from echo_lora.study.design import side_of
from echo_lora.study.folder import StudyRecords
from echo_lora.study.records import mean_of
from echo_lora.study.report.plots import Rows, Style, axis, style_of, swatch


class Link(str):
    """A text that leads to another page; `href` is its place."""

    href: str

    def __new__(cls, text: str, href: str) -> Link:
        link = super().__new__(cls, text)
        link.href = href
        return link


@dataclass(frozen=True)
class PageTable:
    """Texts in rows."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    is_text: bool = False  # long texts, which may wrap

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [
            not self.is_text and any(row[i] for row in self.rows) and all(_is_number(row[i]) for row in self.rows)
            for i in range(len(self.head))
        ]


@dataclass(frozen=True)
class Figure:
    """Panels of SVG, what they show in plain words, and their numbers."""

    caption: str
    panels: list[str]
    table: PageTable | None
    legend: list[tuple[str, str]] = field(default_factory=list)  # swatch and label


@dataclass(frozen=True)
class PageSection:
    """A heading and what is below it; `warnings` are highlighted."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    link: Link | None = None


def arm_style(study: StudyRecords, side: str) -> Style:
    """How an arm, or a side of a comparison, looks in every figure."""
    return style_of(study.arms.index(side_of(side)[0]))


def legend(study: StudyRecords, arms: Container[str]) -> list[tuple[str, str]]:
    return [(swatch(arm_style(study, arm)), study.label(arm)) for arm in study.arms if arm in arms]


def _is_number(cell: str) -> bool:
    return not cell or cell[0] in "+−<–" or cell[0].isdigit()


def dots(
    study: StudyRecords,
    name: str,
    title: str,
    description: str,
    values: Mapping[str, Sequence[float]],
    shown: Callable[[float], str],
    *,
    x_label: str,
    rule: float | None = None,
    scale: float = 1,
) -> str:
    """A row for every arm: a mark for each of its values, a line at their mean, and the mean as text."""
    everything = [scale * value for found in values.values() for value in found]
    x = axis(everything, include=() if rule is None else (rule,))
    panel = Rows(name, title, description, x, len(values), x_label=x_label)
    if rule is not None:
        panel.rule(rule)
    for arm, found in values.items():
        mean = mean_of(found)
        points = [scale * value for value in found]
        panel.add(study.label(arm), shown(mean), points, arm_style(study, arm), mean=scale * mean)
    return panel.svg()
