"""What PEFT offers besides LoRA, DoRA and rsLoRA, in recipes: initialisations, LoRA+ and NEFTune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoModelError
from echo_lora.method.variants import SUBTRACTED
from echo_lora.recipe.build import add_adapter, load_base, training_arguments
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.plan import plan
from echo_lora.recipe.record import RunResult
from echo_lora.recipe.sections import CHANGING
from echo_lora.recipe.train import run, train
from echo_lora.training.sft import EchoSFTTrainer
from tiny_recipe import tiny_recipe

ONE_ROW = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("methods")
    tiny_recipe(path)
    return path


def recipe_of(folder: Path, output: Path, *overrides: str):
    return load_recipe(folder / "recipe.yaml", [*overrides, f"output={output}"])


def trained(folder: Path, output: Path, *overrides: str) -> RunResult:
    return run(recipe_of(folder, output, *overrides))


def tensors_of(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_an_adapter_that_changed_its_base_is_saved_as_one_of_the_base_as_it_is(folder, tmp_path, init, echo, caplog):
    recipe = recipe_of(folder, tmp_path / "run", f"lora.init={init}", f"echo={str(echo).lower()}")
    result, model, _ = train(recipe, tmp_path / "checkpoints", resume=False)
    model.eval()
    saved = trained(folder, tmp_path / "run", f"lora.init={init}", f"echo={str(echo).lower()}")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.arange(40, 60)[None]
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, saved.adapter).eval()
    with torch.no_grad():
        logits = loaded(ids).logits
        torch.testing.assert_close(logits, model.get_base_model()(ids).logits, rtol=1e-3, atol=1e-4)
    assert (logits - before).abs().max() > 1e-2  # or nothing was trained
    numbers = sum(tensor.numel() for tensor in tensors_of(saved).values())
    assert saved.deployed_parameters == result.deployed_parameters == numbers == plan(recipe).deployed_parameters
    assert json.loads((saved.adapter / "adapter_config.json").read_text())["r"] == 2 * recipe.lora.r
    card = (saved.adapter / "README.md").read_text()
    assert f"rank 4, alpha 8, dropout 0.0, initialised by {init}; saved as a LoRA of rank 8" in card
    assert "changed the base" not in caplog.text  # the advice to convert it is for scripts: this is converted already


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_other_initialisations_keep_the_rank(folder, tmp_path, init):
    result = trained(folder, tmp_path / "run", f"lora.init={init}", "echo=false")
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True if init == "default" else init)


def test_the_schema_knows_what_changes_the_base():
    assert set(CHANGING) <= set(SUBTRACTED)


def test_a_rank_above_that_of_a_matrix_is_refused_before_training(folder, tmp_path):
    settings = ["lora.init=pissa", "lora.r=20", "lora.target_modules=[v_proj]"]  # 16 x 32
    with pytest.raises(EchoModelError, match=r"that of .*v_proj has only 16 dimensions, fewer than lora.r = 20"):
        trained(folder, tmp_path / "run", *settings)
    assert trained(folder, tmp_path / "run", "lora.init=default", *settings[1:]).steps == 4


# --------------------------------------------------------------------------------------------------------- LoRA+


def test_the_rates_are_those_of_peft(folder, tmp_path):
    settings = [
        "training.loraplus_lr_ratio=16",
        "training.weight_decay=0.1",
        "training.learning_rate=1e-3",
        "echo=false",
    ]
    recipe = recipe_of(folder, tmp_path / "run", *settings)
    model = add_adapter(recipe, load_base(recipe))
    trainer = EchoSFTTrainer(
        model,
        training_arguments(recipe, tmp_path),
        train_dataset=ONE_ROW,
        loraplus_lr_ratio=16.0,
    )
    expected = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found, wanted = (
        {names[id(p)]: (group["lr"], group["weight_decay"]) for group in one.param_groups for p in group["params"]}
        for one in (trainer.create_optimizer(), expected)
    )
    assert found == wanted
    assert {rate for name, (rate, _) in found.items() if "lora_B" in name} == {1.6e-2}
    assert {rate for name, (rate, _) in found.items() if "lora_A" in name} == {1e-3}


@pytest.mark.parametrize("echo", ["true", "false"])
def test_a_ratio_of_one_is_plain_training_and_another_is_not(folder, tmp_path, echo):
    plain, one, sixteen = (
        tensors_of(trained(folder, tmp_path / name, f"echo={echo}", f"training.loraplus_lr_ratio={ratio}"))
        for name, ratio in (("plain", "null"), ("one", "1"), ("sixteen", "16"))
    )
    assert_equal(plain, one)
    name = next(name for name in plain if "lora_B" in name)
    assert sixteen[name].abs().mean() > 4 * plain[name].abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loraplus_lr_ratio": -1.0}, "loraplus_lr_ratio = -1.0 must be a number above 0"),
        ({"loraplus_lr_ratio": 16.0, "optimizers": (AdamW([torch.zeros(1)]), None)}, "an optimizer of your own"),
    ],
)
def test_a_ratio_without_effect_is_refused(folder, tmp_path, options, message):
    recipe = recipe_of(folder, tmp_path / "run", "echo=false")
    model = add_adapter(recipe, load_base(recipe))
    with pytest.raises(EchoConfigError, match=message):
        EchoSFTTrainer(model, training_arguments(recipe, tmp_path), train_dataset=ONE_ROW, **options)


# ------------------------------------------------------------------------------------------------------- NEFTune


@pytest.mark.parametrize("echo", ["true", "false"])
def test_noise_on_the_embeddings_changes_training_and_nothing_of_the_base(folder, tmp_path, echo):
    settings = [f"echo={echo}", "training.neftune_noise_alpha=50"]
    plain = trained(folder, tmp_path / "plain", settings[0])
    noisy, again = (trained(folder, tmp_path / name, *settings) for name in ("noisy", "again"))
    assert noisy.initial_adapter_sha256 == plain.initial_adapter_sha256
    assert noisy.adapter_sha256 == again.adapter_sha256 != plain.adapter_sha256
    assert noisy.history[0]["loss"] != pytest.approx(plain.history[0]["loss"], rel=1e-4)
    assert "NEFTune noise 50" in (noisy.adapter / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------- resuming


METHODS = [["lora.init=pissa"], ["training.loraplus_lr_ratio=16"], ["training.neftune_noise_alpha=5"]]


@pytest.mark.parametrize("echo", ["true", "false"])
@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings[0].partition("=")[0])
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_refuses_another_setting(folder, tmp_path, settings, echo):
    settings = [*settings, f"echo={echo}", "training.save_every=2"]
    whole = trained(folder, tmp_path / "whole", *settings)
    checkpoints = tmp_path / "resumed" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-2", checkpoints / "checkpoint-2")
    key = settings[0].partition("=")[0]
    with pytest.raises(EchoCheckpointError, match=rf"{key}.*: checkpoint .*, now "):
        run(recipe_of(folder, tmp_path / "resumed", *settings[1:]), resume=True)
    resumed = run(recipe_of(folder, tmp_path / "resumed", *settings), resume=True)
    assert resumed.resumed_at == 2
    assert_equal(tensors_of(whole), tensors_of(resumed))
