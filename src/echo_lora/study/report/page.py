"""The report of a study: one page with its figures inside, and the same numbers in Markdown.

Both are made from one list of sections.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from echo_lora.errors import EchoCheckpointError
from echo_lora.files import write_text
from echo_lora.study.folder import STUDY_FILE, StudyRecords, read_study
from echo_lora.study.report import outcome, side_effects, training
from echo_lora.study.report.parts import Link, PageSection, PageTable
from echo_lora.study.report.texts import count_of, joined, with_range
from echo_lora.study.report.verdict import (
    SIGN,
    Difference,
    compared_text,
    declared_differences,
    difference_of,
    is_search,
    look_text,
    meaning_of,
    missing_runs,
    not_worse_text,
    notices,
    sentence_of,
)
from echo_lora.text import template_environment

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
SEARCHES = " Searches come last: they are scored on validation rows, so what they find is still to be confirmed."


@dataclass(frozen=True)
class Page:
    """What the templates show."""

    title: str
    question: str
    verdict: str  # in a word
    sign: str
    sentence: str
    meaning: str
    notices: list[str]  # warnings
    sections: list[PageSection]
    overview: PageTable | None = None  # of several studies


def write_report(folder: str | Path) -> Path:
    """Write report.html and report.md into a study's folder; returns the path of the former.

    In a folder of several studies, each gets its report, and the folder one of their verdicts. The same records give
    the same bytes. Raises EchoConfigError or EchoDataError as `read_study`, EchoCheckpointError if writing fails.
    """
    folder = Path(folder)
    several, written = _studies_in(folder), []
    for study in several or [read_study(folder)]:
        declared = declared_differences(study)
        path = _write(_report(study, declared), study.folder)
        written.append((study, declared))
    return _write(_report_of_several(written, folder), folder) if several else path


def _studies_in(folder: str | Path) -> list[StudyRecords]:
    """The studies in a folder that is not a study's, at any depth; searches, which confirm nothing, come last."""
    if os.path.exists(Path(folder) / STUDY_FILE):
        return []
    found = []
    for place, names, files in os.walk(folder):
        if STUDY_FILE in files:
            found.append(Path(place))
            names.clear()  # its runs have no study of their own
    return sorted(map(read_study, sorted(found)), key=is_search)


def _write(report: Page, folder: Path) -> Path:
    for name in (MARKDOWN_FILE, HTML_FILE):
        if os.path.isdir(folder / name):
            raise EchoCheckpointError(f"{folder / name} is a folder, but the report has this name. Move the folder.")
    for name, is_html in ((MARKDOWN_FILE, False), (HTML_FILE, True)):
        environment = template_environment(autoescape=is_html)
        environment.filters["md"] = _markdown
        text = environment.get_template(f"{name}.jinja").render(report=report)
        write_text(folder / name, text)
    return folder / HTML_FILE


def summary_lines(folder: str | Path) -> list[str]:
    """The verdicts in words: a line for each declared comparison, then the warnings.

    For a folder of several studies: those of each, below its title. Raises as `write_report`.
    """
    if several := _studies_in(folder):
        return [line for study in several for line in (study.design.title, *_summary_of(study))]
    return _summary_of(read_study(folder))


def _summary_of(study: StudyRecords) -> list[str]:
    declared = declared_differences(study)
    look = look_text(study, declared[0])
    return [*_verdicts(study, declared), *([look] if look else []), *notices(study, declared[0])]


def _report(study: StudyRecords, declared: list[Difference]) -> Page:
    others = [difference_of(study, *pair) for pair in study.others]
    primary = declared[0]
    about_echo = [training.teaching(study), training.echo_strength(study), training.ceiling(study)]
    return Page(
        title=study.design.title,
        question=study.design.question,
        verdict=_word(study, primary),
        sign=SIGN[primary.verdict],
        sentence=sentence_of(study, primary),
        meaning=f"{meaning_of(study, primary)} {not_worse_text(study, primary)}".rstrip(),
        notices=notices(study, primary),
        sections=[
            outcome.completeness(study, primary),
            outcome.comparisons(study, declared, others),
            outcome.by_task(study, declared),
            outcome.accuracy_of_runs(study),
            outcome.controls(study, declared, others),
            training.learning_rates(study),
            training.losses(study),
            *(about_echo if study.has_echo else []),
            side_effects.cost(study),
            side_effects.forgetting(study),
            side_effects.unreadable(study),
            outcome.seed_by_seed(study, declared),
            _settings(study),
        ],
    )


def _word(study: StudyRecords, primary: Difference, kind: str = "") -> str:
    """The verdict of the first comparison. kind: of study, to begin with."""
    begin = " ".join(filter(None, [kind, "so far" if missing_runs(study, primary) else ""]))
    text = f"{begin}: {primary.verdict}" if begin else primary.verdict
    return f"{text[0].upper()}{text[1:]}"


def _section_of_several(study: StudyRecords, declared: list[Difference], name: str) -> PageSection:
    look = look_text(study, declared[0])
    text = [*filter(None, [study.design.question, look])]
    verdicts, warnings = _verdicts(study, declared), notices(study, declared[0])
    link = Link("Full report", f"{name}/{HTML_FILE}")
    return PageSection(name, study.design.title, text, warnings, items=verdicts, link=link)


def _verdicts(study: StudyRecords, declared: list[Difference]) -> list[str]:
    return [f"{one.verdict}: {sentence_of(study, one)} {not_worse_text(study, one)}".rstrip() for one in declared]


def _report_of_several(studies: list[tuple[StudyRecords, list[Difference]]], folder: Path) -> Page:
    # as in a URL: relative to this page
    names = [quote(study.folder.relative_to(folder).as_posix()) for study, _ in studies]
    rows = []
    for name, (study, (primary, *_)) in zip(names, studies, strict=True):
        effect = primary.overall
        rows.append(
            [
                Link(study.design.title, f"{name}/{HTML_FILE}"),
                f"{SIGN[primary.verdict]} {_word(study, primary, 'search' if is_search(study) else '')}",
                with_range(effect) if effect else "none yet",
                compared_text(study, primary),
            ]
        )
    head = ["study", "verdict", "difference in points (interval)", "of the first comparison"]
    return Page(
        title="Several studies",
        question="",
        verdict="1 study" if len(studies) == 1 else f"{len(studies)} studies",
        sign="≡",
        sentence="Each has its own question, verdict and report."
        + (SEARCHES if any(is_search(study) for study, _ in studies) else ""),
        meaning="",
        notices=[],
        sections=[
            _section_of_several(study, declared, name) for name, (study, declared) in zip(names, studies, strict=True)
        ],
        overview=PageTable("What each study says", head, rows, is_text=True),
    )


def _settings(study: StudyRecords) -> PageSection:
    rows = sorted({line for run in study.runs if run["stage"] == "confirmation" for line in run.get("rows", [])})
    warnings = []
    if len({json.dumps(run["versions"], sort_keys=True) for run in study.runs if "versions" in run}) > 1:
        warnings.append("The runs were not all made with the same versions: they may not be comparable.")
    tables = [
        PageTable(
            "Arms: how each differs from the base recipe",
            ["arm", "key", "role", "overrides", "learning rates tried", "chosen"],
            [_arm_settings(study, arm) for arm in study.arms],
            is_text=True,
        ),
        PageTable("The study", ["what", "value"], _study_settings(study), is_text=True),
    ]
    if recipe := [[key, value] for key, value in _flat(study.file.recipe) if _matters(study, key)]:
        tables.append(PageTable("Base recipe, of the baseline's first run", ["key", "value"], recipe, is_text=True))
    text = ["Everything needed to repeat the study."]
    return PageSection("settings", "Settings", text, warnings, tables=tables, items=[f"rows: {line}" for line in rows])


def _arm_settings(study: StudyRecords, arm: str) -> list[str]:
    own = study.design.arms[arm]
    return [
        study.label(arm),
        arm,
        own.role + (", baseline" if arm == study.design.baseline else ""),
        _settings_text({key: value for key, value in own.set.items() if _matters(study, key)}) or "none",
        joined(f"{rate:g}" for rate in study.design.rates(arm)),
        f"{study.chosen[arm]:g}" if arm in study.chosen else "not yet",
    ]


def _matters(study: StudyRecords, key: str) -> bool:
    """Whether a key of a recipe has an effect in this study."""
    return study.has_echo or not key.startswith(("echo", "seeds.routing"))


def _study_settings(study: StudyRecords) -> list[list[str]]:
    file, design = study.file, study.design
    devices = sorted({str(run.get("device", "unknown")) for run in study.runs})
    return [
        ["command", file.command or "unknown"],
        ["started", file.started or "unknown"],
        ["commit", file.commit or "unknown"],
        ["processor", file.processor or "unknown"],
        ["devices of the runs", joined(devices) or "none yet"],
        ["tuning seeds", joined(design.tuning_seeds if design.tunes else []) or "none"],
        ["confirmation seeds", joined(design.seeds)],
        ["smallest effect of interest", count_of(100 * design.smallest_effect, "percentage point")],
        *([["margin", count_of(100 * design.margin, "percentage point")]] if design.margin else []),
        *([["looks, in seeds", joined(study.looks)]] if study.looks else []),
        ["comparisons, the primary first", joined(f"{a} − {b}" for a, b in design.pairs)],
        *([f"version of {name}", number] for name, number in file.versions.items()),
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


def _markdown(text: str) -> str:
    """Text in one line of Markdown: special characters are escaped."""
    for mark in ("\\", "|", "*", "`", "<", "["):
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
