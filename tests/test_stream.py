"""Weights, a validation share and streams: which rows are trained on, and that a resume continues with them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_lora.data.shares import held_out, repeats
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError, EchoInterrupt
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.plan import plan
from echo_lora.recipe.prepare import prepare, prepare_stream, preview
from echo_lora.recipe.rows import evaluation_rows, join
from echo_lora.recipe.train import run
from echo_lora.training.callback import Watch
from tiny import tiny_tokenizer
from tiny_recipe import ROWS, tiny_recipe, write_rows

TOKENIZER = tiny_tokenizer()


def recipe_of(folder, data, *overrides, **changes):
    return load_recipe(tiny_recipe(folder, data=data, **changes), overrides)


def prompts(dataset):
    """The prompts of a tokenised dataset, by the text before their answers."""
    return [
        TOKENIZER.decode([t for t, label in zip(r["input_ids"], r["labels"], strict=True) if label < 0])
        for r in dataset
    ]


# -------------------------------------------------------------------------- weights


@given(st.integers(1, 50), st.floats(0.01, 10), st.integers(0, 9))
def test_a_weight_is_how_often_an_epoch_has_a_row(count, weight, seed):
    places = repeats(count, weight, [seed])
    assert len(places) == max(round(weight * count), 1)
    counted = Counter(dict.fromkeys(range(count), 0)) + Counter(places)
    times = [counted[place] for place in range(count)]
    assert max(times) - min(times) <= 1
    assert places == repeats(count, weight, [seed])


def test_a_mixture_has_the_weighted_rows_and_its_own_hash(tmp_path):
    write_rows(tmp_path / "more.jsonl", [row | {"prompt": f"More: {row['prompt']}"} for row in ROWS])
    data = {"train": [{"file": "train.jsonl", "weight": 2}, {"file": "more.jsonl", "weight": 0.5}]}
    found = Counter(prompts(join(prepare(recipe_of(tmp_path, data))[1]["train"])))
    assert [found[row["prompt"]] for row in ROWS] == [2] * 12
    halves = [prompt for prompt in found if prompt.startswith("More")]
    assert len(halves) == 6
    other = join(prepare(recipe_of(tmp_path, data, "seeds.data_order=1"))[1]["train"])
    assert {p for p in prompts(other) if p.startswith("More")} != set(halves)
    assert any("weight 0.5: 6 rows an epoch" in line for line in plan(recipe_of(tmp_path, data)).rows)
    hashes = set()
    for weight in (1, 2):
        sources = [{"file": "train.jsonl", "weight": weight}, "more.jsonl"]
        changed = recipe_of(tmp_path, {"train": sources}, "training.steps=1", f"output={tmp_path / f'run-{weight}'}")
        hashes.add(run(changed).data_sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "train.jsonl", "validation": {"file": "test.jsonl", "weight": 2}}, "only train is mixed"),
        ({"train": {"file": "train.jsonl", "weight": 2}, "stream": True}, "a stream does not know how many rows"),
        ({"train": {"file": "train.jsonl", "weight": 0}}, "weight = 0 must be greater than 0|greater than 0"),
        ({"train": "train.jsonl", "validation": "test.jsonl", "validation_share": 0.1}, "validation_share contradict"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path, data, message):
    with pytest.raises(EchoConfigError, match=message):
        recipe_of(tmp_path, data)


# ----------------------------------------------------------------- a validation share


def split_prompts(recipe):
    parts = prepare(recipe)[1]
    return [set(prompts(join(parts[split]))) for split in ("train", "validation")]


def test_a_share_of_the_training_rows_is_held_out_by_prompt(tmp_path):
    twice = [*ROWS, *(row | {"completion": " again"} for row in ROWS)]
    write_rows(tmp_path / "twice.jsonl", twice)
    data = {"train": "twice.jsonl", "validation_share": 0.4}
    train, validation = split_prompts(recipe_of(tmp_path, data))
    assert not train & validation
    assert train | validation == {row["prompt"] for row in ROWS}
    counts = [sum(len(d.rows) for d in prepare(recipe_of(tmp_path, data))[1][s]) for s in ("train", "validation")]
    assert counts == [2 * len(train), 2 * len(validation)]  # both rows of a prompt are on one side
    write_rows(tmp_path / "twice.jsonl", list(reversed(twice[:20])))  # neither order nor other options move a row
    others = ["data.chat=true", "seeds.data_order=3", "training.batch_size=2"]
    fewer = twice[:20]
    changed = recipe_of(tmp_path, data, *others)
    held = {row["prompt"] for row in fewer if held_out(row, 0.4, 0)}
    assert held <= validation
    [(_, rows)] = evaluation_rows(changed, TOKENIZER, "validation")
    assert len(rows) == sum(held_out(row, 0.4, 0) for row in fewer)
    assert split_prompts(recipe_of(tmp_path, data, "seeds.validation=1"))[1] != validation


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path):
    with pytest.raises(EchoDataError, match=r"data\.validation_share = 0\.0001 leaves no row for validation"):
        prepare(recipe_of(tmp_path, {"train": "train.jsonl", "validation_share": 0.0001}))
    with pytest.raises(EchoDataError, match=r"data\.validation_share = 0\.9999 leaves no row for train"):
        prepare(recipe_of(tmp_path, {"train": "train.jsonl", "validation_share": 0.9999}))


def test_a_share_of_a_conversation_is_decided_by_what_comes_before_its_answer():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    others = [turns[0], turns[1] | {"content": "c"}]
    for seed in range(20):
        assert held_out({"messages": turns}, 0.5, seed) == held_out({"messages": others}, 0.5, seed)
    assert len({held_out({"messages": turns}, 0.5, seed) for seed in range(20)}) == 2


# ------------------------------------------------------------------------- streaming

STREAM = {"train": "train.jsonl", "stream": True, "shuffle_buffer": 5}


def first(stream, count):
    return [row for row, _ in zip(stream, range(count), strict=False)]


def test_a_stream_has_every_row_once_an_epoch_in_a_seeded_order(tmp_path):
    stream = prepare_stream(recipe_of(tmp_path, STREAM))[1]
    rows = first(stream, 24)
    for epoch in (rows[:12], rows[12:]):
        assert sorted(row["_echo_row"] for row in epoch) == list(range(12))
    assert [row["_echo_row"] for row in rows[:12]] not in (list(range(12)), [row["_echo_row"] for row in rows[12:]])
    assert first(stream, 24) == rows
    [whole] = prepare(recipe_of(tmp_path, {"train": "train.jsonl"}))[1]["train"]
    assert list(whole.dataset) == sorted(rows[:12], key=lambda row: row["_echo_row"])
    other = prepare_stream(recipe_of(tmp_path, STREAM, "seeds.data_order=1"))[1]
    assert first(other, 12) != rows[:12]


def test_several_files_stream_in_turns(tmp_path):
    write_rows(tmp_path / "more.jsonl", [row | {"prompt": f"More: {row['prompt']}"} for row in ROWS[:3]])
    data = STREAM | {"train": ["train.jsonl", "more.jsonl"], "shuffle_buffer": 1}
    rows = first(prepare_stream(recipe_of(tmp_path, data))[1], 15)
    assert [prompt.startswith("More") for prompt in prompts(rows)] == [False, True] * 3 + [False] * 9
    assert len({row["_echo_row"] for row in rows}) == 15


def test_nothing_is_read_before_it_is_needed(tmp_path):
    recipe = recipe_of(tmp_path, STREAM)
    rows = [*ROWS, {"prompt": "a", "completion": ""}]
    write_rows(tmp_path / "train.jsonl", rows)
    stream = prepare_stream(recipe)[1]
    assert len(first(stream, 5)) == 5
    with pytest.raises(EchoDataError, match=r"train\.jsonl:13: row 12 has an empty answer"):
        first(stream, 13)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "completion": "b", "note": "lost"}, {}, r"train\.jsonl:13: row 12 has text that is not used"),
        ({"prompt": "a" * 90, "completion": "b"}, {"max_length": 60}, r"train\.jsonl:13: row 12 keeps no answer token"),
    ],
)
def test_a_row_that_fails_in_a_stream_is_named(tmp_path, row, options, message):
    recipe = recipe_of(tmp_path, STREAM | options)
    write_rows(tmp_path / "train.jsonl", [*ROWS[:11], ROWS[0], row])
    with pytest.raises(EchoDataError, match=message):
        run(recipe)
    dropped = recipe_of(tmp_path, STREAM | {"max_length": 60, "on_overlength": "drop"})
    write_rows(tmp_path / "train.jsonl", [*ROWS[:11], ROWS[0], {"prompt": "a" * 90, "completion": "b"}])
    assert 12 not in [row["_echo_row"] for row in first(prepare_stream(dropped)[1], 24)]


def test_a_stream_without_a_row_ends_with_an_error(tmp_path):
    recipe = recipe_of(tmp_path, STREAM | {"max_length": 2, "on_overlength": "drop"})
    with pytest.raises(EchoDataError, match="the stream has no row to train on"):
        first(prepare_stream(recipe)[1], 1)


def test_a_stream_needs_steps_and_one_process(tmp_path, monkeypatch):
    with pytest.raises(EchoConfigError, match=r"data\.stream needs training\.steps"):
        recipe_of(tmp_path, STREAM, training={"epochs": 1})
    shown = preview(recipe_of(tmp_path, STREAM), 2)
    assert len(shown.rows) == 2
    assert shown.summary[-1].startswith("data.stream: these are the first 1000 rows")
    assert plan(recipe_of(tmp_path, STREAM)).steps == 4


def interrupted(recipe, monkeypatch, step):
    """Train until Ctrl-C after this step."""
    begin = Watch.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Watch, "on_step_begin", on_step_begin)
        with pytest.raises(EchoInterrupt):
            run(recipe)


def test_a_resumed_stream_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """9 steps of 4 rows are three epochs of 12 rows: the resume starts in the second."""
    training = {"steps": 9, "batch_size": 2, "gradient_accumulation": 2, "save_every": 5, "learning_rate": 1e-2}
    whole = run(recipe_of(tmp_path, STREAM, f"output={tmp_path / 'whole'}", training=training))
    recipe = recipe_of(tmp_path, STREAM, f"output={tmp_path / 'part'}", training=training)
    interrupted(recipe, monkeypatch, 7)
    resumed = run(recipe, resume=True)
    assert resumed.resumed_at == 5
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert resumed.data_sha256 == whole.data_sha256 != "stream"
    assert any("a stream" in line for line in json.loads((tmp_path / "whole" / "run.json").read_text())["rows"])


def test_a_share_of_a_stream_is_never_trained_on(tmp_path):
    recipe = recipe_of(tmp_path, STREAM | {"validation_share": 0.4})
    _, stream, validation = prepare_stream(recipe)
    held = set(prompts(join(validation)))
    assert held
    assert set(prompts(first(stream, 30))) == {row["prompt"] for row in ROWS} - held


@pytest.mark.parametrize("change", ["rows", "data.shuffle_buffer=2"])
def test_a_stream_of_other_rows_is_not_resumed(tmp_path, monkeypatch, change):
    training = {"steps": 6, "batch_size": 3, "save_every": 3}
    recipe = recipe_of(tmp_path, STREAM, training=training)
    interrupted(recipe, monkeypatch, 4)
    recipe = recipe_of(tmp_path, STREAM, *([] if change == "rows" else [change]), training=training)
    if change == "rows":
        write_rows(tmp_path / "train.jsonl", [ROWS[0] | {"completion": " other"}, *ROWS[1:]])
    with pytest.raises(EchoCheckpointError, match=r"data \(data\.sha256\)"):
        run(recipe, resume=True)
