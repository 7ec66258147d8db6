"""Batches of rows of very different length: they run in groups, and learn what they learn together."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architectures import collate, random_row, tiny_base, tiny_echo_model
from echo_lora.errors import EchoDataError
from echo_lora.method import grouping
from echo_lora.method.alignment import align_rows
from echo_lora.method.grouping import CPU_PRICE, aligned_groups, groups_of, price_of_group
from echo_lora.method.trial import PROBE_COLUMNS
from test_oracle import assert_equals_oracle, checkpointed, gradients

SHAPES = [(3, 2), (60, 4), (4, 3), (55, 9), (6, 1), (2, 40), (3, 38), (20, 20)]  # prompt, answer


def rows_of(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [random_row(g, *shape) for shape in shapes]


@pytest.fixture
def is_cheap(monkeypatch):
    """Groups cost so little that batches of a few short rows are split."""
    monkeypatch.setattr(grouping, "CPU_PRICE", 16)


@pytest.fixture
def sizes():
    """The number of rows of each group that the model's first layer sees, in order."""
    seen = []

    def watch(model):
        model.get_base_model().model.layers[0].register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
            with_kwargs=True,
        )
        return seen

    return watch


# ------------------------------------------------------------------------ the step


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_groups_equal_the_oracle(side, method, is_checkpointed, sizes, is_cheap):
    model = tiny_echo_model(method=method, echo_step="shared_prefix")
    prepare = checkpointed if is_checkpointed else None
    seen = []
    assert_equals_oracle(
        model, rows_of(SHAPES), side=side, prepare=lambda m: (prepare and prepare(m), seen.append(sizes(m)))
    )
    passes = [rows for rows, columns in seen[0] if columns > PROBE_COLUMNS]
    assert len(set(passes)) > 1
    if not is_checkpointed:
        assert len(passes) >= 4
        assert sum(passes) == 2 * len(SHAPES)


STEPS = [
    {"is_routed": False},
    {"num_items": 500},
    {"train_on_prompt": True, "answer_weight": 3.0},
]


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: next(iter(step)))
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_steps_in_groups_equal_the_oracle(name, step, echo_step, is_cheap):
    assert_equals_oracle(tiny_echo_model(name, echo_step=echo_step), rows_of(SHAPES), **step)


CONFIGS = [
    {"normalization": "standardize"},
    {"source_gradient": True},
    {"echo_on_updates": "echo_only"},
    {"distillation_direction": "off_to_on", "distillation_tokens": "teacher_better"},
    {"injection_site": "lora_input", "injection_mask": "answer"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: next(iter(config)))
def test_groups_give_what_one_group_gives(config, monkeypatch, sizes):
    """Also what the oracle doesn't know: metrics, and the statistics for the next step."""
    outputs, found, states, passes = [], [], [], []
    for price in (math.inf, 16):
        monkeypatch.setattr(grouping, "CPU_PRICE", price)
        model = tiny_echo_model(**config)
        seen = sizes(model)
        start = len(seen)
        for step in range(2):
            model.set_routing_clock(step, 3)
            outputs.append(model.echo_losses(**collate(rows_of(SHAPES, step)), is_routed=True))
        outputs[-1].loss.backward()
        model.set_routing_clock(2, 3)
        found.append(gradients(model))
        states.append(model.echo.tensors())
        passes.append(len(seen) - start)
    assert passes[0] < passes[1]
    for whole, grouped in zip(outputs[:2], outputs[2:], strict=True):
        assert whole.keys() == grouped.keys()
        for name in whole:
            torch.testing.assert_close(
                grouped[name], whole[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
    for one, other in (found, states):
        assert one.keys() == other.keys()
        for name in one:
            error = (other[name] - one[name]).norm() / one[name].norm().clamp(min=1e-2)
            assert error <= 1e-5, f"{name} differs by {error:.2g}"


def noisy():
    model = tiny_echo_model()
    model.get_base_model().get_input_embeddings().neftune_noise_alpha = 5.0
    return model


def balanced():
    model = tiny_echo_model("mixtral")
    model.get_base_model().config.output_router_logits = True
    return model


def stretched():
    model = tiny_echo_model()
    model.get_base_model().config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return model


def compiled():
    model = tiny_echo_model()
    model.get_base_model().model.layers[0].compile()
    return model


def shuffled():
    return tiny_echo_model(echo_kind="shuffled")


@pytest.mark.parametrize("make", [noisy, balanced, stretched, compiled, shuffled])
def test_where_groups_would_change_or_slow_the_step_rows_run_together(make):
    model = make()
    base = model.get_base_model()
    assert price_of_group(base, base.get_input_embeddings(), model.echo_config, starts_together=False) == math.inf


def test_the_price_of_a_group():
    model = tiny_echo_model()
    base, config = model.get_base_model(), model.echo_config
    layer = base.model.layers[0]
    assert price_of_group(base, layer, config, starts_together=False) == CPU_PRICE
    assert price_of_group(base, layer, config, starts_together=True) == math.inf
    with torch.no_grad():
        assert price_of_group(base, layer, config, starts_together=False) == math.inf
    with torch.device("meta"):
        elsewhere = tiny_base().to("meta")
    layer = elsewhere.model.layers[0]
    price = price_of_group(elsewhere, layer, config, starts_together=False)
    assert price == 1e12 / (4 * sum(p.numel() for p in layer.parameters()))


def test_a_row_without_answer_is_named_by_its_place_in_the_batch(is_cheap):
    rows = rows_of(SHAPES)
    rows[5] = (rows[5][0], [-100] * len(rows[5][0]))
    with pytest.raises(EchoDataError, match="row 5 of the batch has no answer"):
        tiny_echo_model()(**collate(rows))
    rows[5] = (rows[5][0], rows[5][0])
    with pytest.raises(EchoDataError, match="row 5 of the batch has no prompt"):
        tiny_echo_model()(**collate(rows, "left"))


# ---------------------------------------------------------------------- the groups


def columns(shapes, passes):
    """Counted on the rows that are really run."""
    aligned = align_rows(**collate(rows_of(shapes)))
    wide, answer = aligned.input_ids.shape[1], aligned.targets.shape[1]
    return len(shapes) * (passes[0] * wide + passes[1] * answer)


def cheapest(shapes, price, passes):
    """The least cost of all ways to cut one of the three orders; slow."""
    costs = []
    for key in (sum, lambda shape: shape[0], lambda shape: shape[1]):
        order = sorted(shapes, key=key)
        for count in range(len(order)):
            for cuts in combinations(range(1, len(order)), count):
                edges = [0, *cuts, len(order)]
                groups = [order[a:b] for a, b in pairwise(edges)]
                costs.append(sum(columns(group, passes) + price for group in groups))
    return min(costs)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    price=st.integers(0, 60),
    passes=st.sampled_from([(1, 1), (1, 0), (2, 0)]),
)
def test_no_way_to_cut_is_cheaper(shapes, price, passes):
    groups = groups_of([p for p, _ in shapes], [p + a for p, a in shapes], price=price, passes=passes)
    assert sorted(i for group in groups for i in group) == list(range(len(shapes)))
    cost = sum(columns([shapes[i] for i in group], passes) + price for group in groups)
    assert cost == cheapest(shapes, price, passes)


def test_many_rows_are_cut_between_blocks():
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 400, (1000,), generator=g).tolist()
    groups = groups_of(prompt, [p + 3 for p in prompt], price=500, passes=(1, 1))
    assert sorted(i for group in groups for i in group) == list(range(1000))
    assert 5 < len(groups) <= grouping.MOST_BLOCKS


@pytest.mark.parametrize(
    ("shapes", "count"),
    [([(30, 4)] * 8, 1), ([(30, 4), (28, 5), (29, 3)], 1), (SHAPES, 3)],
    ids=["equal", "nearly equal", "unequal"],
)
def test_rows_of_like_length_stay_together(shapes, count):
    layout = {"shows_length": False, "starts_together": False}
    groups = aligned_groups(collate(rows_of(shapes)), price=16, passes=(1, 1), **layout)
    assert (len(groups) == 1) if count == 1 else (len(groups) >= count)


def test_columns_per_token_of_rows_of_random_lengths():
    """Batches of 8 rows with lengths from a log-normal distribution, whose padding is most of their columns."""
    g = torch.Generator().manual_seed(0)
    run = {math.inf: 0, CPU_PRICE: 0}
    tokens = 0
    for _ in range(20):
        prompt = (300 * torch.randn(8, generator=g).exp()).long().clamp(1, 2000).tolist()
        answer = (200 * (0.8 * torch.randn(8, generator=g)).exp()).long().clamp(1, 2000).tolist()
        shapes = list(zip(prompt, answer, strict=True))
        tokens += sum(prompt) + 2 * sum(answer)
        for price in run:
            groups = groups_of(prompt, [p + a for p, a in shapes], price=price, passes=(1, 1))
            run[price] += sum(columns([shapes[i] for i in group], (1, 1)) for group in groups)
    assert run[math.inf] / tokens > 1.9
    assert run[CPU_PRICE] / tokens < 1.15
