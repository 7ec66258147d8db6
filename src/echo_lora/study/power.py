"""Power: how likely a study of a given size is to show an effect of a given size, by simulation.

At seed s the true difference is e_s ~ N(effect, seed_sd²), the same for all tasks. A run of the baseline is right with
probability `accuracy`. The two runs of a seed disagree on a share `discordance` of the questions, at least |e_s|. An
accuracy near 0 or 1 is moved if it leaves no room for the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from scipy import stats

from echo_lora.study.statistics import (
    CHUNK,
    LEAST_SEEDS,
    VERDICTS,
    Correct,
    Moments,
    interval_of,
    moments_of,
    paired_answers,
    verdict_of,
)

POWER_WANTED = 0.8

Share = Annotated[float, Field(ge=0, le=1)]


class Noise(BaseModel):
    """The size of a study and the noise in its results. Raises ValidationError.

    question_correlation: correlation of D between two seeds at one question, a little less if seeds differ; the
    default is assumed without a pilot. [O]
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: PositiveInt
    questions: tuple[PositiveInt, ...] = Field(min_length=1)  # of each task
    accuracy: Share  # of the baseline
    discordance: Share
    seed_sd: float = Field(ge=0, lt=1)  # a share: 0.01 is one point
    question_correlation: Share = 0.2


class PowerEstimate(BaseModel):
    """What a study would find, with the assumptions as further fields.

    shares: shares of simulated studies by verdict. power: the share of `better`, or of `worse` for an effect below 0.
    smallest_detectable: effect with a power of 0.8; None if no effect has it.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    effect: float
    power: float
    shares: dict[str, float] = {}
    smallest_detectable: float | None
    source: str = "unknown"  # of the noise


def power(
    effect: float,
    noise: Noise,
    *,
    smallest_effect: float,
    margin: float | None = None,
    confidence: float = 0.95,
    trials: int = 1000,
    seed: int = 0,
    **notes: Any,
) -> PowerEstimate:
    """How often a study would give each verdict if the effect were `effect`.

    The verdicts use the interval of t, which the bootstrap of `compare_arms` only reshapes, so that a study takes
    microseconds. notes: further fields of the estimate.
    """
    moments = _simulated(effect, noise, trials, seed)
    ends = zip(*interval_of(moments, confidence), strict=True) if noise.seeds > 1 else [(-1.0, 1.0)] * trials
    verdicts = [verdict_of(low, high, smallest_effect, margin, noise.seeds) for low, high in ends]
    shares: dict[str, float] = {verdict: verdicts.count(verdict) / trials for verdict in VERDICTS}
    assumed = noise.model_dump(mode="json") | {
        "smallest_effect": smallest_effect,
        "margin": margin,
        "confidence": confidence,
        "trials": trials,
    }
    return PowerEstimate(
        effect=effect,
        power=shares["worse" if effect < 0 else "better"],
        shares=shares,
        smallest_detectable=_smallest_detectable(noise, confidence, min(trials, 1000), seed),
        **assumed | notes,
    )


def estimate_noise(correct_arm: Correct, correct_baseline: Correct) -> dict[str, float]:
    """Fields of `Noise` from a pilot such as tuning runs: arrays as for `compare_arms`.

    accuracy, discordance and seed_sd, which is 0 with one seed; also question_correlation if the pilot has several
    seeds and some difference. seed_sd is the spread of the seeds' differences that is not explained by chance in the
    questions; with few seeds it is a rough guess. Raises EchoDataError if the arrays don't pair.
    """
    first, second = paired_answers("the arm", "the baseline", correct_arm, correct_baseline)
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


def _simulated(effect: float, noise: Noise, trials: int, seed: int) -> Moments:
    """The moments of simulated studies, each field (trials,)."""
    rng = np.random.default_rng(seed)
    step = max(CHUNK // (noise.seeds * max(noise.questions)), 1)
    found = [
        moments_of(list(_simulated_differences(effect, noise, min(step, trials - start), rng)))
        for start in range(0, trials if noise.seeds > 1 else 0, step)
    ]
    names = ("estimate", "variance", "df", "has_shape")
    return Moments(*(np.concatenate([getattr(part, name) for part in found] or [np.empty(0)]) for name in names))


def _simulated_differences(effect: float, noise: Noise, trials: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """D by task, int8 (trials, S, Q).

    The level of a question in a run is uniform. With probability sqrt(question_correlation) it is the question's own,
    so that two seeds share it with that correlation. Below a first bound both runs are right, up to a second only the
    baseline, up to a third only the arm.
    """
    by_seed = np.clip(effect + noise.seed_sd * rng.standard_normal((trials, noise.seeds)), -1, 1)
    discordance = np.maximum(noise.discordance, np.abs(by_seed))
    only_arm, only_baseline = (discordance + by_seed) / 2, (discordance - by_seed) / 2
    accuracy = np.clip(noise.accuracy, only_baseline, 1 - only_arm)
    bounds = (accuracy - only_baseline, accuracy, accuracy + only_arm)
    both, baseline, arm = (bound[:, :, None].astype(np.float32) for bound in bounds)  # (trials, S, 1)
    repeats = np.float32(np.sqrt(noise.question_correlation))
    for questions in noise.questions:
        levels = rng.random((trials, noise.seeds, questions), dtype=np.float32)
        common = rng.random((trials, 1, questions), dtype=np.float32)
        fresh = (levels - repeats) / max(np.float32(1) - repeats, np.float32(1e-6))
        levels = np.where(levels < repeats, common, fresh)
        yield ((levels >= baseline) & (levels < arm)).astype(np.int8) - ((levels >= both) & (levels < baseline))


def _smallest_detectable(noise: Noise, confidence: float, trials: int, seed: int) -> float | None:
    """The effect at which 80 % of studies have an interval above 0, by fixed-point iteration."""
    if noise.seeds < LEAST_SEEDS:
        return None
    effect = 0.0
    for _ in range(3):  # the spread hardly depends on the effect: the second round changes it by less than 2 %
        moments = _simulated(effect, noise, trials, seed)
        half = stats.t.ppf(0.5 + confidence / 2, moments.df) * np.sqrt(moments.variance)
        effect = float(np.quantile(half - (moments.estimate - effect), POWER_WANTED))
        if effect >= 1:
            return None
    return effect
