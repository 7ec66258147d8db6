"""attach_echo: the echo for an adapter that exists. It trains as from get_echo_model; kernels are found."""

from __future__ import annotations

import copy
import types
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional as F

from architectures import collate, lora_config, tiny_base
from echo_lora import EchoConfig, EchoModel, attach_echo, get_echo_model
from echo_lora.errors import EchoConfigError, EchoModelError
from test_oracle import assert_equals_oracle, gradients, mixed_rows

ECHO = EchoConfig(
    source_layers=[1, 2], target_layers=[0, 1], routing_schedule="constant", bottleneck=8, injection_site="lora_input"
)


def started(model: nn.Module) -> nn.Module:
    """The model with weights under which adapter and echo have an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("echo."):
                parameter.normal_(std=0.1, generator=generator)
    return model


def attached(base=None, config: EchoConfig = ECHO, **lora) -> EchoModel:
    torch.manual_seed(1)
    return attach_echo(peft.get_peft_model(base or tiny_base(), lora_config(**lora)), config)


@pytest.mark.parametrize("site", ["output", "lora_input"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_is_the_model_that_get_echo_model_returns(method, site):
    config = EchoConfig(**ECHO.to_dict() | {"injection_site": site})
    torch.manual_seed(1)
    theirs = get_echo_model(tiny_base(), lora_config(method=method), config)
    ours = attached(config=config, method=method)
    assert type(ours) is EchoModel
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    batch = collate(mixed_rows(), "right")
    outputs = []
    for model in (theirs, ours):
        started(model).train()
        output = model.echo_losses(**batch, is_routed=True)
        output.loss.backward()
        outputs.append((output.loss, gradients(model)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1].keys() == outputs[1][1].keys()
    assert all(torch.equal(gradient, outputs[1][1][name]) for name, gradient in outputs[0][1].items())


@pytest.mark.parametrize("site", ["output", "lora_input"])
def test_a_saved_adapter_continues_as_the_literal_method_says(tmp_path, site):
    started(peft.get_peft_model(tiny_base(), lora_config())).save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(tiny_base(), tmp_path, is_trainable=True)
    before = {name: value.clone() for name, value in saved.named_parameters() if "lora_" in name}
    model = attach_echo(saved, EchoConfig(**ECHO.to_dict() | {"injection_site": site}))
    now = dict(model.named_parameters())
    assert before
    assert all(now[name] is parameter for name, parameter in saved.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert_equals_oracle(started(model).train(), mixed_rows())


def test_the_given_model_stays_plain_and_both_save_the_same_adapter(tmp_path):
    plain = peft.get_peft_model(tiny_base(), lora_config())
    names = set(plain.state_dict())
    model = started(attach_echo(plain, ECHO))
    assert set(plain.state_dict()) == names
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "echo")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "echo")]
    assert files[0] == files[1]


def test_an_adapter_without_task_type_generates():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    plain = peft.get_peft_model(tiny_base(), config)
    model = attach_echo(plain, ECHO).eval()
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**arguments), plain.eval().generate(**arguments))


def test_the_active_one_of_several_adapters_carries_the_echo():
    plain = peft.get_peft_model(tiny_base(), lora_config())
    plain.add_adapter("second", lora_config())
    plain.set_adapter("second")
    model = attach_echo(plain, ECHO)
    assert model.echo_adapter == "second"
    assert_equals_oracle(started(model).train(), mixed_rows())


def test_pissa_of_unknown_start_can_train_but_not_be_written_as_lora():
    model = attached(init_lora_weights="pissa")
    assert model.initial_adapter is None


def _frozen() -> PeftModel:
    model = peft.get_peft_model(tiny_base(), lora_config())
    model.requires_grad_(False)
    return model


def _two_active() -> PeftModel:
    model = peft.get_peft_model(tiny_base(), lora_config())
    model.add_adapter("second", lora_config())
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tiny_base, "needs a causal language model with a LoRA adapter.* but got a LlamaForCausalLM"),
        (attached, "already has the echo"),
        (lambda: peft.get_peft_model(tiny_base(), peft.IA3Config(task_type="CAUSAL_LM")), "peft_config is a IA3Config"),
        (lambda: peft.get_peft_model(tiny_base(), lora_config(), mixed=True), "but got a PeftMixedModel"),
        (lambda: peft.get_peft_model(tiny_base(), lora_config(bias="all")), "LoraConfig.bias is 'all'"),
        (_frozen, "every parameter of the adapter 'default' is frozen"),
        (_two_active, "the active ones are 'default', 'second'"),
    ],
    ids=["base", "echo", "ia3", "mixed", "bias", "frozen", "two-adapters"],
)
def test_it_refuses(make, words):
    with pytest.raises(EchoModelError, match=words):
        attach_echo(make(), ECHO)


def test_it_refuses_an_adapter_loaded_for_inference(tmp_path):
    peft.get_peft_model(tiny_base(), lora_config()).save_pretrained(tmp_path)
    with pytest.raises(EchoModelError, match=r"loaded for inference.*is_trainable=True"):
        attach_echo(PeftModel.from_pretrained(tiny_base(), tmp_path), ECHO)


def test_it_refuses_a_layer_that_does_not_exist():
    with pytest.raises(EchoConfigError, match="source_layers names layer 9"):
        attach_echo(peft.get_peft_model(tiny_base(), lora_config()), EchoConfig(source_layers=[9]))


# ------------------------------------------------------------------------------------------------------ fused kernels


def fused_mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What fused kernels compute: the adapted projections from their weights, without running the modules."""

    def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return F.linear(x, layer.base_layer.weight) + layer.scaling["default"] * F.linear(F.linear(x, A), B)

    gate = F.linear(x, mlp.gate_proj.weight)
    return project(mlp.down_proj, F.silu(gate) * project(mlp.up_proj, x))


def plant(model: nn.Module, function, home: str = "somebody.kernels") -> None:
    """Replace the forward of every feed-forward block, as the libraries do."""
    function = types.FunctionType(function.__code__, function.__globals__, "fused", None, function.__closure__)
    function.__module__ = home
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = types.MethodType(function, layer.mlp)


def one_step(model: EchoModel):
    return model.train().echo_losses(**collate(mixed_rows(), "right"), is_routed=True)


@pytest.mark.parametrize("site", ["output", "lora_input"])
@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], ["q_proj", "up_proj", "down_proj"]], ids=["all", "some"])
def test_a_kernel_that_bypasses_the_modules_is_found_and_named(site, targets):
    plain = peft.get_peft_model(tiny_base(), lora_config(target_modules=targets))
    model = attach_echo(plain, EchoConfig(**ECHO.to_dict() | {"injection_site": site}))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(input_ids=ids).logits
    plant(model, fused_mlp)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)  # the kernel is right, and skips the modules
    words = r"model\.layers\.0\.mlp\.\w+_proj does not run .*model\.layers\.0\.mlp\.forward .* somebody\.kernels"
    with pytest.raises(EchoModelError, match=words):
        one_step(model)


def test_a_kernel_of_training_mode_only_is_found_even_after_a_forward_in_eval_mode():
    model = attached(target_modules=["up_proj", "down_proj"])
    stock = {layer.mlp: layer.mlp.forward for layer in model.get_base_model().model.layers}
    plant(model, fused_mlp)
    for mlp, forward in stock.items():
        fused = mlp.forward
        mlp.forward = partial(lambda m, ours, theirs, x: ours(x) if m.training else theirs(x), mlp, fused, forward)
    batch = collate(mixed_rows(), "right")
    with pytest.raises(EchoModelError, match=r"model\.layers\.0\.mlp\.up_proj does not run"):
        model.eval().diagnose(batch["input_ids"], batch["attention_mask"], batch["labels"])


def test_the_trial_leaves_no_hook_and_restores_modes_and_random_state():
    model = started(attached()).train()
    model.get_base_model().model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    model.why_full(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(
    ("home", "words"),
    [
        ("unsloth.kernels.fast_lora", r"layers\.0\.mlp\.forward comes from unsloth.*does not import unsloth"),
        ("unsloth_compiled_module_llama", "Unsloth would compute adapted layers"),
        ("axolotl.kernels.lora", "Set lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel to false"),
    ],
)
def test_known_kernels_are_refused_before_anything_runs(home, words):
    model = peft.get_peft_model(tiny_base(), lora_config(target_modules=["up_proj", "down_proj"]))
    plant(model, fused_mlp, home)
    with pytest.raises(EchoModelError, match=words):
        attach_echo(model, ECHO)


def test_unsloths_class_level_forward_is_refused(monkeypatch):
    """`import unsloth` and its loader replace the forward of transformers' classes, also for models made afterwards."""
    base = tiny_base()
    attention = type(base.model.layers[0].self_attn)

    def fast_forward(self, *args, **kwargs):
        raise AssertionError("not reached")

    fast_forward.__module__ = "unsloth.models.llama"
    monkeypatch.setattr(attention, "forward", fast_forward)
    with pytest.raises(EchoModelError, match=r"model\.layers\.0\.self_attn\.forward comes from unsloth\.models\.llama"):
        get_echo_model(base, lora_config(), ECHO)


def test_functions_that_only_wrap_the_modules_are_accepted():
    """Axolotl puts functions that call the projections on attention modules even where no kernel is on."""
    model = peft.get_peft_model(tiny_base(), lora_config(target_modules=["q_proj", "v_proj"]))

    def apply_qkv(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    apply_qkv.__module__ = "axolotl.monkeypatch.lora_kernels"
    for layer in model.get_base_model().model.layers:
        layer.self_attn.apply_qkv = types.MethodType(apply_qkv, layer.self_attn)
    assert torch.isfinite(one_step(attach_echo(model, ECHO)).loss)


def test_a_copy_finds_bypasses_in_itself():
    model = copy.deepcopy(attached(target_modules=["up_proj", "down_proj"]))
    plant(model, fused_mlp)
    with pytest.raises(EchoModelError, match="does not run"):
        one_step(model)
