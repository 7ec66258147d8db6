"""The recipes of the commonsense table: dry runs at the real model shapes, and published parameter counts."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from echo_lora.recipe.load import SHIPPED, load_recipe
from echo_lora.recipe.plan import Plan, plan
from echo_lora.recipe.rows import evaluation_rows
from tiny import tiny_tokenizer

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = {
    "commonsense-llama-7b": LLAMA | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048},
    "commonsense-llama2-7b": LLAMA | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096},
    "commonsense-llama3-8b": LLAMA
    | {"intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}
BASE_PARAMETERS = {
    "commonsense-llama-7b": 6_738_415_616,
    "commonsense-llama2-7b": 6_738_415_616,
    "commonsense-llama3-8b": 8_030_261_248,
}
# Liu et al. 2024 (DoRA), table 1, "# Params (%)": of all parameters, those of the adapter included
PUBLISHED = {
    ("commonsense-llama-7b", "lora"): "0.83",
    ("commonsense-llama-7b", "dora"): "0.84",
    ("commonsense-llama2-7b", "lora"): "0.83",
    ("commonsense-llama2-7b", "dora"): "0.84",
    ("commonsense-llama3-8b", "lora"): "0.70",
    ("commonsense-llama3-8b", "dora"): "0.71",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with imported rows, and the three models without their weights."""
    folder = tmp_path_factory.mktemp("table")
    for task in TASKS:
        (folder / "data/commonsense" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [
                {"prompt": f"Count {n} of {task}:\n", "completion": f"true {n}", "answer": "true"} for n in range(3)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data/commonsense" / task / f"{split}.jsonl").write_text(lines)
    for name, shape in SHAPES.items():
        LlamaConfig(**shape, tie_word_embeddings=False).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@cache
def planned(folder: Path, name: str, method: str, echo: bool) -> Plan:
    overrides = [f"model={folder / name}", f"method={method}", f"echo={json.dumps(echo)}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return plan(load_recipe(name, overrides))


def modules(name: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear modules that get an adapter, in every layer."""
    shape = SHAPES[name]
    d, wide = shape["hidden_size"], shape["intermediate_size"]
    key_width = d // shape["num_attention_heads"] * shape.get("num_key_value_heads", shape["num_attention_heads"])
    return {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (d, key_width),
        "self_attn.v_proj": (d, key_width),
        "mlp.up_proj": (d, wide),
        "mlp.down_proj": (wide, d),
    }


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_dry_run_counts_the_published_parameters(folder, name, method, echo):
    rank, layers = 32, 32
    per_layer = sum(rank * (inputs + outputs) for inputs, outputs in modules(name).values())
    magnitudes = sum(outputs for _, outputs in modules(name).values()) if method == "dora" else 0
    expected = layers * (per_layer + magnitudes)
    if method == "lora":
        assert expected == (56_623_104 if name == "commonsense-llama3-8b" else 56_098_816)

    result = planned(folder, name, method, echo)
    assert result.deployed_parameters == expected
    assert result.base_parameters == BASE_PARAMETERS[name]
    share = 100 * expected / (expected + result.base_parameters)
    assert f"{share:.2f}" == PUBLISHED[name, method]
    assert result.why_full is None
    assert result.steps == 3 * 2  # three epochs of 24 rows in batches of 16
    assert any(line.startswith("prompts are trained on too") for line in result.rows)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", SHAPES)
def test_echo_parameters_are_counted_separately_and_not_deployed(folder, name, method):
    with_echo, without = planned(folder, name, method, True), planned(folder, name, method, False)
    assert with_echo.deployed_parameters == without.deployed_parameters
    assert without.echo_parameters == 0
    # the echo enters the input of each low-rank branch: W1 and U1 from d, W2 and U2 to its width, c and the scale
    d, bottleneck = 4096, 64
    branch = [2 * bottleneck * d + 2 * bottleneck * inputs + inputs + 1 for inputs, _ in modules(name).values()]
    outputs = [2 * bottleneck * d + 2 * bottleneck * outputs + outputs + 1 for _, outputs in modules(name).values()]
    site = load_recipe(name).build_echo_config().injection_site
    assert with_echo.echo_parameters == 4 * sum(branch if site == "lora_input" else outputs)


@pytest.mark.parametrize("name", SHAPES)
def test_the_default_layers_are_those_of_the_method(folder, name):
    result = planned(folder, name, "lora", True)
    assert result.source_layers == [f"model.layers.{index}" for index in (24, 25, 26, 27)]
    assert list(result.target_layers) == [f"model.layers.{index}" for index in (4, 5, 6, 7)]
    assert all(set(names) == set(modules(name)) for names in result.target_layers.values())


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_that_of_a_bfloat16_base(folder, name):
    result = planned(folder, name, "lora", True)
    assert result.memory.base == 2 * result.base_parameters
    assert result.memory.activations is not None
    assert planned(folder, name, "lora", False).memory.activations < result.memory.activations


def test_the_three_recipes_differ_in_model_and_published_learning_rate_only():
    found = []
    for name in SHAPES:
        document = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
        assert document.pop("output") == f"runs/{name}"
        found.append((document.pop("model"), document))
    assert [model for model, _ in found] == [
        "huggyllama/llama-7b",
        "meta-llama/Llama-2-7b-hf",
        "meta-llama/Meta-Llama-3-8B",
    ]
    assert found[0][1] == found[1][1] == found[2][1]
    for name, rate in zip(SHAPES, ("2e-4", "2e-4", "1e-4"), strict=True):
        text = (SHIPPED / f"{name}.yaml").read_text()
        assert text.count(f"--set method=dora --set training.learning_rate={rate}\n") == 2


@pytest.mark.parametrize("name", SHAPES)
def test_values_of_the_protocol(name):
    recipe = load_recipe(name)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (32, 64, 0.05)
    assert recipe.lora.target_modules == [key.rpartition(".")[2] for key in modules(name)]
    training = recipe.training
    assert (training.epochs, training.batch_size, training.gradient_accumulation) == (3, 16, 1)
    assert (training.learning_rate, training.schedule, training.warmup_steps) == (3e-4, "linear", 100)
    assert (training.optimizer, training.weight_decay, training.max_grad_norm) == ("adamw_torch", 0.0, 1.0)
    assert (recipe.data.max_length, recipe.data.on_overlength, recipe.data.chat) == (256, "drop", False)
    assert recipe.data.train_on_prompt
    assert [source.file for source in recipe.data.train] == [f"data/commonsense/{t}/train.jsonl" for t in TASKS]
    assert [source.file for source in recipe.data.validation] == [
        f"data/commonsense/{t}/validation.jsonl" for t in TASKS
    ]
    assert recipe.echo
    assert recipe.method == "lora"
    assert [task.name for task in recipe.evaluation.tasks] == list(TASKS)
    for task in recipe.evaluation.tasks:
        assert [source.file for source in task.data] == [f"data/commonsense/{task.name}/test.jsonl"]
        assert (task.kind, task.max_new_tokens, task.num_beams) == ("generate", 32, 4)
        assert task.stop == ["### Response:"]


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("boolq", ["true", "false"]),
        ("piqa", [f"solution{n}" for n in (1, 2)]),
        ("hellaswag", [f"ending{n}" for n in range(1, 5)]),
        ("winogrande", [f"option{n}" for n in (1, 2)]),
        *((name, [f"answer{n}" for n in range(1, 6)]) for name in ("social_i_qa", "ARC-Easy", "openbookqa")),
        ("ARC-Challenge", [f"answer{n}" for n in range(1, 6)]),
    ],
)
def test_patterns_read_every_answer_of_their_task(task, answers):
    pattern = next(t.answer_pattern for t in load_recipe("commonsense-llama-7b").evaluation.tasks if t.name == task)
    for answer in answers:
        assert re.search(pattern, f"the correct answer is {answer}").group() == answer
    assert len(answers) == pattern.count("|") + 1


def test_rows_to_score_come_from_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    scored = evaluation_rows(load_recipe("commonsense-llama-7b"), tiny_tokenizer())
    assert [task.name for task, _ in scored] == list(TASKS)
    assert all(len(rows) == 3 and rows[0]["answer"] == "true" for _, rows in scored)
