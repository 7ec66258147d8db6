"""Verdicts on simulated data: how often each comes, what intervals contain; each part against a literal one."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from echo_lora.errors import EchoDataError
from echo_lora.study import power as power_module
from echo_lora.study import statistics
from echo_lora.study.design import Arm, Design
from echo_lora.study.folder import StudyFile, StudyRecords
from echo_lora.study.looks import boundaries, confidence_at
from echo_lora.study.power import Noise, estimate_noise, power
from echo_lora.study.report import verdict
from echo_lora.study.statistics import VERDICTS, compare_arms, mcnemar_exact

NOISE = {"accuracy": 0.6, "discordance": 0.15, "seed_sd": 0.01}


def simulate(effect, seeds, questions, accuracy, discordance, seed_sd, rng, *, question_correlation=0.2):
    """Answers of two arms whose true difference is `effect`, by task: what `power` simulates the differences of."""
    by_seed = np.clip(effect + seed_sd * rng.standard_normal((1, seeds)), -1, 1)[0, :, None]  # (S, 1)
    apart = np.maximum(discordance, np.abs(by_seed))
    only_arm, only_baseline = (apart + by_seed) / 2, (apart - by_seed) / 2
    accuracy = np.clip(accuracy, only_baseline, 1 - only_arm)
    both, right, arm = (x.astype(np.float32) for x in (accuracy - only_baseline, accuracy, accuracy + only_arm))
    repeats, first, second = np.float32(np.sqrt(question_correlation)), {}, {}
    for number, size in enumerate(np.atleast_1d(questions), start=1):
        own, common = rng.random((seeds, size), dtype=np.float32), rng.random((1, size), dtype=np.float32)
        fresh = (own - repeats) / max(np.float32(1) - repeats, np.float32(1e-6))
        level = np.where(own < repeats, common, fresh)  # how hard each question is to each run
        first[f"task {number}"] = (level < both) | ((level >= right) & (level < arm))
        second[f"task {number}"] = level < right
    return first, second


def power_of(effect, *, smallest_effect=0.01, margin=None, confidence=0.95, trials=1000, seed=0, questions, **noise):
    """The power of a study of this size."""
    questions = [questions] if isinstance(questions, int) else questions
    settings = {"smallest_effect": smallest_effect, "margin": margin, "confidence": confidence}
    return power(effect, Noise(questions=questions, **noise), **settings, trials=trials, seed=seed)


def verdicts(effect, trials, *, draws=400, smallest_effect=0.01, seed=0, **design):
    """Shares of the verdicts of `compare_arms` on simulated studies, and of intervals that contain the effect."""
    rng = np.random.default_rng(seed)
    shares = dict.fromkeys([*VERDICTS, "covered"], 0.0)
    for trial in range(trials):
        arms = simulate(effect, rng=rng, **design)
        found = compare_arms("arm", "baseline", *arms, smallest_effect=smallest_effect, draws=draws, seed=trial)
        shares[found.verdict] += 1 / trials
        shares["covered"] += (found.overall.low <= effect <= found.overall.high) / trials
    return shares


def within(share, expected, trials):
    """Whether a share of trials is what was expected, within 4 standard errors."""
    return abs(share - expected) < 4 * np.sqrt(max(expected * (1 - expected), 0.01) / trials)


def answers(seeds, questions, only_arm, only_baseline=0, *, seed=0):
    """Two arms of one task that differ on the first questions, in every seed."""
    base = np.random.default_rng(seed).random((seeds, questions)) < 0.5
    arm, baseline = base.copy(), base.copy()
    arm[:, : only_arm + only_baseline] = np.arange(only_arm + only_baseline) < only_arm
    baseline[:, : only_arm + only_baseline] = ~arm[:, : only_arm + only_baseline]
    return {"sums": arm}, {"sums": baseline}


# ---------------------------------------------------------- with no true effect


# In the second, seeds are most of the noise, and what t is for shows: beyond ±1.96, t of 4 degrees has 12 %.
@pytest.mark.parametrize("change", [{}, {"seed_sd": 0.03, "questions": 1000}], ids=["questions", "seeds"])
def test_with_no_effect_the_verdict_is_better_in_at_most_5_percent_of_1000_trials(change):
    shares = verdicts(0.0, 1000, **({"seeds": 5, "questions": 300} | NOISE | change))
    assert shares["better"] <= 0.05
    assert shares["worse"] <= 0.05
    assert shares["better"] + shares["worse"] <= 0.05 + 3 * 0.0069  # Monte-Carlo error


# ρ of 0.1 is the hardest for degrees of freedom, 0.8 for the t of few seeds; 0 is the case of independent seeds.
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.3, 0.8])
@pytest.mark.parametrize("seed_sd", [0.0, 0.01, 0.02])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_by_t_rejects_a_true_null_rarely(seeds, seed_sd, correlation):
    shares = power_of(
        0.0,
        seeds=seeds,
        questions=300,
        accuracy=0.6,
        discordance=0.15,
        seed_sd=seed_sd,
        question_correlation=correlation,
        smallest_effect=0.01,
        trials=2000,
    ).shares
    assert shares["better"] <= 0.035 + 0.005
    assert shares["better"] + shares["worse"] <= 0.05 + 3 * 0.0049


@pytest.mark.parametrize("questions", [[100, 300, 700], [40, 40]], ids=str)
def test_a_mean_over_tasks_rejects_a_true_null_rarely(questions):
    found = power_of(0.0, seeds=5, questions=questions, smallest_effect=0.01, trials=2000, **NOISE)
    assert found.shares["better"] + found.shares["worse"] <= 0.05 + 3 * 0.0049


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("seed_sd", [0.0, 0.01, 0.02])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_bootstrap_rejects_a_true_null_rarely(seeds, seed_sd, correlation):
    design = {"accuracy": 0.6, "discordance": 0.1, "seed_sd": seed_sd, "question_correlation": correlation}
    shares = verdicts(0.0, 1000, seeds=seeds, questions=300, **design)
    assert shares["better"] <= 0.05
    assert shares["better"] + shares["worse"] <= 0.05 + 3 * 0.0069


@pytest.mark.slow
def test_the_bootstrap_of_a_mean_over_tasks_rejects_a_true_null_rarely():
    shares = verdicts(0.0, 400, seeds=5, questions=[100, 300], **NOISE)
    assert shares["better"] + shares["worse"] <= 0.05 + 3 * 0.011


@pytest.mark.slow
@pytest.mark.parametrize(("questions", "discordance"), [(20, 0.1), (100, 0.02), (100, 0.3)])
def test_few_or_rare_questions_do_not_make_it_bold(questions, discordance):
    shares = verdicts(0.0, 1000, seeds=5, questions=questions, accuracy=0.7, discordance=discordance, seed_sd=0.0)
    assert shares["better"] + shares["worse"] <= 0.05
    assert shares["no difference shown"] == 0


# ------------------------------------------------------------ with a true effect


@pytest.mark.parametrize("effect", [0.03, -0.03])
def test_with_a_known_effect_the_verdict_comes_at_the_nominal_power(effect):
    design = {"seeds": 5, "questions": 400, **NOISE}
    nominal = power_of(effect, smallest_effect=0.01, trials=4000, **design)
    shares = verdicts(effect, 300, **design)
    assert 0.3 < nominal.power < 0.9  # neither is told from a mistake otherwise
    assert within(shares["better" if effect > 0 else "worse"], nominal.power, 300)
    assert shares["worse" if effect > 0 else "better"] <= 0.01
    assert within(shares["covered"], 0.96, 300)


def test_power_is_that_of_normal_theory_where_questions_are_the_only_noise():
    found = power_of(
        0.03,
        seeds=4,
        questions=1000,
        accuracy=0.6,
        discordance=0.1,
        seed_sd=0.0,
        question_correlation=1.0,
        smallest_effect=0.01,
        trials=4000,
    )
    se = np.sqrt((0.1 - 0.03**2) / 1000)
    assert within(found.power, stats.norm.sf(1.96 - 0.03 / se), 4000)


def test_power_is_that_of_the_t_test_where_seeds_are_the_only_noise():
    found = power_of(
        0.03, seeds=5, questions=5000, accuracy=0.5, discordance=0.0, seed_sd=0.02, smallest_effect=0.01, trials=4000
    )  # where discordance is |e_s|, questions add 0.03 · (1 - 0.03) / 5000
    t = stats.t.ppf(0.975, 4)
    expected = stats.nct.sf(t, 4, 0.03 / (0.02 / np.sqrt(5)))
    assert found.power == pytest.approx(expected, abs=0.04)


def test_the_smallest_detectable_effect_has_a_power_of_80_percent():
    design = {"seeds": 5, "questions": [300, 500], **NOISE}
    effect = power_of(0.0, **design).smallest_detectable
    assert 0.02 < effect < 0.05
    found = power_of(effect, smallest_effect=0.01, trials=4000, seed=1, **design)
    assert within(found.power, 0.8, 1000)
    assert found.smallest_detectable == pytest.approx(effect, rel=0.1)


def test_more_seeds_and_more_questions_give_more_power():
    def of(seeds, questions):
        return power_of(0.02, seeds=seeds, questions=questions, smallest_effect=0.01, **NOISE).power

    assert of(3, 500) + 0.03 < of(5, 500) < of(10, 500) - 0.03
    assert of(5, 200) + 0.03 < of(5, 2000)


def test_an_effect_of_the_smallest_size_is_rarely_taken_for_none():
    found = power_of(0.02, seeds=10, questions=2000, smallest_effect=0.02, trials=2000, **NOISE)
    assert found.shares["no difference shown"] <= 0.025 + 3 * 0.0035
    none = power_of(0.0, seeds=10, questions=2000, smallest_effect=0.02, trials=2000, **NOISE)
    assert none.shares["no difference shown"] > 0.8


def test_fewer_than_three_seeds_have_no_power():
    for seeds in (1, 2):
        found = power_of(0.3, seeds=seeds, questions=1000, smallest_effect=0.01, **NOISE)
        assert found.shares == dict.fromkeys(VERDICTS, 0) | {"too few data": 1}
        assert found.power == 0
        assert found.smallest_detectable is None


# ------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("low", "high", "seeds", "expected"),
    [
        (0.001, 0.3, 3, "better"),
        (0.001, 0.005, 3, "better"),  # smaller than what matters, and yet above 0
        (-0.3, -0.001, 3, "worse"),
        (-0.009, 0.009, 3, "no difference shown"),
        (0.0, 0.009, 3, "no difference shown"),
        (-0.009, 0.01, 3, "too few data"),
        (-0.01, 0.009, 3, "too few data"),
        (-0.1, 0.1, 50, "too few data"),
        (0.1, 0.2, 2, "too few data"),
        (-0.2, -0.1, 2, "too few data"),
        (-0.001, 0.001, 2, "too few data"),
    ],
)
def test_the_rule(low, high, seeds, expected):
    assert statistics.verdict_of(low, high, 0.01, None, seeds) == expected


@pytest.mark.parametrize(
    ("low", "high", "seeds", "expected"),
    [
        (0.001, 0.3, 3, "better"),
        (-0.015, -0.001, 3, "worse"),  # though by less than the margin
        (-0.009, 0.009, 3, "no difference shown"),
        (-0.019, 0.1, 3, "not worse"),
        (-0.019, 0.001, 3, "not worse"),
        (0.0, 0.01, 3, "not worse"),
        (-0.02, 0.1, 3, "too few data"),
        (-0.1, 0.1, 50, "too few data"),
        (-0.001, 0.3, 2, "too few data"),
    ],
)
def test_the_rule_with_a_margin(low, high, seeds, expected):
    assert statistics.verdict_of(low, high, 0.01, 0.02, seeds) == expected


@pytest.mark.parametrize(
    ("only_arm", "only_baseline", "margin", "word", "is_not_worse"),
    [
        (200, 20, 0.01, "better", True),
        (2, 2, 0.01, "no difference shown", True),
        (2, 2, 0.001, "no difference shown", False),
        (100, 90, 0.02, "not worse", True),
        (100, 90, 0.01, "too few data", False),
        (5, 30, 0.05, "worse", True),
        (5, 30, 0.01, "worse", False),
        (100, 90, None, "too few data", None),
    ],
)
def test_not_being_worse_is_told_beside_every_word(only_arm, only_baseline, margin, word, is_not_worse):
    data = answers(3, 1000, only_arm, only_baseline)
    found = compare_arms("a", "b", *data, smallest_effect=0.01, margin=margin, draws=1000)
    assert (found.verdict, found.is_not_worse) == (word, is_not_worse)
    two = compare_arms("a", "b", *answers(2, 1000, only_arm, only_baseline), smallest_effect=0.01, margin=margin)
    assert (two.verdict, bool(two.is_not_worse)) == ("too few data", False)


def test_an_arm_that_is_worse_by_the_margin_is_rarely_called_not_worse():
    design = {"seeds": 5, "questions": 1000, "smallest_effect": 0.001, "margin": 0.02, "trials": 2000, **NOISE}
    at_the_margin, equal = power_of(-0.02, **design).shares, power_of(0.0, **design).shares
    assert at_the_margin["not worse"] + at_the_margin["better"] <= 0.025 + 3 * 0.0035
    assert equal["not worse"] + equal["better"] > 0.4


@pytest.mark.parametrize(
    ("only_arm", "only_baseline", "expected"),
    [
        (200, 20, "better"),
        (20, 200, "worse"),
        (2, 2, "no difference shown"),
        (100, 90, "too few data"),
    ],
)
def test_the_words_on_data(only_arm, only_baseline, expected):
    found = compare_arms("a", "b", *answers(3, 1000, only_arm, only_baseline), smallest_effect=0.01, draws=1000)
    assert found.verdict == expected
    assert found.overall.estimate == pytest.approx((only_arm - only_baseline) / 1000)
    two = compare_arms("a", "b", *answers(2, 1000, only_arm, only_baseline), smallest_effect=0.01, draws=1000)
    assert two.verdict == "too few data"


@pytest.mark.parametrize(("questions", "expected"), [(200, "too few data"), (400, "no difference shown")])
def test_equal_answers_show_that_there_is_no_difference_only_if_they_are_many(questions, expected):
    found = compare_arms("a", "b", *answers(5, questions, 0), smallest_effect=0.01, draws=100)
    assert found.verdict == expected
    assert found.overall.estimate == 0
    assert found.overall.p_value == 1
    assert found.overall.high == pytest.approx(np.sqrt(2) / questions * stats.t.ppf(0.975, questions - 1))


def test_one_seed_leaves_everything_open():
    found = compare_arms("a", "b", *answers(1, 500, 100), smallest_effect=0.01, draws=100)
    assert (found.overall.low, found.overall.high, found.overall.p_value) == (-1, 1, 1)
    assert found.verdict == "too few data"
    assert found.tasks["sums"].p_mcnemar[0] < 1e-20


def test_copies_of_a_seed_do_not_make_questions_more():
    """Nested resampling would give 30 seeds with the same answers an interval that is a third as wide."""
    widths = []
    for seeds in (3, 30):
        effect = compare_arms("a", "b", *answers(seeds, 400, 30, 20), smallest_effect=0.01, draws=4000).overall
        widths.append(effect.high - effect.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt((50 / 400 - (10 / 400) ** 2) / 400), rel=0.05)


def test_the_verdict_rests_on_the_unweighted_mean_over_tasks():
    small, large = answers(5, 50, 25), answers(5, 950, 0, 95)
    arm = {"small": small[0]["sums"], "large": large[0]["sums"]}
    baseline = {"large": large[1]["sums"], "small": small[1]["sums"]}  # another order of tasks
    found = compare_arms("a", "b", arm, baseline, smallest_effect=0.01, draws=1000)
    assert found.overall.estimate == pytest.approx((0.5 - 0.1) / 2)
    assert found.tasks["small"].estimate == pytest.approx(0.5)
    assert found.tasks["large"].estimate == pytest.approx(-0.1)
    assert list(found.tasks) == ["small", "large"]
    assert found.tasks["large"].only_baseline == (95,) * 5
    assert found.tasks["large"].only_arm == (0,) * 5
    assert found.tasks["small"].questions == 50


def test_a_single_task_has_the_interval_of_the_whole():
    arms = simulate(0.02, 5, 300, **NOISE, rng=np.random.default_rng(0))
    found = compare_arms("a", "b", *arms, smallest_effect=0.01, draws=500)
    task = found.tasks["task 1"]
    assert (task.low, task.high, task.p_value) == (found.overall.low, found.overall.high, found.overall.p_value)
    assert task.p_holm == task.p_value


def test_interval_and_p_agree():
    rng = np.random.default_rng(3)
    for _ in range(40):
        arms = simulate(0.03, 5, 200, **NOISE, rng=rng)
        effect = compare_arms("a", "b", *arms, smallest_effect=0.01, draws=500).overall
        assert (effect.low > 0 or effect.high < 0) == (effect.p_value < 0.05) or 0.04 < effect.p_value < 0.06
        assert effect.low <= effect.estimate <= effect.high
        assert effect.p_value >= 2 / 501


# ---------------------------------------------------- each part, done literally


@pytest.mark.parametrize(("b", "c"), [(8, 2), (0, 5), (7, 7), (1, 0), (30, 12)])
def test_mcnemar_is_the_exact_test(b, c):
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar_exact(b, c) == pytest.approx(min(2 * tail, 1))
    assert mcnemar_exact(b, c) == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue)


def test_mcnemar_without_a_question_that_tells():
    assert mcnemar_exact(0, 0) == 1


def test_mcnemar_is_reported_per_seed():
    arm = np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]], dtype=bool)
    baseline = np.array([[0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]], dtype=bool)
    task = compare_arms("a", "b", {"t": arm}, {"t": baseline}, smallest_effect=0.01, draws=100).tasks["t"]
    assert task.only_arm == (6, 0, 2)
    assert task.only_baseline == (1, 0, 2)
    assert task.p_mcnemar == pytest.approx((2 * 8 / 128, 1, 1))


def test_holm_by_hand():
    assert statistics._holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    rng = np.random.default_rng(1)
    found = compare_arms(
        "a", "b", *simulate(0.03, 5, [200, 300, 400], **NOISE, rng=rng), smallest_effect=0.01, draws=500
    )
    p = [task.p_value for task in found.tasks.values()]
    step, expected = 0.0, dict.fromkeys(range(3), 0.0)
    for rank, i in enumerate(np.argsort(p)):
        step = expected[int(i)] = max(step, min((3 - rank) * p[i], 1))
    assert [task.p_holm for task in found.tasks.values()] == pytest.approx(list(expected.values()))
    assert max(expected.values()) > max(min(p), 0.001)


def literal_moments(differences):
    """Variance of the mean and its degrees of freedom, from the sums of squares of a two-way table."""
    tasks, seeds = len(differences), len(differences[0])
    grand = [d.mean() for d in differences]
    of_seeds = np.var([np.mean([d[s].mean() for d in differences]) for s in range(seeds)], ddof=1) / seeds
    rest = questions_part = 0.0
    for d, mean in zip(differences, grand, strict=True):
        size = d.shape[1]
        ss_rest = sum((d[s, q] - d[s].mean() - d[:, q].mean() + mean) ** 2 for s in range(seeds) for q in range(size))
        ms_rest = ss_rest / ((seeds - 1) * (size - 1))
        ms_questions = seeds * sum((d[:, q].mean() - mean) ** 2 for q in range(size)) / (size - 1)
        rest += ms_rest / (seeds * size) / tasks**2
        questions_part += (ms_questions - ms_rest) / (seeds * size) / tasks**2
    a = max(of_seeds, rest)
    v = a + max(questions_part, 0)
    least = max(2 / (tasks * d.shape[1]) ** 2 for d in differences)
    df = min((seeds - 1) * (v / a) ** 2, sum(d.shape[1] - 1 for d in differences))
    return np.mean(grand), max(v, least), df


@pytest.mark.parametrize("sizes", [[60], [30, 50, 80]], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_variance_and_degrees_of_freedom_are_those_of_the_two_way_table(sizes, seed):
    rng = np.random.default_rng(seed)
    arms = simulate(0.05, 4, sizes, 0.5, 0.4, 0.03, rng, question_correlation=[0, 0.1, 0.3, 0.8][seed])
    differences = [arms[0][task].astype(float) - arms[1][task] for task in arms[0]]
    found = statistics.moments_of(differences)
    assert (found.estimate, found.variance, found.df) == pytest.approx(literal_moments(differences))
    assert found.has_shape


def test_the_draws_are_those_of_resampled_seeds_and_questions():
    """Against one draw after another by index; seeds are common to the tasks, so their means correlate."""
    rng = np.random.default_rng(5)
    arms = simulate(0.05, 4, [30, 50], 0.5, 0.4, 0.15, rng, question_correlation=0.3)
    differences = [arms[0][task].astype(np.int8) - arms[1][task].astype(np.int8) for task in arms[0]]
    fast = statistics._resample(differences, 20_000, rng)
    literal = []
    for _ in range(20_000):
        seeds = rng.integers(0, 4, 4)
        literal.append(
            [d[np.ix_(seeds, rng.integers(0, d.shape[1], d.shape[1]))].mean() - d.mean() for d in differences]
        )
    literal = np.array(literal).T
    assert fast.std(axis=1) == pytest.approx(literal.std(axis=1), rel=0.03)
    assert np.corrcoef(fast)[0, 1] > 0.09
    assert np.corrcoef(fast) == pytest.approx(np.corrcoef(literal), abs=0.03)
    # Of 1/120 is the grid that draws of the smaller task lie on.
    assert np.quantile(fast, [0.025, 0.5, 0.975], axis=1) == pytest.approx(
        np.quantile(literal, [0.025, 0.5, 0.975], axis=1), abs=0.0085
    )


def test_draws_are_the_same_in_portions(monkeypatch):
    arms = simulate(0.05, 4, 100, **NOISE, rng=np.random.default_rng(0))
    differences = [arms[0]["task 1"].astype(np.int8) - arms[1]["task 1"].astype(np.int8)]
    whole = statistics._resample(differences, 1000, np.random.default_rng(1))
    monkeypatch.setattr(statistics, "CHUNK", 700)
    assert statistics._resample(differences, 1000, np.random.default_rng(1)) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("seeds", [5, 10])
def test_the_bootstrap_only_reshapes_the_interval_by_t(seeds, correlation):
    """Which is why `power` may use the latter."""
    rng = np.random.default_rng(seeds)
    ratios = []
    for trial in range(12):
        arms = simulate(0.02, seeds, [200, 400], **NOISE, rng=rng, question_correlation=correlation)
        effect = compare_arms("a", "b", *arms, smallest_effect=0.01, draws=4000, seed=trial).overall
        moments = statistics.moments_of([arms[0][task].astype(np.int8) - arms[1][task] for task in arms[0]])
        low, high = statistics.interval_of(moments, 0.95)
        assert effect.low == pytest.approx(low, abs=0.2 * (high - low) / 2)
        assert effect.high == pytest.approx(high, abs=0.2 * (high - low) / 2)
        ratios.append((effect.high - effect.low) / (high - low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


# ---------------------------------------------------------------- what must hold


@st.composite
def paired_answers(draw):
    seeds, rng = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    share = draw(st.sampled_from([0.0, 0.02, 0.2, 0.5, 1.0]))
    arm = {f"t{i}": rng.random((seeds, size)) < 0.6 for i, size in enumerate(sizes)}
    return arm, {task: rows ^ (rng.random(rows.shape) < share) for task, rows in arm.items()}


@settings(deadline=None, max_examples=50)
@given(paired_answers())
def test_swapped_arms_mirror_everything(arms):
    swap = {"better": "worse", "worse": "better"}
    found = compare_arms("a", "b", *arms, smallest_effect=0.01, draws=200)
    other = compare_arms("b", "a", *arms[::-1], smallest_effect=0.01, draws=200)
    assert other.verdict == swap.get(found.verdict, found.verdict)
    for effect, mirrored in [
        (found.overall, other.overall),
        *((found.tasks[task], other.tasks[task]) for task in found.tasks),
    ]:
        assert mirrored.estimate == pytest.approx(-effect.estimate, abs=1e-12)
        assert (mirrored.low, mirrored.high) == pytest.approx((-effect.high, -effect.low), abs=1e-9)
        assert mirrored.p_value == pytest.approx(effect.p_value)
        assert -1 <= effect.low <= effect.estimate <= effect.high <= 1
        assert 0 < effect.p_value <= 1
    for task in found.tasks.values():
        assert task.p_holm >= task.p_value


@settings(deadline=None, max_examples=40)
@given(paired_answers(), st.randoms(use_true_random=False))
def test_the_order_of_seeds_and_questions_means_nothing(arms, random):
    seeds = len(arms[0]["t0"])
    rows = random.sample(range(seeds), seeds)
    columns = {task: random.sample(range(a.shape[1]), a.shape[1]) for task, a in arms[0].items()}
    moved = [{task: a[np.ix_(rows, columns[task])] for task, a in arm.items()} for arm in arms]
    # with two seeds the tails are Cauchy's, whose quantiles need many draws
    found = compare_arms("a", "b", *arms, smallest_effect=0.01, draws=40_000).overall
    other = compare_arms("a", "b", *moved, smallest_effect=0.01, draws=40_000).overall
    assert other.estimate == pytest.approx(found.estimate, abs=1e-12)
    width = found.high - found.low
    assert (other.low, other.high) == pytest.approx((found.low, found.high), abs=0.12 * width)  # Monte-Carlo error


@settings(deadline=None, max_examples=20)
@given(paired_answers())
def test_an_arm_is_not_better_than_itself(arms):
    found = compare_arms("a", "a again", arms[0], arms[0], smallest_effect=0.01, draws=100)
    assert found.verdict in ("no difference shown", "too few data")
    assert found.overall.estimate == 0
    assert found.overall.low == -found.overall.high
    assert found.overall.p_value == 1


def test_the_same_arguments_give_the_same_numbers_and_another_seed_others():
    arms = simulate(0.02, 5, [100, 200], **NOISE, rng=np.random.default_rng(0))
    again = simulate(0.02, 5, [100, 200], **NOISE, rng=np.random.default_rng(0))
    first, second, third = (
        compare_arms("a", "b", *pair, smallest_effect=0.01, draws=500, seed=seed)
        for pair, seed in [(arms, 0), (again, 0), (arms, 1)]
    )
    assert first == second
    assert first.overall != third.overall
    assert first.overall.estimate == third.overall.estimate


def test_results_are_plain_values():
    arms = simulate(0.02, 5, [100, 200], **NOISE, rng=np.random.default_rng(0))
    found = compare_arms("a", "b", *arms, smallest_effect=0.01, draws=500)
    document = json.loads(json.dumps(asdict(found)))
    assert document["verdict"] == found.verdict
    assert document["overall"]["low"] == found.overall.low
    assert document["tasks"]["task 2"]["p_mcnemar"] == list(found.tasks["task 2"].p_mcnemar)
    powered = power_of(0.02, seeds=5, questions=[50, 60], smallest_effect=0.01, trials=50, **NOISE)
    document = json.loads(powered.model_dump_json())
    assert document["questions"] == [50, 60]
    assert document["power"] == document["shares"]["better"]
    assert sum(document["shares"].values()) == pytest.approx(1)


# ---------------------------------------------------------------- planted truths


def test_what_is_planted_is_there():
    rng = np.random.default_rng(0)
    arm, baseline = simulate(0.06, 40, 20_000, 0.7, 0.2, 0.0, rng, question_correlation=0.3)
    arm, baseline = arm["task 1"], baseline["task 1"]
    assert arm.shape == baseline.shape == (40, 20_000)
    assert arm.dtype == bool
    assert baseline.mean() == pytest.approx(0.7, abs=0.01)
    assert arm.mean() == pytest.approx(0.76, abs=0.01)
    assert (arm ^ baseline).mean() == pytest.approx(0.2, abs=0.01)
    correlations = np.corrcoef(arm.astype(float) - baseline)
    assert correlations[np.triu_indices(40, 1)].mean() == pytest.approx(0.3, abs=0.02)


def test_power_simulates_the_differences_of_such_answers():
    noise = {"accuracy": 0.7, "discordance": 0.2, "seed_sd": 0.05, "question_correlation": 0.3}
    arm, baseline = simulate(0.06, 7, [100, 60], rng=np.random.default_rng(0), **noise)
    simulated = power_module._simulated_differences(
        0.06, Noise(seeds=7, questions=(100, 60), **noise), 1, np.random.default_rng(0)
    )
    for task, differences in zip(arm, simulated, strict=True):
        assert np.array_equal(differences[0], arm[task].astype(int) - baseline[task])


def test_seeds_differ_as_planted_and_equally_in_all_tasks():
    rng = np.random.default_rng(0)
    arm, baseline = simulate(0.0, 400, [5000, 5000], 0.6, 0.1, 0.05, rng)
    first, second = (arm[task].mean(axis=1) - baseline[task].mean(axis=1) for task in arm)
    assert first.std() == pytest.approx(0.05, rel=0.12)
    assert np.corrcoef(first, second)[0, 1] > 0.9


def test_an_extreme_accuracy_gives_way_to_the_effect():
    arm, baseline = simulate(0.1, 20, 5000, 1.0, 0.0, 0.0, np.random.default_rng(0))
    assert arm["task 1"].mean() == 1
    assert baseline["task 1"].mean() == pytest.approx(0.9, abs=0.02)


def test_noise_is_estimated_from_a_pilot():
    rng = np.random.default_rng(0)
    found = [
        estimate_noise(*simulate(0.02, 10, [400, 800], 0.7, 0.2, 0.03, rng, question_correlation=0.3))
        for _ in range(60)
    ]
    mean = {key: np.mean([noise[key] for noise in found]) for key in found[0]}
    assert mean["accuracy"] == pytest.approx(0.7, abs=0.01)
    assert mean["discordance"] == pytest.approx(0.2, abs=0.01)
    assert mean["seed_sd"] == pytest.approx(0.03, abs=0.003)
    assert mean["question_correlation"] == pytest.approx(0.3, abs=0.03)
    power_of(0.02, seeds=5, questions=100, smallest_effect=0.01, trials=10, **found[0])


def test_noise_of_questions_is_not_taken_for_noise_of_seeds():
    rng = np.random.default_rng(0)
    found = [estimate_noise(*simulate(0.0, 5, 100, 0.6, 0.3, 0.0, rng))["seed_sd"] for _ in range(100)]
    raw = np.sqrt(0.3 * 0.8 / 100)
    assert np.mean(np.square(found)) < 0.4 * raw**2
    assert np.median(found) < 0.5 * raw


def test_a_pilot_of_one_seed_tells_nothing_of_seeds():
    arms = simulate(0.02, 1, 500, **NOISE, rng=np.random.default_rng(0))
    noise = estimate_noise(*arms)
    assert set(noise) == {"accuracy", "discordance", "seed_sd"}
    assert noise["seed_sd"] == 0
    assert noise["discordance"] == (arms[0]["task 1"] ^ arms[1]["task 1"]).mean()


def test_a_pilot_without_any_difference_is_one_too():
    arms = answers(3, 50, 0)
    noise = estimate_noise(*arms)
    assert noise == {"accuracy": arms[0]["sums"].mean(), "discordance": 0, "seed_sd": 0}
    assert power_of(0.01, seeds=3, questions=50, smallest_effect=0.01, trials=20, **noise).power <= 1


# ------------------------------------------------------------------------- looks


def test_the_limits_of_five_equal_looks_are_the_published_ones():
    """Two-sided 0.05, Lan and DeMets' function of the O'Brien-Fleming type."""
    assert boundaries((1, 2, 3, 4, 5)) == pytest.approx((4.877, 3.357, 2.680, 2.290, 2.031), abs=0.0005)
    assert boundaries((2, 4, 6, 8, 10)) == boundaries((1, 2, 3, 4, 5))
    assert boundaries((7,)) == pytest.approx((stats.norm.ppf(0.975),))


@pytest.mark.parametrize("looks", [(3, 5, 12), (4, 5)], ids=str)
def test_all_looks_together_have_the_error_of_one(looks):
    n, z = np.array(looks), np.array(boundaries(looks))
    correlations = np.sqrt(np.minimum.outer(n, n) / np.maximum.outer(n, n))
    inside = stats.multivariate_normal(cov=correlations, seed=0).cdf(z, lower_limit=-z)
    assert inside == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize("of_questions", [0.0, 0.3, 3.0])
def test_noise_of_questions_makes_looks_conservative(of_questions):
    """Means of n seeds with the variance 1/n + of_questions, over 100,000 studies."""
    looks = np.array([3, 4, 6, 8, 10])
    rng = np.random.default_rng(0)
    means = rng.standard_normal((100_000, 10)).cumsum(axis=1)[:, looks - 1] / looks
    means += np.sqrt(of_questions) * rng.standard_normal((100_000, 1))
    z = means / np.sqrt(1 / looks + of_questions)
    rejected = (np.abs(z) >= boundaries(tuple(looks))).any(axis=1).mean()
    assert 0.03 < rejected <= (0.05 + 3 * 0.0007 if of_questions == 0 else 0.047)
    assert (np.abs(z) >= 1.96).any(axis=1).mean() > 0.055  # as if nobody had looked before


def test_a_look_with_next_to_nothing_to_spend_has_an_interval_too():
    assert boundaries((3, 1000))[0] == 8
    confidence = confidence_at((3, 1000), 1)
    assert 0.999999 < confidence < 1
    found = compare_arms("a", "b", *answers(3, 400, 30, 20), smallest_effect=0.01, confidence=confidence, draws=100)
    assert -1 <= found.overall.low < -0.05
    assert found.verdict == "too few data"


def test_where_no_draw_reaches_the_interval_is_that_of_t():
    """The farthest of 1,000 draws lies at three standard errors, whatever the confidence."""
    arms = simulate(0.02, 5, 400, **NOISE, rng=np.random.default_rng(0))
    moments = statistics.moments_of([arms[0]["task 1"].astype(np.int8) - arms[1]["task 1"]])
    for confidence, is_t in [(0.95, False), (0.9999, True)]:
        effect = compare_arms("a", "b", *arms, smallest_effect=0.01, confidence=confidence, draws=1000).overall
        low, high = statistics.interval_of(moments, confidence)
        assert ((effect.low, effect.high) == (low, high)) is is_t
        assert (effect.low > 0 or effect.high < 0) == (effect.p_value < 1 - confidence)


def until_decided(effect, trials, looks, *, margin=None, **design):
    """Shares of the verdicts at which studies end that are looked at, and how many seeds they took on average.

    What `compare --until-decided` does with the records of its runs.
    """
    rng = np.random.default_rng(0)
    seeds = list(range(looks[-1]))
    study_design = Design(
        title="planted",
        arms={"arm": Arm(), "baseline": Arm()},
        baseline="baseline",
        learning_rates=[1e-3],
        seeds=seeds,
        looks=looks,
        smallest_effect=0.01,
        margin=margin,
    )
    shares = dict.fromkeys([*VERDICTS, "seeds"], 0.0)
    for _ in range(trials):
        arms = zip(study_design.arms, simulate(effect, seeds=len(seeds), rng=rng, **design), strict=True)
        answered = [
            {"stage": "confirmation", "arm": arm, "seed": seed, "scores": [{"result": result}]}
            for arm, correct in arms
            for task, rows in correct.items()
            for seed in seeds
            for result in [{"task": task, "correct_per_row": rows[seed]}]
        ]
        for number in looks:
            study = StudyRecords(
                Path("study"), StudyFile(design=study_design), [run for run in answered if run["seed"] < number]
            )
            primary = verdict.difference_of(study, "arm", "baseline")
            if verdict.is_decided(study, primary):
                break
        shares[primary.verdict] += 1 / trials
        shares["seeds"] += number / trials
    return shares


PLANTED = {"questions": 4000, "accuracy": 0.6, "discordance": 0.1, "seed_sd": 0.01}


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(verdict, "compare_arms", partial(compare_arms, draws=400))


def test_looking_often_finds_no_effect_where_none_is(few_draws):
    shares = until_decided(0.0, 100, [3, 5, 8, 12], questions=300, **NOISE)
    assert shares["better"] + shares["worse"] <= 0.05 + 2 * 0.022


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"seed_sd": 0.03, "questions": 1000}], ids=["questions", "seeds"])
def test_looking_often_finds_no_effect_where_none_is_in_1000_trials(few_draws, change):
    shares = until_decided(0.0, 1000, [3, 5, 8, 12], **({"questions": 300} | NOISE | change))
    assert shares["better"] <= 0.05
    assert shares["better"] + shares["worse"] <= 0.05 + 3 * 0.0069


def test_looking_often_finds_a_large_effect_early(few_draws):
    shares = until_decided(0.03, 10, [5, 10, 15, 20], **PLANTED)
    assert shares["better"] == pytest.approx(1)
    assert shares["seeds"] < 10


@pytest.mark.slow
def test_looking_often_finds_an_effect_of_one_point(few_draws):
    """docs/study.md quotes it: 87 % with 15 of 20 seeds on average, of 200 trials."""
    shares = until_decided(0.01, 200, [5, 10, 15, 20], **PLANTED)
    assert within(shares["better"], 0.87, 200)
    assert shares["worse"] == 0
    assert shares["seeds"] == pytest.approx(15.3, abs=1)


# ------------------------------------------------------------------------ errors


def ones(*shape):
    return np.ones(shape, dtype=bool)


@pytest.mark.parametrize(
    ("arm", "baseline", "where"),
    [
        ({"sums": ones(3, 5)}, {"sums": ones(3, 4)}, r"task sums: echo has shape \(3, 5\) and lora \(3, 4\)"),
        ({"sums": ones(3, 5)}, {"sums": ones(2, 5)}, r"task sums: echo has shape \(3, 5\) and lora \(2, 5\)"),
        ({"sums": ones(3, 5)}, {"other": ones(3, 5)}, "echo against lora: only one of them has the task other, sums"),
        ({}, {}, "echo against lora: there is no task"),
    ],
)
def test_answers_that_do_not_pair_are_refused(arm, baseline, where):
    with pytest.raises(EchoDataError, match=where):
        compare_arms("echo", "lora", arm, baseline, smallest_effect=0.01)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seeds": 0}, "seeds\n"),
        ({"questions": []}, "questions\n"),
        ({"questions": [5, 0]}, "questions.1\n"),
        ({"accuracy": 60}, "accuracy\n"),
        ({"discordance": -0.1}, "discordance\n"),
        ({"seed_sd": 1}, "seed_sd\n"),
        ({"question_correlation": 2}, "question_correlation\n"),
        ({"speed": 2}, "speed\n"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(change, where):
    given = {"effect": 0.01, "seeds": 3, "questions": 10, "smallest_effect": 0.01, **NOISE} | change
    with pytest.raises(ValidationError, match=where):
        power_of(given.pop("effect"), **given)
