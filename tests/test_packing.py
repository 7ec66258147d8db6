"""Packed and padding-free batches: their rows are found and learned as those of a padded batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from architectures import collate, lora_config, random_row, tiny_echo_model
from echo_lora import EchoSFTTrainer, EchoTrainer
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.method.packing import BOUNDARIES, unpacked
from echo_lora.training.collator import packed
from test_oracle import assert_equals_oracle, checkpointed, mixed_rows
from test_trainer import DATASETS, ROUTED, arguments, collator, echo_model, rows, sft_arguments, sft_base, sft_trainer

# ------------------------------------------------------------------------ a batch


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_packed_rows_equal_the_oracle(name, method, is_checkpointed):
    model = tiny_echo_model(name, method=method, echo_step="shared_prefix")
    assert_equals_oracle(model, mixed_rows(), side="packed", prepare=checkpointed if is_checkpointed else None)


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
@pytest.mark.parametrize(
    "step",
    [{"is_routed": False}, {"num_items": 100}, {"train_on_prompt": True, "answer_weight": 3.0}],
    ids=lambda step: next(iter(step)),
)
def test_steps_on_packed_rows_equal_the_oracle(step, echo_step):
    assert_equals_oracle(tiny_echo_model(echo_step=echo_step), mixed_rows(), side="packed", **step)


def bins_of(lengths: list[int], capacity: int) -> list[list[int]]:
    """Places of rows, in order, joined while they fit."""
    bins: list[list[int]] = [[]]
    for place, length in enumerate(lengths):
        if sum(lengths[i] for i in bins[-1]) + length > capacity and bins[-1]:
            bins.append([])
        bins[-1].append(place)
    return bins


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    capacity=st.integers(2, 40),
    multiple=st.sampled_from([None, 8]),
    said=st.sets(st.sampled_from(BOUNDARIES), min_size=1),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing(shapes, capacity, multiple, said, seed):
    g = torch.Generator().manual_seed(seed)
    given_rows = [random_row(g, *shape) for shape in shapes]
    features = []
    for places in bins_of([len(ids) for ids, _ in given_rows], capacity):
        joined = {"seq_lengths": [len(given_rows[place][0]) for place in places]}
        for index, name in enumerate(("input_ids", "labels")):
            joined[name] = [value for place in places for value in given_rows[place][index]]
        features.append(joined)
    batch = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=multiple)(features)
    batch["completion_mask"] = (batch["labels"] != -100).long()
    for name in set(BOUNDARIES) - said:
        del batch[name]
    batch = unpacked(batch)
    assert batch.keys() == {"input_ids", "labels", "completion_mask", "attention_mask"}
    expected = collate(given_rows)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    assert torch.equal(batch["completion_mask"], (expected["labels"] != -100).long())


def test_several_packed_rows_of_a_batch():
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]]),
        "labels": torch.tensor([[-100, 4, 5, -100, 7], [-100, 9, -100, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]),
    }
    assert unpacked(batch)["input_ids"].tolist() == [[3, 4, 5], [6, 7, 0], [8, 9, 0]]
    assert unpacked(batch)["attention_mask"].sum(1).tolist() == [3, 2, 2]


def test_other_batches_are_left_as_they_are():
    batch = collate(mixed_rows())
    assert unpacked(batch) == batch
    batch["position_ids"] = batch["attention_mask"].cumsum(1) - 1
    assert unpacked(batch) == batch


def flat(**extra):
    return {"input_ids": torch.tensor([[3, 4, 5, 6, 7]]), "labels": torch.tensor([[-100, 4, 5, -100, 7]])} | extra


MASK = torch.ones(1, 5).long()
STARTS = torch.tensor([[0, 1, 2, 0, 1]])
REFUSED = {
    "restarts under a mask": (flat(position_ids=STARTS, attention_mask=MASK), "position_ids beside an attention_mask"),
    "ends under a mask": (
        flat(cu_seq_lens_q=torch.tensor([0, 3, 5]), attention_mask=MASK),
        "cu_seq_lens_q beside an attention_mask",
    ),
    "a row of one token": (flat(position_ids=torch.tensor([[0, 0, 1, 2, 3]])), "row 0 of the batch has no answer"),
    "a row without prompt": (
        flat(position_ids=STARTS, labels=torch.tensor([[-100, 4, 5, 6, 7]])),
        "row 1 of the batch has no prompt",
    ),
    "an offset": (flat(position_ids=torch.arange(7, 12)[None]), "row 0, column 0 of the batch has 7"),
    "a gap": (flat(position_ids=torch.tensor([[0, 1, 3, 0, 1]])), "row 0, column 2 of the batch has 3"),
    "three kinds of positions": (flat(position_ids=STARTS.expand(3, 1, 5)), r"position_ids has shape \(3, 1, 5\)"),
    "ends that are too short": (flat(cu_seq_lens_q=torch.tensor([0, 3])), r"cu_seq_lens_q is \[0, 3\]"),
    "a contradiction": (
        flat(position_ids=STARTS, seq_idx=torch.tensor([[0, 0, 1, 1, 1]])),
        "position_ids and seq_idx put the beginnings of its rows in different places",
    ),
    "padding only": (flat(position_ids=torch.zeros(1, 5).long()), "no row of the packed batch has two tokens"),
    "a mask that numbers the rows": (flat(attention_mask=torch.tensor([[1, 1, 1, 2, 2]])), "packed rows up to 2"),
    "a mask for each token": (flat(attention_mask=torch.ones(1, 1, 5, 5)), r"shape \(1, 1, 5, 5\)"),
    "lengths": (flat(seq_lengths=[[3, 2]]), "seq_lengths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_say_where_rows_begin_is_refused(name):
    batch, words = REFUSED[name]
    with pytest.raises(EchoDataError, match=words):
        tiny_echo_model()(**batch)


@pytest.mark.parametrize("form", ["return_position_ids", "return_seq_idx", "return_flash_attn_kwargs"])
def test_the_collator_of_transformers(form):
    given_rows = mixed_rows()
    features = [{"input_ids": ids, "labels": labels} for ids, labels in given_rows]
    forms = dict.fromkeys(("return_position_ids", "return_seq_idx", "return_flash_attn_kwargs"), False)
    model = tiny_echo_model()
    joined = model.echo_losses(**DataCollatorWithFlattening(**forms | {form: True})(features), is_routed=True)
    assert torch.equal(joined.loss, model.echo_losses(**collate(given_rows), is_routed=True).loss)


# ---------------------------------------------------------------------- trainers


# 4 lengths, so that rows are padded and packs are filled unevenly
PROMPTS = ["one", "one two three", "one two three four five six", "one two"] * 2
ANSWERS = [" four five six", " four", " two", " five six seven one two three four"] * 2
DATA = {
    "pairs": {"prompt": PROMPTS, "completion": ANSWERS},
    "messages": {
        "messages": [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
    },
}
UNPACKED = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_length": 64}
PACKED = {
    "packing": UNPACKED | {"packing": True},
    "bfd_split": UNPACKED | {"packing": True, "packing_strategy": "bfd_split"},
    "packing, accumulated": UNPACKED
    | {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "packing, evaluated without": UNPACKED | {"packing": True, "eval_packing": False},
    "padding-free": UNPACKED | {"padding_free": True, "max_length": None},
    "padding-free, padded": UNPACKED | {"padding_free": True, "max_length": None, "pad_to_multiple_of": 32},
}


def one_step(folder, data="pairs", method="lora", echo=ROUTED, **kwargs):
    """The trainer after one optimizer step on all rows, in which weights follow the gradient itself."""
    base, tokenizer = sft_base()
    trainer = EchoSFTTrainer(
        model=base,
        args=sft_arguments(folder, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **kwargs),
        train_dataset=Dataset.from_dict(DATA[data]),
        eval_dataset=Dataset.from_dict(DATA[data]),
        processing_class=tokenizer,
        peft_config=lora_config(method=method, init_lora_weights=False),
        echo_config=echo and dataclasses.replace(echo, injection_site="output", routing_schedule="constant"),
    )
    torch.manual_seed(7)
    for branch in trainer.model.echo.branches.values() if echo else ():
        nn.init.normal_(branch.W2.weight, std=0.1)
        nn.init.normal_(branch.U2.weight, std=0.1)
    trainer.train()
    return trainer


def assert_same_step(expected, got):
    """Losses of the step, weights after it, and the evaluation."""
    logs = [next(log for log in trainer.state.log_history if "loss" in log) for trainer in (expected, got)]
    for name in ("loss", "objective", "ce_on", "distillation", "grad_norm", "ce_prompt", "mean_token_accuracy"):
        if name in logs[0]:
            assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5, abs=1e-7), name
    after = dict(got.model.named_parameters())
    for name, value in expected.model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    metrics = [trainer.evaluate() for trainer in (expected, got)]
    for name in [name for name in metrics[0] if name.startswith(("eval_loss", "eval_ce", "eval_dist", "eval_echo"))]:
        # a divergence grows with the square of the passes' difference, which has the rounding error of the logits
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("name", PACKED)
def test_a_step_on_packed_rows_is_that_on_the_rows(tmp_path, name):
    expected = one_step(tmp_path / "rows", **UNPACKED)
    got = one_step(tmp_path / "packed", **PACKED[name])
    if PACKED[name].get("packing"):
        assert len(got.train_dataset) < len(expected.train_dataset)
    assert got._total_train_tokens >= expected._total_train_tokens > 0
    assert_same_step(expected, got)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dora", "activation_checkpointing": True},
        {"data": "messages", "assistant_only_loss": True},
        {"completion_only_loss": False},
        {"echo": None},  # stock TRL: the attention masks of transformers keep the rows apart
        {"echo": dataclasses.replace(ROUTED, routing_start=0.0, routing_end=0.0)},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["packing", "padding-free"])
def test_options_of_a_step_on_packed_rows(tmp_path, name, options):
    expected = one_step(tmp_path / "rows", **UNPACKED, **options)
    assert_same_step(expected, one_step(tmp_path / "packed", **PACKED[name], **options))


def test_packed_rows_keep_their_numbers_and_answers(tmp_path):
    options = {"completion_only_loss": False, "shuffle_dataset": True, "seed": 1}
    trainers = [sft_trainer(tmp_path, DATA["pairs"], **UNPACKED | options | extra) for extra in ({}, {"packing": True})]
    by_number = {row["_echo_row"]: row for row in trainers[0].train_dataset}
    batch = trainers[1].data_collator(list(trainers[1].train_dataset))
    numbers = batch.pop("_echo_row").tolist()
    assert sorted(numbers) == list(range(8))
    assert numbers != sorted(numbers)
    batch = unpacked(batch)
    for place, number in enumerate(numbers):
        inside = batch["attention_mask"][place].bool()
        for name in ("input_ids", "completion_mask"):
            assert batch[name][place][inside].tolist() == by_number[number][name]
    again = trainers[1].evaluate(trainers[1].train_dataset)
    assert again["eval_loss"] == pytest.approx(trainers[1].evaluate(Dataset.from_dict(DATA["pairs"]))["eval_loss"])


def test_rows_are_packed_as_trl_packs_them(tmp_path):
    echo, stock = (
        sft_trainer(tmp_path, DATA["pairs"], echo=echo, packing=True, max_length=48, shuffle_dataset=True)
        for echo in (ROUTED, None)
    )
    for name in ("input_ids", "labels", "seq_lengths"):
        assert echo.train_dataset[:][name] == stock.train_dataset[:][name]


@pytest.mark.parametrize("choice", ["error", "drop", "truncate_prompt"])
def test_a_row_that_does_not_fit_is_never_cut(tmp_path, choice):
    """TRL would cut the longest rows, of 3 + 15 tokens, within the answer."""
    options = {"packing": True, "max_length": 17, "on_overlength": choice}
    if choice == "error":
        with pytest.raises(EchoDataError, match=r"train data: row 3 keeps .* max_length is 17"):
            sft_trainer(tmp_path, DATA["pairs"], **options)
        return
    trainer = sft_trainer(tmp_path, DATA["pairs"], **options)
    numbers = [number for row in trainer.train_dataset for number in row["_echo_row"]]
    assert len(numbers) == 8 if choice == "truncate_prompt" else 0 < len(numbers) < 8
    assert max(length for row in trainer.train_dataset for length in row["seq_lengths"]) <= 17
    whole = sft_trainer(tmp_path, DATA["pairs"], packing=True, max_length=64)
    answers = [sum(label != -100 for row in t.train_dataset for label in row["labels"]) for t in (trainer, whole)]
    assert (answers[0] == answers[1]) == (choice == "truncate_prompt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' .* it cuts rows"),
        ({"eval_packing": True}, "eval_packing=True needs packing=True"),
        ({"packing": True, "max_length": None}, "packing=True needs max_length"),
    ],
    ids=["wrapped", "eval_packing", "max_length"],
)
def test_packing_that_can_not_be_right_is_refused(tmp_path, options, words):
    with pytest.raises(EchoConfigError, match=words):
        sft_trainer(tmp_path, DATASETS["conversational"], **options)


def test_packing_a_stream_is_refused(tmp_path):
    base, tokenizer = sft_base()
    with pytest.raises(EchoConfigError, match="the train data is a stream"):
        EchoSFTTrainer(
            model=base,
            args=sft_arguments(tmp_path, packing=True, max_length=None),
            train_dataset=Dataset.from_dict(DATA["pairs"]).to_iterable_dataset(),
            processing_class=tokenizer,
            peft_config=lora_config(),
            echo_config=ROUTED,
        )


def test_rows_that_somebody_else_packed_are_refused_before_training(tmp_path):
    given_arguments = {"model": echo_model(), "args": arguments(tmp_path), "train_dataset": rows(8)}
    with pytest.raises(EchoDataError, match="DataCollatorWithFlattening"):
        EchoTrainer(**given_arguments, data_collator=DataCollatorWithFlattening(return_position_ids=False))
    ours = packed(rows(8).add_column("_echo_row", list(range(8))), 64, "bfd", None)
    for dataset in (rows(8).add_column("seq_lengths", [[2, 3]] * 8), ours):
        with pytest.raises(EchoDataError, match="the train data is packed already"):
            EchoTrainer(**given_arguments | {"train_dataset": dataset}, data_collator=collator)
    for options in ({}, {"packing": True, "max_length": 64}):
        base, tokenizer = sft_base()
        with pytest.raises(EchoDataError, match="the train data is packed already"):
            EchoSFTTrainer(
                model=base,
                args=sft_arguments(tmp_path, **options),
                train_dataset=rows(8).add_column("seq_lengths", [[2, 3]] * 8),
                processing_class=tokenizer,
                peft_config=lora_config(),
                echo_config=ROUTED,
            )


def test_a_packed_row_may_be_longer_than_the_model_but_none_of_its_rows(tmp_path):
    long = {"prompt": ["one two three"] * 30, "completion": [" four"] * 30}
    trainer = sft_trainer(tmp_path, long, packing=True, max_length=1024)
    positions = trainer.model.config.max_position_embeddings
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) > positions
    trainer.train()


@pytest.mark.parametrize("single", [False, True])
def test_shuffled_needs_two_rows_in_each_packed_row(tmp_path, single):
    shuffled = dataclasses.replace(ROUTED, echo_kind="shuffled")
    options = {"packing": True, "max_length": 18 if single else 1000, "per_device_train_batch_size": 1}
    if single:
        with pytest.raises(EchoConfigError, match="echo_kind='shuffled'"):
            sft_trainer(tmp_path, DATA["pairs"], echo=shuffled, **options)
    else:
        sft_trainer(tmp_path, DATA["pairs"], echo=shuffled, **options).train()


def test_flattened_batches_train_in_echo_trainer(tmp_path):
    losses = []
    for collate_features in (collator, DataCollatorWithFlattening()):
        model = echo_model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer = EchoTrainer(
            model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows(), data_collator=collate_features
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
