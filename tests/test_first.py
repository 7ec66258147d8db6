"""The first recipe for one's own rows: what it holds, and that it is the recipe that runs."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from echo_lora.cli import app
from echo_lora.data import prepared
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.recipe import first, plan
from echo_lora.recipe.first import first_recipe, name_of
from echo_lora.recipe.load import SCHEMA, SHIPPED, load_recipe
from echo_lora.recipe.prepare import prepare
from echo_lora.recipe.record import RunResult
from echo_lora.recipe.table import recipe_schema
from echo_lora.recipe.yaml_file import parse_yaml
from tiny_recipe import tiny_folder

QUESTIONS = [(f"{a} plus {b}?", str(a + b)) for a in range(5) for b in range(5)]
PAIRS = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS]
ALPACA = [{"instruction": "Add.", "input": question, "output": answer} for question, answer in QUESTIONS]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    for question, answer in QUESTIONS
]
OPENAI = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in QUESTIONS
]


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(PAIRS)


KINDS = {
    "alpaca.json": (lambda path: path.write_text(json.dumps(ALPACA)), "alpaca (columns instruction, input, output)"),
    "sharegpt.json": (lambda path: path.write_text(json.dumps(SHAREGPT)), "sharegpt (column conversations)"),
    "openai.jsonl": (lambda path: path.write_text(lines_of(OPENAI)), "messages (column messages)"),
    "sums.csv": (write_csv, "prompt_completion (columns prompt, completion)"),
    "sums.parquet": (
        lambda path: Dataset.from_list(PAIRS).to_parquet(str(path)),
        "prompt_completion (columns prompt, completion)",
    ),
    "sums.jsonl.gz": (
        lambda path: path.write_bytes(gzip.compress(lines_of(PAIRS).encode())),
        "prompt_completion (columns prompt, completion)",
    ),
    "saved": (
        lambda path: Dataset.from_list(PAIRS).save_to_disk(str(path)),
        "prompt_completion (columns prompt, completion)",
    ),
}


def invoke(*args: object, status: int = 0):
    result = CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a base model."""
    tiny_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_init_writes_a_recipe_for_every_kind_of_rows(folder, name):
    write, found = KINDS[name]
    write(folder / name)
    output = invoke("init", name, "--model", "base").output
    file = f"{name.partition('.')[0]}.yaml"
    assert output.rstrip().endswith(f"Written to {file}. To train: echo-lora train {file}")
    text = (folder / file).read_text()
    assert text.startswith(f"# echo-lora train {file}\n# yaml-language-server: $schema=file:")
    assert f"train: {name}  # 25 rows, {found}" in text
    recipe = load_recipe(file)
    assert (recipe.data.chat, recipe.training.epochs, recipe.training.batch_size) == (True, 3, 4)
    assert recipe.model == str(folder / "base")
    assert recipe.output == f"runs/{name.partition('.')[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_from_rows_of_every_kind_to_an_answer(folder, name):
    KINDS[name][0](folder / name)
    invoke("init", name, "--model", "base", "--set", "training.steps=2")
    stem = name.partition(".")[0]
    invoke("train", f"{stem}.yaml")
    assert RunResult.read(Path("runs") / stem).steps == 2
    assert invoke("chat", Path("runs") / stem, "--prompt", "1 plus 1?", "--max-new-tokens", "4").stdout.strip()


def test_the_file_is_the_recipe_that_was_fitted(folder):
    (folder / "inner").mkdir()
    write_csv(folder / "sums.csv")
    first = first_recipe("base", "sums.csv", folder / "inner", ["method=dora", "lora.r=4", "training.epochs=7"])
    text, recipe = first.text, first.recipe
    document = yaml.safe_load(text)
    assert document["data"]["train"] == str(folder / "sums.csv")  # the recipe lies in another folder
    assert document["model"] == str(folder / "base")
    assert (recipe.method, recipe.lora.r, recipe.training.epochs) == ("dora", 4, 7)
    (folder / "inner" / "mine.yaml").write_text(text)
    loaded = load_recipe(folder / "inner" / "mine.yaml")
    paths = {"model": str(folder / "base"), "data": loaded.data, "output": recipe.output}
    assert loaded == recipe.model_copy(update=paths)
    assert loaded.data.train[0].file == str(folder / "sums.csv")
    # 7 passes over 25 rows in batches of 4
    assert "epochs: 7\n" in text
    assert recipe.training.warmup_steps == 4  # of 49


def test_enough_rows_leave_some_for_validation(folder):
    rows = [{"prompt": f"{n} and one?", "completion": str(n + 1)} for n in range(400)]
    (folder / "many.jsonl").write_text(lines_of(rows))
    first = first_recipe("base", "many.jsonl", folder)
    held_out = len(prepare(first.recipe)[1]["validation"][0].rows)
    assert 10 < held_out < 30
    assert f"validation_share: 0.05  # {held_out} rows are held out, for eval_loss" in first.text
    assert first.recipe.training.evaluate_every == 14  # of 144 steps
    (folder / "valid.jsonl").write_text(lines_of(rows[:3]))
    own = ["data.validation=valid.jsonl", "training.evaluate_every=5"]
    recipe = first_recipe("base", "many.jsonl", folder, own).recipe
    assert (recipe.data.validation_share, recipe.training.evaluate_every) == (None, 5)


def test_equal_prompts_leave_no_share_for_validation(folder):
    rows = [{"prompt": "Say a number.", "completion": str(n)} for n in range(400)]
    (folder / "equal.jsonl").write_text(lines_of(rows))
    assert first_recipe("base", "equal.jsonl", folder).recipe.data.validation_share is None


def test_rows_that_are_too_long_for_the_model_are_left_out_and_counted(folder):
    rows = [*PAIRS, {"prompt": "x " * 400, "completion": "y"}]  # the model has 256 positions
    (folder / "long.jsonl").write_text(lines_of(rows))
    output = invoke("init", "long.jsonl", "--model", "base").output
    assert "25 rows kept, 1 dropped" in output
    text = (folder / "long.yaml").read_text()
    assert "train: long.jsonl  # 26 rows, prompt_completion" in text
    assert "max_length: 256  # tokens; longer rows: 1" in text
    assert "on_overlength: drop  # truncate_prompt keeps longer rows, shortened" in text
    assert load_recipe("long.yaml").data.on_overlength == "drop"
    text = first_recipe("base", "long.jsonl", folder, ["data.on_overlength=truncate_prompt"]).text
    assert "on_overlength: truncate_prompt\n" in text
    with pytest.raises(EchoDataError, match="row 25 keeps no answer token"):
        first_recipe("base", "long.jsonl", folder, ["data.on_overlength=error"])


def test_rows_are_tokenised_once_and_the_model_is_built_once(folder, monkeypatch):
    write_csv(folder / "sums.csv")
    calls = []

    def counted(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    counted(prepared, "tokenize_row")
    counted(plan, "empty_model")
    monkeypatch.setattr(first, "memory_size", lambda: 1)  # nothing fits: every batch is tried
    invoke("init", "sums.csv", "--model", "base")
    assert Counter(calls) == {"tokenize_row": len(PAIRS), "empty_model": 1}
    recipe = load_recipe("sums.yaml")
    assert (recipe.training.batch_size, recipe.training.gradient_checkpointing) == (1, True)


def test_the_estimate_is_that_of_the_plan(folder):
    write_csv(folder / "sums.csv")
    recipe = first_recipe("base", "sums.csv", folder, ["training.batch_size=2"]).recipe
    estimate, shape = plan.PeakMemory(recipe), plan.shape_of(prepare(recipe)[1]["train"])

    def planned(**changes):
        training = recipe.training.model_copy(update=changes)
        return replace(plan.plan(recipe.model_copy(update={"training": training})).memory, process=0)  # it grows

    for batch in (1, 4):
        assert replace(estimate(shape, batch), process=0) == planned(batch_size=batch)
    estimate.checkpoint()
    assert replace(estimate(shape, 4), process=0) == planned(batch_size=4, gradient_checkpointing=True)


def test_the_batch_is_the_largest_that_fits(folder, monkeypatch):
    write_csv(folder / "sums.csv")
    asked = []

    class PeakMemory:
        each = 100

        def __init__(self, recipe):
            pass

        def checkpoint(self):
            self.each = 50

        def __call__(self, shape, batch_size):
            asked.append((batch_size, self.each))
            return plan.Memory(batch_size * self.each, 0, 0, 0)

    monkeypatch.setattr(first, "PeakMemory", PeakMemory)
    monkeypatch.setattr(first, "FEWEST_STEPS", 1)
    for memory, expected in [(10_000, (16, False)), (300, (2, False)), (100, (1, True)), (10, (1, True))]:
        monkeypatch.setattr(first, "memory_size", lambda memory=memory: memory)
        training = first_recipe("base", "sums.csv", folder).recipe.training
        assert (training.batch_size, training.gradient_checkpointing) == expected
        assert training.batch_size * training.gradient_accumulation == 16
    assert asked[0] == (16, 100)
    training = first_recipe("base", "sums.csv", folder, ["training.batch_size=3"]).recipe.training
    assert (training.batch_size, training.gradient_accumulation) == (3, 5)
    asked.clear()
    settings = ["training.gradient_checkpointing=true", "lora.r=2", "echo=false"]
    recipe = first_recipe("base", "sums.csv", folder, settings).recipe
    assert (recipe.training.gradient_checkpointing, recipe.lora.r, recipe.echo) == (True, 2, False)
    assert {each for _, each in asked} == {50}


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 2), (25, 4), (400, 8), (600, 16)])
def test_few_rows_are_taken_in_smaller_steps(folder, rows, size):
    (folder / "some.jsonl").write_text(lines_of([{"prompt": f"{n}?", "completion": str(n)} for n in range(rows)]))
    training = first_recipe("base", "some.jsonl", folder).recipe.training
    assert (training.batch_size, training.gradient_accumulation) == (size, 1)


@pytest.mark.parametrize("text", ["data.train=other.csv", "model=other", "data={train: other.csv}"])
def test_the_model_and_the_rows_are_not_set_twice(folder, text):
    write_csv(folder / "sums.csv")
    with pytest.raises(EchoConfigError, match="have options of their own"):
        first_recipe("base", "sums.csv", folder, [text])


@pytest.mark.parametrize("text", ["training=3", "training.steps=x", "training.batch_size=0", "lora=4"])
def test_a_wrong_value_is_named(folder, text):
    write_csv(folder / "sums.csv")
    with pytest.raises(EchoConfigError, match=text.partition("=")[0]):
        first_recipe("base", "sums.csv", folder, [text])


def test_prompts_are_read_as_the_recipe_says(folder):
    write_csv(folder / "sums.csv")
    first = first_recipe("base", "sums.csv", folder, ["data.chat=false"])
    assert not first.recipe.data.chat
    assert first.tokenizer.decode(first.rows[0].rows[0].input_ids).startswith("0 plus 0?")


def test_train_without_a_recipe(folder):
    write_csv(folder / "sums.csv")
    output = invoke("train", "--model", "base", "--data", "sums.csv", "--set", "training.steps=2").output
    assert "echo-lora chat runs/sums" in output
    assert "echo-lora eval" not in output  # there is nothing to score
    recipe = load_recipe(folder / "runs" / "sums" / "recipe.yaml")
    assert (recipe.training.steps, recipe.data.train[0].file) == (2, str(folder / "sums.csv"))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train"], "give a recipe, or both --model and --data"),
        (["train", "--data", "sums.csv"], "give a recipe, or both --model and --data"),
        (["train", "tiny", "--model", "base"], "give a recipe, or --model and --data"),
        (["train", "--model", "base", "--data", "sums.csv", "--resume"], "To resume"),
    ],
)
def test_wrong_use_is_refused(folder, args, expected):
    output = " ".join(invoke(*args, status=2).output.split())
    assert expected in output


def test_a_file_that_exists_is_kept(folder):
    write_csv(folder / "sums.csv")
    (folder / "sums.yaml").write_text("mine")
    assert "sums.yaml exists" in invoke("init", "sums.csv", "--model", "base", status=1).output
    assert (folder / "sums.yaml").read_text() == "mine"
    invoke("init", "sums.csv", "--model", "base", "--output", "other.yaml")


@pytest.mark.parametrize("output", ["missing/rows.yaml", "base"])
def test_where_no_file_can_be_written_nothing_is_read(folder, output):
    (folder / "missing").write_text("a file")
    assert (
        f"{output} can't be written as a file"
        in invoke("init", "x", "--model", "m", "--output", output, status=1).output
    )


def test_what_training_would_refuse_leaves_no_file(folder):
    (folder / "sums.jsonl").write_text(lines_of([{"question": "1+1?", "answer": "2"}]))
    output = invoke("init", "sums.jsonl", "--model", "base", status=1).output
    assert "sums.jsonl:1: row 0 has no prompt. Present: question, answer." in output
    assert not (folder / "sums.yaml").exists()
    with pytest.raises(EchoConfigError, match="unknown key"):
        first_recipe("base", "sums.jsonl", folder, ["data.column=x"])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a/rows.jsonl.gz", "rows"),
        ("sets/*.jsonl", "sets"),
        ("saved/", "saved"),
        ("owner/name", "name"),
        ("my rows.csv", "my-rows"),
    ],
)
def test_the_name_of_the_data_names_the_run(data, expected):
    assert name_of(data) == expected


# ---------------------------------------------------------------------- the schema


def test_the_shipped_schema_is_that_of_the_recipe():
    if os.environ.get("UPDATE_DOCS"):
        SCHEMA.write_text(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == recipe_schema(), "run UPDATE_DOCS=1 pytest"
    assert json.loads(invoke("schema").output) == recipe_schema()


def test_editors_find_the_schema_of_every_shipped_recipe():
    recipes = sorted(SHIPPED.glob("*.yaml"))
    assert len(recipes) >= 7
    for path in recipes:
        line = path.read_text(encoding="utf-8").splitlines()[1]
        assert (path.parent / line.removeprefix("# yaml-language-server: $schema=")).resolve() == SCHEMA.resolve(), path


def test_the_schema_accepts_what_recipes_write():
    schema = recipe_schema()
    for path in SHIPPED.glob("*.yaml"):
        jsonschema.validate(parse_yaml(path)[1], schema)
    with pytest.raises(jsonschema.ValidationError, match="batchsize"):
        jsonschema.validate({"model": "m", "data": {"train": "x.jsonl"}, "training": {"batchsize": 3}}, schema)
