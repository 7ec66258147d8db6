"""What rows hold and how it is learned: weights, tools, reasoning, several turns, columns that nothing uses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_lora.data import json_file
from echo_lora.data.forms import check_forms, unused_texts
from echo_lora.data.prepared import prepare_rows
from echo_lora.data.sources import ROW, RowFile, read_rows
from echo_lora.data.tokenize import IGNORED, TokenizedRow, render_prompt, tokenize_row
from echo_lora.errors import EchoDataError
from tiny import CHAT_TEMPLATE, UNMARKED_CHAT_TEMPLATE, tiny_tokenizer

# Writes tools and calls as Qwen does, and content wherever it is.
TOOL_TEMPLATE = (
    "{% if tools %}{{ 'tools ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% generation %}{{ message.content }}"
    "{% if 'tool_calls' in message %}{% for call in message.tool_calls %}"
    "{{ '<call>' + call.function.name + ' ' }}{{ call.function.arguments | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tool_tokenizer() -> Any:
    return tiny_tokenizer(chat_template=TOOL_TEMPLATE)


def turns(*texts: str, **last: Any) -> list[dict[str, Any]]:
    """Turns of a user and an assistant, in turn; `last` are more keys of the last one."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[-1] |= last
    return messages


def text_of(row: TokenizedRow, tokenizer: Any) -> str:
    return tokenizer.decode(row.input_ids)


def learned(row: TokenizedRow, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


# ----------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("weight", [0, 0.0])
def test_a_turn_of_weight_zero_is_not_learned_and_the_boundary_is_after_it(tokenizer: Any, weight: float) -> None:
    messages = turns("one", "two", "three", "four")
    whole = tokenize_row({"messages": messages}, tokenizer)
    assert learned(whole, tokenizer) == "two<|im_end|>four<|im_end|>"
    messages[1]["weight"] = weight
    row = tokenize_row({"messages": messages}, tokenizer)
    assert row.input_ids == whole.input_ids  # the turn is read all the same, without its weight
    assert learned(row, tokenizer) == "four<|im_end|>"
    prompt = render_prompt({"messages": messages}, tokenizer)
    assert prompt.endswith("three<|im_end|>\n<|im_start|>assistant\n")
    messages[1]["weight"] = 1
    messages[3]["weight"] = 0
    assert learned(tokenize_row({"messages": messages}, tokenizer), tokenizer) == "two<|im_end|>"


def test_a_completion_of_several_turns_is_learned_where_it_is_the_assistants(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    completion = turns("", "two", "three", "four")[1:]
    row = {"prompt": turns("one"), "completion": completion}
    tokenized = tokenize_row(row, tokenizer)
    assert learned(tokenized, tokenizer) == "two<|im_end|>four<|im_end|>"
    with caplog.at_level(logging.WARNING):
        data = prepare_rows([{"prompt": "a", "completion": "b"}, row], tokenizer, max_length=None)
    assert "train.jsonl:2: row 1 has turns of the user in its completion" in caplog.text
    assert "1 rows have turns of the user in its completion, not trained on" in data.summary()
    weighted = {"prompt": turns("one"), "completion": [{**completion[0], "weight": 0}, *completion[1:]]}
    tokenized = tokenize_row(weighted, tokenizer)
    assert learned(tokenized, tokenizer) == "four<|im_end|>\n"  # one answer: as TRL makes it of prompt and completion
    assert render_prompt(weighted, tokenizer).endswith("three<|im_end|>\n<|im_start|>assistant\n")
    unmarked = tiny_tokenizer(chat_template=UNMARKED_CHAT_TEMPLATE)
    with pytest.raises(EchoDataError, match="row 0: the chat template"):
        tokenize_row(row, unmarked)


def test_a_completion_that_begins_with_the_users_turn_begins_after_it(tokenizer: Any) -> None:
    split = tokenize_row({"prompt": turns("one", "two"), "completion": turns("three", "four")}, tokenizer)
    assert split == tokenize_row(
        {"prompt": turns("one", "two", "three"), "completion": turns("", "four")[1:]}, tokenizer
    )
    assert learned(split, tokenizer) == "four<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns("a", "b", weight=0), r"row 0 has nothing to train on: every assistant message has weight 0"),
        (turns("a", "b", weight=0.5), r"row 0: messages\[1\] has weight = 0.5. Write 0"),
        (turns("a", "b", weight=True), r"row 0: messages\[1\] has weight = True"),
        (
            turns("a", "b", "c", weight=1) + turns("", "d")[1:],
            r"messages\[2\] has weight = 1, but only the assistant's",
        ),
        (turns("a", "b", train=False), r"row 0: messages\[1\] has train = False, which has no effect"),
        (turns("a", "b", loss=False), r"messages\[1\] has loss = False"),
        ([*turns("a"), {"role": "assistant"}], r"messages\[1\] has no content"),
        ([*turns("a", "b"), {"content": "c"}], r"messages\[2\] is not a message with a role"),
        ([{"role": "user", "content": [{"type": "image"}]}, *turns("", "b")[1:]], r"part 0 .* the type 'image'"),
        ([{"role": "user", "content": 5}, *turns("", "b")[1:]], r"messages\[0\]: content is a int"),
        (turns("a", "b\ud83d"), r"messages\[1\]: content holds half of a character, '\\ud83d' at position 1"),
        (turns("a", "b", tool_calls=[{"name": 3}]), r"messages\[1\]: tool_calls is not a list of calls"),
        (
            turns("a", "b", tool_calls=[{"name": "f", "arguments": "{"}]),
            r"the arguments of f is a string that is not JSON",
        ),
    ],
)
def test_a_message_that_can_not_be_meant_is_named(messages: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(EchoDataError, match=message):
        tokenize_row({"messages": messages}, tokenizer)


def test_a_template_that_does_not_tell_turns_apart_can_not_weigh_them() -> None:
    joined = tiny_tokenizer(
        chat_template="{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    messages = turns("one", "two", "three", "four")
    messages[1]["weight"] = 0
    with pytest.raises(EchoDataError, match=r"row 0 has a turn with weight 0, but the chat template marks 1 spans"):
        tokenize_row({"messages": messages}, joined)


# ------------------------------------------------------------------------------------------- tools and parts

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}},
    {"type": "function", "function": {"name": "greet", "parameters": {"properties": {"who": {"type": "string"}}}}},
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_ROWS = [
    {
        "messages": [*turns("one"), {"role": "assistant", "content": "", "tool_calls": [call("add", a=1)]}],
        "tools": TOOLS,
    },
    {"messages": [*turns("two"), {"role": "assistant", "content": "", "tool_calls": [call("greet", who="x")]}]},
    {"messages": turns("one", "two")},
]


@pytest.mark.parametrize("row", range(3))
def test_rows_with_tools_are_the_same_from_parquet(tmp_path: Path, tool_tokenizer: Any, row: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(TOOL_ROWS), tmp_path / "rows.parquet")
    assert "None" in str(pq.read_table(tmp_path / "rows.parquet").to_pylist())  # else nothing is shown here
    [read] = [read_rows(tmp_path / "rows.parquet")[row]]
    tokenized = tokenize_row(read, tool_tokenizer)
    assert tokenized == tokenize_row(TOOL_ROWS[row], tool_tokenizer)
    text = text_of(tokenized, tool_tokenizer)
    assert "null" not in text
    assert "None" not in text
    assert ("tools" in text, "<call>" in text) == (row == 0, row < 2)


def test_a_null_that_a_json_file_holds_is_kept(tool_tokenizer: Any) -> None:
    row = {"messages": [*turns("one"), {"role": "assistant", "content": None, "tool_calls": [call("add", a=None)]}]}
    assert '<call>add {"a": null}' in text_of(tokenize_row(row, tool_tokenizer), tool_tokenizer)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_call_without_content_is_written_without_none(tool_tokenizer: Any, content: dict[str, Any]) -> None:
    row = {"messages": [*turns("one"), {"role": "assistant", **content, "tool_calls": [call("add", a=1)]}]}
    tokenized = tokenize_row(row, tool_tokenizer)
    assert text_of(tokenized, tool_tokenizer).endswith('<|im_start|>assistant\n<call>add {"a": 1}<|im_end|>\n')
    adding = tiny_tokenizer(chat_template=TOOL_TEMPLATE.replace("message.content", "message.content + ''"))
    assert tokenize_row(row, adding) == tokenized


def test_a_call_that_the_template_does_not_write_is_named(caplog: pytest.LogCaptureFixture) -> None:
    # DeepSeek's template looks for a content of none, but transformers removes such keys
    deaf = tiny_tokenizer(chat_template=TOOL_TEMPLATE.replace("'tool_calls' in message", "message.content is none"))
    with caplog.at_level(logging.WARNING):
        prepare_rows(TOOL_ROWS[1:], deaf, max_length=None)
    assert "train.jsonl:1: row 0 has tool calls that the chat template leaves out" in caplog.text


def test_arguments_as_json_text_are_written_once(tool_tokenizer: Any) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [call("add", a=1)]}
    message["tool_calls"][0]["function"]["arguments"] = '{"a": "x"}'
    text = text_of(tokenize_row({"messages": [*turns("one"), message]}, tool_tokenizer), tool_tokenizer)
    assert '<call>add {"a": "x"}<|im_end|>' in text
    # a template that adds them to a text, as DeepSeek's, takes no object
    plain = tiny_tokenizer(
        chat_template=TOOL_TEMPLATE.replace("call.function.arguments | tojson", "'' + call.function.arguments")
    )
    message["tool_calls"] = [call("add", a="x")]
    assert '<call>add {"a": "x"}' in text_of(tokenize_row({"messages": [*turns("one"), message]}, plain), plain)


def test_parts_of_text_are_one_text_where_the_template_takes_no_parts(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = {"messages": [{"role": "user", "content": parts}, *turns("", "three")[1:]]}
    plain = {"messages": turns("one two", "three")}
    assert tokenize_row(row, tokenizer) == tokenize_row(plain, tokenizer)
    assert render_prompt(row, tokenizer) == render_prompt(plain, tokenizer)
    looping = tiny_tokenizer(
        chat_template=CHAT_TEMPLATE.replace(
            "{{ message['content'] + '<|im_end|>' }}{% endif %}",
            "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endif %}",
        )
    )
    assert "one two<|im_end|>" in text_of(tokenize_row(row, looping), looping)


def test_tools_that_the_template_does_not_know_are_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": turns("one", "two")}, {"messages": turns("one", "two"), "tools": json.dumps(TOOLS)}]
    with caplog.at_level(logging.WARNING):
        prepare_rows(rows, tokenizer, max_length=None)
    assert "train.jsonl:2: row 1 has tools that the chat template leaves out" in caplog.text


SEARCH = {
    "name": "search",
    "description": "Find pages.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Where to look."}}},
}
# All that the calls and tools hold is in the user's words too.
SEARCH_TURNS = [
    {"role": "user", "content": "Please search for Bern, town of 3 bears: Find pages. Where to look. Paris"},
    {"role": "assistant", "content": "", "tool_calls": [call("search", town="Bern", most=3, exact=True)]},
    {"role": "tool", "content": "It is there."},
    {"role": "assistant", "content": "Done."},
]


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (("", ""), ()),
        (("call.function.arguments | tojson", "call.function.arguments"), ()),  # as Python writes it
        (("{{ tool | tojson }}", "{{ tool.function.name }}"), ("descriptions of tools", "parameters of tools")),
        (("{{ tool | tojson }}", "one"), ("tools",)),
        (("{% if tools %}", "{% if false %}"), ("tools",)),
        (("{% if 'tool_calls' in message %}", "{% if false %}"), ("tool calls",)),
        (("call.function.arguments | tojson", "'...'"), ("tool calls",)),
        (("'<call>' + call.function.name", "'<call>'"), ("tool calls",)),
    ],
)
def test_what_the_template_leaves_out_is_found_where_other_turns_say_the_same(
    change: tuple[str, str], left_out: tuple[str, ...]
) -> None:
    template = TOOL_TEMPLATE.replace(*change)
    assert (template == TOOL_TEMPLATE) == (change == ("", ""))
    row = {"messages": SEARCH_TURNS, "tools": [{"type": "function", "function": SEARCH}]}
    tokenized = tokenize_row(row, tiny_tokenizer(chat_template=template))
    assert tokenized.untrained == tuple(f"{what} that the chat template leaves out" for what in left_out)
    prompt = {"prompt": SEARCH_TURNS[:-1], "completion": SEARCH_TURNS[-1:], "tools": row["tools"]}
    assert tokenize_row(prompt, tiny_tokenizer(chat_template=template)).untrained == tokenized.untrained


@pytest.mark.parametrize("text", ["Paris", "a", "Done."])
def test_a_system_message_whose_words_come_again_is_missed(text: str) -> None:
    deaf = tiny_tokenizer(
        chat_template=TOOL_TEMPLATE.replace("messages %}", "messages if message.role != 'system' %}", 1)
    )
    row = {"messages": [{"role": "system", "content": text}, *SEARCH_TURNS]}
    assert tokenize_row(row, deaf).untrained == ("content that the chat template leaves out",)


def test_tools_without_a_name_are_looked_for_too(tokenizer: Any, tool_tokenizer: Any) -> None:
    row = {"messages": turns("one", "two"), "tools": [{"type": "web"}]}
    assert tokenize_row(row, tokenizer).untrained == ("tools that the chat template leaves out",)
    assert tokenize_row(row, tool_tokenizer).untrained == ()


def test_a_template_that_refuses_changed_values_still_shows_what_it_leaves_out() -> None:
    strict = tiny_tokenizer(
        chat_template="{% if messages[0].content != 'one' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    )
    row = {"messages": turns("one", "two")}
    assert tokenize_row(row, strict).untrained == ()
    assert tokenize_row(row | {"tools": TOOLS}, strict).untrained == ("tools that the chat template leaves out",)


NAMING_TEMPLATE = TOOL_TEMPLATE.replace("message.role + '", "message.role + ' ' + (message.name or '') + '", 1)


@pytest.mark.parametrize(
    ("messages", "left_out"),
    [
        (turns("a", attachment="important") + turns("", "b")[1:], "text in the key 'attachment' of messages"),
        (turns("a", "b", name="Bob"), "text in the key 'name' of messages"),
        (turns("a", "b", citations=[{"of": "page 3"}]), "text in the key 'citations' of messages"),
        (
            turns("a", "b", function_call={"name": "f", "arguments": "{}"}),
            "text in the key 'function_call' of messages",
        ),
        (turns("a", "b", reasoning=[{"text": "hm"}]), "reasoning"),
        (turns("a", "b", tool_calls=[call("f") | {"output": "17"}]), "text in the key 'output' of tool calls"),
        (turns("a", "b", score=3, audio=None, seen=True, notes=[" "]), None),
        ([{"role": "tool", "name": "add", "content": "c"}, *turns("a", "b", tool_calls=[call("add")])], None),
        ([{"role": "tool", "name": "web", "content": "c"}, *turns("a", "b", tool_calls=[call("add")])], "'name'"),
    ],
)
def test_a_key_of_a_message_that_the_template_does_not_write_is_named(
    messages: list[dict[str, Any]], left_out: str | None, tool_tokenizer: Any
) -> None:
    found = tokenize_row({"messages": messages}, tool_tokenizer).untrained
    if left_out is None:
        assert found == ()
    else:
        assert len(found) == 1
        assert left_out in found[0]


def test_a_key_of_a_message_that_the_template_writes_or_asks_for_is_not_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    naming = tiny_tokenizer(chat_template=NAMING_TEMPLATE)
    row = {"messages": turns("a", "b", name="Bob")}
    assert tokenize_row(row, naming).untrained == ()
    assert "assistant Bob" in text_of(tokenize_row(row, naming), naming)
    asking = tiny_tokenizer(
        chat_template=TOOL_TEMPLATE.replace("message.content", "message.said[message.channel] + message.content")
    )
    asked = turns("a", "b", said={"x": "b"}, channel="x")
    asked[0] |= {"said": {"y": "a"}, "channel": "y"}
    assert tokenize_row({"messages": asked}, asking).untrained == ()
    with caplog.at_level(logging.WARNING):
        prepare_rows([row, {"messages": turns("a", "b", named="Bob")}], naming, max_length=None)
    assert "train.jsonl:2: row 1 has text in the key 'named' of messages that the chat template" in caplog.text
    assert "leaves out: not trained on (1 such rows)" in caplog.text
    assert "row 0" not in caplog.text


def test_a_key_of_a_part_of_content_is_named(tokenizer: Any) -> None:
    part = {"type": "text", "text": "a", "source": "page 3"}
    row = {"messages": [{"role": "user", "content": [part]}, *turns("", "b")[1:]]}
    assert tokenize_row(row, tokenizer).untrained == ("text in the key 'source' of parts of content",)


# ------------------------------------------------------------------------------------ variables of the template


@pytest.mark.parametrize(
    "given",
    [
        {"tokenize": False},
        {"return_dict": False},
        {"return_tensors": "pt"},
        {"return_assistant_tokens_mask": False},
        {"padding": "max_length", "max_length": 50},
        {"truncation": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"tokenizer_kwargs": {}},
        {"chat_template": "{{ messages[0].content }}"},
        {"sanitize_control_tokens": True},
        {"tools": []},
        {"conversation": []},
        {"messages": []},
    ],
    ids=lambda given: next(iter(given)),
)
@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_arguments_of_apply_chat_template_are_no_variables(given: dict[str, Any], form: str, tokenizer: Any) -> None:
    row: dict[str, Any] = {"messages": turns("a", "b")}
    if form == "prompt":
        row = {"prompt": turns("a"), "completion": turns("", "b")[1:]}
    names = ", ".join(sorted(given))
    with pytest.raises(EchoDataError) as caught:
        check_forms([row, row | {"chat_template_kwargs": given}], "train.jsonl")
    assert str(caught.value).startswith(f"train.jsonl:2: row 1: chat_template_kwargs has {names}: arguments of")
    with pytest.raises(EchoDataError, match=f"row 0: chat_template_kwargs has {names}"):
        tokenize_row(row | {"chat_template_kwargs": given}, tokenizer)


def test_variables_reach_the_template_and_those_that_it_does_not_name_are_named(tokenizer: Any) -> None:
    template = "{% if documents %}{{ documents[0].text }}{% endif %}{% if not quiet %}loud {% endif %}" + CHAT_TEMPLATE
    named = tiny_tokenizer(chat_template=template)
    row = {"messages": turns("a", "b"), "chat_template_kwargs": {"documents": [{"text": "page"}], "quiet": False}}
    assert tokenize_row(row, named).untrained == ()
    assert text_of(tokenize_row(row, named), named).startswith("pageloud <|im_start|>")
    row["chat_template_kwargs"]["quiet"] = True
    assert text_of(tokenize_row(row, named), named).startswith("page<|im_start|>")
    assert tokenize_row(row, tokenizer).untrained == tuple(
        f"{name!r} in chat_template_kwargs that the chat template leaves out" for name in ("documents", "quiet")
    )


# ------------------------------------------------------------------------------------------------ reasoning


def test_reasoning_that_is_given_twice_is_shown_once() -> None:
    from trl.chat_template_utils import qwen3_chat_template

    qwen = tiny_tokenizer(chat_template=qwen3_chat_template)
    row = {"prompt": turns("one"), "completion": turns("", "two", reasoning_content="count", reasoning="count")[1:]}
    assert tokenize_row(row, qwen).untrained == ()
    row["completion"][0]["reasoning"] = "one"  # which is in the prompt
    assert tokenize_row(row, qwen).untrained == ("reasoning that the chat template leaves out",)


@pytest.mark.parametrize("form", ["in the content", "beside it"])
def test_reasoning_that_the_template_removes_is_named(form: str, caplog: pytest.LogCaptureFixture) -> None:
    from trl.chat_template_utils import qwen3_chat_template

    qwen = tiny_tokenizer(chat_template=qwen3_chat_template)
    thought = {"reasoning_content": "count the words"} if form == "beside it" else {}
    content = "two" if thought else "<think>\ncount the words\n</think>\n\ntwo"
    answer = {"role": "assistant", "content": content, **thought}
    kept = {"prompt": turns("one"), "completion": [answer]}
    removed = {"prompt": turns("one"), "completion": [answer, *turns("three", "four")]}
    context = {"prompt": [*turns("one"), answer, *turns("three")], "completion": turns("", "four")[1:]}
    assert "count the words" in text_of(tokenize_row(kept, qwen), qwen)
    with caplog.at_level(logging.WARNING):
        prepare_rows([kept, context], qwen, max_length=None)
    assert "leaves out" not in caplog.text  # reasoning in the prompt is left out at inference too
    plain = tiny_tokenizer(
        chat_template=CHAT_TEMPLATE.replace(
            "{{ message['content'] + '<|im_end|>' }}{% endg",
            "{{ message['content'].split('</think>')[-1].strip() + '<|im_end|>' }}{% endg",
        )
    )
    row = {"messages": [*turns("one"), answer]}
    assert learned(tokenize_row(row, plain), plain) == "two<|im_end|>"
    with caplog.at_level(logging.WARNING):
        data = prepare_rows([kept, row, removed], plain, max_length=None)
    assert "train.jsonl:1: row 0 has reasoning that the chat template leaves out" in caplog.text
    assert "(3 such rows)" in caplog.text
    assert data.counts.untrained["reasoning that the chat template leaves out"] == [0, 1, 2]


def test_a_system_message_that_the_template_drops_is_named(caplog: pytest.LogCaptureFixture) -> None:
    deaf = tiny_tokenizer(
        chat_template=CHAT_TEMPLATE.replace("messages %}", "messages if message.role != 'system' %}", 1)
    )
    row = {"messages": [{"role": "system", "content": "Be short."}, *turns("one", "two")]}
    with caplog.at_level(logging.WARNING):
        prepare_rows([row], deaf, max_length=None)
    assert "row 0 has content that the chat template leaves out" in caplog.text


# ----------------------------------------------------------------------------------------- columns and files


@pytest.mark.parametrize(
    ("column", "value", "is_text"),
    [
        ("id", "identity_0", False),
        ("conversation_id", "a1-b2", False),
        ("UUID", "0-0", False),
        ("id", "what is this about?", True),
        ("kid", "Anna", True),
        ("source", "wiki", True),
        ("id", ["a"], True),
    ],
)
def test_a_word_that_identifies_a_row_is_no_text_that_is_lost(column: str, value: Any, is_text: bool) -> None:
    assert unused_texts({"prompt": "a", "completion": "b", column: value}) == [column] * is_text


def test_a_column_of_text_that_nothing_uses_is_an_error_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"instruction": "Add the numbers.", "input": "", "output": "0"},
        {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7", "note": {"by": ["me"]}},
    ]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(path, {"prompt": "instruction", "completion": "output"})
    with pytest.raises(EchoDataError) as caught:
        prepare_rows(read, tokenizer, max_length=64, source=str(path))
    assert str(caught.value).startswith(f"{path}:2: row 1 has text that is not used, in the columns 'input', 'note'. ")
    assert "set data.ignore_columns to [input, note] (--set 'data.ignore_columns=[input, note]')" in str(caught.value)
    data = prepare_rows(read, tokenizer, max_length=64, ignore_columns=["input", "note"])
    assert data.counts.kept == 2


def test_prompt_and_completion_come_before_messages_and_the_other_is_unused() -> None:
    both = {"prompt": "a", "completion": "b", "messages": turns("c", "d")}
    with pytest.raises(EchoDataError, match="in the column 'messages'"):
        check_forms([both], "train.jsonl")
    with pytest.raises(EchoDataError, match="in the column 'completion'"):
        check_forms([{"completion": "b", "messages": turns("c", "d")}], "train.jsonl")
    check_forms([{"prompt": "a", "completion": "b", "row": 7, "messages": None, "score": 0.5}], "train.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [SEARCH]),
        ("tools", json.dumps([SEARCH])),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
@pytest.mark.parametrize("is_scored", [False, True])
def test_what_is_for_a_chat_template_is_an_error_where_there_is_none(name: str, value: Any, is_scored: bool) -> None:
    rows = [{"prompt": "a", "completion": "b", name: None}, {"prompt": "a", "completion": "b", name: value}]
    with pytest.raises(EchoDataError) as caught:
        check_forms(rows, "train.jsonl", is_scored=is_scored)
    assert str(caught.value) == (
        f"train.jsonl:2: row 1 has {name}: only a chat template reads it, and plain strings don't go through one. "
        "Write the row as messages, or set data.chat in a recipe. To ignore it, add it to "
        f"data.ignore_columns: [{name}]."
    )
    check_forms(rows, "train.jsonl", [name], is_scored=is_scored)
    check_forms(rows, "train.jsonl", chat=True, is_scored=is_scored)
    check_forms([{"messages": turns("a", "b"), name: value}], "train.jsonl", is_scored=is_scored)
    check_forms([rows[0] | {"tools": "[]", "chat_template_kwargs": {}}], "train.jsonl", is_scored=is_scored)


@pytest.mark.parametrize(("name", "value"), [("weight", 0), ("weight", 0.5), ("sample_weight", 0.0), ("train", False)])
@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": "b"}, {"messages": turns("a", "b")}], ids=["text", "chat"]
)
def test_a_weight_of_a_row_is_an_error(row: dict[str, Any], name: str, value: Any) -> None:
    good = [row | {name: None}, row | {name: 1}, row | {name: True}, row | {name: 1.0}]
    check_forms(good, "train.jsonl")
    with pytest.raises(
        EchoDataError, match=f"train.jsonl:5: row 4 has {name}: rows have no weights, so {value} has the effect"
    ):
        check_forms([*good, row | {name: value}], "train.jsonl")
    check_forms([row | {name: value}], "train.jsonl", [name])
    check_forms([row | {name: value}], "train.jsonl", is_scored=True)


def test_a_column_called_row_is_the_users_own(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b", "row": 40}, {"prompt": "a", "completion": "", "row": 41}]
    with pytest.raises(EchoDataError, match=r"^train\.jsonl:2: row 1 has an empty answer"):
        prepare_rows(rows, tokenizer, max_length=64)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({**row, "part": "x"}) + "\n" for row in rows))
    assert [(row["row"], row[ROW]) for row in read_rows(path, part="x")] == [(40, 0), (41, 1)]


@pytest.mark.parametrize("value", ["abc", 7, None])
@pytest.mark.parametrize("part", [None, "x"])
def test_the_column_with_the_numbers_of_rows_is_none_of_a_file(tmp_path: Path, value: Any, part: str | None) -> None:
    path = tmp_path / "train.jsonl"
    rows = [
        {"prompt": "a", "completion": "b", "part": "x"},
        {"prompt": "a", "completion": "b", "part": "x", ROW: value},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        EchoDataError, match=r"train\.jsonl:2: row 1 has a column '_echo_row', a name that is reserved for"
    ):
        read_rows(path, part=part)
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(EchoDataError, match=r"train\.jsonl:1: row 0 has a column '_echo_row'"):
        read_rows(path, {ROW: "completion"}, part=part)


def test_a_row_whose_number_is_none_is_named(tokenizer: Any) -> None:
    row = {"prompt": "a:", "completion": "b"}
    with pytest.raises(EchoDataError, match="row 1 has a column '_echo_row', a name that is reserved"):
        prepare_rows([row, row | {ROW: "abc"}], tokenizer, max_length=None)


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "a", "answer": "b"}, "{prompt: question, completion: answer}"),
        ({"frage": "a", "antwort": "b"}, "{prompt: frage, completion: antwort}"),
        ({"prompt": "a", "reply": "b"}, "{completion: reply}"),
        ({"a": "a", "b": "b", "c": "c"}, "{prompt: question, completion: answer}"),
    ],
)
def test_a_missing_column_is_an_error_with_what_to_type(row: dict[str, str], mapping: str) -> None:
    with pytest.raises(EchoDataError) as caught:
        check_forms([row], "rows.csv")
    assert str(caught.value).endswith(f"as in data.columns: {mapping} (--set 'data.columns={mapping}').")


def test_the_form_of_all_rows_is_checked_before_the_first_is_tokenised() -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the tokenizer was called")

    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a"}]
    with pytest.raises(EchoDataError, match=r"train\.jsonl:4: row 3 has no completion"):
        prepare_rows(rows, fails, max_length=None)
    with pytest.raises(EchoDataError, match=r"train\.jsonl has no row"):
        prepare_rows([], fails, max_length=None)
    with pytest.raises(EchoDataError, match=r"train\.jsonl:4: row 3 has no completion"):
        prepare_rows(iter(rows), fails, max_length=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}\n', "rows.jsonl:1: not JSON: the name 'prompt' occurs twice in one object"),
        ("[" * 100_000 + "\n", "not JSON"),
        ('{"a": ' + "9" * 5000 + "}\n", "rows.jsonl:1: not JSON: Exceeds the limit"),
        ("", "rows.jsonl has no row"),
        ("\n\n", "rows.jsonl has no row"),
        ('[{"a": 1}] {"a": 2}', "rows.jsonl:1: not JSON: text after the end of the list"),
        ('[{"a": 1}\n{"a": 2}]', "rows.jsonl:2: not JSON: Expecting ',' or ']'"),
        ('[{"a": 1},\n', "not JSON"),
    ],
)
def test_a_file_that_would_lose_something_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(EchoDataError) as caught:
        read_rows(path)
    assert message in str(caught.value)


def test_a_renamed_column_never_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "question": "b", "completion": "c"}\n')
    with pytest.raises(EchoDataError, match=r"rows\.jsonl:1: row 0 already has a column 'prompt'"):
        read_rows(path, {"prompt": "question"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), min_size=1, max_size=5), indent=st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_a_list_is_read_in_pieces_as_it_is_read_at_once(rows: list[dict[str, Any]], indent: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_file, "_CHUNK", 3)
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows, indent=2 if indent else None, ensure_ascii=False), encoding="utf-8")
        assert list(RowFile(path)) == rows
        lines = Path(folder) / "rows.jsonl"
        lines.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        assert list(RowFile(lines, limit=2)) == rows[:2]


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant"]),
        st.text("abc é\n", min_size=1, max_size=8),
        st.sampled_from([None, 0, 1]),
    ),
    min_size=1,
    max_size=6,
)


@given(MESSAGES)
@settings(max_examples=80, deadline=None)
def test_exactly_the_assistants_turns_with_a_weight_are_learned(drawn: list[tuple[str, str, int | None]]) -> None:
    messages = [{"role": "user", "content": "?"}]
    for role, content, weight in drawn:
        messages.append({"role": role, "content": content} | ({"weight": weight} if role == "assistant" else {}))
    expected = [text for role, text, weight in drawn if role == "assistant" and weight != 0]
    row = {"messages": messages}
    if not any(text.strip() for text in expected):
        with pytest.raises(EchoDataError):
            tokenize_row(row, _TOKENIZER)
        return
    assert learned(tokenize_row(row, _TOKENIZER), _TOKENIZER) == "".join(text + "<|im_end|>" for text in expected)


_TOKENIZER = tiny_tokenizer()
