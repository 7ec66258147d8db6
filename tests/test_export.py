"""Every save is verified, and leaves nothing if verification fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import lora_config, tiny_base, tiny_echo_model
from echo_lora.adapter import export
from echo_lora.adapter.export import save_verified, verify_adapter
from echo_lora.adapter.files import adapter_hash, read_adapter
from echo_lora.errors import EchoCheckpointError
from echo_lora.files import new_folder
from tiny import tiny_tokenizer

ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_saving_verifies_and_leaves_the_model_unchanged(tmp_path, method):
    model = tiny_echo_model(method=method)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    random_state = torch.random.get_rng_state()
    save_verified(model, tmp_path / "adapter", tokenizer=tiny_tokenizer())
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert model.training
    assert model.active_adapters == ["default"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (value, requires_grad) in before.items():
        assert torch.equal(after[name], value)
        assert after[name].requires_grad == requires_grad, name
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert names >= {ADAPTER, "adapter_config.json", "tokenizer.json", "chat_template.jinja"}


def test_a_process_without_this_package_loads_it(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = tiny_echo_model()
    save_verified(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([[3, 4, 5]])).logits
    code = (
        "import sys, torch, peft, transformers\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = peft.PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).eval()\n"
        "assert not any(name.startswith('echo_lora') for name in sys.modules)\n"
        f"torch.save(model(input_ids=torch.tensor([[3, 4, 5]])).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def damage(kind: str, folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    name = next(n for n in sorted(tensors) if "lora_B" in n)
    if kind == "missing key":
        del tensors[name]
    elif kind == "extra key":
        tensors[name + ".more"] = torch.ones(1)
    elif kind == "nan":
        tensors[name][0, 0] = float("nan")
    elif kind == "changed":
        tensors[name][0, 0] += 1
    elif kind == "config":
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    save_file(tensors, folder / ADAPTER)
    if kind == "cut off":
        data = (folder / ADAPTER).read_bytes()
        (folder / ADAPTER).write_bytes(data[: len(data) // 2])
    elif kind == "gone":
        (folder / ADAPTER).unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing key", "does not hold the adapter's keys: missing"),
        ("extra key", "unexpected"),
        ("nan", "not finite"),
        ("changed", "differs from the trained adapter"),
        ("config", "other logits"),
        ("cut off", "can't be read"),
        ("gone", "is missing"),
    ],
)
def test_a_damaged_folder_fails_verification(tmp_path, kind, words):
    model = tiny_echo_model()
    model.save_pretrained(tmp_path)
    damage(kind, tmp_path)
    with pytest.raises(EchoCheckpointError, match=words):
        verify_adapter(model, tmp_path)
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]


def test_an_untrained_adapter_fails_verification(tmp_path):
    model = tiny_echo_model(started=False)
    with pytest.raises(EchoCheckpointError, match="every lora_B is zero"):
        save_verified(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("keep")
    with pytest.raises(EchoCheckpointError, match="exists and is not empty"):
        save_verified(tiny_echo_model(), tmp_path / "adapter")
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter", "mine.txt"]
    save_verified(tiny_echo_model(), tmp_path / "adapter", overwrite=True)
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "keep"
    assert read_adapter(tmp_path / "adapter")


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    model = tiny_echo_model()
    save_verified(model, tmp_path / "adapter")
    old = (tmp_path / "adapter" / ADAPTER).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(EchoCheckpointError, match="No space left on device"):
        save_verified(model, tmp_path / "adapter", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / ADAPTER).read_bytes() == old


def test_new_folder_is_removed_if_its_block_fails(tmp_path):
    def fail_half_way():
        with new_folder(tmp_path / "a" / "b") as folder:
            (folder / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EchoCheckpointError, match="is a file"):
        save_verified(tiny_echo_model(), tmp_path / "file")


def test_adapter_hash_sees_names_and_values():
    model = tiny_echo_model()
    first = adapter_hash(model)
    assert first == adapter_hash(tiny_echo_model())
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] += 1e-3
    assert adapter_hash(model) != first


def test_a_named_adapter_is_saved_without_a_subfolder(tmp_path):
    from echo_lora import EchoConfig, get_echo_model

    config = lora_config(init_lora_weights=False)
    model = get_echo_model(tiny_base(), config, EchoConfig(target_layers=[0]), adapter_name="mine")
    save_verified(model, tmp_path / "out")
    assert (tmp_path / "out" / ADAPTER).is_file()
    assert export.ADAPTER_FILE == ADAPTER
