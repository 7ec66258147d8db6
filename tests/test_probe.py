"""Models that do not say what they do with later tokens, padding, positions and a prefix are found out."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, RobertaConfig, XLMConfig, XLNetConfig

from architectures import collate, lora_config, tiny_base, tiny_echo_model
from echo_lora import EchoConfig, get_echo_model
from echo_lora.errors import EchoModelError
from test_oracle import assert_equals_oracle, mixed_rows

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
