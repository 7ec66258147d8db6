"""The dry run counts what training would count, and a preview shows what the model would see."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from echo_lora.data.tokenize import tokenize_row
from echo_lora.errors import EchoConfigError, EchoDataError, EchoModelError
from echo_lora.recipe.build import add_adapter
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.plan import _kept_bytes, plan
from echo_lora.recipe.prepare import preview
from echo_lora.recipe.train import run
from tiny import tiny_tokenizer
from tiny_recipe import ROWS, tiny_recipe, write_rows


def loaded(folder, *overrides, **changes):
    return load_recipe(tiny_recipe(folder, **changes), overrides)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_dry_run_counts_as_training_does_and_needs_no_weights(tmp_path, method):
    recipe = loaded(tmp_path, f"method={method}", "training.steps=null", "training.epochs=2")
    result = run(recipe)
    (tmp_path / "base" / "model.safetensors").unlink()
    planned = plan(recipe)
    assert planned.deployed_parameters == result.deployed_parameters
    assert planned.echo_parameters == result.echo_parameters
    assert planned.steps == result.steps == 8  # 12 rows in batches of 3, twice
    assert planned.rows == result.rows


def test_layers_are_named(tmp_path):
    planned = plan(loaded(tmp_path))
    assert planned.source_layers == ["model.layers.1", "model.layers.2"]
    modules = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
    assert planned.target_layers == {"model.layers.0": modules, "model.layers.1": modules}
    assert planned.echo_kind == "real"


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["training.steps=7"], 7),
        (["training.steps=null"], 4),
        (["training.steps=null", "training.batch_size=5"], 3),
        (["training.steps=null", "training.batch_size=5", "training.gradient_accumulation=2"], 2),
        (["training.steps=null", "training.epochs=1.5"], 6),
    ],
)
def test_steps_are_those_of_the_trainer(tmp_path, overrides, steps):
    recipe = loaded(tmp_path, *overrides)
    assert plan(recipe).steps == steps
    assert run(recipe).steps == steps


def test_the_cost_is_the_floor_of_the_shared_prefix(tmp_path):
    rows = [tokenize_row(row, tiny_tokenizer()) for row in ROWS]
    P = sum(row.answer_start for row in rows)
    A = sum(len(row.labels) for row in rows) - P
    planned = plan(loaded(tmp_path, "training.steps=5", "echo_config.routing_end=0.5"))
    assert planned.mean_routing == pytest.approx((1 + 0.875 + 0.75 + 0.625 + 0.5) / 5)
    assert planned.cost == pytest.approx((P + (1 + planned.mean_routing) * A) / (P + A))
    assert planned.why_full is None


def test_full_passes_cost_as_much_again_as_they_are_routed(tmp_path):
    planned = plan(loaded(tmp_path, "echo_config.echo_step=full"))
    assert planned.cost == pytest.approx(1 + planned.mean_routing)
    assert "echo_step is full" in planned.why_full


def test_without_the_echo_nothing_of_it_is_planned(tmp_path):
    planned = plan(loaded(tmp_path, "echo=false"))
    assert (planned.cost, planned.echo_parameters, planned.echo_kind) == (1.0, 0, None)
    assert planned.source_layers == []


def test_memory_counts_weights_states_and_what_autograd_keeps(tmp_path):
    planned = plan(loaded(tmp_path))
    assert planned.memory.base == 4 * planned.base_parameters
    assert planned.memory.states == 16 * planned.trainable_parameters
    assert planned.memory.total > planned.memory.base + planned.memory.states + planned.memory.activations
    kept = planned.memory.activations
    assert plan(loaded(tmp_path, "training.batch_size=6")).memory.activations == pytest.approx(2 * kept, rel=0.01)
    assert plan(loaded(tmp_path, "echo=false")).memory.activations < kept
    assert plan(loaded(tmp_path, "echo_config.echo_step=full")).memory.activations > kept
    assert plan(loaded(tmp_path, "dtype=bfloat16")).memory.base == planned.memory.base // 2
    assert plan(loaded(tmp_path, "training.optimizer=sgd")).memory.states == planned.memory.states // 2


def test_checkpointing_keeps_less(tmp_path):
    whole = plan(loaded(tmp_path)).memory.activations
    checkpointed = plan(loaded(tmp_path, "training.gradient_checkpointing=true"))
    assert checkpointed.why_full is None
    assert checkpointed.memory.activations < 0.7 * whole


@pytest.mark.parametrize("T", [20, 120])  # with scores of attention, the longer rows would keep about twice as much
def test_activations_are_the_bytes_that_a_real_forward_keeps(tmp_path, T):
    recipe = loaded(tmp_path, "echo=false")
    real = add_adapter(recipe, AutoModelForCausalLM.from_pretrained(tmp_path / "base")).train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    mask = torch.ones(3, 1, T, T, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real.get_base_model()(torch.zeros(3, T).long(), attention_mask=mask, use_cache=False, logits_to_keep=5)
    expected = sum(size for pointer, (size, _) in kept.items() if pointer not in weights)
    with torch.device("meta"):
        meta = add_adapter(recipe, AutoModelForCausalLM.from_config(real.config))
    # the real attention kernel may keep a little more than its shape-only twin
    assert _kept_bytes(meta.train(), 3, T, 5) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_other_architectures_can_be_planned(tmp_path, kind):
    path = tiny_recipe(tmp_path)
    shared = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2}
    config = {
        "gpt2": GPT2Config(**shared, n_embd=32, n_layer=4, n_head=4, n_positions=128),
        "mixtral": MixtralConfig(
            **shared,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
    }[kind]
    config.save_pretrained(tmp_path / "base")
    planned = plan(load_recipe(path, ["lora.target_modules=all-linear"]))
    assert len(planned.target_layers) == 2
    experts = {name.rpartition("mlp.")[2]: why for name, why in planned.without_echo.items() if "layers.1." in name}
    assert experts.keys() == ({"gate", "experts", "experts.base_layer"} if kind == "mixtral" else set())
    assert all("adapts a bare parameter" in why for why in experts.values())
    assert not any("experts" in name for names in planned.target_layers.values() for name in names)
    assert planned.memory.activations is None or planned.memory.activations > 0


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["echo_config.source_layers=[9]"], EchoConfigError, "source_layers names layer 9, but the model has 4"),
        (["lora.target_modules=[nothing]"], EchoModelError, r"lora\.target_modules.*nothing"),
        (["lora.target_modules=[q_proj, v_prj]"], EchoModelError, r"names 'v_prj', but .* Did you mean 'v_proj'\?"),
        (["lora.target_modules=[q_proj, v_prj]", "echo=false"], EchoModelError, r"lora\.target_modules names 'v_prj'"),
        (["data.max_length=5"], EchoDataError, r"train\.jsonl:1: row 0"),
        (["training.evaluate_every=1", "data.validation=missing.jsonl"], EchoDataError, "missing.jsonl"),
        (["attn_implementation=flash_attention_2"], EchoModelError, "base can't be built"),
    ],
)
def test_the_dry_run_refuses_what_training_would(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        plan(loaded(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("override", "package"),
    [("training.report_to=[mlflow]", "mlflow"), ("training.optimizer=adamw_bnb_8bit", "bitsandbytes")],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, override, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EchoConfigError, match=f"needs the package {package}"):
        plan(loaded(tmp_path, override))


# -------------------------------------------------------------------- preview


def test_a_preview_shows_the_first_rows_of_each_source_and_counts_all(tmp_path):
    write_rows(tmp_path / "more.jsonl", ROWS[:3])
    shown = preview(loaded(tmp_path, data={"train": ["train.jsonl", "more.jsonl"]}), 2)
    assert [where.rpartition("/")[2] for where, _ in shown.rows] == [
        *("train.jsonl: row 0", "train.jsonl: row 1"),
        *("more.jsonl: row 0", "more.jsonl: row 1"),
    ]
    for (_, segments), row in zip(shown.rows, ROWS[:2] * 2, strict=True):
        assert "".join(text for text, _ in segments) == row["prompt"] + row["completion"] + "</s>"
        assert [kind for _, kind in segments].count("boundary") == 1
    assert shown.summary[0].endswith("train.jsonl: prompt_completion (columns prompt, completion)")
    assert "12 rows kept" in shown.summary[1]
    assert any("3 rows kept" in line for line in shown.summary)


USER, ANSWER = {"role": "user", "content": "Please search for Bern"}, {"role": "assistant", "content": "Done."}
TOOL = {"type": "function", "function": {"name": "search"}}
CALLED = ANSWER | {"tool_calls": [{"function": {"name": "search", "arguments": {"of": "Bern"}}}]}


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, "tools that the chat template leaves out"),
        ({"messages": [USER, CALLED]}, "tool calls that the chat template leaves out"),
        ({"messages": [USER | {"name": "Bob"}, ANSWER]}, "text in the key 'name' of messages that the chat template"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"loud": True}},
            "'loud' in chat_template_kwargs that the",
        ),
    ],
    ids=["tools", "tool calls", "key of a message", "variable"],
)
@pytest.mark.parametrize("command", [preview, plan])
def test_content_that_is_not_trained_on_is_warned_about(tmp_path, caplog, command, row, left_out):
    recipe = loaded(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"messages": [USER, ANSWER]}, row])
    with caplog.at_level("WARNING"):
        found = command(recipe)
    lines = found.summary if command is preview else found.rows
    assert any(line.startswith(f"1 rows have {left_out}") and line.endswith("not trained on") for line in lines)
    assert f"train.jsonl:2: row 1 has {left_out}" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a:", "completion": "b", "tools": [TOOL]}, "has tools: only a chat template reads it"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": False}},
            ": chat_template_kwargs has tokenize:",
        ),
        ({"prompt": "a:", "completion": "b", "_echo_row": 7}, "has a column '_echo_row', a name that is reserved"),
        ({"prompt": "th", "completion": "e"}, "has no boundary: the tokenizer merges the end of the prompt"),
        (
            {"prompt": "a:", "completion": "b", "weight": 0},
            "has weight: rows have no weights, so 0 has the effect of 1",
        ),
    ],
    ids=["tools", "argument", "number of the row", "joined", "weight"],
)
@pytest.mark.parametrize("command", [preview, plan])
def test_a_row_that_would_be_trained_on_wrongly_is_refused(tmp_path, command, row, message):
    recipe = loaded(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a:", "completion": "b"}, row])
    with pytest.raises(EchoDataError) as caught:
        command(recipe)
    assert f"train.jsonl:2: row 1{message if message[0] == ':' else ' ' + message}" in str(caught.value)


@pytest.mark.parametrize("command", [preview, plan])
def test_data_columns_can_not_name_the_column_with_the_numbers(tmp_path, command):
    with pytest.raises(EchoDataError, match=r"train\.jsonl:1: row 0 has a column '_echo_row'"):
        command(loaded(tmp_path, "data.columns={_echo_row: completion}"))
