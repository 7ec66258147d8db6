"""What a row may hold, checked without a tokenizer: its columns, its messages, and which messages are trained on.

A row has one of TRL's forms: `prompt` and `completion` as strings, both as lists of messages, or a conversation in
`messages`. The assistant's messages are trained on, except those with `weight: 0` (OpenAI's key).
"""

from __future__ import annotations

import inspect
import json
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from echo_lora.data.sources import KEPT_NAME, ROW, where_is
from echo_lora.errors import EchoDataError
from echo_lora.text import check_unicode

ROW_COLUMNS = ("prompt", "completion", "messages", "tools", "chat_template_kwargs", "part", ROW)
SCORED_COLUMNS = ("answer", "choices", "label", "test", "entry_point", "group")
REASONING = ("reasoning_content", "reasoning", "thinking")  # message keys that chat templates know
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "weight", *REASONING)
PART_KEYS = ("type", "text")
CALL_KEYS = ("type", "id", "function", "name", "arguments")
IDENTIFIER = re.compile(r"(.*_)?(id|idx|uuid|guid|hash)", re.IGNORECASE)  # names of columns
# What other programs call `weight`; ignoring such a key would be silent.
_RIVALS = ("train", "loss", "loss_weight", "trainable", "mask", "masked")


def row_number(row: Mapping[str, Any], index: int) -> int:
    """The row's number in its file, or `index` if the row has none. Raises EchoDataError if it is not an integer."""
    try:
        return operator.index(row.get(ROW, index))
    except TypeError as error:
        raise EchoDataError(f"row {index} has {KEPT_NAME}") from error


def check_forms(
    rows: Iterable[Mapping[str, Any]],
    source: str,
    ignore: Collection[str] = (),
    *,
    chat: bool = False,
    is_scored: bool = False,
) -> None:
    """Check the form of every row, and that no text in it goes unused. Raises EchoDataError with file and line.

    ignore: columns that may go unused. chat: strings go through the chat template. is_scored: the rows are questions
    to score, which need no completion.
    """
    unused: dict[str, int] = {}
    index = -1
    for index, row in enumerate(rows):
        number = row_number(row, index)
        if not is_scored:
            checked_row(row, where_is(source, number))
        for name, why in without_effect(row, chat=chat, is_scored=is_scored).items():
            if name not in ignore:
                raise EchoDataError(
                    f"{where_is(source, number)} has {name}: {why}. To ignore it, add it to "
                    f"data.ignore_columns: [{name}]."
                )
        for name in unused_texts(row, is_scored=is_scored):
            if name not in ignore:
                unused.setdefault(name, number)
    if index < 0:
        raise EchoDataError(f"{source} has no row. Name a file with at least one.")
    if unused:
        first = min(unused.values())
        raise EchoDataError(
            f"{where_is(source, first)} has text that is not used, in the column{'s' * (len(unused) > 1)} "
            f"{', '.join(map(repr, unused))}. Put it into the prompt or the completion, map it with data.columns, or, "
            f"to ignore it, set data.ignore_columns to [{', '.join(unused)}] (--set "
            f"'data.ignore_columns=[{', '.join(unused)}]')."
        )


def unused_texts(row: Mapping[str, Any], *, is_scored: bool = False) -> list[str]:
    """Columns whose text is part of neither the prompt nor the answer; a word that identifies the row is no text."""
    used = {*ROW_COLUMNS, *SCORED_COLUMNS} if is_scored else set(ROW_COLUMNS)
    if not is_scored:
        # as in TRL, prompt and completion come before messages
        used -= {"messages"} if row.get("prompt") is not None else {"completion"} if row.get("messages") else set()
    return [
        name
        for name, value in row.items()
        if name not in used and holds_text(value) and not _identifies(str(name), value)
    ]


def _identifies(name: str, value: Any) -> bool:
    return isinstance(value, str) and len(value.split()) == 1 and IDENTIFIER.fullmatch(name) is not None


def without_effect(row: Mapping[str, Any], *, chat: bool = False, is_scored: bool = False) -> dict[str, str]:
    """Columns that would change how a row is read or trained on but have no effect, with the reason and the remedy."""
    found = {}
    if isinstance(row.get("prompt"), str) and not chat:
        for name in ("tools", "chat_template_kwargs"):
            if row.get(name) not in (None, [], {}, "", "[]"):
                found[name] = (
                    "only a chat template reads it, and plain strings don't go through one. Write the row as messages, "
                    "or set data.chat in a recipe"
                )
    for name in () if is_scored else ("weight", "sample_weight", *_RIVALS):
        value = row.get(name)
        if isinstance(value, (int, float)) and value != 1:  # True means 1, which is what happens
            found[name] = (
                f"rows have no weights, so {value!r} has the effect of 1. Remove rows that should not be trained on; "
                'in messages, give an assistant turn "weight": 0'
            )
    return found


def holds_text(value: Any) -> bool:
    """Whether a value holds a non-blank string, at any depth."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(holds_text, value.values()))
    return isinstance(value, (list, tuple)) and any(map(holds_text, value))


def checked_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row in one of two forms: `messages`, or `prompt` and `completion`, both strings or both lists of messages.

    Null columns and message keys are removed. A completion of messages starts with one that is trained on; messages
    before that move to the prompt. Raises EchoDataError for any other form, and for a row without a prompt or answer.
    """
    row = {name: value for name, value in row.items() if value is not None}  # Arrow fills gaps with None
    if "tools" in row:
        row["tools"] = _tools(row["tools"], where)
    _check_template_kwargs(row.get("chat_template_kwargs", {}), where)
    if "messages" in row and "prompt" not in row:
        row["messages"] = checked_messages(row["messages"], "messages", where)
        _require_answer(row["messages"], "assistant message", where)
        return {name: value for name, value in row.items() if name != "completion"}
    if "text" in row and "completion" not in row:
        raise EchoDataError(
            f"{where} has only text: nothing marks where the prompt ends and the answer begins, and the echo is read "
            "at this boundary. Split it into prompt and completion."
        )
    if missing := [column for column in ("prompt", "completion") if column not in row]:
        others = [name for name in row if name not in (ROW, "prompt", "completion")]
        # with as many other columns as are missing, this is what to type
        names = others if len(others) == len(missing) else ["question", "answer"][-len(missing) :]
        mapping = ", ".join(f"{column}: {name}" for column, name in zip(missing, names, strict=True))
        present = ", ".join(name for name in row if name != ROW) or "none"
        raise EchoDataError(
            f"{where} has no {missing[0]}. Present: {present}. Add it, or name the column that holds it, as in "
            f"data.columns: {{{mapping}}} (--set 'data.columns={{{mapping}}}')."
        )
    row.pop("messages", None)
    kinds = {type(row["prompt"]), type(row["completion"])}
    if kinds == {list}:
        prompt, completion = (checked_messages(row[column], column, where) for column in ("prompt", "completion"))
        _require_answer(completion, "assistant message in its completion", where)
        start = next(i for i, message in enumerate(completion) if is_learned(message))
        return row | {"prompt": prompt + completion[:start], "completion": completion[start:]}
    if kinds != {str}:
        raise EchoDataError(
            f"{where}: prompt is a {_kind(row['prompt'])} and completion a {_kind(row['completion'])}. "
            "Write both as strings, or both as lists of messages."
        )
    for column in ("prompt", "completion"):
        _check_text(row[column], column, where)
    if not row["prompt"]:
        raise EchoDataError(f"{where} has an empty prompt. Write one, or remove the row.")
    if not row["completion"].strip():
        raise EchoDataError(f"{where} has an empty answer. Write one, or remove the row.")
    return row


def checked_messages(messages: Any, column: str, where: str) -> list[dict[str, Any]]:
    """The messages without their null keys. Raises EchoDataError unless it is a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise EchoDataError(
            f"{where}: {column} is not a list of messages. "
            'Write it as [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        )
    return [_message(message, f"{where}: {column}[{i}]") for i, message in enumerate(messages)]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the message is trained on: the assistant's are, except those with `weight: 0`."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content: one, several parts, or none (with tool calls)."""
    content = message.get("content")
    return [part["text"] for part in content] if isinstance(content, list) else [content] if content else []


def functions_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that a message calls: name and arguments of each tool call."""
    return [call.get("function", call) for call in message.get("tool_calls", [])]


def other_texts(item: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Keys, besides the known ones, that hold text."""
    return [key for key, value in item.items() if key not in known and holds_text(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise EchoDataError(f'{where} is not a message with a role. Write it as {{"role": "user", "content": ...}}.')
    # null keys mean nothing; templates test for the key tool_calls, so an empty list must go too
    message = {key: value for key, value in message.items() if value is not None and (key, value) != ("tool_calls", [])}
    for key in _RIVALS:
        if key in message:
            raise EchoDataError(
                f"{where} has {key} = {message[key]!r}, which has no effect. "
                'Give turns that should not be trained on "weight": 0, and remove this key.'
            )
    _check_weight(message, where)
    _check_content(message, where)
    for key in REASONING:
        if isinstance(message.get(key), str):
            _check_text(message[key], key, where)
    _check_tool_calls(message, where)
    return message


def _check_weight(message: Mapping[str, Any], where: str) -> None:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise EchoDataError(f"{where} has weight = {weight!r}. Write 0 (not trained on) or 1, or leave it out.")
    if "weight" in message and weight == 1 and message["role"] != "assistant":
        raise EchoDataError(
            f"{where} has weight = 1, but only the assistant's turns are trained on and this turn is the "
            f"{message['role']}'s. Remove the weight."
        )


def _check_content(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise EchoDataError(f"{where} has no content. Write it as a string, or remove the message.")
    elif isinstance(content, str):
        _check_text(content, "content", where)
    elif isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
                raise EchoDataError(
                    f"{where}: part {i} of its content has the type {kind!r}. Only text can be trained on: "
                    'write it as {"type": "text", "text": ...}.'
                )
            _check_text(part.get("text"), f"part {i} of its content", where)
    else:
        raise EchoDataError(
            f"{where}: content is a {_kind(content)}. Write it as a string, or as a list of text parts."
        )


def _check_tool_calls(message: Mapping[str, Any], where: str) -> None:
    calls = message.get("tool_calls", [])
    is_list = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    functions = functions_of(message) if is_list else []
    if not is_list or not all(
        isinstance(function, Mapping) and isinstance(function.get("name"), str) for function in functions
    ):
        raise EchoDataError(
            f"{where}: tool_calls is not a list of calls. "
            'Write it as [{"type": "function", "function": {"name": ..., "arguments": {...}}}].'
        )
    for function in functions:
        if isinstance(function.get("arguments"), str):
            _parsed(function["arguments"], f"{where}: the arguments of {function['name']}")


def _tools(tools: Any, where: str) -> Any:
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: tools") if tools.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise EchoDataError(f"{where}: tools is a {_kind(tools)}. Write it as a list of objects, or as a JSON string.")
    return tools or None  # templates test for tools, not for how many there are


def _check_template_kwargs(given: Any, where: str) -> None:
    if not isinstance(given, Mapping):
        raise EchoDataError(f"{where}: chat_template_kwargs is a {_kind(given)}. Write it as an object.")
    if own := sorted(_arguments_of_apply_chat_template().intersection(given)) if given else []:
        raise EchoDataError(
            f"{where}: chat_template_kwargs has {', '.join(own)}: arguments of apply_chat_template, not variables of a "
            "chat template. They would change how the row is tokenised and labelled. Remove them."
        )


@cache
def _arguments_of_apply_chat_template() -> frozenset[str]:
    """Its parameters, except those that it only passes on to the template."""
    from transformers import PreTrainedTokenizerBase

    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*names, "messages"} - {"self", "kwargs", "documents"})


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EchoDataError(f"{what} is a string that is not JSON: {error}. Correct it.") from error


def _require_answer(messages: list[dict[str, Any]], what: str, where: str) -> None:
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        raise EchoDataError(f"{where} has no {what}. Write one, or remove the row.")
    learned = [turn for turn in turns if is_learned(turn)]
    if not learned:
        raise EchoDataError(
            f"{where} has nothing to train on: every {what} has weight 0. Give one weight 1, or remove the row."
        )
    if not any(any(text.strip() for text in texts_of(turn)) or turn.get("tool_calls") for turn in learned):
        raise EchoDataError(f"{where} has an empty answer. Write one, or remove the row.")


def _check_text(text: Any, name: str, where: str) -> None:
    if not isinstance(text, str):
        raise EchoDataError(f"{where}: {name} is a {_kind(text)}. Write it as a string.")
    check_unicode(text, name, where)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
