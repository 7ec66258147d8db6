"""Every variant of LoRA in PEFT: the echo learns in it and what is saved is what was trained, or it is refused by name.

The table of docs/api.md is made here; `python tests/test_peft_variants.py` prints it.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
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
from echo_lora import EchoConfig, attach_echo, get_echo_model, save_verified
from echo_lora.adapter.export import verify_adapter
from echo_lora.adapter.files import ADAPTER_FILE, compare_adapter, read_adapter
from echo_lora.adapter.inspection import inspect_adapter
from echo_lora.errors import EchoCheckpointError, EchoModelError

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
UNMEASURED = '`init_lora_weights="loftq"`'  # PEFT quantises on a GPU only


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
            preprocess_corda(base, config, run_model=lambda: [base(input_ids=b["input_ids"][:1]) for b in batches()])
    if "lora_ga" in name:

        def train_step() -> None:
            for b in batches():
                base(**b).loss.backward()

        preprocess_loraga(base, config, train_step)
        base.zero_grad()
    return base


def trained(name: str, site: str = "output") -> Any:
    """A model of this variant after a few steps with the echo, in which each of its parameters had a gradient."""
    torch.manual_seed(1)
    config = config_of(name)
    echo = EchoConfig(**ROUTED.to_dict() | {"injection_site": site})
    model = get_echo_model(prepared_base(name, config), config, echo)
    if "eva" in name:
        # EVA goes round for ever where a batch has fewer supervised tokens than twice the rank
        g = torch.Generator().manual_seed(6)
        data = [collate([random_row(g, 6, 6) for _ in range(4)]) for _ in range(2)]
        initialize_lora_eva_weights(model, data, show_progress_bar=False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    touched: set[str] = set()
    for batch in batches():
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
        "parameters": {
            n: (id(p), p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()
        },
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
    base = base_model(name)
    torch.manual_seed(7)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=IDS).logits


# --------------------------------------------------------------------------------- how each is saved


def saved_how(name: str, folder: Path, site: str = "output") -> str:
    """What becomes of a variant: one cell of the table. Checks what it says."""
    try:
        model = trained(name, site)
    except EchoModelError as error:
        return f"refused: {str(error).split(',')[0].split(':')[0].split('. ')[0]}" if site == "output" else "refused"
    ways = []
    for as_lora, words in ((False, "as it is"), (True, "converted to LoRA")):
        out, base = folder / words, base_model(name)
        torch.manual_seed(11)  # base_model leaves the random state that training started from
        before = state_of(model)
        try:
            save_verified(model, out, as_lora=as_lora, base=base)
        except EchoCheckpointError:
            assert not out.exists()
            assert_equal(before, state_of(model))
            continue
        assert_equal(before, state_of(model))
        torch.testing.assert_close(loaded(name, out), before["logits"], rtol=0, atol=2e-4)
        initialisation = json.loads((out / "adapter_config.json").read_text())["init_lora_weights"]
        if not as_lora or initialisation != before["adapters"]["default"]["init_lora_weights"]:
            ways.append(words)
    return " or ".join(ways)


def table() -> str:
    rows = ["| LoraConfig | echo at `output` | at `lora_input` | saved |", "|---|---|---|---|"]
    for name in VARIANTS:
        if name == UNMEASURED:
            continue
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
    made = table()
    assert len(made.splitlines()) == 2 + len(VARIANTS) - 1
    assert made in documented


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


# ------------------------------------------------------------------------------------- more about saving


def test_a_failed_proof_leaves_the_model_alone(tmp_path, monkeypatch):
    model = trained("`layer_replication`")

    def save_wrongly(folder: str, **kwargs: Any) -> None:
        PeftModel.save_pretrained(model, folder, **kwargs)
        path = Path(folder) / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))

    monkeypatch.setattr(model, "save_pretrained", save_wrongly)
    before = state_of(model)
    with pytest.raises(EchoCheckpointError, match="other logits than the trained one"):
        save_verified(model, tmp_path / "adapter")
    assert_equal(before, state_of(model))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_configuration_alone(tmp_path, monkeypatch):
    model = trained("plain LoRA")
    before = state_of(model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoraConfig, "save_pretrained", full)  # after PEFT has set inference_mode
    with pytest.raises(EchoCheckpointError, match="No space left"):
        save_verified(model, tmp_path / "adapter")
    assert_equal(before, state_of(model))


def test_modules_in_eval_mode_and_parameters_that_were_frozen_stay_so(tmp_path):
    model = trained("`use_dora`")
    model.get_base_model().model.layers[2].eval()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    before = state_of(model)
    save_verified(model, tmp_path / "adapter")
    assert_equal(before, state_of(model))


def test_the_proof_copies_no_weight_of_the_base(monkeypatch, tmp_path):
    """On the meta side of things: each tensor of the copied base lies where the live one does."""
    from echo_lora.adapter import export

    model = trained("plain LoRA")
    live = {t.data_ptr() for t in [*model.get_base_model().parameters(), *model.get_base_model().buffers()]}
    copies = export._shared_base(model, "default")
    assert {t.data_ptr() for t in [*copies.parameters(), *copies.buffers()]} <= live
    assert not any(p is q for p in copies.parameters() for q in model.parameters())  # PEFT may freeze its own
    assert not any("lora" in name for name, _ in copies.named_modules())


def test_an_adapter_that_is_not_active_is_proved_too(tmp_path):
    model = trained("plain LoRA")
    model.save_pretrained(tmp_path)
    model.add_adapter("other", lora_config(init_lora_weights=False))
    model.set_adapter("other")
    before = state_of(model)
    verify_adapter(model, tmp_path, "default")
    assert_equal(before, state_of(model))


def test_two_active_adapters_are_not_one_folder(tmp_path):
    model = trained("plain LoRA")
    model.add_adapter("other", lora_config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(EchoCheckpointError, match="the adapters default, other are active"):
        save_verified(model, tmp_path / "adapter")


def test_a_quantised_copy_of_half_precision_is_proved_in_its_own_type(tmp_path):
    model = get_echo_model(tiny_base().bfloat16(), lora_config(init_lora_weights="pissa"), ROUTED)
    save_verified(model.bfloat16(), tmp_path / "adapter", base=tiny_base().bfloat16())
    save_verified(model, tmp_path / "lora", base=tiny_base().bfloat16(), as_lora=True)


# --------------------------------------------------------------- adapters that changed the base's weights


def test_scripts_hear_how_to_save_an_adapter_that_changed_the_base(caplog):
    for init, count in (("pissa", 1), (True, 0)):
        for make in (get_echo_model, lambda *args: attach_echo(get_peft_model(*args[:2]), args[2])):
            caplog.clear()
            make(tiny_base(), lora_config(init_lora_weights=init), ROUTED)
            assert caplog.text.count("changed the base's weights, so checkpoints only fit the changed base") == count


def test_the_base_is_read_anew_from_where_it_came(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_echo_model(base, lora_config(init_lora_weights="olora"), ROUTED)
    save_verified(model, tmp_path / "adapter")
    save_verified(model, tmp_path / "lora", as_lora=True)
    other = tiny_base(seed=1)
    with pytest.raises(EchoCheckpointError, match=r"q_proj differs by .* Check that base is the model's own"):
        save_verified(model, tmp_path / "wrong", as_lora=True, base=other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "lora"]


def test_a_base_from_nowhere_has_to_be_given(tmp_path):
    model = trained('`init_lora_weights="pissa"`')
    with pytest.raises(EchoCheckpointError, match=r"not loaded from a folder.*save_verified\(base=…\)"):
        save_verified(model, tmp_path / "adapter")
    for base in (model.get_base_model(), get_peft_model(tiny_base(), lora_config())):
        with pytest.raises(EchoCheckpointError, match="got a base with an adapter"):
            save_verified(model, tmp_path / "adapter", base=base)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa", "use_dora": True}, "lora_magnitude_vector does not belong to a plain LoRA"),
        ({"kasa_config": KasaConfig()}, "lora_diag does not belong to a plain LoRA"),
    ],
)
def test_what_is_no_lora_is_not_converted(config, words, tmp_path):
    model = get_echo_model(tiny_base(), lora_config(**config), ROUTED)
    with pytest.raises(EchoCheckpointError, match=words):
        save_verified(model, tmp_path / "adapter", as_lora=True, base=tiny_base(), trained=False)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_converted_adapter_keeps_every_scale(rslora, tmp_path):
    """Ranks and alphas of their own, which PEFT's conversion refuses beside rsLoRA."""
    config = lora_config(
        init_lora_weights="pissa", use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    )
    model = get_echo_model(tiny_base(), config, ROUTED).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_verified(model, tmp_path / "lora", as_lora=True, base=tiny_base())
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (saved["r"], saved["rank_pattern"], saved["init_lora_weights"]) == (8, {"q_proj": 4}, True)
    assert {t.shape[0] for n, t in read_adapter(tmp_path / "lora").items() if "lora_A" in n} == {4, 8}
    torch.testing.assert_close(loaded("plain LoRA", tmp_path / "lora"), state_of(model)["logits"], rtol=0, atol=2e-4)


def test_modules_saved_whole_survive_the_conversion(tmp_path):
    config = lora_config(init_lora_weights="pissa", modules_to_save=["lm_head"])
    model = get_echo_model(tiny_base(), config, ROUTED)
    model.get_base_model().lm_head.modules_to_save["default"].weight.data += 0.1
    save_verified(model, tmp_path / "lora", as_lora=True, base=tiny_base())
    assert any("lm_head" in name for name in load_file(tmp_path / "lora" / ADAPTER_FILE))


def test_checkpoints_of_a_changed_base_are_proved_on_it(tmp_path):
    model = trained('`init_lora_weights="corda"`')
    model.save_pretrained(tmp_path)
    before = state_of(model)
    verify_adapter(model, tmp_path)
    assert_equal(before, state_of(model))
    compare_adapter(tmp_path, read_adapter(tmp_path))


def test_loftq_is_saved_as_it_is(tmp_path, monkeypatch):
    """With a quantisation that needs no GPU in place of PEFT's: what matters is that the base becomes another."""

    def quantise(weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[torch.Tensor, ...]:
        step = weight.abs().max() / 2 ** (num_bits - 1)
        quantised = (weight / step).round() * step
        U, S, Vh = torch.linalg.svd(weight - quantised)
        return (
            quantised,
            S[:reduced_rank, None].sqrt() * Vh[:reduced_rank],
            U[:, :reduced_rank] * S[:reduced_rank].sqrt(),
        )

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", torch.no_grad()(quantise))
    assert saved_how(UNMEASURED, tmp_path) == "as it is"


def test_a_folder_says_who_can_read_it(tmp_path):
    for name, is_served in (("plain LoRA", True), ('`init_lora_weights="pissa"`', False)):
        folder = tmp_path / str(is_served)
        trained(name).save_pretrained(folder)
        found = inspect_adapter(folder)
        assert any(line.startswith("PEFT: ") for line in found.readers)
        assert any(line.startswith("vLLM") for line in found.readers) == is_served
        assert any(line.startswith("vLLM") for line in found.refused_by) != is_served


@pytest.mark.parametrize(
    ("written", "right"), [("PiSSA", "pissa"), ("PISSA_niter_4", "pissa_niter_4"), ("CorDA", "corda"), ("EVA", "eva")]
)
def test_a_name_that_peft_does_not_know(written, right):
    with pytest.raises(EchoModelError, match=f"'{written}', which PEFT does not know. Write '{right}'"):
        get_echo_model(tiny_base(), lora_config(init_lora_weights=written), ROUTED)


# ---------------------------------------------------------------------------------------- EVA


def test_the_echo_follows_eva_to_its_new_ranks():
    """EVA replaces lora_A where it changes a rank: an echo on the old one would never be heard."""
    model = trained('`init_lora_weights="eva"`', "lora_input")  # asserts that every echo parameter has a gradient
    ranks = set(model.peft_config["default"].rank_pattern.values())
    assert ranks - {4}


def test_a_module_that_eva_took_out():
    config = lora_config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_echo_model(tiny_base(), config, ROUTED)
    data = [collate([random_row(torch.Generator().manual_seed(n), 6, 6) for n in range(4)])]
    state = get_eva_state_dict(model, data, show_progress_bar=False)
    gone = "base_model.model.model.layers.1.self_attn.v_proj"
    state[gone] = state[gone][:0]
    initialize_lora_eva_weights(model, eva_state_dict=state)
    with pytest.raises(EchoModelError, match=r"model\.layers\.1\.self_attn\.v_proj lost its adapter.*rho=1"):
        model.train().echo_losses(**batches()[0], is_routed=True)


if __name__ == "__main__":
    print(table())
