"""Recipes: every wrong key is named with its place, and the shipped ones load."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from echo_lora.errors import EchoConfigError
from echo_lora.method.config import EchoConfig
from echo_lora.recipe.load import SHIPPED, load_recipe, recipe_of_run, shipped_recipes
from echo_lora.recipe.table import recipe_table

MINIMAL = """\
model: ./base
lora:
  r: 4
data:
  train: rows.jsonl
  test:
    task: chain_sum
    count: 5
training:
  steps: 20
evaluation:
  tasks:
    - name: sums
      kind: generate
"""


def written(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def refused(path: Path | str, *overrides: str) -> str:
    with pytest.raises(EchoConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_recipe_of_a_few_keys_has_a_default_for_all_others(tmp_path):
    recipe = load_recipe(written(tmp_path))
    assert recipe.lora.r == 4
    assert recipe.method == "lora"
    assert recipe.echo is False
    assert recipe.build_echo_config() == EchoConfig()
    assert recipe.output == "runs/my"
    assert [source.task for source in recipe.data.test] == ["chain_sum"]


@pytest.mark.parametrize("echo", [True, False])
def test_settings_of_the_echo_need_a_word_on_whether_it_is_on(tmp_path, echo):
    settings = ["echo_config.source_gradient=true", "echo_config.bottleneck=8"]
    assert refused(written(tmp_path), *settings).endswith(
        "the echo is off by default, but it has settings (echo_config.bottleneck, echo_config.source_gradient): set "
        "echo = true, or echo = false to train the plain adapter all the same."
    )
    recipe = load_recipe(written(tmp_path), [*settings, f"echo={str(echo).lower()}"])
    assert (recipe.echo, recipe.echo_config.bottleneck) == (echo, 8)


# ------------------------------------------------------------------- wrong keys


@pytest.mark.parametrize(
    ("before", "after", "line", "key", "nearest"),
    [
        ("model:", "modle:", 1, "modle", "model"),
        ("  r: 4", "  rr: 4", 3, "lora.rr", "r"),
        ("    count: 5", "    count: 5\n    parms: {}", 9, "data.test.parms", "params"),
        ("  steps: 20", "  step: 20", 10, "training.step", "steps"),
        ("      kind: generate", "      knd: generate", 14, "evaluation.tasks.0.knd", "kind"),
        ("lora:", "echo_config:\n  botleneck: 3\nlora:", 3, "echo_config.botleneck", "bottleneck"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(tmp_path, before, after, line, key, nearest):
    path = written(tmp_path, MINIMAL.replace(before, after))
    message = refused(path)
    assert f"{path}:{line}: unknown key {key}. Did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batch_size=0", "training.batch_size = 0 must be greater than or equal to 1."),
        ("training.batch_size=true", "training.batch_size = True must be a valid integer."),
        ("training.learning_rate=fast", "training.learning_rate = 'fast' must be a valid number."),
        ("method=qlora", "method = 'qlora' must be 'lora', 'dora' or 'rslora'."),
        ("echo=maybe", "echo = 'maybe' must be true or false."),
        ("echo=on", "echo = 'on' must be true or false."),
        ("training.batch_size=1:30", "training.batch_size = '1:30' must be a valid integer."),
        ("training.batch_size=1_000", "training.batch_size = '1_000' must be a valid integer."),
        ("training.batch_size=010", "training.batch_size = '010' must be a valid integer."),
        ("training.learning_rate=.nan", "training.learning_rate = nan must be a finite number."),
        ("training.learning_rate=1e400", "training.learning_rate = inf must be a finite number."),
        ("training.batch_size=1000000000000", "must be less than or equal to 1000000."),
        ("lora.r=1000000000", "lora.r = 1000000000 must be less than or equal to 65536."),
        ("echo_config.bottleneck=1000000000", "echo_config: bottleneck = 1000000000 must be at most 65536."),
        ("model=' '", "model: ' ' must be non-blank"),
        ("lora.target_modules=[]", "lora.target_modules = [] must have at least 1 item"),
        ("data.columns={prompt: q, completion: q}", "data.columns: prompt and completion both map to the column 'q'"),
        ("lora.target_modules=3", "lora.target_modules = 3 must be a valid string."),
        (
            "output=~",
            "output = null must be a valid string. YAML reads ~ and an empty value as null: to mean the",
        ),
        (
            "output=",
            "output = null must be a valid string. YAML reads ~ and an empty value as null: to mean the",
        ),
        ("echo=~", "echo = null must be true or false."),
        ("dtype=null", "dtype = null must be 'auto'"),
        ("echo_config.bottleneck=0", "echo_config: bottleneck = 0 must be at least 1."),
        ("echo_config.echo_kind=loud", "echo_config.echo_kind = 'loud' must be 'real', 'zero'"),
        ("echo_config.routing_seed=1", "echo_config: routing_seed is set by seeds.routing; move it there."),
        ("data.train=[]", "data.train = [] must have at least 1 item"),
        ("data.train={task: chain_sum}", "data.train: count is missing"),
        ("data.train={part: train}", "data.train: set one of file, hub and task"),
        ("data.train={file: a.jsonl, count: 3}", "data.train: count has no effect together with file"),
        ("data.train=[a.jsonl, a.jsonl]", "data.train: a.jsonl is listed twice with the same rows"),
        ("evaluation.tasks=[{name: a b}]", "evaluation.tasks.0.name = 'a b' must match pattern"),
        ("evaluation.tasks=[{name: a}, {name: a}]", "evaluation.tasks: 2 tasks have the name 'a'"),
        (
            "evaluation.tasks=[{name: a, answer_pattern: '('}]",
            "evaluation.tasks.0: evaluation task 'a': answer_pattern = '(' must be a valid",
        ),
        ("evaluation.tasks=[{name: a, kind: choice, stop: [x]}]", "stop works with generated answers only"),
    ],
)
def test_a_wrong_value_names_the_override_and_what_is_allowed(tmp_path, override, expected):
    message = refused(written(tmp_path), override)
    assert message.startswith(f"--set {override}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.epochs=2"], "training: epochs = 2 and steps = 20 contradict"),
        (["training.warmup_steps=20"], "training: warmup_steps = 20 must be below steps = 20"),
        (["training.evaluate_every=5"], "training.evaluate_every needs rows to evaluate: set data.validation"),
        (["training.bf16=true", "dtype=float16"], "training.bf16 = true contradicts dtype = float16"),
        (["data.max_length=null", "data.on_overlength=drop"], "data: on_overlength = drop needs max_length"),
        (["data.train={task: a, count: 1}", "data.columns={prompt: q}"], "data: columns maps the columns of files"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, overrides, expected):
    assert expected in refused(written(tmp_path), *overrides)


def test_an_override_that_does_not_go_with_the_files_section_is_named(tmp_path):
    path = written(tmp_path, MINIMAL + "echo_config: {bottleneck: 8}\n")
    assert f"{path}:15, --set echo_config.bottleneck=0: echo_config: " in refused(path, "echo_config.bottleneck=0")


def test_every_wrong_key_is_reported_at_once(tmp_path):
    message = refused(written(tmp_path, MINIMAL.replace("  r: 4", "  q: 4").replace("steps: 20", "steps: 0")))
    assert [line.partition(": ")[0].rpartition(":")[2] for line in message.splitlines()] == ["3", "10"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: a\ndata: [1, 2\n", ":3: not a YAML recipe:"),
        ("model: a\nmodel: b\n", ":2: not a YAML recipe: the key 'model' occurs twice."),
        ("- model\n", " is not a YAML mapping. Write `key: value` lines"),
        ("", " is not a YAML mapping. Write `key: value` lines"),
        ("model: !!python/name:os.system\n", ":1: not a YAML recipe: the tag tag:yaml.org,2002:python/name:os.system"),
        ("model: a\n3: b\n", ":2: not a YAML recipe: the key '3' is not a string"),
        ("? [a, b]\n: c\n", ":1: not a YAML recipe: this key is not a string"),
        ("model: &a [*a]\n", ":1: not a YAML recipe: the value contains itself through an alias"),
        (f"model: {'[' * 500}{']' * 500}\n", ": not a YAML recipe: it is nested more than 50 levels deep"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
            ":16: not a YAML recipe: it has more",
        ),
        ("model: a\n", ": the key data is missing. Add it."),
        ("model: a\ndata: {}\n", ":2: the key data.train is missing. Add it."),
        ("model: a\ndata: rows.jsonl\n", ":2: data = 'rows.jsonl' must be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(tmp_path, text, expected):
    path = written(tmp_path, text)
    assert f"{path}{expected}" in refused(path)


def test_an_unknown_recipe_offers_the_shipped_ones():
    assert "Did you mean 'tiny'?" in refused("tinny")


# -------------------------------------------------------------------- overrides


def test_an_override_is_yaml_and_wins_over_the_file(tmp_path):
    overrides = ["training.steps=null", "training.epochs=0.5", "training.learning_rate=1e-3", "echo=false"]
    recipe = load_recipe(written(tmp_path), [*overrides, "echo_config.source_layers=[-1]"])
    assert (recipe.training.steps, recipe.training.epochs, recipe.training.learning_rate) == (None, 0.5, 1e-3)
    assert recipe.echo is False
    assert recipe.build_echo_config().source_layers == [-1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("lora.r=[1", "the value is not valid YAML"),
        ("model.path=x", "model is not a section"),
    ],
)
def test_an_override_that_is_none_is_refused(tmp_path, override, expected):
    message = refused(written(tmp_path), override)
    assert message.startswith(f"--set {override}: ")
    assert expected in message


def test_an_override_changes_one_of_two_sections_that_an_anchor_made_the_same(tmp_path):
    text = "model: a\ndata:\n  train: &x {task: chain_sum, count: 5}\n  test: *x\n"
    recipe = load_recipe(written(tmp_path, text), ["data.train.count=7"])
    assert (recipe.data.train[0].count, recipe.data.test[0].count) == (7, 5)


def test_paths_start_at_the_recipe_and_those_of_overrides_at_the_working_directory(tmp_path):
    text = "model: ./base\ndata:\n  train: [rows.jsonl, {file: sub/more.jsonl}]\n  test: /abs/test.jsonl\n"
    text += "evaluation: {tasks: [{name: a, data: own.jsonl}]}\n"
    recipe = load_recipe(written(tmp_path, text), ["data.validation=here.jsonl"])
    assert [source.file for source in recipe.data.train] == [f"{tmp_path}/rows.jsonl", f"{tmp_path}/sub/more.jsonl"]
    assert recipe.data.test[0].file == "/abs/test.jsonl"
    assert recipe.data.validation[0].file == "here.jsonl"
    assert recipe.evaluation.tasks[0].data[0].file == f"{tmp_path}/own.jsonl"
    assert Path(recipe.model) == tmp_path / "base"


def test_what_only_old_yaml_takes_for_a_number_or_a_boolean_is_text(tmp_path):
    for text in ("1:30", "2024-01-01", "on", "no", "010", "0x10", "1_000", "y", "="):
        assert load_recipe(written(tmp_path), [f"output={text}"]).output == text


def test_a_long_value_is_shortened_in_the_message_and_what_is_not_printable_escaped(tmp_path):
    message = refused(written(tmp_path, MINIMAL.replace("r: 4", f"r: {'x' * 900_000}")))
    assert len(message) < 1000
    assert message.startswith(f"{tmp_path}/my.yaml:3: lora.r = 'xxx")
    assert message.endswith("xxx' must be a valid integer.")
    assert "\x1b" not in refused("\x1b[31mred")
    many = refused(written(tmp_path, MINIMAL + "".join(f"key{i}: 1\n" for i in range(1000))))
    assert len(many.splitlines()) == 12
    assert "... (989 more lines)" in many


def test_a_file_that_no_recipe_can_be_is_not_read(tmp_path):
    path = written(tmp_path)
    os.truncate(path, 10**9)
    assert "has 1,000,000,000 bytes" in refused(path)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "+1e-3", "0.001"])
def test_a_number_with_an_exponent_is_a_number(tmp_path, number):
    assert load_recipe(written(tmp_path), [f"training.learning_rate={number}"]).training.learning_rate == 1e-3


def test_a_recipe_that_a_run_recorded_is_the_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path), ["seeds.routing=3"])
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"recipe": recipe.to_dict()}))
    assert recipe_of_run(record) == recipe
    assert recipe_of_run(record, ["lora.r=8"]).lora.r == 8
    record.write_text("{}")
    with pytest.raises(EchoConfigError, match=r"run\.json holds no recipe"):
        recipe_of_run(record)


# --------------------------------------------------------------------- shipped


def test_all_shipped_recipes_load_and_open_with_the_command_that_runs_them():
    names = shipped_recipes()
    table = ["commonsense-llama-7b", "commonsense-llama2-7b", "commonsense-llama3-8b"]
    assert names == [*table, "demo", "peft-methods", "reasoning", "study-quick", "tiny"]
    for name in names:
        command = {"demo": "demo", "study-quick": "compare quick", "peft-methods": "compare peft-methods"}.get(
            name, f"train {name}"
        )
        assert (SHIPPED / f"{name}.yaml").read_text().startswith(f"# echo-lora {command}\n")
        assert load_recipe(name).output.startswith(f"runs/{name}")


def test_rows_of_a_shipped_recipe_start_at_the_working_directory(tmp_path):
    """They are the user's; no package holds them. A copy of the recipe has them beside it."""
    name = "commonsense-llama-7b"
    copy = tmp_path / "mine.yaml"
    copy.write_text((SHIPPED / f"{name}.yaml").read_text())
    for source, folder in ((name, Path()), (SHIPPED / f"{name}.yaml", Path()), (copy, tmp_path)):
        recipe = load_recipe(source)
        rows = "data/commonsense/boolq"
        assert recipe.data.train[0].file == str(folder / rows / "train.jsonl")
        assert recipe.evaluation.tasks[0].data[0].file == str(folder / rows / "test.jsonl")


@pytest.mark.parametrize("name", ["commonsense-llama-7b", "demo", "reasoning", "tiny"])
def test_a_shipped_recipe_holds_only_what_differs_from_the_defaults(name):
    defaults = {key: default for key, _, default, _ in recipe_table()}

    def leaves(value, prefix=""):
        if isinstance(value, dict) and prefix not in ("data.train.", "data.test.", "data.validation."):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}{key}.")]
        return [(prefix.rstrip("."), value)]

    found = leaves(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()))
    assert len(found) >= 5
    for key, value in found:
        assert defaults[key] != yaml.safe_dump(value).removesuffix("...\n").strip(), key


# --------------------------------------------------------------- documentation


def test_the_table_has_every_key_once_with_one_line_of_help():
    rows = recipe_table()
    keys = [key for key, *_ in rows]
    assert len(set(keys)) == len(keys)
    fields = {f"echo_config.{f.name}" for f in dataclasses.fields(EchoConfig)} - {"echo_config.routing_seed"}
    assert {key for key in keys if key.startswith("echo_config.")} == fields
    assert {"model", "data.train", "<source>.file", "training.steps", "evaluation.tasks[].name"} <= set(keys)
    for key, kind, _, text in rows:
        assert text, key
        assert "\n" not in text, key
        assert kind, key


def test_reading_a_recipe_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from echo_lora.recipe.load import load_recipe; load_recipe('tiny');"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'trl', 'lm_eval'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
