"""From a recipe's sources to rows: which rows, in which part, and how they are scored."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from transformers import AutoConfig, GPT2Config, GPTJConfig, OPTConfig

from echo_lora.commands import adapters, inference, recipes, studies
from echo_lora.commands import data as data_commands
from echo_lora.data.sources import ROW
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.plan import plan
from echo_lora.recipe.prepare import preview
from echo_lora.recipe.rows import evaluation_rows, join, prepare_split, source_rows
from echo_lora.recipe.scoring import resolve
from echo_lora.recipe.train import run
from echo_lora.terminal import path as parsed_path
from tiny import tiny_tokenizer
from tiny_recipe import ROWS, tiny_recipe, write_rows


def loaded(folder, *overrides, **changes):
    return load_recipe(tiny_recipe(folder, **changes), overrides)


def questions(recipe, part):
    sources = getattr(recipe.data, part)
    return [row["prompt"] for source in sources for rows in source_rows(recipe, source, part) for row in rows]


TASK = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def test_the_parts_of_a_task_share_no_question_and_a_part_does_not_depend_on_the_others(tmp_path):
    data = {"train": TASK | {"count": 60}, "test": TASK | {"count": 20}}
    recipe = loaded(tmp_path, data=data)
    train, test = questions(recipe, "train"), questions(recipe, "test")
    assert (len(train), len(test)) == (60, 20)
    assert not set(train) & set(test)
    more = loaded(tmp_path, data=data | {"train": TASK | {"count": 80}, "validation": TASK | {"count": 9}})
    assert questions(more, "test") == test
    assert not set(questions(more, "validation")) & {*questions(more, "train"), *test}
    assert questions(loaded(tmp_path, data=data | {"test": TASK | {"count": 20, "seed": 1}}), "test") != test


def test_a_task_of_the_evaluation_draws_from_the_test_rows(tmp_path):
    data = {"train": TASK | {"count": 60}, "test": TASK | {"count": 10}}
    recipe = loaded(tmp_path, data=data)
    own = loaded(tmp_path, data=data, evaluation={"tasks": [{"name": "more", "data": TASK | {"count": 30}}]})
    [(_, rows)] = evaluation_rows(own, tiny_tokenizer())
    assert len(rows) == 30
    assert not {row["prompt"] for row in rows} & set(questions(own, "train"))
    assert {row["prompt"] for row in rows} >= set(questions(recipe, "test"))
    fewer = loaded(tmp_path, data=data, evaluation={"tasks": [{"name": "fewer", "data": TASK | {"count": 4}}]})
    assert questions(fewer, "test") == questions(recipe, "test")
    assert len(evaluation_rows(fewer, tiny_tokenizer())[0][1]) == 4


def test_several_sources_are_one_dataset_with_rows_numbered_through(tmp_path):
    write_rows(tmp_path / "more.jsonl", ROWS[:5])
    recipe = loaded(tmp_path, data={"train": ["train.jsonl", "more.jsonl"]})
    dataset = join(prepare_split(recipe, tiny_tokenizer(), "train"))
    assert dataset[ROW][:] == list(range(len(ROWS) + 5))
    assert dataset["input_ids"][len(ROWS)] == dataset["input_ids"][0]


def test_limit_keeps_the_first_rows_of_each_source(tmp_path):
    recipe = loaded(tmp_path, "data.limit=2", data={"train": ["train.jsonl", TASK | {"count": 9}]})
    assert [data.counts.kept for data in prepare_split(recipe, tiny_tokenizer(), "train")] == [2, 2]


def test_a_column_that_is_not_there_is_named_with_file_and_line(tmp_path):
    recipe = loaded(tmp_path, "data.columns={prompt: promt}")
    with pytest.raises(EchoDataError, match=r"train\.jsonl:1: row 0 has no column 'promt'.*Did you mean 'prompt'"):
        prepare_split(recipe, tiny_tokenizer(), "train")


def test_a_broken_line_is_named(tmp_path):
    recipe = loaded(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "cut o\n')
    with pytest.raises(EchoDataError, match=rf"train\.jsonl:{len(ROWS) + 1}: not JSON"):
        prepare_split(recipe, tiny_tokenizer(), "train")


# ------------------------------------------------------------------- scoring


def test_without_tasks_each_test_source_is_one_and_ends_where_a_turn_ends(tmp_path):
    write_rows(tmp_path / "other test.jsonl", ROWS[:2])
    (tmp_path / "sub").mkdir()
    write_rows(tmp_path / "sub" / "test.jsonl", ROWS[:3])
    data = {"train": "train.jsonl", "test": ["test.jsonl", "other test.jsonl", "sub/test.jsonl"]}
    tasks = evaluation_rows(loaded(tmp_path, data=data), tiny_tokenizer())
    assert [(task.name, len(rows)) for task, rows in tasks] == [("test", 4), ("other_test", 2), ("test-3", 3)]
    assert set(tasks[0][0].stop) == {"</s>", "<|im_end|>"}
    assert tasks[0][1][0] == {"prompt": ROWS[0]["prompt"], "answer": ROWS[0]["completion"]}


def test_a_chat_prompt_is_rendered_and_the_first_answer_compared(tmp_path):
    turns = [("user", "What is the capital?"), ("assistant", "Paris"), ("user", "Write."), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    write_rows(tmp_path / "chat.jsonl", [{"messages": messages}, ROWS[0]])
    recipe = loaded(tmp_path, "data.chat=true", data={"train": "train.jsonl", "test": "chat.jsonl"})
    [(_, rows)] = evaluation_rows(recipe, tiny_tokenizer())
    assert [row["answer"] for row in rows] == ["Paris", ROWS[0]["completion"]]
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") for row in rows)


def test_choices_are_passed_on(tmp_path):
    write_rows(tmp_path / "choice.jsonl", [{"prompt": "true or", "choices": [" false", " true"], "label": 0}])
    task = {"name": "c", "kind": "choice", "data": "choice.jsonl"}
    [(built, rows)] = evaluation_rows(loaded(tmp_path, evaluation={"tasks": [task]}), tiny_tokenizer())
    assert built.kind == "choice"
    assert built.stop == []
    assert rows == [{"prompt": "true or", "choices": [" false", " true"], "label": 0}]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"train": "train.jsonl"}}, EchoConfigError, "nothing to score"),
        (
            {"data": {"train": "train.jsonl"}, "evaluation": {"tasks": [{"name": "x"}]}},
            EchoConfigError,
            "evaluation task 'x' has no rows",
        ),
        (
            {"data": {"train": "train.jsonl", "test": "bare.jsonl"}},
            EchoDataError,
            r"bare\.jsonl:1: row 0 has no answer",
        ),
    ],
)
def test_what_can_not_be_scored_is_refused(tmp_path, changes, error, message):
    write_rows(tmp_path / "bare.jsonl", [{"prompt": "Write a word."}])
    with pytest.raises(error, match=message):
        evaluation_rows(loaded(tmp_path, **changes), tiny_tokenizer())


# --------------------------------------------------------------- before a model


def test_the_form_of_all_rows_is_checked_before_a_tokenizer_is_loaded(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("a tokenizer was loaded")

    monkeypatch.setattr("echo_lora.recipe.prepare.load_tokenizer", fails)
    recipe = loaded(tmp_path, data={"train": "train.jsonl", "validation": "held.jsonl"})
    write_rows(tmp_path / "held.jsonl", [*ROWS, {"prompt": "a", "completion": "b", "input": "lost"}])
    for command in (plan, preview, run):
        with pytest.raises(
            EchoDataError, match=r"held\.jsonl:13: row 12 has text that is not used, in the column 'inp"
        ):
            command(recipe)
    with pytest.raises(AssertionError, match="a tokenizer was loaded"):  # the other rows are sound
        plan(loaded(tmp_path, "data.ignore_columns=[input]", data={"train": "train.jsonl", "validation": "held.jsonl"}))
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(EchoDataError, match=r"train\.jsonl has no row"):
        run(recipe)


def test_questions_to_score_are_complete_too(tmp_path):
    write_rows(tmp_path / "test.jsonl", [{"prompt": "Add.", "input": "3 and 4", "answer": "7"}])
    path = tiny_recipe(tmp_path)
    write_rows(tmp_path / "test.jsonl", [{"prompt": "Add.", "input": "3 and 4", "answer": "7"}])
    with pytest.raises(EchoDataError, match=r"test\.jsonl:1: row 0 has text that is not used, in the column 'input'"):
        evaluation_rows(load_recipe(path), tiny_tokenizer())
    [(_, rows)] = evaluation_rows(load_recipe(path, ["data.ignore_columns=[input]"]), tiny_tokenizer())
    assert rows == [{"prompt": "Add.", "answer": "7"}]


def test_a_token_beyond_the_embedding_is_named_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("echo_lora.recipe.build.load_base_model", None)
    path = tiny_recipe(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"prompt": "a <extra-39>", "completion": "b"}])
    for command in (plan, preview, run):
        with pytest.raises(EchoDataError, match=r"train\.jsonl:13: row 12 has the token id 4\d\d, but .* 0 to 399"):
            command(load_recipe(path))


@pytest.mark.parametrize("kind", [GPT2Config, OPTConfig, GPTJConfig])
def test_a_row_beyond_a_table_of_positions_is_named_before_the_model_is_loaded(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("echo_lora.recipe.build.load_base_model", None)
    path = tiny_recipe(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24}
    extra = {"rotary_dim": 8} if kind is GPTJConfig else {"word_embed_proj_dim": 32, "ffn_dim": 32}
    kind(vocab_size=400, **sizes, **(extra if kind is not GPT2Config else {})).save_pretrained(tmp_path / "base")
    for command in (plan, run):
        with pytest.raises(EchoDataError, match=r"train\.jsonl:\d+: row \d+ has \d\d tokens, but .* for 24 positions"):
            command(load_recipe(path))


def test_a_row_beyond_computed_positions_is_a_warning(tmp_path, caplog):
    path = tiny_recipe(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.max_position_embeddings = 24
    config.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        plan(load_recipe(path))
    assert re.search(r"train\.jsonl:\d+: row \d+ has \d\d tokens, more than the model's maximum of 24", caplog.text)


# ------------------------------------------------------------------------ paths


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    write_rows(tmp_path / "home" / "rows.jsonl", ROWS[:4])
    path = tiny_recipe(tmp_path, data={"train": ["~/rows.jsonl", {"file": "train.jsonl"}]}, output="~/runs/first")
    recipe = load_recipe(path, ["training.steps=1"])
    assert recipe.output == str(tmp_path / "home" / "runs" / "first")
    assert recipe.data.train[0].file == str(tmp_path / "home" / "rows.jsonl")
    assert load_recipe(path, ["output=~/second"]).output == str(tmp_path / "home" / "second")
    assert load_recipe(path, ["data.train=~/rows.jsonl"]).data.train[0].file == str(tmp_path / "home" / "rows.jsonl")
    result = run(recipe)
    assert result.output == recipe.output
    assert {entry.name for entry in (tmp_path / "home" / "runs" / "first").iterdir()} >= {"adapter", "run.json"}
    assert not (tmp_path / "~").exists()
    assert resolve("~/runs/first")[1] == tmp_path / "home" / "runs" / "first" / "adapter"
    with pytest.raises(EchoConfigError, match=r"\$HOME/runs: environment variables are not expanded"):
        load_recipe(path, ["output=$HOME/runs"])
    with pytest.raises(EchoConfigError, match=r"~nobody-here/x: there is no such home folder"):
        load_recipe(path, ["output=~nobody-here/x"])
    assert load_recipe(path, ["output=100%"]).output == "100%"


def test_every_path_of_the_command_line_takes_a_tilde():
    found = 0
    apps = [module.app for module in (recipes, inference, adapters, studies, data_commands)]
    for command in (command for app in apps for command in app.registered_commands):
        for name, kind in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(get_args(kind)[:1]):
                found += 1
                assert get_args(kind)[1].parser is parsed_path, f"{command.callback.__name__}: {name}"
    assert found == 13


# ----------------------------------------------------------------------- memory

READ = """
import resource, sys
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.prepare import prepare
from echo_lora.recipe.rows import join
recipe = load_recipe(sys.argv[1])
scale = 1024 if sys.platform != "darwin" else 1
import datasets, pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
data = prepare(recipe)[1]["train"]
dataset = join(data)
for row in dataset.select(range(0, len(dataset), 100)):
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before) / 1e6, len(dataset))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is asked for with `resource`")
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_rows_of_200_megabytes_take_less_than_500(tmp_path, kind):
    line = json.dumps(
        {"prompt": "Count the words in this line: " * 20, "completion": " the correct answer is true" * 10}
    )
    count = 200_000_000 // len(line)
    start, between, end = ("[", ",\n", "]") if kind == "json" else ("", "\n", "\n")
    path = tiny_recipe(tmp_path, data={"train": f"large.{kind}", "max_length": None})
    with (tmp_path / f"large.{kind}").open("w") as file:
        file.write(start + line)
        file.writelines(between + line for _ in range(count - 1))
        file.write(end)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    grown, rows = map(float, done.stdout.split())
    assert rows == count
    assert grown < 500, f"{grown:.0f} MB"
