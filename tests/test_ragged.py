"""Long rows, rows of very different lengths, and rows of several turns."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import SFTConfig

import architectures
from architectures import collate, lora_config, random_row, tiny_base, tiny_echo_model
from echo_lora import EchoConfig, EchoSFTTrainer, EchoTrainer
from echo_lora.method.alignment import align_rows
from test_oracle import assert_equals_oracle
from tiny import tiny_tokenizer


def rows_of(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [random_row(g, *shape) for shape in shapes]


def switch_checkpointing(is_checkpointed):
    return lambda model: model.gradient_checkpointing_enable() if is_checkpointed else None


def long_model(name="llama", length=1200, **config):
    """A tiny model whose positions reach `length`."""
    key = "n_positions" if name == "gpt2" else "max_position_embeddings"
    config_class, arguments, modules = architectures.ARCHITECTURES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, name, (config_class, arguments | {key: length}, modules))
        return tiny_echo_model(name, **{"echo_step": "shared_prefix"} | config)


RAGGED = {
    "answers much longer than prompts": [(4, 60), (3, 45), (6, 60)],
    "one long row among short ones": [(90, 20), (3, 2), (5, 1), (2, 4)],
    "answers of one token": [(7, 1), (1, 1), (40, 1), (12, 1)],
    "mostly padding": [(1, 1), (1, 1), (1, 1), (100, 8)],
    "a long prompt beside a long answer": [(70, 2), (2, 70)],
    "all of it": [(70, 2), (2, 70), (30, 30), (1, 1), (50, 1)],
}


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("shapes", RAGGED.values(), ids=RAGGED)
def test_ragged_batches(shapes, name, is_checkpointed):
    prepare = switch_checkpointing(is_checkpointed)
    assert_equals_oracle(tiny_echo_model(name, echo_step="shared_prefix"), rows_of(*shapes), prepare=prepare)


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("site", ["lora_input", "output"])
def test_boundaries_in_different_columns(site, mask, echo_step):
    """Rows that all start in one column, where that is cheaper: nothing may be injected before a later boundary."""
    rows = rows_of((20, 2), (2, 20), (11, 11))
    assert len(set(align_rows(**collate(rows)).boundary.tolist())) == 3
    model = tiny_echo_model(injection_site=site, injection_mask=mask, echo_step=echo_step)
    assert_equals_oracle(model, rows, side="both")


@pytest.mark.parametrize(
    ("shapes", "columns", "on_columns"),
    [
        ([(8, 3), (6, 2)], 10, 3),  # boundaries in one column: 10 + 3, not 10 + 5
        ([(400, 4), (4, 400)], 403, 400),  # rows start in one column: 403 + 400, not 799 + 400
        ([(400, 4), (200, 4), (390, 5)], 404, 5),
    ],
    ids=str,
)
def test_the_narrower_of_two_layouts(shapes, columns, on_columns):
    aligned = align_rows(**collate(rows_of(*shapes)))
    assert aligned.input_ids.shape[1] == columns
    assert aligned.targets.shape[1] == on_columns


shape_lists = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes=shape_lists)
def test_both_passes_are_never_wider_than_two_full_ones(shapes):
    aligned = align_rows(**collate(rows_of(*shapes)))
    longest = max(prompt + answer for prompt, answer in shapes)
    assert aligned.input_ids.shape[1] + aligned.targets.shape[1] <= 2 * (longest - 1)
    assert int(aligned.position_ids.max()) < longest


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_that_fit_the_position_embeddings_fit_when_aligned(name):
    """Aligned, these rows span 130 columns, and the model knows 128 positions."""
    rows = rows_of((120, 1), (100, 10))
    assert align_rows(**collate(rows)).input_ids.shape[1] > 128
    assert_equals_oracle(tiny_echo_model(name, echo_step="shared_prefix"), rows)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1000, 30), (5, 2), (3, 9)],
        pytest.param([(4000, 96), (20, 300), (7, 1)], marks=pytest.mark.slow),
        pytest.param([(40, 4056), (2000, 1)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_long_rows(shapes):
    assert_equals_oracle(long_model(length=4096), rows_of(*shapes))


# ------------------------------------------------------------------ several turns


def turns(seed, *lengths):
    """A row of user and assistant spans in turn, beginning with the user; labels -100 in the user's."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, architectures.VOCAB, (sum(lengths),), generator=g).tolist()
    labels, start = [], 0
    for index, length in enumerate(lengths):
        labels += ids[start : start + length] if index % 2 else [-100] * length
        start += length
    return ids, labels


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("mask", ["predictive", "answer"])
@pytest.mark.parametrize("site", ["lora_input", "output"])
def test_rows_of_several_turns(site, mask, is_checkpointed):
    model = tiny_echo_model(injection_site=site, injection_mask=mask, echo_step="shared_prefix")
    # the last: ends with the user; the third: one token each
    rows = [turns(1, 5, 3, 4, 6, 2, 1), turns(2, 2, 9), turns(3, 1, 1, 1, 1, 1, 1), turns(4, 9, 1, 7, 2, 5)]
    assert_equals_oracle(model, rows, prepare=switch_checkpointing(is_checkpointed))


MODELS = {}
row_turns = st.lists(st.integers(1, 7), min_size=2, max_size=7)


# The same examples on every run, for the reason given in test_oracle.
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(row_turns, min_size=1, max_size=4),
    side=st.sampled_from(["right", "left", "both"]),
    mask=st.sampled_from(["predictive", "answer"]),
    site=st.sampled_from(["lora_input", "output"]),
    is_checkpointed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_turns(lengths, side, mask, site, is_checkpointed, seed):
    if (mask, site) not in MODELS:
        MODELS[mask, site] = tiny_echo_model(injection_mask=mask, injection_site=site, echo_step="shared_prefix")
    model = MODELS[mask, site]
    model.get_base_model().activation_checkpointing_disable()  # the oracle knows nothing of it
    rows = [turns(seed + index, *row) for index, row in enumerate(lengths)]
    assert_equals_oracle(model, rows, side=side, prepare=switch_checkpointing(is_checkpointed))


# ---------------------------------------------------------------- length grouping


def pairs(shapes):
    return [dict(zip(("input_ids", "labels"), row, strict=True)) for row in rows_of(*shapes)]


def spread_of_batches(trainer_class, data, tmp_path, strategy, config_class, **kwargs):
    """Train two epochs; the row numbers of each epoch, and the mean spread of lengths within a batch."""
    args = config_class(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        train_sampling_strategy=strategy,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    trainer = trainer_class(args=args, train_dataset=data, **kwargs)
    batches, lengths = [], []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        batches.append(inputs["_echo_row"].tolist())
        lengths.append(inputs["attention_mask"].sum(1))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    rows = [row for batch in batches for row in batch]
    half = len(rows) // 2
    return [sorted(rows[:half]), sorted(rows[half:])], sum(float(n.max() - n.min()) for n in lengths) / len(lengths)


@pytest.mark.parametrize("trainer_class", [EchoTrainer, EchoSFTTrainer])
def test_length_grouping(trainer_class, tmp_path):
    """The number of each row does not disturb it: every row once an epoch, in batches of like lengths."""
    shapes = [(1 + i * 7 % 32, 2 + i % 3) for i in range(32)]
    spreads = {}
    for strategy in ("random", "group_by_length"):
        if trainer_class is EchoTrainer:
            data = Dataset.from_list(pairs(shapes))
            kwargs = {
                "model": tiny_echo_model(),
                "data_collator": lambda features: collate([(f["input_ids"], f["labels"]) for f in features]),
            }
            config_class = TrainingArguments
        else:
            data = Dataset.from_list(
                [{"prompt": "one two " * (1 + i * 7 % 32), "completion": "three" + "!" * (i % 3)} for i in range(32)]
            )
            base = tiny_base()
            base.resize_token_embeddings(400)
            kwargs = {
                "model": base,
                "processing_class": tiny_tokenizer(),
                "peft_config": lora_config(),
                "echo_config": EchoConfig(bottleneck=4),
            }
            config_class = SFTConfig
        epochs, spreads[strategy] = spread_of_batches(trainer_class, data, tmp_path, strategy, config_class, **kwargs)
        assert epochs == [list(range(32))] * 2
    assert spreads["group_by_length"] < 0.75 * spreads["random"]
