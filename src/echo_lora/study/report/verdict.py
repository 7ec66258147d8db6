"""What a study says, in words: its differences, whether it is complete, whether its arms are paired."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from echo_lora.errors import EchoDataError
from echo_lora.study.design import RunKey, side_of
from echo_lora.study.folder import StudyRecords
from echo_lora.study.looks import confidence_at
from echo_lora.study.records import START, Pairing, correct_by_task, results
from echo_lora.study.report.texts import count_of, is_known, joined, percent_text, points_text, range_text
from echo_lora.study.statistics import LEAST_SEEDS, Comparison, Effect, TaskEffect, Verdict, compare_arms

ENOUGH_TUNING = 3  # seeds; with fewer, chance may choose between two learning rates
DULL = 0.98  # share of a run's answers that are the same, or right, or wrong

SIGN = {"better": "▲", "worse": "▼", "no difference shown": "◇", "not worse": "△", "too few data": "?"}


@dataclass(frozen=True)
class Difference:
    """One side of a comparison minus the other, over the seeds that both have. comparison: None without such a seed."""

    arm: str
    baseline: str
    seeds: list[int]
    comparison: Comparison | None

    @property
    def verdict(self) -> Verdict:
        return self.comparison.verdict if self.comparison else "too few data"

    @property
    def is_not_worse(self) -> bool:
        """Whether the arm is shown to be not worse by more than the margin."""
        return bool(self.comparison and self.comparison.is_not_worse)

    @property
    def overall(self) -> Effect | None:
        return self.comparison.overall if self.comparison else None

    @property
    def tasks(self) -> dict[str, TaskEffect]:
        return self.comparison.tasks if self.comparison else {}


def declared_differences(study: StudyRecords) -> list[Difference]:
    """The declared comparisons, the primary one first."""
    return [difference_of(study, *pair) for pair in study.design.pairs]


def difference_of(study: StudyRecords, arm: str, baseline: str) -> Difference:
    """One side minus the other. Raises EchoDataError if they did not answer the same questions."""
    runs = study.confirmation(arm), study.confirmation(baseline)
    seeds = [seed for seed in runs[0] if seed in runs[1]]
    found = None
    if seeds:
        correct = [_correct(study, side, seeds) for side in (arm, baseline)]
        found = compare_arms(
            arm,
            baseline,
            *correct,
            smallest_effect=study.design.smallest_effect,
            margin=study.design.margin,
            confidence=confidence_of(study),
        )
    return Difference(arm, baseline, seeds, found)


def confidence_of(study: StudyRecords) -> float:
    """The confidence of all intervals: that of the last complete look."""
    return confidence_at(study.looks, study.look) if study.look else 0.95


def is_decided(study: StudyRecords, primary: Difference) -> bool:
    """Whether a study with looks may end at the last complete one."""
    return study.look > 0 and primary.verdict != "too few data"


def missing_runs(study: StudyRecords, primary: Difference) -> list[RunKey]:
    """The runs that are still needed: a decided study needs no more seeds."""
    return [run for run in study.missing if run.stage == "tuning" or not is_decided(study, primary)]


def _correct(study: StudyRecords, side: str, seeds: list[int]) -> dict[str, np.ndarray]:
    """By task, bool (seeds, questions). Raises EchoDataError if the runs did not answer the same questions."""
    of_seed = study.confirmation(side)
    runs, (arm, is_kept) = [of_seed[seed] for seed in seeds], side_of(side)
    if is_kept and (without := [run["seed"] for run in runs if not results(run, echo=True)]):
        raise EchoDataError(
            f"{study.folder}: the confirmation run of arm {arm}, seed {without[0]}, has no answers with its "
            "echo kept on, but a comparison names them. Repeat the run."
        )
    found = correct_by_task(runs, echo=is_kept)
    for task, rows in found.items():
        if len(rows) != len(runs) or len({len(row) for row in rows}) > 1:
            raise EchoDataError(
                f"{study.folder}: the confirmation runs of arm {arm} did not all answer the same questions "
                f"of task {task}: {', '.join(str(len(row)) for row in rows)} answers in {len(runs)} runs. "
                "Repeat the run that differs."
            )
    return {task: np.array(rows, dtype=bool) for task, rows in found.items()}


def compared_text(study: StudyRecords, difference: Difference) -> str:
    """The name of a difference, as in "Echo-LoRA − LoRA"."""
    return f"{study.label(difference.arm)} − {study.label(difference.baseline)}"


def sentence_of(study: StudyRecords, difference: Difference) -> str:
    """The result in numbers."""
    names = compared_text(study, difference)
    smallest = f"smallest effect of interest {count_of(100 * study.design.smallest_effect, 'point')}"
    effect = difference.overall
    if effect is None:
        what = "no look has been reached" if study.looks else "no seed has a confirmation run of both"
        return f"{names}: {what} yet; {smallest}."
    interval = f"{interval_name(study)} {range_text(effect)}" if is_known(effect) else "one seed gives no interval"
    questions = sum(task.questions for task in difference.tasks.values())
    tasks = f" in {len(difference.tasks)} tasks" if len(difference.tasks) > 1 else ""
    return (
        f"{names}: {points_text(effect.estimate)} percentage points ({interval}), "
        f"{count_of(len(difference.seeds), 'seed')} × {count_of(questions, 'question')}{tasks}; {smallest}."
        + rates_text(study, difference)
    )


def rates_text(study: StudyRecords, difference: Difference) -> str:
    """A warning if the arms ran at different learning rates that few seeds chose; otherwise empty. [O]"""
    rates = [study.chosen.get(side_of(side)[0]) for side in (difference.arm, difference.baseline)]
    seeds = len(study.design.tuning_seeds)
    if not study.design.tunes or None in rates or rates[0] == rates[1] or seeds >= ENOUGH_TUNING:
        return ""
    return (
        f" They ran at different learning rates, {rates[0]:g} and {rates[1]:g}, chosen with {count_of(seeds, 'seed')}: "
        "the difference may be that of the rates."
    )


def interval_name(study: StudyRecords) -> str:
    return f"{percent_text(confidence_of(study))} interval"


def not_worse_text(study: StudyRecords, difference: Difference) -> str:
    """Whether the arm is shown to be not worse by more than the margin; empty without a margin."""
    margin = study.design.margin
    if margin is None:
        return ""
    arm, other = study.label(difference.arm), study.label(difference.baseline)
    what = f"that {arm} is not worse than {other} by more than the margin of {count_of(100 * margin, 'point')}"
    if len(difference.seeds) < LEAST_SEEDS:
        return f"It is not shown {what}: there are too few seeds."
    if difference.is_not_worse:
        return f"It is shown {what}: the interval lies above {points_text(-margin)}."
    return f"It is not shown {what}: the interval does not lie above {points_text(-margin)}."


def look_text(study: StudyRecords, primary: Difference) -> str:
    """Which look this is; empty without looks."""
    looks, look = study.looks, study.look
    if not looks:
        return ""
    rest = "" if look == len(looks) else f"Runs of later seeds do not count until all arms have {looks[look]} seeds."
    if not look:
        return f"None of the {count_of(len(looks), 'look')} that the study declared has been reached. {rest}"
    text = (
        f"Look {look} of {len(looks)}: {looks[look - 1]} of {looks[-1]} seeds. Intervals have a nominal confidence of "
        f"{percent_text(confidence_of(study))}. The study may be decided now: its looks were fixed before the first "
        "run and divide an error of 5 % among them (alpha spending, O'Brien-Fleming type)."
    )
    if is_decided(study, primary):
        return f"{text} The primary comparison is decided" + (": no more seeds are needed." if rest else ".")
    return f"{text} The primary comparison is not decided." + f" {rest}".rstrip()


def meaning_of(study: StudyRecords, difference: Difference) -> str:
    """What the verdict means, for a first reader."""
    smallest = study.design.smallest_effect
    size = count_of(100 * smallest, "point")
    arm, other = study.label(difference.arm), study.label(difference.baseline)
    effect = difference.overall
    if effect is None:
        return "“Too few data” means that no conclusion is possible: there is nothing to compare yet."
    if len(difference.seeds) < LEAST_SEEDS:
        return (
            f"“Too few data” means that no conclusion is possible: with fewer than {LEAST_SEEDS} seeds it is unknown "
            "how much the result depends on the seed."
        )
    if difference.verdict in ("better", "worse"):
        side = "above" if difference.verdict == "better" else "below"
        text = (
            f"“{difference.verdict.capitalize()}” means that the whole interval lies {side} 0: chance in seeds "
            f"and questions alone is unlikely to make {arm} differ this much from {other}."
        )
        if min(abs(effect.low), abs(effect.high)) < smallest:
            text += f" The true difference may still be smaller than {size}, the smallest that matters here."
        return text
    if difference.verdict == "no difference shown":
        return (
            f"“No difference shown” means that the interval contains 0 and lies within ±{size}: a difference, if any, "
            "is too small to matter here."
        )
    if difference.verdict == "not worse":
        margin = count_of(100 * (study.design.margin or 0), "point")
        return (
            f"“Not worse” means that the interval contains 0 and lies above −{margin}, the margin that was declared "
            "before the study began. It does not say whether there is a difference."
        )
    return (
        f"“Too few data” means that the interval contains 0 and reaches beyond ±{size}: the study shows neither a "
        "difference nor that any difference is too small to matter."
    )


def power_lines(study: StudyRecords) -> list[str]:
    """The estimate from before the confirmation runs."""
    found = study.file.power
    if found is None:
        return []
    least = found.smallest_detectable
    return [
        "Before its confirmation runs, the study was estimated to detect a true difference of "
        f"{count_of(100 * found.effect, 'point')} in {found.power:.0%} of cases; "
        + (
            "no difference would be detected in 80 %"
            if least is None
            else f"in 80 % of cases it would detect one of {count_of(round(100 * least, 2), 'point')}"
        )
        + f". Source of the noise: {found.source}."
    ]


def state_text(study: StudyRecords, primary: Difference) -> str:
    missing = missing_runs(study, primary)
    if not missing:
        return ""
    tuning = sum(key.stage == "tuning" for key in missing)
    if tuning == len(missing):
        tuning_text = f"{tuning} tuning"
    elif tuning:
        tuning_text = f"{tuning} tuning and {len(missing) - tuning} confirmation"
    else:
        tuning_text = f"{len(missing)} confirmation"
    return (
        f"This study is not complete: {tuning_text} runs of {len(study.expected)} in all are missing. "
        "Do not base decisions on these numbers."
    )


def is_search(study: StudyRecords) -> bool:
    """Whether the study looks for settings, on rows that can't confirm them too."""
    return study.design.score_on == "validation"


def notices(study: StudyRecords, primary: Difference) -> list[str]:
    """Warnings: missing runs, unpaired arms, rows that were used to choose settings."""
    found = [state] if (state := state_text(study, primary)) else []
    if is_search(study):
        found.append(
            "The confirmation runs were scored on validation rows: this is a search for settings, whose result "
            "is still to be confirmed on test rows."
        )
    commits = sorted({str(run["commit"]) for run in study.runs if "commit" in run})
    if len(commits) > 1:
        found.append(f"The runs were made by different commits ({joined(commits)}): they may not be comparable.")
    return found + dull_tasks(study) + check_pairing(study)[1]


def dull_tasks(study: StudyRecords) -> list[str]:
    """Warnings of tasks where arms can't differ: in all runs nearly all answers are the same, right or wrong. [O]"""
    dull: dict[str, list[bool]] = {}
    for side in study.sides:
        for run in study.confirmation(side).values():
            for result in results(run, echo=side_of(side)[1]):
                said = Counter(result.get("predictions", [])).most_common(1)
                says_one = bool(said) and said[0][1] >= DULL * len(result["correct_per_row"])
                right = sum(result["correct_per_row"]) / len(result["correct_per_row"])
                dull.setdefault(result["task"], []).append(says_one or not 1 - DULL < right < DULL)
    return [
        f"Task {task} can show no difference: in every run nearly all answers are the same, or right, or wrong. It "
        "only makes the overall difference smaller."
        for task, runs in dull.items()
        if all(runs)
    ]


def missing_lines(missing: list[RunKey]) -> list[str]:
    """The missing runs; those of an arm with the same missing seeds share a line."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for run in missing:
        rate = "" if run.learning_rate is None else f"{run.learning_rate:g}"
        seeds.setdefault((run.stage, run.arm, rate), []).append(run.seed)
    rates: dict[tuple[str, str, str], list[str]] = {}
    for (stage, arm, rate), found in seeds.items():
        rates.setdefault((stage, arm, joined(found)), []).append(rate)
    lines = []
    for (stage, arm, seed_text), found_rates in rates.items():
        rate_text = f", learning rate{'s' * (len(found_rates) > 1)} {joined(found_rates)}" if found_rates[0] else ""
        lines.append(f"missing: {stage} of {arm}{rate_text}, seed{'s' * (',' in seed_text)} {seed_text}")
    return lines


def check_pairing(study: StudyRecords) -> tuple[list[str], list[str]]:
    """Whether runs are paired: the statement, and the warnings."""
    pairing = Pairing(study.runs)
    warnings = []
    for what, by_value in pairing.broken:
        groups = [
            f"{'; '.join(sorted({study.label(key.arm) for key in keys}))} ({value[:12]}{'…' * (len(value) > 12)})"
            for value, keys in by_value.items()
        ]
        one = next(iter(by_value.values()))[0]
        where = f"in {one.stage} seed {one.seed} " if what == START else ""
        warnings.append(
            f"Not paired: {where}the arms did not {what}: {' and '.join(groups)}. Differences between them are not due "
            "to the method alone."
        )
    starts = {group: by_value for (what, group), by_value in pairing.groups.items() if what == START}
    if any(len(by_value) > 1 for by_value in starts.values()):
        return ["Within a seed, arms did not all start from the same adapter: see the warning above."], warnings
    if all(len({key.arm for keys in by_value.values() for key in keys}) == 1 for by_value in starts.values()):
        return [], warnings
    kinds = {json.dumps(json.loads(group)[1:]) for group in starts}
    each = "Within each seed, all arms" if len(kinds) == 1 else "Within each seed, all arms with adapters of one kind"
    return [f"{each} started from the same adapter: their sha256 before training is equal (checked)."], warnings
