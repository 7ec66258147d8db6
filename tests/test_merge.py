"""Merging keeps the logits or writes nothing; adapters that don't fit their base are refused."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from echo_lora.adapter import merge as merge_module
from echo_lora.adapter.files import ADAPTER_FILE, CONFIG_FILE
from echo_lora.adapter.inspection import inspect_adapter
from echo_lora.adapter.merge import load_adapter, merge
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.recipe.build import add_adapter
from echo_lora.recipe.load import load_recipe
from tiny import tiny_tokenizer
from tiny_recipe import tiny_folder, tiny_recipe

IDS = torch.tensor([[5, 60, 200, 7]])


@pytest.fixture(params=["lora"])
def adapter(tmp_path, request) -> Path:
    """The folder of a trained adapter, with a tokenizer."""
    recipe = load_recipe(tiny_recipe(tmp_path), [f"method={request.param}", "echo=false"])
    model = add_adapter(recipe, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def base_of(adapter: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(adapter.parent / "base", **kwargs)


def nothing_was_written(adapter: Path) -> bool:
    return not [path for path in adapter.parent.iterdir() if "merged" in path.name]


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora"], indirect=True)
def test_the_merged_model_has_the_logits_of_base_and_adapter(adapter, tmp_path):
    base = logits(base_of(adapter))
    expected = logits(PeftModel.from_pretrained(base_of(adapter), adapter))
    done = merge(adapter, tmp_path / "merged", verify=True)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (base - expected).abs().max() > 100 * 1e-5
    assert done.dtype == "float32"
    assert done.max_difference < 1e-4
    assert done.reloaded_difference == pytest.approx(done.max_difference, abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_the_base_may_be_named_and_the_type_chosen(adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    done = merge(adapter, tmp_path / "merged", base=tmp_path / "moved", dtype="bfloat16")
    assert done.dtype == "bfloat16"
    assert done.reloaded_difference is None
    assert 0 < done.max_difference <= done.tolerance * done.largest_logit
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


# --------------------------------------------------------------------- refusals


def test_a_merge_that_changes_logits_is_not_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **kwargs: self.unload())  # forgets the adapter
    with pytest.raises(EchoCheckpointError, match=r"merging changes logits by .* torch\.float32 explains up to"):
        merge(adapter, tmp_path / "merged")
    assert nothing_was_written(adapter)


def test_a_saved_model_with_other_logits_is_removed(adapter, tmp_path, monkeypatch):
    original = merge_module.load_tokenizer

    def damages_the_model(*args, **kwargs):
        [folder] = [path for path in tmp_path.iterdir() if path.name.startswith(".merged") and path.is_dir()]
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.self_attn.q_proj.weight"].mul_(5.0)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return original(*args, **kwargs)

    monkeypatch.setattr(merge_module, "load_tokenizer", damages_the_model)
    with pytest.raises(EchoCheckpointError, match="as it loads changes logits"):
        merge(adapter, tmp_path / "merged", verify=True)
    assert nothing_was_written(adapter)


def test_a_quantised_base_is_refused_with_what_to_do(adapter, tmp_path):
    path = tmp_path / "base" / "config.json"
    quantised = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    path.write_text(json.dumps(quantised))
    with pytest.raises(EchoModelError, match=r"base is quantised \(bitsandbytes\).*--base"):
        merge(adapter, tmp_path / "merged")
    assert nothing_was_written(adapter)


def test_an_output_folder_with_files_is_left_alone(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(EchoCheckpointError, match="out exists and is not empty"):
        merge(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge_module, "load_tokenizer", full)  # the last step before the folder is renamed
    with pytest.raises(EchoCheckpointError, match=r"merged could not be written: .*No space left"):
        merge(adapter, tmp_path / "merged")
    assert nothing_was_written(adapter)


@pytest.mark.parametrize("name", [ADAPTER_FILE, CONFIG_FILE])
@pytest.mark.parametrize("kind", ["cut off", "missing"])
def test_a_damaged_adapter_is_an_error_that_names_the_file(adapter, tmp_path, name, kind):
    path = adapter / name
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EchoCheckpointError, match=rf"adapter/{name} (can't be read|is missing)"):
        merge(adapter, tmp_path / "merged")
    assert nothing_was_written(adapter)


def test_an_adapter_with_values_that_are_not_finite_is_not_merged(adapter, tmp_path):
    tensors = load_file(adapter / ADAPTER_FILE)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter / ADAPTER_FILE)
    with pytest.raises(EchoCheckpointError, match=r"lora_B\.weight holds values that are not finite"):
        merge(adapter, tmp_path / "merged")
    assert nothing_was_written(adapter)


def test_an_adapter_that_names_no_base_is_an_error(adapter, tmp_path):
    config = json.loads((adapter / CONFIG_FILE).read_text()) | {"base_model_name_or_path": None}
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(EchoCheckpointError, match=r"names no base model\. Name it with --base"):
        merge(adapter, tmp_path / "merged")


# ------------------------------------------------------- adapters for other bases


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"width": 16}, r"model\.layers\.0\.mlp\.up_proj needs the shape \(4, 16\), but the adapter holds \(4, 32\)"),
        ({"layers": 3}, r"model\.layers\.3\.mlp\.up_proj is not a module of this base"),
        ({"layers": 5}, r"model\.layers\.4\.mlp\.up_proj has no weights in the adapter"),
    ],
)
def test_an_adapter_for_another_base_is_refused_with_the_module(adapter, tmp_path, shape, expected, recwarn):
    other = tiny_folder(tmp_path / "other", **shape)
    with pytest.raises(EchoCheckpointError, match=expected) as caught:
        merge(adapter, tmp_path / "merged", base=other)
    assert f"made for {tmp_path / 'base'}" in str(caught.value)
    assert [str(warning.message)[:80] for warning in recwarn if "eight" in str(warning.message)] == []
    assert [str(warning.message)[:80] for warning in recwarn if "keys" in str(warning.message)] == []
    assert nothing_was_written(adapter)


def test_an_adapter_for_another_architecture_is_refused(adapter, tmp_path):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=4, n_head=4, n_positions=64))
    other.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(EchoCheckpointError, match=r"does not fit .*gpt2: .*not found in the base model"):
        merge(adapter, tmp_path / "merged", base=tmp_path / "gpt2")


def test_a_base_of_another_name_is_refused_if_names_must_agree(adapter, tmp_path):
    tiny_folder(tmp_path / "other", seed=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(EchoCheckpointError, match=r"was made for .*base, not for .*other"):
        load_adapter(base, adapter, require_same_name=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").rename(tmp_path / "elsewhere" / "base")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "base")
    assert not load_adapter(moved, adapter, require_same_name=True).training


# ---------------------------------------------------------------------- inspection


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora"], indirect=True)
def test_a_sound_adapter_is_described(adapter, request):
    report = inspect_adapter(adapter)
    assert report.method == request.node.callspec.params["adapter"]
    assert (report.rank, report.alpha) == (4, 8)
    assert report.modules == ["q_proj", "up_proj", "v_proj"]
    assert report.layers == 12
    assert report.base == str(adapter.parent / "base")
    assert report.parameters == sum(t.numel() for t in load_file(adapter / ADAPTER_FILE).values())
    assert report.has_chat_template
    assert report.problems == []
    assert any("PEFT" in reader for reader in report.readers)
    assert any("vLLM" in reader for reader in report.readers) == (report.method != "dora")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda name, t: t.fill_(float("inf")) if name.endswith("lora_B.weight") else t, "not finite"),
        (lambda name, t: t.zero_() if "lora_B" in name else t, "every lora_B is zero"),
    ],
    ids=["infinite", "zero"],
)
def test_nothing_can_load_an_adapter_with_a_problem(adapter, change, expected):
    tensors = {name: change(name, tensor) for name, tensor in load_file(adapter / ADAPTER_FILE).items()}
    save_file(tensors, adapter / ADAPTER_FILE)
    report = inspect_adapter(adapter)
    assert expected in " ".join(report.problems)
    assert report.readers == []


def test_foreign_keys_are_a_problem(adapter):
    tensors = load_file(adapter / ADAPTER_FILE) | {"echo.branches.W1.weight": torch.zeros(2)}
    save_file(tensors, adapter / ADAPTER_FILE)
    assert "echo.branches.W1.weight is not a PEFT key (1 such keys)" in inspect_adapter(adapter).problems


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": -1}, "r = -1 must be greater than or equal to 1"),
        ({"r": "4"}, "r = '4' must be a valid integer"),
        ({"r": 10**9}, "r = 1000000000 must be less than or equal to 65536"),
        ({"lora_alpha": None}, "lora_alpha = None must be a valid number"),
        ({"lora_dropout": 7}, "lora_dropout = 7 must be less than 1"),
        ({"peft_type": "NONSENSE"}, "peft_type = 'NONSENSE' is unknown to the installed PEFT"),
        ({"task_type": "NONSENSE"}, "task_type = 'NONSENSE' must be"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj = -1 must be"),
        ({"target_parameters": 3}, "target_parameters = 3 must be a valid list"),
    ],
)
def test_an_impossible_configuration_is_refused_by_every_reader(adapter, changes, expected, tmp_path):
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(EchoCheckpointError, match=rf"adapter_config\.json: {re.escape(expected)}"):
        inspect_adapter(adapter)
    with pytest.raises(EchoCheckpointError, match=re.escape(expected)):
        merge(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": 8}, "of shapes (4, 32) and (32, 4), which do not fit rank 8"),
        ({"lora_alpha": 0}, "lora_alpha = 0: the adapter changes nothing"),
        ({"use_dora": True}, "has no DoRA magnitude, but use_dora = True"),
        ({"peft_type": "IA3"}, "the weights are LoRA weights, but peft_type = IA3"),
        ({"target_modules": ["q_proj"]}, "has weights, but target_modules = ['q_proj'] does not name it"),
        ({"target_modules": "("}, "is not a valid regular expression"),
        ({"task_type": "SEQ_CLS"}, "task_type = SEQ_CLS is not that of a causal language model, CAUSAL_LM"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type = SEQ_2_SEQ_LM is not that of a causal language model"),
        ({"lora_bias": True}, "model.layers.0.mlp.up_proj has no lora_B bias, but lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but there are no weights for it"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = [1], but there are no token weights"),
    ],
)
def test_weights_that_do_not_match_their_configuration_are_a_problem(adapter, changes, expected, tmp_path):
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    report = inspect_adapter(adapter)
    assert expected in " ".join(report.problems)
    assert report.readers == []
    with pytest.raises(EchoCheckpointError, match=re.escape(report.problems[0])):
        merge(adapter, tmp_path / "merged")


def test_modules_to_save_may_name_a_missing_module(adapter, tmp_path):
    """A list of modules_to_save may serve several architectures; PEFT loads it."""
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["wte"]}))
    merge(adapter, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # about lora_bias without a bias in the base
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]])
def test_saved_modules_are_not_a_problem(modules, tmp_path):
    tiny_folder(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM", lora_bias=True)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    assert inspect_adapter(tmp_path / "adapter").problems == ["every lora_B is zero: the adapter changes nothing"]


def test_a_mismatch_with_its_own_base_is_blamed_on_the_adapter(adapter, tmp_path):
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exclude_modules": ["q_proj"]}))
    with pytest.raises(EchoCheckpointError, match=r"Is adapter_config\.json the one that was saved with the weights"):
        merge(adapter, tmp_path / "merged")


def test_a_variant_that_can_not_be_merged_is_refused(adapter, tmp_path):
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": [1]}))
    with pytest.raises(EchoModelError, match="can't be merged: aLoRA does not support safe merging"):
        merge(adapter, tmp_path / "merged")
