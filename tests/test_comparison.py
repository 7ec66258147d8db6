"""Base and adapter on the same rows: the difference, and how sure it is."""

from __future__ import annotations

import numpy as np
import pytest

from echo_lora.evaluate import TaskResult
from echo_lora.recipe.scoring import Scores, comparison, differences


def result(correct: list[bool], task: str = "test", unreadable: float = 0.0) -> TaskResult:
    return TaskResult(
        task=task,
        kind="generate",
        metric="exact_match",
        filter="none",
        correct=sum(correct),
        total=len(correct),
        accuracy=sum(correct) / len(correct),
        low=0.0,
        high=1.0,
        unreadable=unreadable,
        seconds=1.0,
        lm_eval_version="0",
        task_version=1.0,
        correct_per_row=correct,
        predictions=["x"] * len(correct),
    )


def scores(*results: TaskResult) -> Scores:
    return Scores("base", None, list(results))


def test_the_interval_is_that_of_bonett_and_price():
    """Of 10 questions, 5 only the adapter got right and 1 only the base: shares 6/12 and 2/12."""
    base = result([True] + [False] * 5 + [True] * 4)
    adapter = result([False] + [True] * 5 + [True] * 4)
    (found,) = differences(scores(base), scores(adapter))
    assert (found.base, found.adapter) == (0.5, 0.9)
    centre, width = 4 / 12, 1.959964 * ((8 / 12 - (4 / 12) ** 2) / 12) ** 0.5
    assert (found.low, found.high) == pytest.approx((centre - width, centre + width), abs=1e-6)


def test_equal_answers_leave_room_for_a_difference():
    (found,) = differences(scores(result([True] * 20)), scores(result([True] * 20)))
    assert found.estimate == 0
    assert found.low == -found.high
    assert 0.05 < found.high < 0.2


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered, rounds = 0, 1000
    for _ in range(rounds):
        kinds = random.choice(4, size=60, p=[0.15, 0.05, 0.5, 0.3])  # gained, lost, both right, both wrong: +0.1
        base, adapter = [k in (1, 2) for k in kinds], [k in (0, 2) for k in kinds]
        (found,) = differences(scores(result(base)), scores(result(adapter)))
        covered += found.low <= 0.1 <= found.high
    assert 0.93 < covered / rounds < 0.985


def test_pairing_narrows_the_interval():
    """The same shares, once with the right answers on the same questions and once on others."""
    base, same, other = [True] * 10 + [False] * 10, [True] * 12 + [False] * 8, [False] * 8 + [True] * 12
    narrow, wide = (differences(scores(result(base)), scores(result(second)))[0] for second in (same, other))
    assert narrow.estimate == wide.estimate
    assert narrow.high - narrow.low < 0.7 * (wide.high - wide.low)


def test_several_tasks_have_a_mean_that_is_surer_than_each():
    base, adapter = [True, False] * 20, [True] * 30 + [False] * 10
    tasks = [
        scores(result(correct, "a", unreadable), result(correct, "b", unreadable))
        for correct, unreadable in ((base, 0.5), (adapter, 0.125))
    ]
    a, b, mean = differences(*tasks)
    assert mean.task == "mean of tasks"
    assert mean.estimate == pytest.approx(a.estimate)
    assert mean.high - mean.low == pytest.approx((b.high - b.low) / 2**0.5)
    rows = comparison(*tasks)
    assert [row["task"] for row in rows] == ["a", "b", "mean of tasks"]
    assert rows[0]["unreadable"] == "50.0% / 12.5%"
    assert rows[0]["difference"] == "+25.0"
    assert len({tuple(row) for row in rows}) == 1
