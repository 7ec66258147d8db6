"""The sections of a report that say what came out: differences, accuracies, controls, cost, forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from echo_lora.study.folder import StudyRecords
from echo_lora.study.records import mean_of, results
from echo_lora.study.report.parts import Figure, PageSection, PageTable, arm_style
from echo_lora.study.report.plots import Axis, Rows, Style, axis
from echo_lora.study.report.texts import (
    count_of,
    counts_text,
    ends_of,
    mean_and_range,
    number_text,
    p_text,
    percent,
    points_text,
    range_text,
    with_range,
)
from echo_lora.study.report.verdict import (
    Difference,
    check_pairing,
    confidence_of,
    interval_name,
    look_text,
    missing_lines,
    missing_runs,
    power_lines,
)
from echo_lora.study.statistics import Effect

OVERALL = "mean of the tasks"


def completeness(study: StudyRecords, primary: Difference) -> PageSection:
    """How much of the design is done, and what is missing; whether the arms are paired."""
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
    """A line for every comparison, those that were not planned last."""
    rows = []
    margin = study.design.margin
    for compared in [*declared, *others]:
        effect = compared.overall
        name = f"{study.label(compared.arm)} − {study.label(compared.baseline)}"
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
        "Each line is one arm minus another, over all tasks, in percentage points of correct answers. The interval "
        f"holds the true difference in 95 of 100 such studies{together}; it counts both the luck of the seeds and that "
        "of the questions. The first line is the primary comparison, named before the study began."
    ]
    if study.look:
        text.append(
            f"p is that of this look alone: it is to be compared with {1 - confidence_of(study):.2g}, not with 0.05."
        )
    if others:
        text.append("Comparisons that were not planned are for orientation only.")
    head = ["comparison", "difference", interval_name(study), "verdict", "p"]
    if margin is not None:
        head.insert(-1, f"not worse by more than {count_of(100 * margin, 'point')}")
    return PageSection("comparisons", "All comparisons", text, tables=[PageTable("Differences in points", head, rows)])


def by_task(study: StudyRecords, declared: list[Difference]) -> PageSection:
    """A forest plot for every declared comparison."""
    title = "Differences by task"
    shown = [(compared, compared.overall) for compared in declared if compared.overall]
    if not shown:
        return PageSection("tasks", title, ["Nothing to show yet: no two arms have been run at a seed that counts."])
    smallest = 100 * study.design.smallest_effect
    x = points_axis(study, [effect for c, overall in shown for effect in (overall, *c.tasks.values())])
    panels, rows = [], []
    for i, (compared, overall) in enumerate(shown):
        arm, other = study.label(compared.arm), study.label(compared.baseline)
        panel = Rows(
            f"forest-{i}",
            f"{arm} − {other}",
            f"Difference of {arm} minus {other} in percentage points with {interval_name(study)}, by task and overall.",
            x,
            1 + len(compared.tasks),
            x_label=f"← {other} better",
            ends=f"{arm} better →",
        )
        panel.shade(-smallest, smallest)
        panel.rule(0)
        style = arm_style(study, compared.arm)
        lines: list[tuple[str, Effect, str]] = [
            (name, task, p_text(task.p_holm)) for name, task in compared.tasks.items()
        ]
        for name, effect, holm in [*lines, ("overall", overall, "")]:
            is_overall = effect is overall
            used = Style("diamond", "", "#111111") if is_overall else style
            points = [100 * effect.estimate]
            panel.add(name, with_range(effect), points, used, interval=ends_of(effect), is_strong=is_overall)
            rows.append(
                [
                    f"{arm} − {other}",
                    name,
                    points_text(effect.estimate),
                    range_text(effect),
                    p_text(effect.p_value),
                    holm,
                ]
            )
        panels.append(panel.svg())
    caption = (
        "A mark right of the line at 0 means that the first arm answered more questions correctly; the bar shows how "
        "far luck could have moved it. The grey strip holds differences too small to matter here (under "
        f"{count_of(smallest, 'point')})."
    )
    head = ["comparison", "task", "difference", interval_name(study), "p", "p (Holm)"]
    text = []
    if any(len(compared.tasks) > 1 for compared, _ in shown):
        text = ["p (Holm) allows for the number of tasks: with many of them, one looks good by luck alone."]
    return PageSection(
        "tasks", title, text, figures=[Figure(caption, panels, PageTable("Differences by task", head, rows))]
    )


def accuracy_of_runs(study: StudyRecords) -> PageSection:
    """A dot for every run, by task and arm."""
    title = "Accuracy of each run"
    tasks = study.tasks
    if not tasks:
        return PageSection("accuracy", title, ["Nothing to show yet: there is no confirmation run that counts."])
    names = [*tasks, *([OVERALL] if len(tasks) > 1 else [])]
    values = {(arm, task): accuracies(study, arm, task) for arm in study.arms for task in names}
    panels, rows = [], []
    for i, task in enumerate(names):
        x = axis([100 * value for arm in study.arms for value in values[arm, task].values()])
        panel = Rows(
            f"accuracy-{i}",
            task,
            f"Accuracy on {task} of every arm, one mark per seed and a line at their mean.",
            x,
            len(study.arms),
            x_label="correct answers, %",
        )
        for arm in study.arms:
            found = values[arm, task]
            mean = float(np.mean(list(found.values()))) if found else math.nan
            points = [100 * value for value in found.values()]
            panel.add(study.label(arm), percent(mean), points, arm_style(study, arm), mean=100 * mean)
            cells = [percent(found.get(seed, math.nan)) for seed in study.counted_seeds]
            rows.append([study.label(arm), task, percent(mean), *cells])
        panels.append(panel.svg())
    caption = (
        "Every mark is one trained adapter, every seed is one mark; the upright line is the mean of an arm's seeds."
    )
    head = ["arm", "task", "mean", *(f"seed {seed}" for seed in study.counted_seeds)]
    figure = Figure(caption, panels, PageTable(f"Correct answers on {study.design.score_on} questions", head, rows))
    return PageSection("accuracy", title, figures=[figure])


def controls(study: StudyRecords, declared: list[Difference], others: list[Difference]) -> PageSection:
    """All arms against the baseline, methods and controls side by side."""
    title = "Controls"
    control_arms = [arm for arm in study.arms[1:] if study.design.arms[arm].role == "control"]
    if not control_arms:
        return PageSection("controls", title, ["This study has no control arms."])
    to_baseline = {c.arm: c.overall for c in [*declared, *others] if c.baseline == study.design.baseline and c.overall}
    if not to_baseline:
        return PageSection(
            "controls", title, ["Nothing to show yet: there is no pair of confirmation runs that count."]
        )
    baseline = study.label(study.design.baseline)
    smallest = 100 * study.design.smallest_effect
    panel = Rows(
        "controls",
        f"Every arm − {baseline}",
        f"Overall difference of every arm minus {baseline} in percentage points with {interval_name(study)}.",
        points_axis(study, to_baseline.values()),
        len(to_baseline),
        x_label=f"← {baseline} better",
        ends="the arm better →",
    )
    panel.shade(-smallest, smallest)
    panel.rule(0)
    rows = []
    for arm in study.arms[1:]:
        if arm not in to_baseline:
            continue
        effect = to_baseline[arm]
        kind = "control" if study.design.arms[arm].role == "control" else "method"
        panel.add(
            f"{study.label(arm)}, {kind}",
            with_range(effect),
            [100 * effect.estimate],
            arm_style(study, arm),
            interval=ends_of(effect),
            is_strong=kind == "method",
        )
        mean = float(np.mean(list(accuracies(study, arm, OVERALL).values()) or [math.nan]))
        rows.append([study.label(arm), kind, percent(mean), points_text(effect.estimate), range_text(effect)])
    caption = (
        "A control leaves out one ingredient of the method or puts something useless in its place; where a control "
        "does as well as the method, that ingredient is not what helps."
    )
    head = ["arm", "role", "accuracy", f"difference to {baseline}", interval_name(study)]
    figure = Figure(caption, [panel.svg()], PageTable("Methods and controls side by side", head, rows))
    return PageSection("controls", title, figures=[figure])


def cost(study: StudyRecords) -> PageSection:
    """Time, memory and parameters."""
    title = "Cost"
    base = study.confirmation(study.design.baseline)
    panels, rows = [], []
    ratios = {}
    for arm in study.arms:
        runs = [run for run in study.confirmation(arm).values() if _seconds(run)]
        if not runs:
            continue
        ratios[arm] = [
            _seconds(run) / _seconds(base[run["seed"]]) for run in runs if _seconds(base.get(run["seed"], {}))
        ]
        rows.append(
            [
                study.label(arm),
                f"{mean_of(_seconds(run) for run in runs):.0f}",
                mean_and_range(ratios[arm], ".2f"),
                " ".join(sorted({str(run.get("steps", "")) for run in runs})),
                f"{max(run.get('peak_memory', 0) for run in runs) / 1e9:.2f}",
                counts_text(run.get("deployed_parameters") for run in runs),
                counts_text(run.get("echo_parameters") for run in runs),
            ]
        )
    if not rows:
        return PageSection("cost", title, ["Nothing to show yet: there is no confirmation run that counts."])
    baseline = study.label(study.design.baseline)
    ratios = {arm: values for arm, values in ratios.items() if values}
    figures = []
    head = ["arm", "seconds", f"over {baseline}", "steps", "peak GB", "parameters deployed", "of the echo, discarded"]
    table = PageTable("Training of one run", head, rows)
    if len(ratios) > 1:
        panel = Rows(
            "cost",
            f"Training time over that of {baseline}",
            f"Training seconds of each run divided by those of {baseline} in the same seed.",
            axis([value for values in ratios.values() for value in values], include=(1,)),
            len(ratios),
            x_label="times as long",
        )
        panel.rule(1)
        for arm, values in ratios.items():
            panel.add(study.label(arm), f"{mean_of(values):.2f}", values, arm_style(study, arm), mean=mean_of(values))
        panels.append(panel.svg())
        caption = (
            f"How many times as long as {baseline} training took in the same seed; right of the line at 1 is slower."
        )
        figures.append(Figure(caption, panels, None))
    text = [
        "Seconds are those of training alone, without evaluation, of runs that were not interrupted. They are rough "
        "where runs shared a machine."
    ]
    devices = sorted({str(run.get("device", "unknown")) for run in study.runs})
    warnings = []
    if len(devices) > 1:
        warnings.append(f"Runs were done on different devices ({', '.join(devices)}): their times can't be compared.")
    return PageSection("cost", title, text, warnings, figures, [table])


def _seconds(run: Mapping[str, Any]) -> float:
    """Of training, without the evaluations in between; 0 where a resumed run does not know."""
    if run.get("resumed_at") or not run.get("seconds"):
        return 0.0
    return run["seconds"] - sum(entry.get("eval_runtime", 0.0) for entry in run["history"])


def forgetting(study: StudyRecords) -> PageSection:
    """What the adapters do to text that has nothing to do with the task."""
    title = "Forgetting"
    changes: dict[str, list[float]] = {}
    rows = []
    tokens = None
    for arm in study.arms:
        measured = [run["general"] for run in study.confirmation(arm).values() if run.get("general")]
        if measured:
            tokens = measured[0].get("tokens")
            changes[arm] = [found["after"] - found["before"] for found in measured]
            before, after = (number_text(mean_of(found[key] for found in measured)) for key in ("before", "after"))
            rows.append([study.label(arm), before, after, mean_and_range(changes[arm], "+.3f")])
    if not changes:
        return PageSection("forgetting", title, ["Not measured: the study names no general text, or has no run yet."])
    panel = Rows(
        "forgetting",
        "Change of the loss on general text",
        "Loss on held-out general text with the adapter minus that of the base model, one mark per seed.",
        axis([value for values in changes.values() for value in values], include=(0,)),
        len(changes),
        x_label="nats per token",
    )
    panel.rule(0)
    for arm, values in changes.items():
        numbers = mean_and_range([mean_of(values)], "+.3f")
        panel.add(study.label(arm), numbers, values, arm_style(study, arm), mean=mean_of(values))
    caption = (
        "What training took from the model elsewhere: marks right of the line at 0 mean that text which has nothing to "
        "do with the task became less likely to it."
    )
    text = [f"Measured on {tokens:,} tokens of text that no run was trained on."] if tokens else []
    head = ["arm", "base model", "with the adapter", "change (range over seeds)"]
    figure = Figure(caption, [panel.svg()], PageTable("Loss on general text, nats per token", head, rows))
    return PageSection("forgetting", title, text, figures=[figure])


def unreadable(study: StudyRecords) -> PageSection:
    """Answers in which none was found."""
    title = "Unreadable answers"
    rows = []
    for arm in study.arms:
        for task in study.tasks:
            shares = [
                result["unreadable"]
                for run in study.confirmation(arm).values()
                for result in results(run)
                if result["task"] == task and "unreadable" in result
            ]
            if shares:
                rows.append([study.label(arm), task, percent(mean_of(shares)), percent(max(shares))])
    if not rows:
        return PageSection("unreadable", title, ["Nothing to show yet: there is no confirmation run that counts."])
    text = [
        "Share of answers in which no answer could be found; they count as wrong. Where arms differ here, they may "
        "differ in form and not in knowledge."
    ]
    table = PageTable(
        f"Unreadable answers on {study.design.score_on} questions", ["arm", "task", "mean", "highest of a seed"], rows
    )
    return PageSection("unreadable", title, text, tables=[table])


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
            rows.append([f"{study.label(difference.arm)} − {study.label(difference.baseline)}", name, *cells.values()])
    if not rows:
        return PageSection("seeds", title, ["Nothing to show yet: no two arms have been run at a seed that counts."])
    text = [
        "Both adapters of a seed answered the same questions; those that only one of them had right are what tells "
        "them apart: 12 : 7 means that the first alone was right 12 times, the second alone 7 times. McNemar's exact p "
        "says how often a fair coin would divide these questions at least as unevenly. It knows nothing of the luck of "
        "seeds, so a small p in one seed proves little: look whether all seeds agree."
    ]
    head = ["comparison", "task", *(f"seed {seed}" for seed in study.counted_seeds)]
    return PageSection(
        "seeds", title, text, tables=[PageTable("Questions that one alone had right, and McNemar's p", head, rows)]
    )


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


def points_axis(study: StudyRecords, effects: Iterable[Effect]) -> Axis:
    """A common axis for differences in points, which shows 0 and the smallest effect of interest."""
    smallest = 100 * study.design.smallest_effect
    values = [value for effect in effects for value in (*(ends_of(effect) or ()), 100 * effect.estimate)]
    return axis(values, include=(0, smallest, -smallest), count=6)
