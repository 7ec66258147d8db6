"""What the arms cost, what they forget, and which answers could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_lora.study.folder import StudyRecords
from echo_lora.study.records import mean_of, results
from echo_lora.study.report.parts import Figure, PageSection, PageTable, dots
from echo_lora.study.report.texts import counts_text, mean_and_range, number_text, percent


def cost(study: StudyRecords) -> PageSection:
    """Time, memory and parameters."""
    title = "Cost"
    baseline, of_baseline = study.label(study.design.baseline), study.confirmation(study.design.baseline)
    rows, ratios = [], {}
    for arm in study.arms:
        runs = [run for run in study.confirmation(arm).values() if _seconds(run)]
        if not runs:
            continue
        over = [_seconds(run) / base for run in runs if (base := _seconds(of_baseline.get(run["seed"], {})))]
        if over:
            ratios[arm] = over
        rows.append(
            [
                study.label(arm),
                f"{mean_of(_seconds(run) for run in runs):.0f}",
                mean_and_range(over, ".2f"),
                " ".join(sorted({str(run.get("steps", "")) for run in runs})),
                f"{max(run.get('peak_memory', 0) for run in runs) / 1e9:.2f}",
                counts_text(run.get("deployed_parameters") for run in runs),
                *([counts_text(run.get("echo_parameters") for run in runs)] if study.has_echo else []),
            ]
        )
    if not rows:
        return PageSection("cost", title, ["Nothing to show yet: there is no confirmation run that counts."])
    text = [
        "Seconds are of training without evaluation, in runs that were not interrupted. They are approximate if runs "
        "shared a machine."
    ]
    devices = sorted({str(run.get("device", "unknown")) for run in study.runs})
    warnings = []
    if len(devices) > 1:
        warnings.append(f"Runs were done on different devices ({', '.join(devices)}): their times can't be compared.")
    head = ["arm", "seconds", f"over {baseline}", "steps", "peak GB", "parameters deployed"]
    head += ["of the echo, discarded"] if study.has_echo else []
    figures = [_cost_figure(study, baseline, ratios)] if len(ratios) > 1 else []
    return PageSection("cost", title, text, warnings, figures, [PageTable("Training of one run", head, rows)])


def _cost_figure(study: StudyRecords, baseline: str, ratios: dict[str, list[float]]) -> Figure:
    panel = dots(
        study,
        "cost",
        f"Training time over that of {baseline}",
        f"Training seconds of each run divided by those of {baseline} in the same seed.",
        ratios,
        "{:.2f}".format,
        x_label="times as long",
        rule=1,
    )
    caption = f"Training time relative to {baseline} in the same seed; right of the line at 1 is slower."
    return Figure(caption, [panel], None)


def _seconds(run: Mapping[str, Any]) -> float:
    """Of training without evaluations; 0 if unknown, as after a resume."""
    if run.get("resumed_at") or not run.get("seconds"):
        return 0.0
    return run["seconds"] - sum(entry.get("eval_runtime", 0.0) for entry in run["history"])


def forgetting(study: StudyRecords) -> PageSection:
    """The loss on text unrelated to the task."""
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
    panel = dots(
        study,
        "forgetting",
        "Change of the loss on general text",
        "Loss on held-out general text with the adapter minus that of the base model, one mark per seed.",
        changes,
        lambda mean: mean_and_range([mean], "+.3f"),
        x_label="nats per token",
        rule=0,
    )
    caption = (
        "What the model forgot in training: marks right of the line at 0 mean that text unrelated to the task became "
        "less likely."
    )
    text = [f"Measured on {tokens:,} tokens of text that no run was trained on."] if tokens else []
    head = ["arm", "base model", "with the adapter", "change (range over seeds)"]
    figure = Figure(caption, [panel], PageTable("Loss on general text, nats per token", head, rows))
    return PageSection("forgetting", title, text, figures=[figure])


def unreadable(study: StudyRecords) -> PageSection:
    """Outputs in which no answer was found."""
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
        "Share of outputs in which no answer was found; these count as wrong. Arms that differ here may differ in "
        "format rather than in knowledge."
    ]
    table = PageTable(
        f"Unreadable answers on {study.design.score_on} questions", ["arm", "task", "mean", "highest of a seed"], rows
    )
    return PageSection("unreadable", title, text, tables=[table])
