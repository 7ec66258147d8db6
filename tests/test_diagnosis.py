"""What the echo does, seen from outside: losses of both passes, its share of the branch, answers with the echo on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from echo_lora import EchoConfig, get_echo_model
from echo_lora.errors import EchoModelError
from echo_lora.method.echo import echo_representation
from echo_lora.method.injection import Injection
from echo_lora.method.step import reading

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
ANSWERS = [[30, 31], [32, 33, 34], [35]]


def echo_model(**changes):
    """A model whose LoRA and echo have been given random weights, so that both change what it says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=63, bos_token_id=None,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    lora.use_dora = changes.pop("use_dora", False)
    settings = {"source_layers": [2, 3], "target_layers": [0, 1], "bottleneck": 8} | changes
    model = get_echo_model(base, lora, EchoConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "W2" in name or "U2.weight" in name:
                parameter.normal_(std=0.5)
    return model


def padded(rows, side):
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row if side == "left" else row + [0] * (width - len(row)) for row in rows]
    mask = [
        [0] * (width - len(row)) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def literal_answer(model, prompt, tokens):
    """Greedy, one row, every token by a whole pass without a cache."""
    ids = torch.tensor([prompt])
    boundary = torch.tensor([len(prompt) - 1])
    with reading(model._source_layers, boundary, len(prompt)) as hidden:
        model(input_ids=ids)
    deltas, _, _ = model.echo(echo_representation(hidden))
    first = len(prompt) - (model.echo_config.injection_mask == "predictive")
    for _ in range(tokens):
        mask = torch.arange(ids.shape[1])[None] >= first
        with model._injector.injecting(Injection(deltas, mask)):
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("site", ["output", "lora_input"])
def test_answers_with_the_echo_kept_on_are_those_of_whole_passes(site, mask):
    model = echo_model(injection_site=site, injection_mask=mask)
    model.generation_config.eos_token_id = None
    ids, attention = padded(PROMPTS, "left")
    plain = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=6, do_sample=False)
    with model.keeping_echo():
        kept = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=6, do_sample=False)
    expected = [literal_answer(model, prompt, 6) for prompt in PROMPTS]
    assert kept[:, ids.shape[1] :].tolist() == expected
    assert kept.tolist() != plain.tolist()  # else the echo did nothing
    again = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=6, do_sample=False)
    assert again.tolist() == plain.tolist()


def test_a_model_with_a_state_keeps_no_echo(monkeypatch):
    model = echo_model().eval()
    monkeypatch.setattr(model.get_base_model(), "_is_stateful", True)
    with model.keeping_echo(), pytest.raises(EchoModelError, match="has a recurrent state"):
        model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"generation_config": GenerationConfig(num_beams=2)},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
    ],
)
def test_several_answers_to_a_row_are_refused_while_the_echo_is_kept_on(arguments):
    """They are rows of a batch that has become larger than the echo's."""
    model = echo_model()
    with model.keeping_echo(), pytest.raises(EchoModelError, match="no beam search"):
        model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, **arguments)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("site", ["output", "lora_input"])
def test_the_share_is_the_echos_part_of_what_the_branch_adds(site, use_dora):
    model = echo_model(injection_site=site, use_dora=use_dora)
    ids, attention = padded([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)], "right")
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    found = model.diagnose(ids, attention, labels)
    outputs = model.echo_losses(ids, attention, labels, is_routed=True)
    assert found["ce_on"] == pytest.approx(outputs.ce_on.item())
    assert found["ce_off"] == pytest.approx(outputs.ce_off.item())
    assert found["ce_on"] != pytest.approx(found["ce_off"], rel=1e-5)

    # the literal share, of the first target module
    name, layer = next(iter(model._injector.modules.items()))
    x = torch.randn(2, 3, 32)
    delta = {name: torch.randn(2, model._injector.widths({name: layer}, site)[name])}
    mask = torch.tensor([[False, True, True], [True, False, False]])
    with torch.no_grad():
        with model._injector.measuring() as shares, model._injector.injecting(Injection(delta, mask)):
            layer(x)
        # W0, A, B and the magnitude by hand
        W0, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling, magnitude = layer.scaling["default"], torch.ones(len(W0), 1)
        if use_dora:
            magnitude = layer.lora_magnitude_vector["default"].weight[:, None]
            magnitude = magnitude / (W0 + scaling * B @ A).norm(dim=1, keepdim=True)
        own = delta[name] if site == "output" else delta[name] @ (magnitude * (scaling * B @ A)).T  # (2, out)
        plain = x @ (magnitude * (W0 + scaling * B @ A) - W0).T  # (2, 3, out)
        branch = plain + own[:, None]
        literal = (own[:, None].norm(dim=-1) / branch.norm(dim=-1))[mask].mean()
    assert shares[0].item() == pytest.approx(literal.item(), rel=1e-4)
    assert found["echo_share"] > 0
