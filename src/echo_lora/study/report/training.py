"""The sections of a report on training: learning rates, losses, and what the echo did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from echo_lora.study.folder import StudyRecords
from echo_lora.study.records import mean_of, results, run_accuracy, tuned_on
from echo_lora.study.report.parts import Figure, PageSection, PageTable, arm_style, legend
from echo_lora.study.report.plots import Axis, Panel, Rows, Style, axis, log_axis
from echo_lora.study.report.texts import joined, number_text, percent, points_text

POINTS = 60  # of a curve; longer ones are averaged
STEPS = 6  # steps of a curve that its table shows

# a curve: its title, what it is, and its value in an entry of a run's log
Part = tuple[str, str, Callable[[dict[str, Any]], float | None]]


def learning_rates(study: StudyRecords) -> PageSection:
    """The results of tuning, and the chosen rates."""
    title = "Choice of the learning rate"
    runs = {arm: study.tuning(arm) for arm in study.arms}
    diverged = [run for by_rate in runs.values() for found in by_rate.values() for run in found if "diverged" in run]
    failed = {(run["arm"], run["learning_rate"]) for run in diverged}
    curves = {
        arm: {
            rate: mean_of(tuned_on(run, study.design.tune_on) for run in found)
            for rate, found in by_rate.items()
            if (arm, rate) not in failed
        }
        for arm, by_rate in runs.items()
    }
    curves = {arm: curve for arm, curve in curves.items() if curve}
    if not curves:
        rates = {f"{rate:g}" for arm in study.design.arms for rate in study.design.rates(arm)}
        text = [f"There was nothing to choose: each arm has one learning rate ({', '.join(sorted(rates))})."]
        return PageSection("rates", title, text)
    seeds = study.design.tuning_seeds
    text = [f"Means over tuning seed{'s' * (len(seeds) != 1)} {joined(seeds)}."]
    if not study.chosen:
        text.append("Tuning is not complete: no rate has been chosen.")
    warnings = []
    if edge := [a for a, c in curves.items() if study.chosen.get(a) in (min(c), max(c)) and len(c) > 1]:
        warnings.append(
            f"The rate chosen for {joined(study.label(arm) for arm in edge)} is the lowest or the highest tried: a "
            "better one may lie beyond."
        )
    items = [
        f"{study.label(run['arm'])}, learning rate {run['learning_rate']:g}, seed {run['seed']}: training diverged"
        for run in diverged
    ]
    return PageSection("rates", title, text, warnings, [_tuning_figure(study, curves)], items=items)


def _tuning_figure(study: StudyRecords, curves: dict[str, dict[float, float]]) -> Figure:
    """A line for every arm over its learning rates."""
    on_accuracy = study.design.tune_on == "accuracy"
    what = "accuracy on validation questions" if on_accuracy else "loss on validation rows"
    head, scale = f"{what[0].upper()}{what[1:]}", 100 if on_accuracy else 1
    panel = Panel(
        "rates",
        head,
        f"{what} of each arm by learning rate; the chosen rate has a ring.",
        log_axis(rate for curve in curves.values() for rate in curve),
        axis(scale * value for curve in curves.values() for value in curve.values()),
        unit="%" if on_accuracy else "nats per token",
        x_label="learning rate",
        height=290,
        labels=[_short_label(study, arm) for arm in curves],
    )
    rows = []
    for arm, curve in curves.items():
        style, chosen = arm_style(study, arm), study.chosen.get(arm)
        panel.line([(rate, scale * value) for rate, value in curve.items()], style, _short_label(study, arm))
        if chosen in curve:
            panel.ring(chosen, scale * curve[chosen], style)
        for rate, value in curve.items():
            shown = percent(value) if on_accuracy else number_text(value)
            rows.append([study.label(arm), f"{rate:g}", shown, "chosen" if rate == chosen else ""])
    better = "higher" if on_accuracy else "lower"
    caption = (
        f"Every arm tried the same number of learning rates, on validation data only; {better} is better. A ring marks "
        "the chosen rate."
    )
    table = PageTable(f"{head}, by learning rate", ["arm", "learning rate", what, ""], rows)
    return Figure(caption, [panel.svg()], table, legend(study, curves))


def losses(study: StudyRecords) -> PageSection:
    """Losses of the confirmation runs, in training and on validation rows, and the distillation."""
    explained = "cross-entropy of the answers" + (", echo off" if study.has_echo else "")
    parts: list[Part] = [
        (
            "Loss in training",
            explained,
            lambda e: e.get("ce_off", e.get("loss") if "ce_on" not in e else None),
        ),
        ("Loss on validation rows", explained, lambda e: e.get("eval_loss")),
        ("Distillation", "divergence of the passes with and without the echo", lambda e: e.get("distillation")),
    ]
    caption = (
        "Lower means that the model gives the right answers a higher probability. Lines are means over seeds; the "
        "shading spans the lowest to the highest seed."
    )
    text = []
    if _trains_on_prompts(study):
        text.append(
            "This study also trains on prompts. The training loss of an arm with the echo is then summed over answers "
            "but divided by all trained tokens, so it can't be compared with that of other arms; the loss on "
            "validation rows can."
        )
    return _curves_section(study, "losses", "Losses", parts, "nats per token", caption, text)


def _trains_on_prompts(study: StudyRecords) -> bool:
    return study.has_echo and bool(study.file.recipe.get("data", {}).get("train_on_prompt"))


def teaching(study: StudyRecords) -> PageSection:
    """CE(on) - CE(off): whether the echo has anything to teach."""
    parts = [
        ("CE(on) − CE(off) in training", "below 0 the echo helps", _difference("ce_on", "ce_off")),
        ("CE(on) − CE(off) on validation rows", "below 0 the echo helps", _difference("eval_ce_on", "eval_ce_off")),
    ]
    caption = (
        "Below the line at 0 the model answers better with the echo than without, so there is something to distil. At "
        "0 or above, distillation has nothing to teach."
    )
    text = [
        "In training, CE(on) is a mean over routed steps and CE(off) over all steps, so the first panel is noisier."
    ]
    if _trains_on_prompts(study):
        text.append(
            "Arms that also train on prompts divide both by all trained tokens in training, so their numbers there are "
            "small; on validation rows they are means over answer tokens."
        )
    return _curves_section(
        study, "teaching", "Does the echo know more?", parts, "nats per token", caption, text, zero=True
    )


def echo_strength(study: StudyRecords) -> PageSection:
    """Gate, norm and share of the echo."""
    parts = [
        ("Gate", "mean, between 0 and 1", lambda e: e.get("gate_mean")),
        ("Norm of the echo", "mean over the target modules", lambda e: e.get("echo_norm")),
        ("Share of the echo", "in the low-rank branch, validation", lambda e: e.get("eval_echo_share")),
    ]
    caption = (
        "How strong the echo is: how far its gate is open, its norm, and its share of the adapter's low-rank branch. "
        "Near 0 it has no effect."
    )
    return _curves_section(study, "echo", "Strength of the echo", parts, "", caption, [])


def _curves_section(
    study: StudyRecords,
    name: str,
    title: str,
    parts: Sequence[Part],
    unit: str,
    caption: str,
    text: list[str],
    *,
    zero: bool = False,
) -> PageSection:
    """A panel for each quantity that a run has logged; the table has the values at a few steps."""
    panels, rows, drawn = [], [], dict[str, None]()
    for i, (head, explained, read) in enumerate(parts):
        curves = {arm: curve for arm in study.arms if len(curve := _curve(study, arm, read)) > 0}
        if not curves:
            continue
        drawn.update((arm, None) for arm in curves)
        x = axis([step for curve in curves.values() for step, *_ in curve], include=(0,), count=4)
        x = Axis(0, x.high, [tick for tick in x.ticks if tick[0] >= 0])
        y = axis([v for curve in curves.values() for _, *three in curve for v in three], include=(0,) if zero else ())
        panel = Panel(
            f"{name}-{i}",
            head,
            f"{head}, {explained}, over the steps of training: {joined(study.label(arm) for arm in curves)}.",
            x,
            y,
            unit=f"{explained}{', ' if unit else ''}{unit}" if len(explained) < 30 else unit or explained,
            x_label="step",
            labels=[_short_label(study, arm) for arm in curves],
        )
        if zero:
            panel.level(0)
        for arm, curve in curves.items():
            steps, _, low, high = zip(*curve, strict=True)
            panel.band(steps, low, high, arm_style(study, arm))
        for arm, curve in curves.items():
            is_short = len(curve) <= 8
            points = [(step, mean) for step, mean, *_ in curve]
            panel.line(points, arm_style(study, arm), _short_label(study, arm), markers=is_short)
            for step, mean, low, high in _some(curve):
                rows.append(
                    [head, study.label(arm), f"{step:.0f}", number_text(mean), number_text(low), number_text(high)]
                )
        panels.append(panel.svg())
    if not panels:
        reason = "no arm with an echo has logged it" if name != "losses" else "no confirmation run has logged any"
        return PageSection(name, title, [f"Nothing to show: {reason}."])
    table = PageTable(f"{title}: mean over seeds", ["quantity", "arm", "step", "mean", "lowest", "highest"], rows)
    return PageSection(name, title, text, figures=[Figure(caption, panels, table, legend(study, drawn))])


def _curve(
    study: StudyRecords, arm: str, read: Callable[[dict[str, Any]], float | None]
) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) over the seeds of an arm's confirmation runs, at most POINTS of them."""
    at: dict[int, list[float]] = {}
    for run in study.confirmation(arm).values():
        for entry in run["history"]:
            value = read(entry)
            if value is not None and math.isfinite(value) and "step" in entry:
                at.setdefault(entry["step"], []).append(value)
    curve = [(float(s), float(np.mean(v)), min(v), max(v)) for s, v in sorted(at.items())]
    if len(curve) <= POINTS:
        return curve
    parts = [curve[i * len(curve) // POINTS : (i + 1) * len(curve) // POINTS] for i in range(POINTS)]
    thinned = []
    for part in parts:
        steps, means, lows, highs = zip(*part, strict=True)
        thinned.append((float(np.mean(steps)), float(np.mean(means)), min(lows), max(highs)))
    return thinned


def _some(curve: list[Any]) -> list[Any]:
    """The first, the last, and a few in between."""
    if len(curve) <= STEPS:
        return curve
    return [curve[round(i * (len(curve) - 1) / (STEPS - 1))] for i in range(STEPS)]


def _difference(first: str, second: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda e: e[first] - e[second] if first in e and second in e else None


def ceiling(study: StudyRecords) -> PageSection:
    """Exact answers with the echo off and on."""
    title = "What the echo itself could do"
    means: dict[str, list[float]] = {}
    for arm in study.arms:
        if kept := [run for run in study.confirmation(arm).values() if results(run, echo=True)]:
            means[arm] = [mean_of(run_accuracy(run, echo=echo) for run in kept) for echo in (False, True)]
    if not means:
        return PageSection("ceiling", title, ["Not measured: no run was scored with its echo kept on."])
    panel = Rows(
        "ceiling",
        "Echo off and on",
        "Share of exact answers without the echo (hollow mark) and with it (filled mark).",
        axis([100 * value for pair in means.values() for value in pair]),
        len(means),
        x_label="exact answers, %",
    )
    rows, how = [], f"{study.design.score_on}, generated"
    for arm, (off, on) in means.items():
        color, points = arm_style(study, arm).color, [100 * off, 100 * on]
        hollow, filled = Style("circle", "", color, False), Style("circle", "", color)
        numbers = f"{percent(off)} → {percent(on)}"
        interval = (min(points), max(points))
        panel.add(f"{study.label(arm)}: {how}", numbers, points, hollow, interval=interval, last=filled)
        rows.append([study.label(arm), how, percent(off), percent(on), points_text(on - off)])
    caption = (
        "Hollow: as deployed, without the echo. Filled: with the echo kept on, which no deployed adapter can do. Where "
        "the filled mark is not to the right of the hollow one, there is nothing to distil."
    )
    text = ["Means over the seeds."]
    head = ["arm", "how", "echo off", "echo on", "difference"]
    figure = Figure(caption, [panel.svg()], PageTable("Exact answers without and with the echo", head, rows))
    return PageSection("ceiling", title, text, figures=[figure])


def _short_label(study: StudyRecords, arm: str) -> str:
    """The label if it is short, else the shorter of label and name."""
    label = study.label(arm)
    return label if len(label) <= 14 or len(label) <= len(arm) else arm
