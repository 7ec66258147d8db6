"""The sections of a report on results: differences, accuracies, controls, cost, forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable

from echo_lora.study.design import side_of
from echo_lora.study.folder import StudyRecords
from echo_lora.study.records import mean_of, results
from echo_lora.study.report.parts import Figure, PageSection, PageTable, arm_style, dots
from echo_lora.study.report.plots import Rows, Style, axis
from echo_lora.study.report.texts import count_of, ends_of, p_text, percent, points_text, range_text, with_range
from echo_lora.study.report.verdict import (
    Difference,
    check_pairing,
    compared_text,
    confidence_of,
    interval_name,
    look_text,
    missing_lines,
    missing_runs,
    power_lines,
)
from echo_lora.study.statistics import Effect, TaskEffect

OVERALL = "mean of the tasks"


def completeness(study: StudyRecords, primary: Difference) -> PageSection:
    """What is done and what is missing; whether the arms are paired."""
    expected, missing = study.expected, missing_runs(study, primary)
    text = [
        f"{len(expected) - len(study.missing)} of {len(expected)} runs of the design are done."
        + ("" if missing else " The study is complete."),
        *filter(None, [look_text(study, primary)]),
        *check_pairing(study)[0],
        *power_lines(study),
    ]
    return PageSection("complete", "Is the study complete?", text, items=missing_lines(missing))


def comparisons(study: StudyRecords, declared: list[Difference], others: list[Difference]) -> PageSection:
    """A line for every comparison; those that were not planned come last."""
    rows = []
    margin = study.design.margin
    for compared in [*declared, *others]:
        effect = compared.overall
        name = compared_text(study, compared)
        rows.append(
            [
                name if compared in declared else f"{name} (not planned)",
                points_text(effect.estimate) if effect else "",
                range_text(effect) if effect else "",
                compared.verdict,
                *([] if margin is None else ["shown" if compared.is_not_worse else "not shown"]),
                p_text(effect.p_value) if effect else "",
            ]
        )
    together = ", at all looks together" if study.looks else ""
    text = [
        "Each line is one arm minus another over all tasks, in percentage points of correct answers. In 95 of 100 such "
        f"studies the interval contains the true difference{together}; it accounts for chance in both seeds and "
        "questions. The first line is the primary comparison, declared before the study began."
    ]
    if study.look:
        text.append(
            f"p is for this look alone: it must be compared with {1 - confidence_of(study):.2g}, not with 0.05."
        )
    if others:
        text.append("Comparisons that were not planned are for orientation only.")
    if study.sides != study.arms:
        text.append("(echo on) is an arm that keeps its echo while it generates, which no deployed adapter does.")
    head = ["comparison", "difference", interval_name(study), "verdict", "p"]
    if margin is not None:
        head.insert(-1, f"not worse by more than {count_of(100 * margin, 'point')}")
    return PageSection("comparisons", "All comparisons", text, tables=[PageTable("Differences in points", head, rows)])


def by_task(study: StudyRecords, declared: list[Difference]) -> PageSection:
    """A forest plot of every declared comparison."""
    title = "Differences by task"
    shown = [compared for compared in declared if compared.overall]
    if not shown:
        return PageSection(
            "tasks", title, ["Nothing to show yet: no seed has a confirmation run of both arms that counts."]
        )
    effects = [effect for compared in shown for effect in _effects(compared).values()]
    panels, rows = [], []
    for i, compared in enumerate(shown):
        name, arm, other = compared_text(study, compared), study.label(compared.arm), study.label(compared.baseline)
        panel = _difference_panel(
            study,
            f"forest-{i}",
            name,
            f"Difference of {arm} minus {other} in percentage points with {interval_name(study)}, by task and overall.",
            effects,
            1 + len(compared.tasks),
            (other, arm),
        )
        for task, effect in _effects(compared).items():
            is_overall = effect is compared.overall
            style = Style("diamond", "", "#111111") if is_overall else arm_style(study, compared.arm)
            points = [100 * effect.estimate]
            panel.add(task, with_range(effect), points, style, interval=ends_of(effect), is_strong=is_overall)
            holm = p_text(effect.p_holm) if isinstance(effect, TaskEffect) else ""
            numbers = [points_text(effect.estimate), range_text(effect), p_text(effect.p_value), holm]
            rows.append([name, task, *numbers])
        panels.append(panel.svg())
    caption = (
        "A mark right of the line at 0 means that the first arm answered more questions correctly; the bar is its "
        "interval. The grey strip marks differences too small to matter here (under "
        f"{count_of(100 * study.design.smallest_effect, 'point')})."
    )
    text = []
    if any(len(compared.tasks) > 1 for compared in shown):
        text = ["p (Holm) is adjusted for the number of tasks: among many, one may look good by chance."]
    head = ["comparison", "task", "difference", interval_name(study), "p", "p (Holm)"]
    figure = Figure(caption, panels, PageTable("Differences by task", head, rows))
    return PageSection("tasks", title, text, figures=[figure])


def _effects(compared: Difference) -> dict[str, Effect]:
    """By task, and overall; empty without an overall effect."""
    return {**compared.tasks, "overall": compared.overall} if compared.overall else {}


def accuracy_of_runs(study: StudyRecords) -> PageSection:
    """A dot for every run, by task and arm."""
    title = "Accuracy of each run"
    tasks = study.tasks
    if not tasks:
        return PageSection("accuracy", title, ["Nothing to show yet: there is no confirmation run that counts."])
    panels, rows = [], []
    for i, task in enumerate([*tasks, *([OVERALL] if len(tasks) > 1 else [])]):
        found = {side: _accuracies(study, side, task) for side in study.sides}
        panels.append(
            dots(
                study,
                f"accuracy-{i}",
                task,
                f"Accuracy on {task} of every arm, one mark per seed and a line at their mean.",
                {side: list(values.values()) for side, values in found.items()},
                percent,
                x_label="correct answers, %",
                scale=100,
            )
        )
        for side, values in found.items():
            cells = [percent(values.get(seed, math.nan)) for seed in study.counted_seeds]
            rows.append([study.label(side), task, percent(mean_of(values.values())), *cells])
    caption = "Each mark is one trained adapter, one for each seed; the vertical line is an arm's mean over seeds."
    head = ["arm", "task", "mean", *(f"seed {seed}" for seed in study.counted_seeds)]
    figure = Figure(caption, panels, PageTable(f"Correct answers on {study.design.score_on} questions", head, rows))
    return PageSection("accuracy", title, figures=[figure])


def controls(study: StudyRecords, declared: list[Difference], others: list[Difference]) -> PageSection:
    """All arms against the baseline, methods and controls side by side."""
    title = "Controls"
    design = study.design
    if all(design.arms[arm].role != "control" for arm in study.arms[1:]):
        return PageSection("controls", title, ["This study has no control arms."])
    effects = {c.arm: c.overall for c in [*declared, *others] if c.baseline == design.baseline and c.overall}
    if not effects:
        text = ["Nothing to show yet: no seed has a confirmation run of both arms that counts."]
        return PageSection("controls", title, text)
    baseline = study.label(design.baseline)
    panel = _difference_panel(
        study,
        "controls",
        f"Every arm − {baseline}",
        f"Overall difference of every arm minus {baseline} in percentage points with {interval_name(study)}.",
        effects.values(),
        len(effects),
        (baseline, "the arm"),
    )
    rows = []
    for arm in (arm for arm in study.arms if arm in effects):
        effect, role, style = effects[arm], design.arms[arm].role, arm_style(study, arm)
        name, points = f"{study.label(arm)}, {role}", [100 * effect.estimate]
        panel.add(name, with_range(effect), points, style, interval=ends_of(effect), is_strong=role == "method")
        mean = mean_of(_accuracies(study, arm, OVERALL).values())
        rows.append([study.label(arm), role, percent(mean), points_text(effect.estimate), range_text(effect)])
    caption = (
        "A control leaves out one ingredient of the method or replaces it with something useless. If a control does as "
        "well as the method, that ingredient is not what helps."
    )
    head = ["arm", "role", "accuracy", f"difference to {baseline}", interval_name(study)]
    figure = Figure(caption, [panel.svg()], PageTable("Methods and controls side by side", head, rows))
    return PageSection("controls", title, figures=[figure])


def seed_by_seed(study: StudyRecords, declared: list[Difference]) -> PageSection:
    """McNemar's test within each seed."""
    title = "Each seed by itself"
    rows = []
    for difference in declared:
        for name, task in difference.tasks.items():
            cells = dict.fromkeys(study.counted_seeds, "–")
            for seed, first, second, p in zip(
                difference.seeds, task.only_arm, task.only_baseline, task.p_mcnemar, strict=True
            ):
                cells[seed] = f"{first} : {second}, p {p_text(p)}"
            rows.append([compared_text(study, difference), name, *cells.values()])
    if not rows:
        return PageSection(
            "seeds", title, ["Nothing to show yet: no seed has a confirmation run of both arms that counts."]
        )
    text = [
        "Both sides of a comparison answered the same questions in each seed. 12 : 7 means that only the first was "
        "right on 12 of them, and only the second on 7. McNemar's exact p is the probability that a fair coin divides "
        "these questions at least as unevenly. It does not account for chance in the seed, so a small p in one seed "
        "proves little: check whether all seeds agree."
    ]
    head = ["comparison", "task", *(f"seed {seed}" for seed in study.counted_seeds)]
    return PageSection(
        "seeds",
        title,
        text,
        tables=[PageTable("Questions that only one arm answered correctly, and McNemar's p", head, rows)],
    )


def _accuracies(study: StudyRecords, side: str, task: str) -> dict[int, float]:
    """By seed; of one task, or the mean of all."""
    found: dict[int, float] = {}
    for seed, run in study.confirmation(side).items():
        values = {result["task"]: result["accuracy"] for result in results(run, echo=side_of(side)[1])}
        if task == OVERALL and values:
            found[seed] = mean_of(values.values())
        elif task in values:
            found[seed] = values[task]
    return found


# ---------------------------------------------------------------- the figures


def _difference_panel(
    study: StudyRecords,
    name: str,
    title: str,
    description: str,
    effects: Iterable[Effect],
    count: int,
    sides: tuple[str, str],
) -> Rows:
    """A panel for `count` differences in points. effects: those on its axis. sides: which arm is better left, right."""
    smallest = 100 * study.design.smallest_effect
    values = [value for effect in effects for value in (*(ends_of(effect) or ()), 100 * effect.estimate)]
    x = axis(values, include=(0, smallest, -smallest), count=6)
    worse, better = sides
    panel = Rows(name, title, description, x, count, x_label=f"← {worse} better", ends=f"{better} better →")
    panel.shade(-smallest, smallest)
    panel.rule(0)
    return panel
