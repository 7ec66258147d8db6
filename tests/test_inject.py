"""Where the echo enters: modules that see every token once, in its place. Others keep their LoRA without it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import MontecloraConfig
from torch import Tensor, nn

from architectures import _LLAMA_LIKE, LAYERS, VOCAB, WIDTH, collate, lora_config, tiny_base
from echo_lora import EchoConfig, get_echo_model
from echo_lora.errors import EchoModelError
from echo_lora.method.targets import decoder_layers
from test_oracle import assert_equals_oracle, mixed_rows

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = _LLAMA_LIKE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# name: (config class, arguments, the modules of layer 1 that "all-linear" adapts and the echo leaves out)
MIXTURES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "mixtral": ("MixtralConfig", _LLAMA_LIKE | {"num_local_experts": 4}, {"mlp.gate", "mlp.experts"}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _LLAMA_LIKE | _EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        set(),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _LLAMA_LIKE | _EXPERTS | {"moe_intermediate_size": 16, "head_dim": 8},
        {"mlp.gate", "mlp.experts"},
    ),
    "olmoe": ("OlmoeConfig", _LLAMA_LIKE | _EXPERTS, {"mlp.gate", "mlp.experts"}),
    "deepseek_v2": ("DeepseekV2Config", _LATENT, {"self_attn.kv_b_proj", "mlp.gate", "mlp.experts"}),
    "deepseek_v3": ("DeepseekV3Config", _LATENT, {"self_attn.kv_b_proj", "mlp.gate", "mlp.experts"}),
    "gpt_oss": (
        "GptOssConfig",
        _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
        set(),
    ),
    "granitemoe": ("GraniteMoeConfig", _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}, set()),
    "jetmoe": (
        "JetMoeConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_key_value_heads": 2}
        | {"kv_channels": 8, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        set(),
    ),
}
ROUTED = {"source_layers": [1, 2], "target_layers": [0, 1], "routing_schedule": "constant", "bottleneck": 8}


def mixture(name: str, lora: dict[str, Any] | None = None, **config: Any) -> Any:
    """An EchoModel of this mixture of experts, in training mode, whose echo already has an effect."""
    config_class, arguments, _ = MIXTURES[name]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_config = LoraConfig(**arguments | {"init_lora_weights": False} | (lora or {}))
    model = get_echo_model(base, peft_config, EchoConfig(**ROUTED | config))
    for branch in model.echo.branches.values():
        nn.init.normal_(branch.W2.weight, std=0.1)
        nn.init.normal_(branch.U2.weight, std=0.1)
    return model.train()


def left_out(model: Any) -> set[str]:
    """Names within layer 1, nested wrappers of one module once."""
    inside = [name.partition("layers.1.")[2] for name in model.without_echo if "layers.1." in name]
    return {name.removesuffix(".base_layer") for name in inside}


@pytest.mark.parametrize("site", ["output", "lora_input"])
@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_works_on_mixtures_of_experts(name, site, caplog):
    with caplog.at_level(logging.WARNING, "echo_lora"):
        model = mixture(name, injection_site=site)
    expected = MIXTURES[name][2]
    assert left_out(model) == expected
    said = [r.getMessage() for r in caplog.records if "keep their LoRA but receive no echo" in r.getMessage()]
    assert len(said) == bool(expected)
    model.echo_losses(**collate(mixed_rows()), is_routed=True).loss.backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert trainable
    assert without == set()  # no branch that can't learn, and every module keeps its LoRA


@pytest.mark.parametrize("site", ["output", "lora_input"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_equal_the_literal_method(name, site):
    assert_equals_oracle(mixture(name, injection_site=site), mixed_rows())


@pytest.mark.parametrize("name", MIXTURES)
def test_the_rule_says_what_a_pass_shows(name):
    """The echo enters exactly the modules that see all tokens of the batch in their places, the shared prefix's off."""
    model = mixture(name)
    shapes: dict[str, set[tuple[int, ...]]] = {}
    _, layers = decoder_layers(model.get_base_model())

    def note(path: str) -> Any:
        return lambda _module, args, output: shapes.setdefault(path, set()).add(
            tuple(args[0].shape[:-1]) if isinstance(output, Tensor) else ()
        )

    for index in (0, 1):
        for path, module in layers[index].named_modules():
            if isinstance(module, LoraLayer) and not path.endswith("base_layer"):
                module.register_forward_hook(note(f"{index}.{path}"))
    for _ in range(2):  # the first step also tries the model on other rows
        shapes.clear()
        model.echo_losses(**collate(mixed_rows()), is_routed=True)
    columns = {shape for seen in shapes.values() for shape in seen if len(shape) == 2 and shape[0] == 5}
    whole = columns | {(shape[0] * shape[1],) for shape in columns}
    entered = {name.partition("layers.")[2] for name in model._injector.modules}
    for path, seen in shapes.items():
        if path in entered:
            assert seen <= whole, path
        elif "expert" not in path:  # one module that holds all experts does see all tokens; none of its LoRA does
            assert not seen <= whole, path


def test_experts_alone_are_refused_where_the_model_is_made():
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.raises(
        EchoModelError, match=r"target layer 0 .*model\.layers\.0\.mlp\.experts.* adapts a bare parameter"
    ):
        mixture("mixtral", {"target_modules": [], "target_parameters": names})


@pytest.mark.parametrize("site", ["output", "lora_input"])
def test_expert_parameters_beside_linear_modules(site):
    model = mixture(
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        injection_site=site,
    )
    assert left_out(model) == {"mlp.experts"}
    assert set(model._injector.modules) == {f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)}
    assert_equals_oracle(model, mixed_rows())


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu())


class ListOfExperts(nn.Module):
    """As models outside transformers write it: each expert a module, given the tokens that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, None])
        return out.reshape(x.shape)


@pytest.mark.parametrize("site", ["output", "lora_input"])
def test_experts_that_are_modules(site):
    base = tiny_base()
    torch.manual_seed(3)
    for layer in base.model.layers:
        layer.mlp = ListOfExperts()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_echo_model(base, config, EchoConfig(**ROUTED | {"injection_site": site})).train()
    for branch in model.echo.branches.values():
        nn.init.normal_(branch.W2.weight, std=0.1)
    assert left_out(model) == {f"mlp.experts.{i}.{name}" for i in range(3) for name in ("up_proj", "down_proj")}
    assert "model.layers.0.mlp.gate" in model._injector.modules  # a linear router sees every token
    assert_equals_oracle(model, mixed_rows())


@pytest.mark.parametrize(
    ("config_class", "arguments", "router"),
    [
        ("PhimoeConfig", _LLAMA_LIKE | {"num_local_experts": 4}, "router"),
        (
            "Llama4TextConfig",
            _LLAMA_LIKE | {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
            "router",
        ),
    ],
)
def test_a_router_that_peft_takes_for_a_linear_layer(config_class, arguments, router):
    config = getattr(transformers, config_class)(**arguments)
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    base = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(EchoModelError, match=rf"is a router that returns several.*exclude_modules=\['{router}'\]"):
        get_echo_model(base, LoraConfig(**lora), EchoConfig(**ROUTED))
    base = transformers.AutoModelForCausalLM.from_config(config)
    model = get_echo_model(base, LoraConfig(**lora, exclude_modules=[router]), EchoConfig(**ROUTED)).train()
    assert torch.isfinite(model.echo_losses(**collate(mixed_rows()), is_routed=True).loss)


def test_a_low_rank_branch_that_never_runs_lora_a():
    config = lora_config(monteclora_config=MontecloraConfig())
    with pytest.raises(EchoModelError, match=r"model\.layers\.0\.self_attn\.q_proj is adapted by PEFT's Monteclora"):
        get_echo_model(tiny_base(), config, EchoConfig(**ROUTED | {"injection_site": "lora_input"}))


@pytest.mark.parametrize("site", ["output", "lora_input"])
def test_a_module_that_no_pass_runs_is_named_at_the_first_step(site):
    base = tiny_base()
    for layer in base.model.layers:
        layer.mlp.unused = nn.Linear(WIDTH, WIDTH)
    config = lora_config(target_modules=["q_proj", "unused"])
    model = get_echo_model(base, config, EchoConfig(**ROUTED | {"injection_site": site})).train()
    with pytest.raises(EchoModelError, match=r"model\.layers\.0\.mlp\.unused does not run in .* \(2 such"):
        model.echo_losses(**collate(mixed_rows()), is_routed=True)


def test_layers_that_are_dropped_at_random_are_no_fault():
    """With LayerDrop a pass in training mode leaves out other layers each time; one in eval mode runs them all."""

    class Dropping(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x if self.training else self.layer(x)

    base = tiny_base()
    base.config.layerdrop = 0.1
    for layer in base.model.layers:
        layer.mlp = Dropping(layer.mlp)
    model = get_echo_model(base, lora_config(target_modules=["q_proj", "up_proj"]), EchoConfig(**ROUTED)).train()
    assert torch.isfinite(model.echo_losses(**collate(mixed_rows()), is_routed=True).loss)


def test_convolutions_and_embeddings_in_a_layer_get_no_echo():
    base = tiny_base()
    for layer in base.model.layers:
        layer.mlp.embedding = nn.Embedding(5, WIDTH)
        layer.mlp.convolution = nn.Conv2d(3, 5, 1)
    model = get_echo_model(
        base, lora_config(target_modules=["q_proj", "embedding", "convolution"]), EchoConfig(**ROUTED)
    )
    assert left_out(model) == {"mlp.embedding", "mlp.convolution"}
    assert set(model.without_echo.values()) == {
        "adapts a layer of type Embedding, which is not linear",
        "adapts a layer of type Conv2d, which is not linear",
    }
