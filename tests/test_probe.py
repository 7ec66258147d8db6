"""Models that do not say what they do with later tokens, padding, positions and a prefix are found out."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    RobertaConfig,
    XLMConfig,
    XLNetConfig,
)
from transformers.masking_utils import flash_attention_mask

from architectures import ARCHITECTURES, collate, lora_config, tiny_base, tiny_echo_model
from echo_lora import EchoConfig, get_echo_model
from echo_lora.errors import EchoModelError
from echo_lora.method.alignment import align_rows
from echo_lora.method.trial import _slice_of
from test_oracle import assert_equals_oracle, mixed_rows
from test_step import rows_of

CONFIG = EchoConfig(source_layers=[1, 2], target_layers=[0, 1], routing_schedule="constant", bottleneck=8)
BERT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


def echo_model(break_it, echo_step="auto"):
    """A Llama whose first layer is changed by `break_it(module, args, kwargs, output)`, which gives another output."""
    base = tiny_base("llama")
    base.model.layers[0].register_forward_hook(break_it, with_kwargs=True)
    config = EchoConfig(**CONFIG.to_dict() | {"echo_step": echo_step, "scale_init": 1.0})
    return get_echo_model(base, lora_config(init_lora_weights=False), config).train()


def recurrent(_module, _args, _kwargs, output):
    """Adds the mean of all states so far, of padding too."""
    columns = torch.arange(1, output.shape[1] + 1)[:, None]
    return output + output.cumsum(1) / columns


def looking_ahead(_module, _args, _kwargs, output):
    return output + output.mean(1, keepdim=True)


def counting_columns(_module, _args, _kwargs, output):
    """Adds a number for each column, whatever position_ids say."""
    return output + torch.arange(output.shape[1])[:, None] / 10


def counting_from_two(_module, _args, kwargs, output):
    """As RoBERTa: positions begin at 2 unless they are given."""
    given = kwargs["position_ids"]
    return output + (given if bool((given != torch.arange(given.shape[-1])).any()) else given + 2)[..., None] / 10


def refusing_a_prefix(_module, _args, kwargs, output):
    if kwargs["attention_mask"] is not None and kwargs["attention_mask"].shape[-1] > output.shape[1]:
        raise RuntimeError("no prefix, please")
    return output


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (recurrent, "padding before a row changes what LlamaForCausalLM computes"),
        (counting_columns, "padding before a row changes what LlamaForCausalLM computes"),
        (counting_from_two, "ignores position_ids"),
        (refusing_a_prefix, "can't run on a cached prefix .RuntimeError: no prefix, please"),
    ],
)
def test_what_a_model_does_not_say_is_found_and_the_step_is_exact(break_it, reason, caplog):
    assert_equals_oracle(echo_model(break_it), mixed_rows(), side="left")
    assert reason in caplog.text.replace("(", ".")
    with pytest.raises(EchoModelError, match=reason):
        echo_model(break_it, "shared_prefix").echo_losses(**collate(mixed_rows()), is_routed=True)


def test_tokens_that_see_later_ones_are_refused_before_the_first_step():
    with pytest.raises(EchoModelError, match=r"see later ones.*causal language model.*architectures\.md"):
        echo_model(looking_ahead).echo_losses(**collate(mixed_rows()), is_routed=True)


def test_a_model_that_fails_on_tokens_alone_is_named():
    def fail(*_):
        raise ValueError("pixel_values are missing")

    with pytest.raises(
        EchoModelError, match="LlamaForCausalLM fails on a batch of a few tokens: ValueError: pixel_values"
    ):
        echo_model(fail).echo_losses(**collate(mixed_rows()), is_routed=True)


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (BertConfig(**BERT), "is_decoder=False"),
        (RobertaConfig(**BERT), "is_decoder=False"),
        (XLNetConfig(vocab_size=61, d_model=32, n_layer=4, n_head=4, d_inner=48), "attn_type='bi'"),
        (LlamaConfig(**BERT, is_causal=False), "is_causal=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_a_model_that_says_that_it_is_not_causal_is_refused_when_it_is_wrapped(config, flag):
    with pytest.raises(EchoModelError, match=flag):
        get_echo_model(AutoModelForCausalLM.from_config(config), lora_config(target_modules="all-linear"), CONFIG)


def test_layers_in_several_lists_are_refused():
    """XLM's list of attentions had been taken for its layers."""
    config = XLMConfig(vocab_size=61, emb_dim=32, n_layers=4, n_heads=4, causal=True)
    with pytest.raises(EchoModelError, match=r"several lists \(transformer\.attentions, transformer\.layer_norm1"):
        get_echo_model(AutoModelForCausalLM.from_config(config), lora_config(target_modules="all-linear"), CONFIG)


def test_a_trial_leaves_modes_and_random_numbers_as_they_were():
    model = tiny_echo_model()
    model.get_base_model().model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    model._abilities._tried.clear()
    assert model.why_full(torch.device("cpu")) is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model._abilities._tried == {True: None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "opt"])
def test_rounding_is_no_reason(name, dtype):
    model = tiny_echo_model(name).to(dtype)
    model._abilities._tried.clear()
    assert model.why_full(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("hc_mult", 4),
        ("altup_num_inputs", 4),
        ("n_recurrent_loops", 2),
        ("prompt_length", 32),
        ("local_attn_chunk_length", 8),
        ("causal", False),
        ("use_bidirectional_attention", True),
    ],
)
def test_a_configuration_that_says_what_can_not_work_is_refused(flag, value):
    base = tiny_base("llama")
    setattr(base.config, flag, value)
    with pytest.raises(EchoModelError, match=flag):
        get_echo_model(base, lora_config(), CONFIG)


# ------------------------------------------------------------- attention implementations


def without_padding(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What flash attention computes: rows without their padding, causal from the last query and the last key."""
    B, H, q, _ = query.shape
    k = key.shape[2]
    key, value = (states.repeat_interleave(H // key.shape[1], dim=1) for states in (key, value))
    is_token = torch.ones(B, k, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    number = is_token.cumsum(1)  # of each token in its row
    sees = is_token[:, None, :] & (number[:, None, :] <= number[:, -q:, None])  # (B, q, k)
    scores = (query @ key.mT * scaling).masked_fill(~sees[:, None], torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def causal_from_the_first(module, query, key, value, attention_mask, scaling, **kwargs):
    """As flash attention before 2.1: query 0 sees key 0 only."""
    q, k = query.shape[2], key.shape[2]
    shifted = query if q == k else torch.cat([query, query.new_zeros(*query.shape[:2], k - q, query.shape[3])], dim=2)
    output, _ = without_padding(module, shifted, key, value, attention_mask, scaling)
    return output[:, :q], None


def wrong_in_long_rows(module, query, key, value, attention_mask, scaling, **kwargs):
    if key.shape[2] > max(query.shape[2], 12):
        value = value.roll(1, dims=2)
    return without_padding(module, query, key, value, attention_mask, scaling)


def without_gradient_in_long_rows(module, query, key, value, attention_mask, scaling, **kwargs):
    if key.shape[2] > max(query.shape[2], 12):
        key, value = key.detach(), value.detach()
    return without_padding(module, query, key, value, attention_mask, scaling)


def refusing_long_rows(module, query, key, value, attention_mask, scaling, **kwargs):
    if key.shape[2] > max(query.shape[2], 12):
        raise RuntimeError("too long for me")
    return without_padding(module, query, key, value, attention_mask, scaling)


@pytest.fixture
def registered(monkeypatch):
    """Registers an attention implementation, for one test; returns its name."""
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))

    def register(function):
        AttentionInterface.register(function.__name__, function)
        AttentionMaskInterface.register(function.__name__, flash_attention_mask)
        return function.__name__

    return register


def model_with(attention, **config):
    model = tiny_echo_model(attention=attention, **config)
    model._abilities._tried_on_batch = False
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_an_attention_of_any_name_shares_the_prefix_if_it_is_exact(registered, side, method, caplog):
    model = model_with(registered(without_padding), method=method)
    assert_equals_oracle(model, mixed_rows(), side=side)
    assert model.why_full(torch.device("cpu")) is None
    assert model._abilities._tried_on_batch
    assert "whole rows" not in caplog.text


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (causal_from_the_first, "gives different results with a cached prefix than on the whole row"),
        (wrong_in_long_rows, "gives different results with a cached prefix than on whole rows of this batch"),
        (without_gradient_in_long_rows, "gives different gradients with a cached prefix than on whole rows"),
        (refusing_long_rows, r"can't run on the cached prefix of this batch \(RuntimeError: too long for me\)"),
    ],
)
def test_an_attention_that_is_not_exact_runs_in_full_and_the_step_is_exact(registered, attention, reason, caplog):
    name = registered(attention)
    model = model_with(name)
    assert_equals_oracle(model, mixed_rows())
    assert len(re.findall(reason, caplog.text)) == 1
    assert re.search(reason, model.why_full(torch.device("cpu")))
    model.echo_losses(**collate(mixed_rows()), is_routed=True)
    assert len(re.findall(reason, caplog.text)) == 1
    with pytest.raises(EchoModelError, match=reason):
        model_with(name, echo_step="shared_prefix").echo_losses(**collate(mixed_rows()), is_routed=True)


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.filterwarnings("ignore")  # of transformers and torch
def test_flex_attention_shares_the_prefix(name, stance, monkeypatch):
    """As far as a CPU can show it: there it has no backward pass."""
    monkeypatch.setitem(ARCHITECTURES[name][1], "head_dim", 16)  # the least that it takes
    outputs = []
    with torch.no_grad(), torch.compiler.set_stance(stance):
        for attention in ("flex_attention", "eager"):
            model = tiny_echo_model(name, attention=attention)
            assert model.why_full(torch.device("cpu")) is None
            outputs.append(model.echo_losses(**collate(mixed_rows()), is_routed=True))
    for term in ("loss", "ce_off", "ce_on"):
        torch.testing.assert_close(outputs[0][term], outputs[1][term], rtol=1e-5, atol=0)


def test_the_first_batch_with_a_prefix_is_tried_once_and_leaves_no_trace():
    model = model_with(None)
    batch = collate(rows_of((1, 5), (1, 3)))
    model.echo_losses(**batch, is_routed=True)
    assert not model._abilities._tried_on_batch  # nothing comes before these boundaries
    calls, state = [], torch.get_rng_state()
    handle = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    output = model.echo_losses(**collate(mixed_rows()), is_routed=True)
    assert len(calls) == 4
    output.loss.backward()
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.echo_losses(**collate(mixed_rows()), is_routed=True).loss.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 300, 20), (2, 299, 20)),
        ((8, 900, 100), (2, 448, 64)),
        ((2, 100, 20), (1, 39, 20)),
        ((1, 100, 60), (1, 20, 19)),
        ((1, 2, 1), (1, 1, 1)),
    ],
)
def test_the_trial_takes_a_quarter_of_a_batch_at_most(shape, expected):
    B, prompt, answer = shape
    batch = collate(rows_of(*[(prompt, answer)] * B))
    rows = align_rows(batch["input_ids"], batch["attention_mask"], batch["labels"])
    part, prefix = _slice_of(rows)
    count, columns = part.input_ids.shape
    assert (count, prefix, columns - prefix) == expected
    assert count * columns <= max(2, B * rows.input_ids.shape[1] / 4)
    assert torch.equal(part.input_ids[0], rows.input_ids[0, rows.prefix_length - prefix :][:columns])
