"""Power: how many seeds and questions show an effect of a given size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from echo_lora.errors import EchoConfigError
from echo_lora.study.statistics import (
    CHUNK,
    LEAST_SEEDS,
    VERDICTS,
    Correct,
    Moments,
    check_numbers,
    interval_of,
    moments_of,
    paired_differences,
    sizes,
    verdict_of,
)

POWER_WANTED = 0.8

# Correlation between seeds of D at one question that a power estimate assumes where no pilot tells. [O]
QUESTION_CORRELATION = 0.2


@dataclass(frozen=True)
class Power:
    """What a study of a given size would find, and what was assumed. Made by `power`.

    shares: of simulated studies, by verdict. power: that of `better`, or of `worse` for an effect below 0.
    smallest_detectable: effect with a power of 0.8; None if no effect has it.
    """

    effect: float
    power: float
    shares: dict[str, float]
    smallest_detectable: float | None
    seeds: int
    questions: tuple[int, ...]
    accuracy: float
    discordance: float
    seed_sd: float
    question_correlation: float
    smallest_effect: float
    margin: float | None
    confidence: float
    trials: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"questions": list(self.questions)}


# --------------------------------------------------------------------- the power


def power(
    effect: float,
    *,
    seeds: int,
    questions: int | Sequence[int],
    accuracy: float,
    discordance: float,
    seed_sd: float,
    smallest_effect: float,
    margin: float | None = None,
    question_correlation: float = QUESTION_CORRELATION,
    confidence: float = 0.95,
    trials: int = 1000,
    seed: int = 0,
) -> Power:
    """How often a study of this size would give each verdict if the effect were `effect`, by simulation.

    questions: of each task. The rest as in `simulate`. The verdicts are those of the interval by t, which the
    bootstrap of `compare_arms` only reshapes: a study takes microseconds. Raises EchoConfigError for a number that
    means nothing.
    """
    check_numbers(smallest_effect, margin, confidence)
    noise = _Noise(seeds, sizes(questions), accuracy, discordance, seed_sd, question_correlation)
    if trials < 1:
        raise EchoConfigError(f"trials = {trials} must be at least 1; 1000 is the default.")
    moments = _simulated(effect, noise, trials, seed)
    ends = zip(*interval_of(moments, confidence), strict=True) if seeds > 1 else [(-1.0, 1.0)] * trials
    verdicts = [verdict_of(low, high, smallest_effect, margin, seeds) for low, high in ends]
    shares: dict[str, float] = {verdict: verdicts.count(verdict) / trials for verdict in VERDICTS}
    return Power(
        effect=effect,
        power=shares["worse" if effect < 0 else "better"],
        shares=shares,
        smallest_detectable=_smallest_detectable(noise, confidence, min(trials, 1000), seed),
        seeds=seeds,
        questions=noise.questions,
        accuracy=accuracy,
        discordance=discordance,
        seed_sd=seed_sd,
        question_correlation=question_correlation,
        smallest_effect=smallest_effect,
        margin=margin,
        confidence=confidence,
        trials=trials,
    )


def smallest_detectable(
    *,
    seeds: int,
    questions: int | Sequence[int],
    accuracy: float,
    discordance: float,
    seed_sd: float,
    question_correlation: float = QUESTION_CORRELATION,
    confidence: float = 0.95,
    trials: int = 1000,
    seed: int = 0,
) -> float | None:
    """The effect that is found `better` in 80 % of studies of this size; None if none is. Arguments as in `power`."""
    noise = _Noise(seeds, sizes(questions), accuracy, discordance, seed_sd, question_correlation)
    return _smallest_detectable(noise, confidence, trials, seed)


def simulate(
    effect: float,
    seeds: int,
    questions: int | Sequence[int],
    accuracy: float,
    discordance: float,
    seed_sd: float,
    rng: np.random.Generator,
    *,
    question_correlation: float = QUESTION_CORRELATION,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Predictions of two arms whose true difference is `effect`, as `compare_arms` takes them.

    At seed s the true difference is e_s ~ N(effect, seed_sd²), the same for all tasks. A run of the baseline is right
    with probability `accuracy`; the two runs of a seed disagree on a share `discordance` of the questions, which is
    raised to |e_s| where it is below. question_correlation: correlation between two seeds of D at one question, a
    little less where seeds differ; what an arm gets right repeats itself likewise. An accuracy near 0 or 1 gives way
    where it leaves no room for the difference. Tasks are named "task 1" and so on. Raises EchoConfigError for a number
    that means nothing.
    """
    noise = _Noise(seeds, sizes(questions), accuracy, discordance, seed_sd, question_correlation)
    first, second = {}, {}
    by_seed = _true_effects(effect, noise, 1, rng)
    for i, size in enumerate(noise.questions, start=1):
        levels, bounds = _levels(by_seed, size, noise, rng)
        both, baseline, arm = (bound[0] for bound in bounds)
        first[f"task {i}"] = (levels[0] < both) | ((levels[0] >= baseline) & (levels[0] < arm))
        second[f"task {i}"] = levels[0] < baseline
    return first, second


def estimate_noise(correct_arm: Correct, correct_baseline: Correct) -> dict[str, float]:
    """What `power` needs to know of the noise, from a pilot such as tuning runs: arrays as for `compare_arms`.

    accuracy (of the baseline), discordance and seed_sd, which is 0 with one seed; question_correlation too, where the
    pilot has more than one seed and tells. seed_sd is what remains of the spread of seeds' differences after what the
    questions' chance explains; with few seeds it is a rough guess. Raises EchoDataError if the arrays don't pair.
    """
    first, second = paired_differences("the arm", "the baseline", correct_arm, correct_baseline)
    differences = [first[task].astype(np.int8) - second[task].astype(np.int8) for task in first]
    found = {
        "accuracy": float(np.mean([rows.mean() for rows in second.values()])),
        "discordance": float(np.mean([np.abs(difference).mean() for difference in differences])),
        "seed_sd": 0.0,
    }
    seeds = len(differences[0])
    if seeds < 2:
        return found
    per_seed = np.mean([difference.mean(axis=1) for difference in differences], axis=0)  # (S,)
    chance_of_mean, repeated, chance = 0.0, 0.0, 0.0
    for difference in differences:
        questions = difference.shape[1]
        rows, columns = difference.mean(axis=1, keepdims=True), difference.mean(axis=0, keepdims=True)
        rest = np.square(difference - rows - columns + difference.mean()).sum()
        rest /= (seeds - 1) * max(questions - 1, 1)  # mean square of interaction and chance
        chance_of_mean += rest / questions / len(differences) ** 2
        repeated += columns.var() * questions / max(questions - 1, 1) - rest / seeds
        chance += rest
    found["seed_sd"] = float(np.sqrt(max(per_seed.var(ddof=1) - chance_of_mean, 0)))
    if repeated + chance > 0:
        found["question_correlation"] = float(np.clip(repeated / (repeated + chance), 0, 1))
    return found


@dataclass(frozen=True)
class _Noise:
    """The assumptions of a simulated study, checked."""

    seeds: int
    questions: tuple[int, ...]
    accuracy: float
    discordance: float
    seed_sd: float
    question_correlation: float

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise EchoConfigError(f"seeds = {self.seeds} must be at least 1.")
        if not self.questions or min(self.questions) < 1:
            raise EchoConfigError(f"questions = {list(self.questions)} must be numbers of questions, at least 1 each.")
        for name in ("accuracy", "discordance", "question_correlation"):
            if not 0 <= getattr(self, name) <= 1:
                raise EchoConfigError(f"{name} = {getattr(self, name)} must be a share, from 0 to 1.")
        if not 0 <= self.seed_sd < 1:
            raise EchoConfigError(f"seed_sd = {self.seed_sd} must be a share, from 0 to below 1; 0.01 is one point.")


def _true_effects(effect: float, noise: _Noise, trials: int, rng: np.random.Generator) -> np.ndarray:
    """The true difference at each seed: float (trials, S)."""
    if not -1 <= effect <= 1:
        raise EchoConfigError(f"effect = {effect} must be a difference of shares, from -1 to 1; 0.01 is one point.")
    return np.clip(effect + noise.seed_sd * rng.standard_normal((trials, noise.seeds)), -1, 1)


def _levels(
    by_seed: np.ndarray, questions: int, noise: _Noise, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """How hard each question is to each run, uniform (trials, S, Q), and the bounds (trials, S, 1) of what follows.

    Below the first bound both are right, up to the second the baseline alone, up to the third the arm alone. A level
    is the question's own with probability sqrt(question_correlation), so at two seeds with that correlation.
    """
    trials, seeds = by_seed.shape
    repeats = np.float32(np.sqrt(noise.question_correlation))
    levels = rng.random((trials, seeds, questions), dtype=np.float32)
    common = rng.random((trials, 1, questions), dtype=np.float32)
    fresh = (levels - repeats) / max(np.float32(1) - repeats, np.float32(1e-6))
    levels = np.where(levels < repeats, common, fresh)
    discordance = np.maximum(noise.discordance, np.abs(by_seed))
    arm, baseline = (discordance + by_seed) / 2, (discordance - by_seed) / 2
    accuracy = np.clip(noise.accuracy, baseline, 1 - arm)
    bounds = tuple(bound[:, :, None].astype(np.float32) for bound in (accuracy - baseline, accuracy, accuracy + arm))
    return levels, bounds


def _simulated(effect: float, noise: _Noise, trials: int, seed: int) -> Moments:
    """The moments of simulated studies, each field (trials,)."""
    rng = np.random.default_rng(seed)
    step = max(CHUNK // (noise.seeds * max(noise.questions)), 1)
    found = [
        moments_of(list(_simulated_differences(effect, noise, min(step, trials - start), rng)))
        for start in range(0, trials if noise.seeds > 1 else 0, step)
    ]
    names = ("estimate", "variance", "df", "has_shape")
    return Moments(*(np.concatenate([getattr(part, name) for part in found] or [np.empty(0)]) for name in names))


def _simulated_differences(effect: float, noise: _Noise, trials: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """D by task, int8 (trials, S, Q)."""
    by_seed = _true_effects(effect, noise, trials, rng)
    for size in noise.questions:
        levels, (both, baseline, arm) = _levels(by_seed, size, noise, rng)
        yield ((levels >= baseline) & (levels < arm)).astype(np.int8) - ((levels >= both) & (levels < baseline))


def _smallest_detectable(noise: _Noise, confidence: float, trials: int, seed: int) -> float | None:
    """Fixed point: where studies of effect e lie e too high or too low for 80 % of them to be above 0."""
    if noise.seeds < LEAST_SEEDS:
        return None
    effect = 0.0
    for _ in range(3):  # the spread hardly depends on the effect; the second round already moves it by under 2 %
        moments = _simulated(effect, noise, trials, seed)
        half = stats.t.ppf(0.5 + confidence / 2, moments.df) * np.sqrt(moments.variance)
        effect = float(np.quantile(half - (moments.estimate - effect), POWER_WANTED))
        if effect >= 1:
            return None
    return effect
