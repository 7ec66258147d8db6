"""Bases quantised by bitsandbytes, and its 8-bit optimizers, on a CPU: exact, verified when saved, resumed."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from architectures import collate, lora_config, tiny_base
from echo_lora import EchoConfig, attach_echo, get_echo_model
from echo_lora.adapter.export import save_verified
from echo_lora.errors import EchoModelError, EchoTrainingError
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.train import run
from test_oracle import assert_equals_oracle, mixed_rows
from test_run import interrupt_at
from tiny_recipe import tiny_recipe

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every product

OPTIONS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
OPTIONS["4bit, twice"] = OPTIONS["4bit"] | {"bnb_4bit_use_double_quant": True}
CONFIG = EchoConfig(source_layers=[1, 2], target_layers=[0, 1], bottleneck=8, scale_init=1.0)


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch):
    """As a CPU without AVX512-BF16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def quantised(folder, bits, name="llama"):
    tiny_base(name).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**OPTIONS[bits]), dtype=torch.float32
    )


# DoRA on 8 bits fails in bitsandbytes' product on a CPU, without the echo too
@pytest.mark.parametrize(
    ("bits", "method"), [("4bit", "lora"), ("4bit", "dora"), ("4bit, twice", "lora"), ("8bit", "lora")]
)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_step_on_a_quantised_base_equals_the_oracle(tmp_path, bits, method, is_checkpointed):
    base = quantised(tmp_path / "base", bits)
    torch.manual_seed(1)
    model = get_echo_model(base, lora_config(method=method, init_lora_weights=False), CONFIG).train()
    for branch in model.echo.branches.values():
        nn.init.normal_(branch.W2.weight, std=0.1)
        nn.init.normal_(branch.U2.weight, std=0.1)
    prepare = type(model).gradient_checkpointing_enable if is_checkpointed else None
    assert_equals_oracle(model, mixed_rows(), prepare=prepare)
    assert model.why_full(torch.device("cpu")) is None
    save_verified(model, tmp_path / "adapter")


def test_4_bit_weights_that_would_be_repacked_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = quantised(tmp_path / "base", "4bit")
    with pytest.raises(EchoModelError, match=r"layers\.0\.self_attn\.q_proj has 4-bit weights.*no gradient through"):
        attach_echo(get_peft_model(base, lora_config()), CONFIG)
    recipe = load_recipe(tiny_recipe(tmp_path / "own"), ["quantization=4bit", "echo=false"])
    with pytest.raises(EchoModelError, match="Train on a GPU, in 8 bits"):
        run(recipe)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_with_an_8_bit_optimizer_is_resumed_exactly(tmp_path, monkeypatch, bits):
    path = tiny_recipe(tmp_path)
    settings = [f"quantization={bits}", "training.optimizer=adamw_bnb_8bit", "training.save_every=1"]
    adapters = []
    for name in ("whole", "parts"):
        recipe = load_recipe(path, [*settings, f"output={tmp_path / name}"])
        if name == "parts":
            with monkeypatch.context() as patch:
                interrupt_at(patch, 3)
                with pytest.raises(EchoTrainingError, match="stopped at step 3"):
                    run(recipe)
        run(recipe, resume=name == "parts")
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for tensor, value in adapters[0].items():
        assert torch.equal(value, adapters[1][tensor]), tensor


def test_states_of_8_bits_move_adapter_and_echo():
    torch.manual_seed(1)
    model = get_echo_model(tiny_base(), lora_config(init_lora_weights=False), CONFIG).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        model.echo_losses(**collate(mixed_rows()), is_routed=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
