"""Every variant of LoRA in PEFT: the echo learns in it, and what is saved is what was trained; or it is refused by name.

The table of docs/api.md is made here; `python tests/test_peft_variants.py` prints it.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftModel,
    VeloraConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from architectures import _LLAMA_LIKE, collate, lora_config, random_row, tiny_base
from echo_lora import EchoConfig, get_echo_model, save_verified
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.export import ADAPTER_FILE, compare_adapter, inspect_adapter, read_adapter, verify_adapter

ROUTED = EchoConfig(source_layers=[1, 2], target_layers=[0, 1], routing_schedule="constant", bottleneck=8)
IDS = torch.tensor([[3, 4, 5, 6, 7]])
ROOT = Path(__file__).parents[1]

# name in the table: arguments of LoraConfig
VARIANTS: dict[str, dict[str, Any]] = {
    "plain LoRA": {},
    "`use_rslora`": {"use_rslora": True},
    "`use_dora`": {"use_dora": True},
    "`lora_bias`": {"lora_bias": True},
    '`init_lora_weights="gaussian"`': {"init_lora_weights": "gaussian"},
    '`init_lora_weights="orthogonal"`': {"init_lora_weights": "orthogonal"},
    '`init_lora_weights="mica"`': {"init_lora_weights": "mica"},
    '`init_lora_weights="eva"`': {"init_lora_weights": "eva"},
    '`init_lora_weights="pissa"`': {"init_lora_weights": "pissa"},
    '`init_lora_weights="pissa_niter_4"`': {"init_lora_weights": "pissa_niter_4"},
    '`init_lora_weights="olora"`, `"OLoRA"`': {"init_lora_weights": "OLoRA"},
    '`init_lora_weights="corda"`': {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    '`init_lora_weights="lora_ga"`': {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    '`init_lora_weights="loftq"`': {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)},
    "`kasa_config`": {"kasa_config": KasaConfig()},
    "`rank_pattern`, `alpha_pattern`": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "`layers_to_transform`": {"layers_to_transform": [0, 1]},
    "`exclude_modules`": {"exclude_modules": ["v_proj"]},
    "`layer_replication`": {"layer_replication": [[0, 3], [1, 4]]},
    "`modules_to_save`": {"modules_to_save": ["lm_head"]},
    "`trainable_token_indices`": {"trainable_token_indices": [3, 4]},
    "`ensure_weight_tying`": {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
    "`target_modules` with embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "`target_modules` with the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "`target_parameters`": {"target_parameters": ["up_proj.weight"], "target_modules": ["q_proj"]},
    "`runtime_config`": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    "`use_bdlora`": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["up_proj"], nblocks=2),
        "target_modules": ["up_proj", "down_proj"],
    },
    "`velora_config`": {"velora_config": VeloraConfig(num_groups=4)},
    "`monteclora_config`": {"monteclora_config": MontecloraConfig()},
    "`alora_invocation_tokens`": {"alora_invocation_tokens": [5, 6]},
    "`arrow_config`": {"arrow_config": ArrowConfig()},
    "`bias`, other than `none`": {"bias": "all"},
    "`inference_mode`": {"inference_mode": True},
}
NEEDS = {'`init_lora_weights="loftq"`': "bitsandbytes"}  # on a machine without it, the table's row is not checked


def base_model(name: str) -> Any:
    if "tying" not in name:
        return tiny_base()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**_LLAMA_LIKE | {"tie_word_embeddings": True}))


def batches() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [collate([random_row(g, 6, 3), random_row(g, 5, 4)]) for _ in range(4)]


def config_of(name: str) -> LoraConfig:
    return lora_config(**VARIANTS[name])


def prepared_base(name: str, config: LoraConfig) -> Any:
    """The base as a user of this variant hands it over: some need to see data first."""
    base = base_model(name)
    if "corda" in name:
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            preprocess_corda(base, config, run_model=lambda: [base(input_ids=b["input_ids"]) for b in batches()])
    if "lora_ga" in name:

        def train_step() -> None:
            for b in batches():
                base(**b).loss.backward()

        preprocess_loraga(base, config, train_step)
        base.zero_grad()
    return base


def trained(name: str, site: str = "output") -> Any:
    """A model of this variant after three steps with the echo."""
    torch.manual_seed(1)
    config = config_of(name)
    echo = EchoConfig(**ROUTED.to_dict() | {"injection_site": site})
    model = get_echo_model(prepared_base(name, config), config, echo)
    if "eva" in name:
        initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    touched: set[str] = set()
    for batch in batches()[:3]:
        model.echo_losses(**batch, is_routed=True).loss.backward()
        touched |= {n for n, p in model.echo.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert {n for n, _ in model.echo.named_parameters()} == touched
    return model


def state_of(model: Any) -> dict[str, Any]:
    """All of a model that saving might disturb."""
    hooks = {
        (name, kind): list(value)
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if isinstance(value, OrderedDict) and kind.endswith("hooks")
    }
    with torch.no_grad():
        modes = {name: module.training for name, module in model.named_modules()}
        logits = model.eval()(input_ids=IDS).logits
        for name, module in model.named_modules():
            module.training = modes[name]
    return {
        "logits": logits,
        "parameters": {n: (id(p), p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "training": modes,
        "hooks": hooks,
        "active": model.active_adapters,
        "adapters": {n: c.to_dict() | {"inference_mode": c.inference_mode} for n, c in model.peft_config.items()},
        "config": model.config.to_dict(),
        "random": torch.random.get_rng_state(),
    }


def assert_equal(before: Any, after: Any, path: str = "") -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after), path
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before:
            assert_equal(before[key], after[key], f"{path}/{key}")
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            assert_equal(one, other, path)
    else:
        assert before == after, path


def loaded(name: str, folder: Path) -> torch.Tensor:
    """Logits of a base that nobody has touched, with the adapter as stock PEFT loads it."""
    torch.manual_seed(7)
    with torch.no_grad():
        return PeftModel.from_pretrained(base_model(name), str(folder)).eval()(input_ids=IDS).logits


# --------------------------------------------------------------------------------- how each is saved


def saved_how(name: str, folder: Path, site: str = "output") -> str:
    """What becomes of a variant: one cell of the table. Checks what it says."""
    try:
        model = trained(name, site)
    except EchoModelError as error:
        return f"refused: {str(error).split(',')[0].split(':')[0].split('. ')[0]}" if site == "output" else "refused"
    before = state_of(model)
    ways = []
    for as_lora, words in ((False, "as it is"), (True, "converted to LoRA")):
        out = folder / words
        try:
            save_verified(model, out, as_lora=as_lora, base=base_model(name))
        except EchoCheckpointError:
            assert not out.exists()
        else:
            torch.testing.assert_close(loaded(name, out), before["logits"], rtol=0, atol=2e-4)
            plain = json.loads((out / "adapter_config.json").read_text())["init_lora_weights"] is True
            if not as_lora or (plain and before["adapters"]["default"]["init_lora_weights"] is not True):
                ways.append(words)
        assert_equal(before, state_of(model))
    return " or ".join(ways)


def table() -> str:
    rows = ["| LoraConfig | echo at `output` | at `lora_input` | saved |", "|---|---|---|---|"]
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            saved = saved_how(name, Path(folder))
        learns = []
        for site in ("output", "lora_input"):
            try:
                trained(name, site)
                learns.append("yes")
            except EchoModelError:
                learns.append("refused")
        rows.append(f"| {name} | {learns[0]} | {learns[1]} | {'' if saved.startswith('refused') else saved} |")
    return "\n".join(rows)


@pytest.mark.slow  # builds and trains every variant three times
def test_the_table_in_the_docs_is_what_is_measured():
    documented = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    made = table().splitlines()
    missing = {name for name, package in NEEDS.items() if find_spec(package) is None}
    lines = [line for line in made if not any(name in line for name in missing)]
    assert len(lines) == 2 + len(VARIANTS) - len(missing)
    assert [line for line in lines if line not in documented] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain LoRA", "as it is"),
        ("`use_dora`", "as it is"),
        ('`init_lora_weights="mica"`', "as it is"),
        ('`init_lora_weights="eva"`', "as it is"),
        ('`init_lora_weights="pissa"`', "as it is or converted to LoRA"),
        ('`init_lora_weights="pissa_niter_4"`', "converted to LoRA"),  # PEFT draws another base as it loads it
        ('`init_lora_weights="olora"`, `"OLoRA"`', "as it is or converted to LoRA"),
        ('`init_lora_weights="corda"`', "converted to LoRA"),  # PEFT can't load it without the data
        ('`init_lora_weights="lora_ga"`', "converted to LoRA"),  # PEFT leaves the base as it is
        ("`kasa_config`", "as it is"),
        ("`layer_replication`", "as it is"),
        ("`ensure_weight_tying`", "as it is"),
        ("`trainable_token_indices`", "as it is"),
        ("`target_parameters`", "as it is"),
    ],
)
def test_a_variant_is_saved_as_it_was_trained_and_the_model_is_left_alone(name, expected, tmp_path):
    assert saved_how(name, tmp_path) == expected
    assert {path.name for path in tmp_path.iterdir()} <= {"as it is", "converted to LoRA"}


if __name__ == "__main__":
    print(table())
