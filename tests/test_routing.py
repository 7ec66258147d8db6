"""Routing: a pure function of (seed, step), with the frequencies of its schedule."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.stats import binomtest

from echo_lora.method.config import EchoConfig
from echo_lora.method.routing import distillation_weight, echo_lr_factor, is_routed, routing_probability


def test_linear_schedule_starts_and_ends_where_told():
    config = EchoConfig(routing_start=0.9, routing_end=0.3)
    assert routing_probability(config, 0, 101) == pytest.approx(0.9)
    assert routing_probability(config, 50, 101) == pytest.approx(0.6)
    assert routing_probability(config, 100, 101) == pytest.approx(0.3)
    assert routing_probability(config, 500, 101) == pytest.approx(0.3)


def test_a_single_step_is_routed_by_the_start():
    assert routing_probability(EchoConfig(), 0, 1) == 1.0


def test_draws_depend_on_seed_and_step_only():
    config = EchoConfig(routing_seed=7)
    draws = [is_routed(config, step, 200) for step in range(200)]
    random.seed(1)
    torch.manual_seed(1)
    assert [is_routed(config, step, 200) for step in reversed(range(200))] == draws[::-1]
    assert [is_routed(EchoConfig(routing_seed=8), step, 200) for step in range(200)] != draws


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("p", [0.2, 0.6, 0.95])
def test_frequencies_match_the_probability(p, seed):
    config = EchoConfig(routing_schedule="constant", routing_start=p, routing_seed=seed)
    routed = sum(is_routed(config, step, 5000) for step in range(5000))
    assert binomtest(routed, 5000, p).pvalue > 1e-4


def test_frequencies_follow_the_schedule():
    config = EchoConfig()
    routed = [is_routed(config, step, 20_000) for step in range(20_000)]
    for decile in range(10):
        share = sum(routed[decile * 2000 : (decile + 1) * 2000]) / 2000
        assert share == pytest.approx(1.0 - 0.8 * (decile + 0.5) / 10, abs=0.04)


@pytest.mark.parametrize(("p", "expected"), [(0.0, False), (1.0, True)])
def test_certainty(p, expected):
    config = EchoConfig(routing_schedule="constant", routing_start=p)
    assert all(is_routed(config, step, 500) is expected for step in range(500))


def test_warm_ups_rise_in_a_share_of_the_training():
    config = EchoConfig(distillation_weight=2.0, distillation_warmup=0.4, echo_lr_warmup=0.2)
    assert [distillation_weight(config, step, 10) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.5, 1, 2, 2])
    assert [echo_lr_factor(config, step, 10) for step in (0, 1, 2, 9)] == pytest.approx([0.5, 1, 1, 1])


def test_without_a_warm_up_the_first_step_is_like_any_other():
    config = EchoConfig(distillation_weight=0.5)
    assert distillation_weight(config, 0, 10) == 0.5
    assert echo_lr_factor(config, 0, 10) == 1.0
