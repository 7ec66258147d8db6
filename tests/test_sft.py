"""Scripts with EchoSFTTrainer and EchoTrainer: the rows of a Dataset are checked and learned as those of a recipe."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from architectures import lora_config
from echo_lora import EchoConfig, EchoSFTTrainer, EchoTrainer, get_echo_model
from echo_lora.data.prepared import prepare_rows
from echo_lora.errors import EchoDataError
from test_forms import TOOL_ROWS, TOOL_TEMPLATE, turns
from test_trainer import DATASETS, ROUTED, arguments, collator, echo_model, rows, sft_arguments, sft_base, sft_trainer
from tiny import tiny_tokenizer

ECHO = pytest.mark.parametrize("echo", [ROUTED, None], ids=["echo", "baseline"])


def learned(trainer, index=0):
    row = trainer.train_dataset[index]
    return trainer.processing_class.decode([label for label in row["labels"] if label != -100])


@ECHO
def test_a_turn_of_weight_zero_is_not_learned(tmp_path, echo):
    messages = turns("one", "two", "three", "four")
    weighted = [message | {"weight": int(i != 1)} if i % 2 else message for i, message in enumerate(messages)]
    trainer = sft_trainer(tmp_path, {"messages": [messages, weighted]}, echo=echo, assistant_only_loss=True)
    assert learned(trainer, 0) == "two<|im_end|>four<|im_end|>"
    assert learned(trainer, 1) == "four<|im_end|>"


@ECHO
def test_turns_of_the_user_in_a_completion_are_not_learned_and_named(tmp_path, caplog, echo):
    data = {"prompt": [turns("one")] * 2, "completion": [turns("", "two")[1:], turns("", "two", "three", "four")[1:]]}
    with caplog.at_level(logging.WARNING):
        trainer = sft_trainer(tmp_path, data, echo=echo)
    assert learned(trainer, 0) == "two<|im_end|>\n"
    assert learned(trainer, 1) == "two<|im_end|>four<|im_end|>"
    assert "train data: row 1 has turns of the user in its completion: not trained on (1 such rows)" in caplog.text


@ECHO
def test_nulls_that_arrow_adds_are_not_shown_to_the_template(tmp_path, echo):
    base, _ = sft_base()
    dataset = Dataset.from_list(TOOL_ROWS)
    trainer = EchoSFTTrainer(
        model=base,
        args=sft_arguments(tmp_path, assistant_only_loss=True),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(chat_template=TOOL_TEMPLATE),
        peft_config=lora_config(),
        echo_config=echo,
    )
    texts = [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert not any("null" in text or "None" in text for text in texts)
    assert ["<call>" in text for text in texts] == [True, True, False]


def test_what_a_template_leaves_out_and_what_no_column_is_used_for_is_named(tmp_path, caplog):
    thought = "<think>\nhm\n</think>\n\ntwo"
    data = {"messages": [turns("one", "two"), turns("one", thought)], "input": ["", "3 and 4"]}
    base, _ = sft_base()
    template = tiny_tokenizer().chat_template.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endg", "{{ message['content'].split('</think>')[-1] }}{% endg"
    )
    with caplog.at_level(logging.WARNING):
        EchoSFTTrainer(
            model=base,
            args=sft_arguments(tmp_path, assistant_only_loss=True),
            train_dataset=Dataset.from_dict(data),
            processing_class=tiny_tokenizer(chat_template=template),
            peft_config=lora_config(),
            echo_config=ROUTED,
        )
    assert "train data: row 1 has reasoning that the chat template leaves out: not trained on (1 such" in caplog.text
    assert "train data: row 1 has text in the column 'input', which is not trained on" in caplog.text


@ECHO
def test_tools_whose_names_the_user_says_are_named_where_the_template_drops_them(tmp_path, caplog, echo):
    data = {"prompt": [turns("Please add")], "completion": [turns("", "two")[1:]], "tools": [TOOL_ROWS[0]["tools"][:1]]}
    with caplog.at_level(logging.WARNING):
        sft_trainer(tmp_path, data, echo=echo)
    assert "train data: row 0 has tools that the chat template leaves out: not trained on (1 such" in caplog.text


@ECHO
def test_what_is_for_a_chat_template_is_named_where_there_is_none(tmp_path, caplog, echo):
    data = {"prompt": ["one", "one"], "completion": ["two", "two"], "tools": [[], TOOL_ROWS[0]["tools"][:1]]}
    with caplog.at_level(logging.WARNING):
        sft_trainer(tmp_path, data | {"chat_template_kwargs": [{"quiet": True}, None]}, echo=echo)
    assert "train data: row 1 has tools, which has no effect: only a chat template reads it" in caplog.text
    assert "train data: row 0 has chat_template_kwargs, which has no effect: only a chat" in caplog.text


@ECHO
def test_a_weight_of_a_row_is_named(tmp_path, caplog, echo):
    data = {"prompt": ["one"] * 3, "completion": ["two"] * 3, "weight": [1, None, 0.5]}
    with caplog.at_level(logging.WARNING):
        sft_trainer(tmp_path, data, echo=echo)
    assert (
        "train data: row 2 has weight, which has no effect: rows have no weights, so 0.5 has the effect of 1"
        in caplog.text
    )


@ECHO
def test_variables_that_the_template_does_not_name_are_named(tmp_path, caplog, echo):
    data = {"prompt": [turns("one")] * 2, "completion": [turns("", "two")[1:]] * 2}
    with caplog.at_level(logging.WARNING):
        sft_trainer(tmp_path, data | {"chat_template_kwargs": [None, {"quiet": False}]}, echo=echo)
    assert "train data: row 1 has 'quiet' in chat_template_kwargs that the chat template leaves out: not" in caplog.text


@pytest.mark.parametrize("given", [{"padding": "max_length", "max_length": 50}, {"add_generation_prompt": False}])
def test_arguments_of_apply_chat_template_are_no_variables(tmp_path, given):
    data = {"prompt": [turns("one")] * 2, "completion": [turns("", "two")[1:]] * 2}
    with pytest.raises(EchoDataError, match=f"train data: row 1: chat_template_kwargs has {', '.join(sorted(given))}"):
        sft_trainer(tmp_path, data | {"chat_template_kwargs": [None, given]})


@ECHO
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_text_in_a_key_of_messages_that_the_template_ignores_is_named(tmp_path, caplog, echo, role):
    messages = [turns("one", "two"), [{**turn, "note": "three"} for turn in turns("one", "two")]]
    for turn in messages[1]:
        turn["note"] = turn["note"] if turn["role"] == role else None
    with caplog.at_level(logging.WARNING):
        sft_trainer(tmp_path, {"messages": messages}, echo=echo, assistant_only_loss=True)
    assert (
        "train data: row 1 has text in the key 'note' of messages that the chat template leaves out: not" in caplog.text
    )


def test_a_system_message_that_the_template_drops_is_named(tmp_path, caplog):
    base, _ = sft_base()
    template = tiny_tokenizer().chat_template.replace("messages %}", "messages if message.role != 'system' %}", 1)
    with caplog.at_level(logging.WARNING):
        EchoSFTTrainer(
            model=base,
            args=sft_arguments(tmp_path, assistant_only_loss=True),
            train_dataset=Dataset.from_dict(
                {"messages": [[{"role": "system", "content": "one"}, *turns("one", "two")]]}
            ),
            processing_class=tiny_tokenizer(chat_template=template),
            peft_config=lora_config(),
            echo_config=ROUTED,
        )
    assert "train data: row 0 has content that the chat template leaves out: not trained on (1 such" in caplog.text


def test_a_row_of_no_known_form_is_named_before_training(tmp_path, caplog):
    data = {"prompt": ["one", "two"], "completion": ["three", ""]}
    with pytest.raises(EchoDataError, match="train data: row 1 has an empty answer"):
        sft_trainer(tmp_path, data)
    with caplog.at_level(logging.WARNING):
        sft_trainer(tmp_path, data, echo=None)  # which needs no boundary
    assert "train data: row 1 has an empty answer" in caplog.text


def test_a_prompt_that_is_one_token_with_its_answer_is_named(tmp_path):
    with pytest.raises(EchoDataError, match=r"row 1 has no boundary: .* If the row has one, its end and the start"):
        sft_trainer(tmp_path, {"prompt": ["a:", "th"], "completion": ["b", "e"]})


@ECHO
def test_an_empty_dataset_is_an_error(tmp_path, echo):
    with pytest.raises(EchoDataError, match="the train data has no row"):
        sft_trainer(tmp_path, {"prompt": [], "completion": []}, echo=echo)
    with pytest.raises(EchoDataError, match="the train data has no row"):
        EchoTrainer(model=echo_model(), args=arguments(tmp_path), train_dataset=rows().select([]))


def test_a_stream_is_checked_and_weighed_as_its_rows_come(tmp_path, caplog):
    messages = turns("one", "two", "three", "four")
    messages[1]["weight"] = 0
    good = [turns("one", "two"), messages]

    def trainer(data):
        stream = Dataset.from_list([{"messages": one} for one in data]).to_iterable_dataset()
        args = sft_arguments(tmp_path, assistant_only_loss=True, max_length=None)
        base, tokenizer = sft_base()
        return EchoSFTTrainer(
            model=base,
            args=args,
            train_dataset=stream,
            processing_class=tokenizer,
            peft_config=lora_config(),
            echo_config=ROUTED,
        )

    labels = [[label for label in row["labels"] if label != -100] for row in trainer(good).train_dataset]
    assert [tiny_tokenizer().decode(row) for row in labels] == ["two<|im_end|>", "four<|im_end|>"]
    with pytest.raises(EchoDataError, match="train data: row 1 has no assistant message"):
        list(trainer([*good[:1], turns("one")]).train_dataset)


# ------------------------------------------------------------------------------------------ columns of the user


@ECHO
def test_columns_of_the_users_own_reach_the_collator(tmp_path, echo):
    """The numbers of rows have a private name, and completion_mask is a column like any other without the echo."""
    seen = []

    class Collator:
        def __call__(self, features):
            seen.extend(features)
            return collator(features)

    data = rows().add_column("row", list(range(40, 52)))
    if echo is None:
        data = data.add_column("completion_mask", [[7]] * 12)
    torch.manual_seed(0)
    model = echo_model()
    if echo is None:
        model = model.unload()
        import peft

        model = peft.get_peft_model(model, lora_config())
    trainer = EchoTrainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False, max_steps=2),
        train_dataset=data,
        data_collator=Collator(),
    )
    trainer.train()
    assert {feature["row"] for feature in seen} <= set(range(40, 52))
    assert len(seen) >= 4
    assert all("_echo_row" not in feature for feature in seen)
    if echo is None:
        assert all(feature["completion_mask"] == [7] for feature in seen)


@ECHO
def test_the_column_with_the_numbers_of_rows_is_ours(tmp_path, echo):
    data = {"prompt": ["one", "two", "one"], "completion": ["two", "", "two"]}
    numbers = {"completion": ["two"] * 3, "_echo_row": [7, 8, 9]}
    for which, given in {"text": ["a", "b", "c"], "flag": [True, False, True]}.items():
        with pytest.raises(EchoDataError, match="the train data has a column '_echo_row', a name that is reserved"):
            sft_trainer(tmp_path / which, data | {"_echo_row": given}, echo=echo)
    assert list(sft_trainer(tmp_path, data | numbers, echo=echo).train_dataset["_echo_row"]) == [0, 1, 2]
    stream = Dataset.from_dict(data | numbers).to_iterable_dataset()
    common = {"processing_class": sft_base()[1], "peft_config": lora_config(), "echo_config": echo}
    args = sft_arguments(tmp_path, max_length=None)
    with pytest.raises(EchoDataError, match="the train data has a column '_echo_row'"):
        EchoSFTTrainer(model=sft_base()[0], args=args, train_dataset=stream, **common)


def test_a_prepared_dataset_keeps_its_numbers_when_it_is_used_again(tmp_path):
    data = {"prompt": ["one", "one " * 40, "one"], "completion": ["two"] * 3}
    base, tokenizer = sft_base()
    args = sft_arguments(tmp_path, max_length=20)
    common = {"processing_class": tokenizer, "peft_config": lora_config(), "echo_config": ROUTED}
    first = EchoSFTTrainer(
        model=base, args=args, train_dataset=Dataset.from_dict(data), on_overlength="drop", **common
    ).train_dataset
    again = EchoSFTTrainer(model=sft_base()[0], args=args, train_dataset=first, **common)
    assert list(again.train_dataset["_echo_row"]) == [0, 2]
    again.train()


def test_a_shortened_prompt_keeps_its_beginning_of_sequence_token_as_in_a_recipe(tmp_path):
    data = {"prompt": ["one " * 40], "completion": ["two"]}
    base, _ = sft_base()
    tokenizer = tiny_tokenizer(adds_bos=True)
    trainer = EchoSFTTrainer(
        model=base,
        args=sft_arguments(tmp_path, max_length=20),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=lora_config(),
        echo_config=ROUTED,
        on_overlength="truncate_prompt",
    )
    rows = [{name: column[0] for name, column in data.items()}]
    expected = prepare_rows(rows, tokenizer, max_length=20, on_overlength="truncate_prompt").rows[0]
    assert trainer.train_dataset[0]["input_ids"] == expected.input_ids
    assert expected.input_ids[0] == tokenizer.bos_token_id


def test_an_evaluated_dataset_whose_numbers_are_none_is_an_error(tmp_path):
    bad = rows().add_column("_echo_row", ["abc"] * 12)
    trainer = EchoTrainer(
        model=echo_model(), args=arguments(tmp_path), train_dataset=rows(), eval_dataset=bad, data_collator=collator
    )
    with pytest.raises(EchoDataError, match="row 0 has a column '_echo_row'"):
        trainer.evaluate()
    with pytest.raises(EchoDataError, match="the train data has a column '_echo_row'"):
        EchoTrainer(model=echo_model(), args=arguments(tmp_path), train_dataset=bad, data_collator=collator)


def test_a_loss_that_is_not_finite_names_our_numbers_and_not_the_users(tmp_path):
    data = rows().add_column("row", list(range(40, 52)))
    trainer = EchoTrainer(model=echo_model(), args=arguments(tmp_path), train_dataset=data, data_collator=collator)
    batch = trainer.data_collator([{**trainer.train_dataset[i]} for i in (3, 5)])
    assert batch["_echo_row"].tolist() == [3, 5]


# --------------------------------------------------------------------------------------------------- embeddings


def test_ids_without_an_embedding_are_named(tmp_path):
    data = rows().map(lambda row, i: {"input_ids": [*row["input_ids"][:-1], 500 if i == 4 else 3]}, with_indices=True)
    with pytest.raises(EchoDataError, match=r"train data: row 4 has the token id 500, but .* 0 to \d+"):
        EchoTrainer(model=echo_model(), args=arguments(tmp_path), train_dataset=data, data_collator=collator)
    good, bad = rows(), data
    with pytest.raises(EchoDataError, match=r"eval data: row 4 has the token id 500"):
        EchoTrainer(
            model=echo_model(), args=arguments(tmp_path), train_dataset=good, eval_dataset=bad, data_collator=collator
        )


def test_rows_beyond_a_table_of_positions_are_refused_and_beyond_computed_ones_named(tmp_path, caplog):
    data = Dataset.from_dict({"input_ids": [[3, 4, 5], [3] * 20], "labels": [[-100, 4, 5], [-100] * 4 + [3] * 16]})
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=4, n_head=2))
    config = lora_config(target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_echo_model(base, config, EchoConfig(source_layers=[2], target_layers=[0], bottleneck=4))
    with pytest.raises(EchoDataError, match=r"train data: row 1 has 20 tokens, but .* embeddings for 16 positions"):
        EchoTrainer(model=model, args=arguments(tmp_path), train_dataset=data, data_collator=collator)
    model = echo_model()
    model.config.max_position_embeddings = 16
    with caplog.at_level(logging.WARNING):
        EchoTrainer(model=model, args=arguments(tmp_path), train_dataset=data, data_collator=collator)
    assert "train data: row 1 has 20 tokens, more than the model's maximum of 16" in caplog.text


def test_the_datasets_of_trl_are_tokenised_by_trl(tmp_path, monkeypatch):
    """Rows that hold nothing special keep TRL's own preparation."""
    import echo_lora.training.sft as sft

    monkeypatch.setattr(sft, "tokenize_row", None)
    for name, data in DATASETS.items():
        assert len(sft_trainer(tmp_path / name, data).train_dataset) == 6
