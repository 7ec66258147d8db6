"""Is one arm better than another? Verdicts and intervals for paired answers.

The data. Both arms answer the same questions after training from the same seeds. D[s, q] in {-1, 0, 1} is "the arm is
right" minus "the baseline is right" at seed s and question q. The effect is the mean of D over seeds and questions,
then over tasks with equal weights. Seeds and questions are crossed, not nested: every seed answers the same questions,
so a question that suits the arm does so at every seed, and this chance does not shrink with more seeds.

The interval. Two-level paired bootstrap: seeds are resampled, the same for all tasks, then questions within each task,
the same for all seeds (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1:386). Resampling
questions separately in every seed would treat them as S·Q different ones and give intervals that are too narrow. With
few seeds plain percentiles are wrong too, so the draws give the shape of the interval, and three corrections its width:

    variance     the draws understate the variance between seeds by (S - 1)/S and count the rest (interaction and
                 chance, E) up to three times. They are rescaled to the variance of the mean in the two-way random
                 model, V = A + max(B - E, 0), where A, B are the variance between means of seeds, of questions, over
                 their number, and E = MS_rest/(S·Q). A is expected to be at least E, so A = max(A, E) [O].
    quantiles    each draw's deviation is divided by sqrt(χ²_df/df), which gives it the tails of t instead of the
                 normal's: the expanded percentile interval of Hesterberg (2015, "What teachers should know about the
                 bootstrap", The American Statistician 69:371), for two factors. df = (S - 1)·(V/A)²: S - 1 if seeds
                 are the only noise, more if questions are most of it (Hillis 2007, Statistics in Medicine 26:596, for
                 readers and cases, which are crossed in the same way); at most that of the questions.
    few events   if the arms differ on hardly any question, their spread can't be estimated. V is at least 2/Q²: two
                 imagined questions, one for each arm, which is about the rule of three (no event in Q allows 3/Q).
                 The draws then have no shape, and t alone is used. So it is if the confidence is so high that fewer
                 than 5 draws lie beyond an end.

Under the null, with 3, 5 and 10 seeds, a standard deviation of 0, 1 and 2 points between seeds, and a correlation of 0
to 0.8 between seeds' answers to a question, 0 to 6 % of studies gave `better` or `worse`, up to 3 % `better`. With 5
seeds and 3 points it was 6.6 %, `better` 3.4 % (1,000 studies, ±0.7): df is a little high if seeds are most but not all
of the noise. tests/test_statistics.py holds the bounds. With t at S - 1 instead, the interval of 5 seeds would be up to
1.4 times as wide if questions are the noise: an effect would need twice the questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from echo_lora.errors import EchoDataError

Verdict = Literal["better", "worse", "no difference shown", "not worse", "too few data"]

VERDICTS: tuple[Verdict, ...] = ("better", "worse", "no difference shown", "not worse", "too few data")

# Two seeds say almost nothing about how much seeds differ: with 500 questions, the half-widths of their intervals in
# null studies are 3 to 21 points, those of three seeds 3 to 6. [O]
LEAST_SEEDS = 3

# Draws beyond an end of the interval, on average; with fewer the end is uncertain. 10,000 draws allow 0.999. [O]
LEAST_BEYOND = 5

# Random numbers in memory at a time.
CHUNK = 4_000_000

Correct = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Effect:
    """A difference in accuracy, arm minus baseline, as a share (0.01 is one point), its interval and two-sided p."""

    estimate: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class TaskEffect(Effect):
    """The effect on one task; per-seed values are in the order of the seeds.

    p_holm: p_value adjusted for the number of tasks (Holm). p_mcnemar: exact McNemar test within each seed, which
    accounts for questions only. only_arm, only_baseline: numbers of questions that only this one answered correctly.
    """

    p_holm: float
    p_mcnemar: tuple[float, ...]
    only_arm: tuple[int, ...]
    only_baseline: tuple[int, ...]
    questions: int


@dataclass(frozen=True)
class Comparison:
    """One arm against another. Made by `compare_arms`.

    overall: unweighted mean over tasks, the only basis of the verdict. is_not_worse: whether the arm is shown to be not
    worse by more than the margin, whatever the verdict; None without a margin.
    """

    verdict: Verdict
    overall: Effect
    tasks: dict[str, TaskEffect]
    is_not_worse: bool | None


# ------------------------------------------------------------------ the verdict


def compare_arms(
    arm: str,
    baseline: str,
    correct_arm: Correct,
    correct_baseline: Correct,
    *,
    smallest_effect: float,
    margin: float | None = None,
    seed: int = 0,
    draws: int = 10_000,
    confidence: float = 0.95,
) -> Comparison:
    """Whether an arm is better than the baseline: see the module's docstring, and `verdict_of` for the rule.

    correct_arm, correct_baseline: by task, bool (S, Q) whether the answer was right; row s is the same seed and column
    q the same question in both, and every task has the same S seeds. smallest_effect: smallest difference of
    interest, as a share. The same arguments give the same numbers. No p of the bootstrap is below 2/(draws + 1). With
    one seed every interval is [-1, 1]. Raises EchoDataError if the arrays don't pair.
    """
    first, second = paired_answers(arm, baseline, correct_arm, correct_baseline)
    differences = {task: first[task].astype(np.int8) - second[task].astype(np.int8) for task in first}  # (S, Q) each
    deviations = _resample(list(differences.values()), draws, np.random.default_rng(seed))  # (tasks, draws)
    overall = _effect(list(differences.values()), deviations.mean(axis=0), confidence, seed)
    effects = [
        _effect([difference], deviations[i], confidence, seed) for i, difference in enumerate(differences.values())
    ]
    holm = _holm([effect.p_value for effect in effects])
    seeds = len(next(iter(differences.values())))
    return Comparison(
        verdict=verdict_of(overall.low, overall.high, smallest_effect, margin, seeds),
        overall=overall,
        tasks={
            task: _task_effect(effect, float(p), first[task], second[task])
            for task, effect, p in zip(differences, effects, holm, strict=True)
        },
        is_not_worse=None if margin is None else seeds >= LEAST_SEEDS and overall.low > -margin,
    )


def mcnemar_exact(only_arm: int, only_baseline: int) -> float:
    """Two-sided p of the exact McNemar test: each question that only one run got right is a fair coin."""
    total = only_arm + only_baseline
    return float(stats.binomtest(only_arm, total, 0.5).pvalue) if total else 1.0


def verdict_of(low: float, high: float, smallest_effect: float, margin: float | None, seeds: int) -> Verdict:
    """The first of these that applies:

        too few data          with fewer than 3 seeds
        better, worse         the interval of the overall effect lies above, below 0
        no difference shown   it contains 0 and lies inside ±smallest_effect
        not worse             it contains 0 and lies above -margin, if there is one
        too few data          anything else

    A `better` effect may still be smaller than the smallest one of interest. `not worse` is a one-sided test of
    non-inferiority at (1 - confidence)/2 (CONSORT: Piaggio et al. 2012, JAMA 308:2594).
    """
    if seeds < LEAST_SEEDS:
        return "too few data"
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    if -smallest_effect < low and high < smallest_effect:
        return "no difference shown"
    return "not worse" if margin is not None and low > -margin else "too few data"


def _holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for their number. A single one stays as it is, without a second of import."""
    if len(p_values) == 1:
        return np.array(p_values)
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="holm")[1]


def _task_effect(effect: Effect, p_holm: float, first: np.ndarray, second: np.ndarray) -> TaskEffect:
    only_arm = tuple(int(n) for n in (first & ~second).sum(axis=1))
    only_baseline = tuple(int(n) for n in (second & ~first).sum(axis=1))
    return TaskEffect(
        **asdict(effect),
        p_holm=p_holm,
        p_mcnemar=tuple(mcnemar_exact(b, c) for b, c in zip(only_arm, only_baseline, strict=True)),
        only_arm=only_arm,
        only_baseline=only_baseline,
        questions=first.shape[1],
    )


# ----------------------------------------------------------------- the interval


@dataclass(frozen=True)
class Moments:
    """The mean over tasks in the two-way random model; each field has the leading axes of the data.

    has_shape: False if the least variance is used instead of the data's, so that a bootstrap has no shape.
    """

    estimate: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    has_shape: np.ndarray


def moments_of(differences: Sequence[np.ndarray]) -> Moments:
    """Mean of D, its variance and degrees of freedom. differences: (..., S, Q_t) by task, S at least 2."""
    tasks, seeds = len(differences), differences[0].shape[-2]
    per_seed: Any = 0.0  # (..., S), mean over tasks
    rest: Any = 0.0  # E
    of_questions: Any = 0.0  # B - E
    least = 0.0
    for difference in differences:
        questions = difference.shape[-1]
        by_seed = difference.mean(axis=-1, dtype=np.float64)  # (..., S)
        by_question = difference.mean(axis=-2, dtype=np.float64)  # (..., Q)
        squares = np.square(difference, dtype=np.float64).mean(axis=(-2, -1)) - np.square(by_seed.mean(axis=-1))
        between_seeds, between_questions = by_seed.var(axis=-1), by_question.var(axis=-1)
        chance = squares - between_seeds - between_questions  # of D, not explained by seed or question
        chance = np.maximum(chance, 0) / ((seeds - 1) * max(questions - 1, 1))
        per_seed = per_seed + by_seed / tasks
        rest = rest + chance / tasks**2
        of_questions = of_questions + (between_questions / max(questions - 1, 1) - chance) / tasks**2
        least = max(least, 2 / (questions * tasks) ** 2)
    of_seeds = np.maximum(per_seed.var(axis=-1, ddof=1) / seeds, rest)  # A
    variance = of_seeds + np.maximum(of_questions, 0)  # V
    most_df = max(sum(difference.shape[-1] - 1 for difference in differences), 1)
    ratio = np.divide(variance, of_seeds, out=np.full_like(variance, np.inf), where=of_seeds > 0)
    return Moments(
        estimate=per_seed.mean(axis=-1),
        variance=np.maximum(variance, least),
        df=np.minimum((seeds - 1) * ratio**2, most_df),
        has_shape=variance > least,
    )


def interval_of(moments: Moments, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The interval of t with the moments' variance, without a bootstrap."""
    half = stats.t.ppf(0.5 + confidence / 2, moments.df) * np.sqrt(moments.variance)
    return np.maximum(moments.estimate - half, -1), np.minimum(moments.estimate + half, 1)


def _resample(differences: Sequence[np.ndarray], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of D in resampled seeds and questions, minus the mean of D: float (tasks, draws)."""
    seeds = len(differences[0])
    seed_shares = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds  # (draws, S)
    found = np.empty((len(differences), draws))
    for i, difference in enumerate(differences):
        questions = difference.shape[1]
        # Equal columns are one question with a larger count: the same draws, much faster. They stay in the order of
        # their first appearance, so that swapped arms have mirrored draws.
        columns, first, counts = np.unique(difference, axis=1, return_index=True, return_counts=True)
        order = np.argsort(first)
        columns, counts = columns[:, order].astype(np.float64), counts[order]  # (S, U), (U,)
        step = max(CHUNK // len(counts), 1)
        for start in range(0, draws, step):
            shares = seed_shares[start : start + step]
            resampled = rng.multinomial(questions, counts / questions, len(shares)) / questions  # (step, U)
            found[i, start : start + step] = ((resampled @ columns.T) * shares).sum(axis=1)
        found[i] -= difference.mean()
    return found


def _effect(differences: Sequence[np.ndarray], deviations: np.ndarray, confidence: float, seed: int) -> Effect:
    """The effect whose resampled means, minus their centre, are `deviations` (draws,).

    The tails are the same for every effect, so that a single task has the interval of the whole.
    """
    if len(differences[0]) < 2:
        return Effect(float(np.mean([difference.mean() for difference in differences])), -1.0, 1.0, 1.0)
    moments = moments_of(differences)
    estimate, se, df = float(moments.estimate), float(np.sqrt(moments.variance)), float(moments.df)
    spread = float(deviations.std())
    if not moments.has_shape or spread == 0 or len(deviations) * (0.5 - confidence / 2) < LEAST_BEYOND:
        low, high = interval_of(moments, confidence)
        return Effect(estimate, float(low), float(high), float(2 * stats.t.sf(abs(estimate) / se, df)))
    tails = np.sqrt(df / np.random.default_rng([seed, 1]).chisquare(df, len(deviations)))
    draws = estimate + deviations * (se / spread) * tails
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p_value = min(2 * (beyond + 1) / (len(draws) + 1), 1.0)
    return Effect(estimate, float(max(low, -1)), float(min(high, 1)), p_value)


# ------------------------------------------------------------------------ checks


def paired_answers(
    arm: str, baseline: str, correct_arm: Correct, correct_baseline: Correct
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Both arms' answers as bool (S, Q) by task, in the arm's order of tasks."""
    where = f"{arm} against {baseline}"
    if only := sorted(set(correct_arm) ^ set(correct_baseline)):
        raise EchoDataError(
            f"{where}: only one of them has the task {', '.join(only)}. Compare them on tasks that both answered."
        )
    if not correct_arm:
        raise EchoDataError(f"{where}: there is no task. Score both on at least one.")
    first = {task: np.asarray(rows, dtype=np.bool_) for task, rows in correct_arm.items()}
    second = {task: np.asarray(correct_baseline[task], dtype=np.bool_) for task in first}
    for task in first:
        if first[task].shape != second[task].shape:
            raise EchoDataError(
                f"{where}, task {task}: {arm} has shape {first[task].shape} and {baseline} {second[task].shape} "
                "(seeds, questions). Score both on the same questions, after runs of the same seeds."
            )
    return first, second
