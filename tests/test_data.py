"""Rows become the ids and labels that TRL makes of them, and every bad row is named."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_lora.data.check import SpecialTokens, check_tokenized_dataset
from echo_lora.data.generated import reasoning_gym_rows, reasoning_gym_splits
from echo_lora.data.prepared import prepare_rows
from echo_lora.data.preview import preview_segments
from echo_lora.data.sources import ROW, read_rows
from echo_lora.data.tokenize import IGNORED, TokenizedRow, end_token_ids, render_prompt, tokenize_row
from echo_lora.errors import EchoDataError
from tiny import UNMARKED_CHAT_TEMPLATE, tiny_tokenizer

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

PLAIN = [
    {"prompt": "What is the capital of France? ", "completion": "Paris."},
    {"prompt": "Count the words:", "completion": " three</s>"},
    {"prompt": "one two", "completion": " three\nfour \U0001f642"},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in PLAIN
]
CONVERSATION = [
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "Count the words."},
            {"role": "assistant", "content": "one"},
        ]
    },
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
]
FORMS = {"plain": PLAIN, "chat": CHAT, "conversation": CONVERSATION}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tokenizer_with_bos() -> Any:
    return tiny_tokenizer(adds_bos=True)


def answer_text(row: TokenizedRow, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", ["train.jsonl", "list.json", "lines.json", "train.parquet"])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "train.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(PLAIN), path)
    elif name == "list.json":
        path.write_text(json.dumps(PLAIN, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\r\n" for row in PLAIN))
    assert read_rows(path) == PLAIN


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b", "completion": "c"}
    path = write(tmp_path / "train.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert read_rows(path) == [row]


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("train.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n', "train.jsonl:2: not JSON"),
        ("train.jsonl", '{"a": 1}\n\n{"a": 3}\n', "train.jsonl:2: the line is empty"),
        ("train.jsonl", '{"a": 1}\n["a"]\n', "train.jsonl:2: row 1 is a list"),
        ("train.json", '[{"a": 1},\n {"a": }]', "train.json:2: not JSON"),
        ("train.json", "[]", "train.json has no row"),
        ("train.parquet", "not parquet", "train.parquet can't be read as Parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, place: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(EchoDataError) as caught:
        read_rows(path)
    assert place in str(caught.value)


def test_a_missing_or_binary_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EchoDataError, match=r"none\.jsonl: there is no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "train.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(EchoDataError, match=r"not UTF-8 text \(byte 7\)"):
        read_rows(tmp_path / "train.jsonl")


def test_columns_are_renamed_and_the_others_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '{"instruction": "q", "output": "a", "label": 1}\n')
    columns = {"prompt": "instruction", "completion": "output"}
    assert read_rows(path, columns) == [{"prompt": "q", "completion": "a", "label": 1}]


def test_a_wrong_column_names_the_row_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '{"instruction": "q"}\n{"output": "q"}\n')
    with pytest.raises(EchoDataError, match=r"train\.jsonl:1: row 0 .*'instrution'.*mean 'instruction'\?"):
        read_rows(path, {"prompt": "instrution"})
    with pytest.raises(EchoDataError, match=r"train\.jsonl:2: row 1 has no column .* Present: output\."):
        read_rows(path, {"prompt": "instruction"})


def test_a_part_keeps_the_place_of_its_rows(tmp_path: Path, tokenizer: Any) -> None:
    lines = [{"prompt": "a", "completion": "b", "part": part} for part in ("xs", "xl", "xl")]
    lines[2]["completion"] = ""
    path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, lines)))
    rows = read_rows(path, part="xl")
    assert [row[ROW] for row in rows] == [1, 2]
    with pytest.raises(EchoDataError, match=r"^train\.jsonl:3: row 2 has an empty answer"):
        prepare_rows(rows, tokenizer, max_length=64)
    with pytest.raises(EchoDataError, match=r"no row has part = 'xxl'\. Did you mean 'xl'"):
        read_rows(path, part="xxl")


# --------------------------------------------------------------------------------------------- tokenising


def trl_rows(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """What the real SFTTrainer makes of `rows`."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    args = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        **options,
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return list(trainer.train_dataset)


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("form", FORMS)
def test_ids_and_labels_are_those_of_trl(form: str, adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    rows = FORMS[form]
    expected = trl_rows(rows, tokenizer, tmp_path, assistant_only_loss=form == "conversation")
    assert len(expected) == len(rows)
    for row, theirs in zip(rows, expected, strict=True):
        ours = tokenize_row(row, tokenizer)
        assert ours.input_ids == theirs["input_ids"]
        assert ours.labels == theirs["labels"]
        assert IGNORED in ours.labels  # else the comparison says little
        assert set(ours.labels) != {IGNORED}


def test_a_template_that_trl_knows_is_marked_as_trl_does(tmp_path: Path) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = tiny_tokenizer(chat_template=qwen2_5_chat_template)
    expected = trl_rows(CONVERSATION, tokenizer, tmp_path, assistant_only_loss=True)
    for row, theirs in zip(CONVERSATION, expected, strict=True):
        ours = tokenize_row(row, tokenizer)
        assert (ours.input_ids, ours.labels) == (theirs["input_ids"], theirs["labels"])
        # TRL's variant counts the newline after the role as the assistant's; the prompt then ends before it.
        assert render_prompt(row, tokenizer).endswith("<|im_start|>assistant")
    assert answer_text(ours, tokenizer) == "\ntwo<|im_end|>\n"


def test_plain_answers_end_with_one_end_of_sequence(tokenizer: Any) -> None:
    assert [answer_text(tokenize_row(row, tokenizer), tokenizer) for row in PLAIN[:2]] == [
        " Paris.</s>",  # the blank at the end of the prompt has become part of " P"
        " three</s>",
    ]


def test_every_assistant_turn_is_supervised(tokenizer: Any) -> None:
    row = tokenize_row(CONVERSATION[0], tokenizer)
    assert answer_text(row, tokenizer) == "Paris.<|im_end|>one<|im_end|>"


def test_chat_turns_strings_into_messages(tokenizer: Any) -> None:
    for plain, chat in zip(PLAIN, CHAT, strict=True):
        assert tokenize_row(plain, tokenizer, chat=True) == tokenize_row(chat, tokenizer)
        assert tokenize_row(chat, tokenizer, chat=True) == tokenize_row(chat, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "all in one"}, "row 3 has only text"),
        ({"completion": "a"}, "row 3 has no prompt. Present: completion"),
        ({"prompt": None, "completion": "a"}, "row 3 has no prompt"),
        ({"prompt": "a"}, "row 3 has no completion"),
        ({"prompt": "", "completion": "a"}, "row 3 has an empty prompt"),
        ({"prompt": "a", "completion": " \n"}, "row 3 has an empty answer"),
        ({"prompt": CHAT[0]["prompt"], "completion": [{"role": "assistant", "content": ""}]}, "an empty answer"),
        ({"prompt": "a", "completion": CHAT[0]["completion"]}, "prompt is a str and completion a list"),
        ({"prompt": [], "completion": CHAT[0]["completion"]}, "row 3: prompt is not a list of messages"),
        ({"messages": [{"from": "user", "value": "a"}]}, "row 3: messages[0] is not a message with a role"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 3 has no assistant message"),
    ],
)
def test_a_row_of_no_known_form_is_refused(row: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(EchoDataError) as caught:
        tokenize_row({ROW: 3, **row}, tokenizer)
    assert message in str(caught.value)


def test_a_template_that_marks_nothing_is_named() -> None:
    unmarked = tiny_tokenizer(chat_template=UNMARKED_CHAT_TEMPLATE)
    unmarked.name_or_path = "owner/model"
    with pytest.raises(EchoDataError, match=r"row 0: the chat template of owner/model fails"):
        tokenize_row(CONVERSATION[0], unmarked)
    # Marks that surround nothing: what TRL checks is the mask, and so do we.
    empty = tiny_tokenizer(chat_template=UNMARKED_CHAT_TEMPLATE + "{% generation %}{% endgeneration %}")
    empty.name_or_path = "owner/model"
    with pytest.raises(EchoDataError, match=r"row 0 has no answer token: .* owner/model marks nothing"):
        tokenize_row(CONVERSATION[0], empty)


def test_what_the_tokenizer_lacks_is_named() -> None:
    bare = tiny_tokenizer(chat_template=None)
    with pytest.raises(EchoDataError, match="row 0 needs a chat template"):
        tokenize_row(PLAIN[0], bare, chat=True)
    bare.eos_token = None
    with pytest.raises(EchoDataError, match=r"row 0 can't be terminated: .* no end-of-sequence token"):
        tokenize_row(PLAIN[0], bare)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    strict = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}{% generation %}")
    with pytest.raises(EchoDataError, match="row 0: the chat template"):
        tokenize_row(CONVERSATION[0], strict)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("chat", [False, True], ids=["as-given", "chat"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_with_bos"])
def test_a_rendered_prompt_gives_the_ids_before_the_answer(
    name: str, form: str, chat: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    for row in FORMS[form]:
        tokenized = tokenize_row(row, tokenizer, chat)
        text = render_prompt(row, tokenizer, chat)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenized.input_ids[: tokenized.answer_start]


def test_a_prompt_without_a_completion_is_rendered(tokenizer: Any, tokenizer_with_bos: Any) -> None:
    assert render_prompt({"prompt": "a "}, tokenizer) == "a "
    assert render_prompt({"prompt": "a"}, tokenizer_with_bos) == "<s>a"
    expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt({"prompt": "a"}, tokenizer, chat=True) == expected
    assert render_prompt({"prompt": [{"role": "user", "content": "a"}]}, tokenizer) == expected


def test_a_prompt_that_merges_with_its_answer_is_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "the answer:", "completion": " is"}, {"prompt": "the answer ", "completion": "is"}]
    assert tokenize_row(rows[1], tokenizer).merged_tokens == 1  # " " and "is" become " is"
    with caplog.at_level(logging.WARNING):
        data = prepare_rows(rows, tokenizer, max_length=None)
    assert data.counts.merged_boundary == 1
    assert "train.jsonl:2: row 1 has one token for the end of its prompt" in caplog.text
    assert render_prompt(rows[1], tokenizer) == "the answer"


def test_text_without_a_token_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "one": 2, "two": 3, "=": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    rows = [
        {"prompt": "one two = ", "completion": "two"},
        {"prompt": "one two =", "completion": "two"},  # "=two"
        {"prompt": "one three = ", "completion": "two"},
    ]
    with caplog.at_level(logging.WARNING):
        data = prepare_rows(rows, tokenizer, max_length=None)
    assert data.counts.untrained == {"text that the vocabulary has no token for": [1, 2]}
    expected = "train.jsonl:2: row 1 has text that the vocabulary has no token for: not trained on (2 such rows)."
    assert expected in caplog.text


def test_an_unknown_token_that_no_text_becomes_is_not_counted(tokenizer: Any) -> None:
    unused = copy.deepcopy(tokenizer)
    unused.unk_token = unused.pad_token  # as byte-level tokenizers have it, for no use
    row = {"prompt": f"{unused.pad_token} a ", "completion": "b \U00012000"}
    assert prepare_rows([row], unused, max_length=None).counts.untrained == {}


# ----------------------------------------------------------------------------------------------- checking


def test_counts_and_lengths_are_those_of_the_rows(tokenizer: Any) -> None:
    data = prepare_rows(PLAIN, tokenizer, max_length=128)
    counts = data.counts
    assert (counts.kept, counts.dropped, counts.truncated, counts.without_end_token) == (3, 0, 0, 0)
    answers = [sum(label != IGNORED for label in row.labels) for row in data.rows]
    prompts = [row.answer_start for row in data.rows]
    assert counts.answer_tokens == (min(answers), sorted(answers)[1], max(answers))
    assert counts.prompt_tokens == (min(prompts), sorted(prompts)[1], max(prompts))
    assert counts.answer_tokens_total == sum(answers)
    assert [row.row for row in data.rows] == [0, 1, 2]
    assert data.summary()[0] == "train.jsonl: 3 rows kept, 0 dropped, 0 with a shortened prompt"
    assert f"{sum(answers)} in total" in data.summary()[2]
    dataset = data.dataset
    assert dataset.column_names == ["input_ids", "labels", ROW]
    assert dataset["labels"][1] == data.rows[1].labels


LONG = [
    {"prompt": "one two", "completion": " three"},
    {"prompt": "Count the words in this line: " * 4, "completion": "five"},
]


def test_a_longer_row_is_an_error_that_says_what_fits(tokenizer: Any) -> None:
    row = tokenize_row(LONG[1], tokenizer)
    prompt, length = row.answer_start, len(row.labels)
    with pytest.raises(EchoDataError) as caught:
        prepare_rows(LONG, tokenizer, max_length=prompt)
    assert str(caught.value) == (
        f"train.jsonl:2: row 1 keeps no answer token: the prompt has {prompt} tokens, the answer "
        f"{length - prompt}, and max_length is {prompt} (1 such rows).\n"
        f'Raise max_length to {length}, or set on_overlength to "truncate_prompt" or "drop".'
    )
    with pytest.raises(EchoDataError, match="keeps only part of its answer"):
        prepare_rows(LONG, tokenizer, max_length=length - 1)
    assert prepare_rows(LONG, tokenizer, max_length=length).counts.kept == 2


def test_a_longer_row_can_be_dropped(tokenizer: Any) -> None:
    data = prepare_rows(LONG, tokenizer, max_length=16, on_overlength="drop")
    assert (data.counts.kept, data.counts.dropped) == (1, 1)
    assert [row.row for row in data.rows] == [0]
    with pytest.raises(EchoDataError, match="no row is left: 2 were dropped"):
        prepare_rows(LONG, tokenizer, max_length=2, on_overlength="drop")


@given(prompt=st.text(min_size=1, max_size=40), completion=st.text(min_size=1, max_size=10), room=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_shortening_keeps_the_answer_and_the_end_of_the_prompt(prompt: str, completion: str, room: int) -> None:
    tokenizer = _HYPOTHESIS_TOKENIZER
    if not completion.strip():
        return
    row = {"prompt": prompt + ":", "completion": completion}
    whole = tokenize_row(row, tokenizer)
    answer = whole.labels[whole.answer_start :]
    max_length = len(answer) + room
    data = prepare_rows([row], tokenizer, max_length=max_length, on_overlength="truncate_prompt")
    short = data.rows[0]
    assert short.labels[short.answer_start :] == answer
    assert len(short.labels) == len(short.input_ids) == min(max_length, len(whole.labels))
    assert 1 <= short.answer_start <= room
    assert data.counts.truncated == (len(whole.labels) > max_length)
    if room > 1:
        assert short.input_ids[0] == tokenizer.bos_token_id  # attention leans on it
        kept = short.answer_start - 1
    else:
        kept = 1
    boundary = whole.answer_start
    assert (
        short.input_ids[short.answer_start - kept : short.answer_start] == whole.input_ids[boundary - kept : boundary]
    )


_HYPOTHESIS_TOKENIZER = tiny_tokenizer(adds_bos=True)


def test_an_answer_too_long_to_keep_is_an_error_or_dropped(tokenizer: Any) -> None:
    row = tokenize_row(PLAIN[0], tokenizer)
    answer = len(row.labels) - row.answer_start
    kept = prepare_rows(PLAIN[:1], tokenizer, max_length=answer + 1, on_overlength="truncate_prompt")
    assert kept.rows[0].answer_start == 1
    with pytest.raises(EchoDataError, match=rf"row 0 can't be shortened: its answer alone has {answer} tokens"):
        prepare_rows(PLAIN[:1], tokenizer, max_length=answer, on_overlength="truncate_prompt")


def test_an_answer_without_an_end_token_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    # The template closes a turn only when another follows: the model would never learn to stop.
    endless = tiny_tokenizer(
        chat_template="{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    )
    with caplog.at_level(logging.WARNING):
        data = prepare_rows(PLAIN, endless, max_length=None, chat=True)
    assert data.counts.without_end_token == 2  # the second row ends with </s> by itself
    assert "train.jsonl:1: row 0 ends its answer without" in caplog.text
    assert "(2 such rows)" in caplog.text
    assert any(line.startswith("2 answers end without") for line in data.summary())


def test_the_newline_after_an_end_of_turn_is_no_reason_to_warn(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = prepare_rows(CHAT + CONVERSATION, tokenizer, max_length=None)
    assert answer_text(data.rows[0], tokenizer).endswith("<|im_end|>\n")
    assert (data.counts.without_end_token, caplog.text) == (0, "")


def test_end_tokens_are_found_by_rendering(tokenizer: Any) -> None:
    names = tokenizer.convert_ids_to_tokens(sorted(end_token_ids(tokenizer)))
    assert names == ["</s>", "<|im_end|>"]
    assert end_token_ids(tiny_tokenizer(chat_template=None)) == {tokenizer.eos_token_id}


def test_errors_name_a_line_only_where_rows_are_lines(tokenizer: Any) -> None:
    rows = [*PLAIN, {"prompt": "a", "completion": ""}]
    with pytest.raises(EchoDataError, match=r"^train\.jsonl:4: row 3 has an empty answer"):
        prepare_rows(rows, tokenizer, max_length=64)
    with pytest.raises(EchoDataError, match=r"^train\.parquet: row 3 has an empty answer"):
        prepare_rows(rows, tokenizer, max_length=64, source="train.parquet")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-100, -100, -100], "train.jsonl:8: row 7 has no answer token: all of its 3 labels are -100"),
        ([5, 6, 7], "train.jsonl:8: row 7 has no boundary: its answer starts at the first token"),
    ],
)
def test_a_tokenised_row_without_boundary_or_answer_is_refused(labels: list[int], message: str) -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [labels], ROW: [7]})
    with pytest.raises(EchoDataError) as caught:
        check_tokenized_dataset(
            dataset, max_length=8, on_overlength="drop", special=SpecialTokens({7}), source="train.jsonl"
        )
    assert message in str(caught.value)


def test_a_prompt_that_is_one_token_with_its_answer_is_named(tokenizer: Any) -> None:
    row = {"prompt": "th", "completion": "e"}
    assert len(tokenizer("the")["input_ids"]) == 1  # else nothing is shown here
    with pytest.raises(EchoDataError) as caught:
        prepare_rows([{"prompt": "a:", "completion": "b"}, row], tokenizer, max_length=None)
    assert str(caught.value) == (
        "train.jsonl:2: row 1 has no boundary: the tokenizer merges the end of the prompt and the start of the answer "
        "into one token, so no token belongs to the prompt alone. Put a space or a line break between the two, or use "
        "the chat form."
    )
    for remedied in ({"prompt": "th\n", "completion": "e"}, {"prompt": "th", "completion": " e"}):
        assert prepare_rows([remedied], tokenizer, max_length=None).counts.kept == 1
    assert prepare_rows([row], tokenizer, max_length=None, chat=True).counts.kept == 1


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt"])
def test_a_tokenised_dataset_is_treated_like_the_rows(policy: Any, tokenizer_with_bos: Any) -> None:
    tokenizer, limit = tokenizer_with_bos, 20
    rows = LONG + PLAIN
    prepared = prepare_rows(rows, tokenizer, max_length=limit, on_overlength=policy)
    dataset = prepare_rows(rows, tokenizer, max_length=None).dataset
    dataset = dataset.add_column("note", [row["completion"] for row in rows])
    checked, counts = check_tokenized_dataset(
        dataset, max_length=limit, on_overlength=policy, special=SpecialTokens.of(tokenizer), source="train.jsonl"
    )
    assert counts.dropped + counts.truncated > 0
    assert (counts.kept, counts.dropped, counts.truncated) == (
        prepared.counts.kept,
        prepared.counts.dropped,
        prepared.counts.truncated,
    )
    assert list(checked.remove_columns("note")) == list(prepared.dataset)
    assert checked["note"] == [rows[row]["completion"] for row in checked[ROW]]


# ------------------------------------------------------------------------------------------------ preview


@pytest.mark.parametrize("form", FORMS)
def test_a_preview_shows_every_token_with_its_class(form: str, tokenizer: Any) -> None:
    for source in FORMS[form]:
        row = tokenize_row(source, tokenizer)
        segments = preview_segments(row, tokenizer)
        assert "".join(text for text, _ in segments) == tokenizer.decode(row.input_ids)
        kinds = [kind for _, kind in segments]
        assert kinds.index("boundary") == row.answer_start - 1
        assert kinds.count("boundary") == 1
        assert kinds.count("prompt") == row.answer_start - 1
        assert [kind == "answer" for kind in kinds] == [label != IGNORED for label in row.labels]
        answer = "".join(text for text, kind in segments if kind == "answer")
        assert answer == answer_text(row, tokenizer)


def test_a_preview_marks_later_prompts_as_ignored(tokenizer: Any) -> None:
    segments = preview_segments(tokenize_row(CONVERSATION[0], tokenizer), tokenizer)
    ignored = "".join(text for text, kind in segments if kind == "ignored")
    assert ignored == "\n<|im_start|>user\nCount the words.<|im_end|>\n<|im_start|>assistant\n\n"


# ---------------------------------------------------------------------------------------- generated tasks


def test_reasoning_gym_parts_share_no_question_and_no_size() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # few questions: collisions
    sizes = {"train": 90, "validation": 20, "test": 30}
    splits = reasoning_gym_splits("chain_sum", sizes, seed=1, params=params)
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    assert list(splits) == list(sizes)
    questions = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)
    drawn = reasoning_gym_rows("chain_sum", 140, seed=1, params=params)
    assert len({row["prompt"] for row in drawn}) < 140  # so that the line above could have failed
    smaller = reasoning_gym_splits("chain_sum", sizes | {"train": 10}, seed=1, params=params)
    assert smaller["test"] == splits["test"]
    assert reasoning_gym_splits("chain_sum", sizes, seed=1, params=params) == splits
    assert reasoning_gym_splits("chain_sum", sizes, seed=2, params=params) != splits


def test_reasoning_gym_errors_say_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    with pytest.raises(EchoDataError, match=r"'chain_sums' is not a task .* mean 'chain_sum'\?"):
        reasoning_gym_rows("chain_sums", 2, seed=0)
    with pytest.raises(EchoDataError, match=r"max_term'.* Correct its parameters: .*max_terms"):
        reasoning_gym_rows("chain_sum", 2, seed=0, params={"max_term": 3})
    with pytest.raises(EchoDataError, match="'rubiks_cube' has questions without a text answer"):
        reasoning_gym_rows("rubiks_cube", 1, seed=0)
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(EchoDataError, match=r"only \d+ different questions left for the 400 rows of 'train'"):
        reasoning_gym_splits("chain_sum", {"train": 400, "test": 10}, seed=0, params=few)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(EchoDataError, match="pip install reasoning-gym"):
        reasoning_gym_rows("chain_sum", 2, seed=0)


# ---------------------------------------------------------------------------------------------- real rows


@pytest.mark.parametrize("task", ["ARC-Challenge", "winogrande"])
def test_real_rows_can_be_trained_on(task: str, tokenizer: Any) -> None:
    path = REAL_DATA / task / "train.parquet"
    if not path.exists():
        pytest.skip(f"the data set is not here: {path.name} of {task}")
    part = "s" if task == "winogrande" else None
    rows = read_rows(path, {"prompt": "instruction", "completion": "output"}, part=part)
    assert len(rows) == (640 if task == "winogrande" else 1119)
    data = prepare_rows(
        rows[:200], tokenizer, max_length=None, source="train.parquet", ignore_columns=("answer", "question", "choices")
    )
    assert data.counts.kept == 200
    assert data.counts.without_end_token == 0
    assert answer_text(data.rows[0], tokenizer) == rows[0]["completion"] + "</s>"
    text = render_prompt(rows[0], tokenizer)
    assert rows[0]["prompt"].startswith(text)
