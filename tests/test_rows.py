"""From a recipe's sources to rows: which rows, in which part, and how they are scored."""

from __future__ import annotations

import pytest

from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.recipe import load_recipe
from echo_lora.rows import evaluation_rows, join, prepare_part, source_rows
from echo_lora.sources import ROW
from tiny import tiny_tokenizer
from tiny_recipe import ROWS, tiny_recipe, write_rows


def loaded(folder, *overrides, **changes):
    return load_recipe(tiny_recipe(folder, **changes), overrides)


def questions(recipe, part):
    sources = getattr(recipe.data, part)
    return [row["prompt"] for source in sources for row in source_rows(recipe, source, part)]


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
    dataset = join(prepare_part(recipe, tiny_tokenizer(), "train"))
    assert dataset[ROW][:] == list(range(len(ROWS) + 5))
    assert dataset["input_ids"][len(ROWS)] == dataset["input_ids"][0]


def test_limit_keeps_the_first_rows_of_each_source(tmp_path):
    recipe = loaded(tmp_path, "data.limit=2", data={"train": ["train.jsonl", TASK | {"count": 9}]})
    assert [data.counts.kept for data in prepare_part(recipe, tiny_tokenizer(), "train")] == [2, 2]


def test_a_column_that_is_not_there_is_named_with_file_and_line(tmp_path):
    recipe = loaded(tmp_path, "data.columns={prompt: promt}")
    with pytest.raises(EchoDataError, match=r"train\.jsonl:1: row 0 has no column 'promt'.*Did you mean 'prompt'"):
        prepare_part(recipe, tiny_tokenizer(), "train")


def test_a_broken_line_is_named(tmp_path):
    recipe = loaded(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "cut o\n')
    with pytest.raises(EchoDataError, match=rf"train\.jsonl:{len(ROWS) + 1}: not JSON"):
        prepare_part(recipe, tiny_tokenizer(), "train")


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
