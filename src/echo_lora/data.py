"""From rows to token ids and labels, with every check before the first step.

A row is one of TRL's forms: `prompt` and `completion` as strings, the same two as lists of messages, or a
conversation in `messages`. The ids and labels are those that TRL's SFTTrainer makes of it. What the echo
adds is a demand: each row has a **boundary**, the last token before its first answer token, and keeps its
whole answer. A row that can't is an error that names it, never a silent loss. What a row holds and is not trained on,
because the chat template leaves it out or its turn is not the assistant's, is a warning that names it.

`row` is the index of a row in its source, from 0; a JSON Lines file has it on line `row + 1`.
"""

from __future__ import annotations

import atexit
import json
import logging
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from echo_lora.errors import EchoDataError
from echo_lora.forms import (
    CALL_KEYS,
    MESSAGE_KEYS,
    PART_KEYS,
    REASONING,
    check_forms,
    checked_row,
    functions_of,
    is_learned,
    other_texts,
    row_number,
    texts_of,
)
from echo_lora.sources import ROW, where_is

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
ANSWER = "completion_mask"  # column that is 1 at answer tokens, where labels cover prompt tokens too
Overlength = Literal["error", "drop", "truncate_prompt"]
Segment = tuple[str, Literal["prompt", "boundary", "answer", "ignored"]]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids and labels (-100 where nothing is learned) of one row, both of length T."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    merged_tokens: int = 0  # prompt tokens that differ once the answer follows; TRL leaves them out
    untrained: tuple[str, ...] = ()  # what the row holds beside its prompt and is not trained on

    @property
    def answer_start(self) -> int:
        """Column of the first answer token; T if there is none."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


# --------------------------------------------------------------------------------------------- tokenising


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = False,
    where: str | None = None,
    assistant_only: bool = False,
) -> TokenizedRow:
    """Ids and labels of `row`, as TRL's SFTTrainer makes them where that trains on the assistant's turns alone.

    chat: put a plain prompt and completion into the chat template, as a user's and an assistant's message.
    assistant_only: of a completion of messages, too, train on what the template marks as the assistant's.
    where: how errors name the row. Raises EchoDataError for a row without a prompt or without an answer.
    """
    number = row_number(row, 0)
    where = where or f"row {number}"
    row = checked_row(row, where)
    if "messages" in row:
        return _tokenize_marked(row, [], row["messages"], tokenizer, where, number)
    row = _as_chat(row) if chat else row
    if not isinstance(row["prompt"], str):
        prompt, completion = row["prompt"], row["completion"]
        if assistant_only or not all(map(is_learned, completion)):
            return _tokenize_marked(row, prompt, completion, tokenizer, where, number)
        template = _Template(row, tokenizer, where)
        messages, left_out = template.fit(prompt + completion, len(prompt))
        prompt_ids = template.tokenize(messages[: len(prompt)], add_generation_prompt=True)
        ids = template.tokenize(messages)
    else:
        left_out = ()
        if tokenizer.eos_token is None:
            raise EchoDataError(
                f"{where} can't be ended: {tokenizer.name_or_path} has no end-of-sequence token. "
                "Set tokenizer.eos_token."
            )
        text = row["prompt"] + row["completion"].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        prompt_ids = tokenizer(text=row["prompt"])["input_ids"]
        ids = tokenizer(text=text)["input_ids"]
    start = _common_prefix(prompt_ids, ids)
    labels = [IGNORED] * start + list(ids[start:])
    return TokenizedRow(list(ids), labels, number, len(prompt_ids) - start, left_out)


def _tokenize_marked(
    row: Mapping[str, Any],
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    number: int,
) -> TokenizedRow:
    """A row of several turns, of which those are learned that the template marks as the assistant's."""
    template = _Template(row, tokenizer, where, has_marks=True)
    messages, left_out = template.fit(prompt + completion, len(prompt))
    ids, mask = template.tokenize_marked(messages)
    start = merged = 0
    if prompt:
        prompt_ids = template.tokenize(messages[: len(prompt)], add_generation_prompt=True)
        start = _common_prefix(prompt_ids, ids)
        merged = len(prompt_ids) - start
    turns = [message for message in prompt + completion if message["role"] == "assistant"]
    if not all(map(is_learned, turns)):
        mask = _without_weight(mask, [is_learned(turn) for turn in turns], where)
    labels = [
        token if marked and column >= start else IGNORED
        for column, (token, marked) in enumerate(zip(ids, mask, strict=True))
    ]
    if labels.count(IGNORED) == len(labels):
        raise EchoDataError(
            f"{where} keeps no answer token: the chat template of {tokenizer.name_or_path} marks "
            "nothing as the assistant's. Put what it says between {% generation %} and {% endgeneration %} in the "
            "template, or give the row as prompt and completion."
        )
    foreign = {f"turns of the {m['role']} in its completion" for m in completion if m["role"] != "assistant"}
    return TokenizedRow(ids, labels, number, merged, left_out + tuple(sorted(foreign)) if prompt else left_out)


def _without_weight(mask: list[int], learned: list[bool], where: str) -> list[int]:
    """The mask without the turns of weight 0. Each turn of the assistant is one run of marked tokens."""
    runs = [column for column, marked in enumerate(mask) if marked and (column == 0 or not mask[column - 1])]
    if len(runs) != len(learned):
        raise EchoDataError(
            f"{where} has a turn with weight 0, but the chat template marks {len(runs)} places as the assistant's, "
            f"who has {len(learned)} turns: it is not known which tokens are that turn's. Give the row as prompt and "
            "completion, with such turns in the prompt."
        )
    turn = -1
    kept = []
    for column, marked in enumerate(mask):
        turn += bool(marked) and (column == 0 or not mask[column - 1])
        kept.append(int(bool(marked) and learned[turn]))
    return kept


def render_prompt(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool = False, where: str | None = None
) -> str:
    """The prompt as text, special tokens included, for generation and scoring.

    Tokenised with `add_special_tokens=False` it gives the ids before the row's first answer token. A
    conversation is rendered up to the first message that is learned. Without a completion in the row, the prompt
    is rendered as it stands. Raises EchoDataError if no text gives these ids.
    """
    where = where or f"row {row_number(row, 0)}"
    if row.get("messages") is None and row.get("completion") is None:
        is_chat = isinstance(row.get("prompt"), list)
        completion = [{"role": "assistant", "content": "?"}] if is_chat else "?"
        return _prompt_text(checked_row({**row, "completion": completion}, where), tokenizer, chat, where)
    tokenized = tokenize_row(row, tokenizer, chat, where)
    ids = tokenized.input_ids[: tokenized.answer_start]
    text = _prompt_text(checked_row(row, where), tokenizer, chat, where)
    for candidate in (text, tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
        if tokenizer(candidate, add_special_tokens=False)["input_ids"] == ids:
            return candidate
    raise EchoDataError(
        f"{where}: no text gives its prompt's token ids again, with the tokenizer {tokenizer.name_or_path}. "
        "End the prompt on a token boundary, for example without a blank at its end."
    )


def _prompt_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, where: str) -> str:
    row = _as_chat(row) if chat else row
    if "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if is_learned(message))
        messages = row["messages"][:first]
    elif isinstance(row["prompt"], str):
        with_special, plain = (
            tokenizer(row["prompt"], add_special_tokens=special)["input_ids"] for special in (True, False)
        )
        added = with_special[: len(with_special) - len(plain)]  # a beginning-of-sequence token, if any
        return "".join(tokenizer.convert_ids_to_tokens(added)) + row["prompt"]
    else:
        messages = row["prompt"]
    template = _Template(row, tokenizer, where)
    return template.render(template.fit(messages, len(messages))[0], add_generation_prompt=True)


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), str):
        return row
    return row | {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


# ---------------------------------------------------------------------------------------- the chat template


class _Template:
    """The tokenizer's chat template for the messages of one row. Its methods raise EchoDataError."""

    def __init__(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, has_marks: bool = False
    ) -> None:
        if tokenizer.chat_template is None:
            raise EchoDataError(
                f"{where} needs a chat template, and {tokenizer.name_or_path} has none. "
                "Give prompt and completion as strings and leave chat off, or name a chat model."
            )
        self.tokenizer, self.where, self.tools = tokenizer, where, row.get("tools")
        self.variables = row.get("chat_template_kwargs", {})
        self.options: dict[str, Any] = {"tools": self.tools, **self.variables}
        if has_marks:
            try:
                template = _training_template(tokenizer, str(tokenizer.chat_template))
            except ValueError as error:
                raise self._error(error) from error
            self.options["chat_template"] = template

    def fit(self, messages: list[dict[str, Any]], prompt: int) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """The messages in the form in which the template shows most of what they hold, and what it leaves out.

        prompt: the number of messages that come before the answer; templates rightly leave reasoning out of them.
        """
        best: tuple[list[dict[str, Any]], tuple[str, ...]] | None = None
        failure: EchoDataError | None = None
        for form in _written(messages):
            try:
                left_out = self._left_out(form, prompt)
            except EchoDataError as error:
                failure = failure or error
                continue
            if best is None or len(left_out) < len(best[1]):
                best = form, left_out
            if not left_out:
                break
        if best is None:
            assert failure is not None
            raise failure
        contents = (message["content"] for message in messages if isinstance(message.get("content"), list))
        keys = sorted({key for content in contents for part in content for key in other_texts(part, PART_KEYS)})
        return best[0], best[1] + tuple(f"text in the key {key!r} of parts of content" for key in keys)

    def _left_out(self, messages: list[dict[str, Any]], prompt: int) -> tuple[str, ...]:
        """What the row holds and the template does not write."""
        text = self.render(messages)
        mark = _Marker()
        marked = [
            mark.message(message, place < prompt and message["role"] == "assistant")
            for place, message in enumerate(messages)
        ]
        tools = self.tools and [mark.tool(tool) for tool in self.tools]
        try:
            shown = self.render(marked, tools=tools)
        except EchoDataError:  # a template that takes the row's own values only: they are looked for instead
            shown = "".join(word for _, _, word in mark.marks)
        found = {what for what, value, word in mark.marks if word not in shown or not _shows(text, value)}
        if _is_written_twice(messages, text):
            found.add("tool calls")
        if self.tools and not any(what == "tools" for what, _, _ in mark.marks):  # tools without names
            found |= {"tools"} if self.render(messages, tools=None) == text else set()
        found |= {f"text in the key {key!r} of messages" for key in self._unused_keys(messages, text)}
        if self.variables:
            source = self.tokenizer.get_chat_template(self.options.get("chat_template"), self.tools)
            found |= {f"{name!r} in chat_template_kwargs" for name in self.variables if name not in _names_in(source)}
        if "tools" in found:
            found -= {"parameters of tools", "descriptions of tools"}
        return tuple(f"{what} that the chat template leaves out" for what in sorted(found))

    def _unused_keys(self, messages: list[dict[str, Any]], text: str) -> set[str]:
        """Keys of messages without which the template writes the same."""
        called = [function["name"] for message in messages for function in functions_of(message)]
        keys = {
            (message["role"], key)
            for message in messages
            for key in other_texts(message, MESSAGE_KEYS)
            if not (key == "name" and message["role"] == "tool" and message[key] in called)  # said by the call
        }
        unused = set()
        for role, key in keys:
            without = [
                {name: value for name, value in message.items() if (message["role"], name) != (role, key)}
                for message in messages
            ]
            try:
                unused |= {key} if self.render(without) == text else set()
            except EchoDataError:  # the template needs it
                continue
        return unused

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self._apply(messages, tokenize=False, **options)

    def tokenize(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return list(self._apply(messages, return_dict=True, **options)["input_ids"])

    def tokenize_marked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Ids, and 1 where the template marks what the assistant says."""
        rendered = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), list(rendered["assistant_masks"])

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, **self.options | options)
        # a template's own errors too; a loop without end is an overflow to jinja
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> EchoDataError:
        return EchoDataError(
            f"{self.where} can't go through the chat template of {self.tokenizer.name_or_path}: {error}\n"
            "Correct the roles of its messages, or set another chat template."
        )


def _written(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages in every form in which templates expect them, the usual one first.

    Content of several texts as one text, or as parts; content that is not there, or that is empty; arguments of tool
    calls as they are, or as object for JSON text and the other way about.
    """
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    has = {
        "parts": any(isinstance(message.get("content"), list) for message in messages),
        "empty": any("content" not in message for message in messages),
        "arguments": any(function.get("arguments") for message in messages for function in functions_of(message)),
    }
    for picked in product(*((False, True) if present else (False,) for present in has.values())):
        parts, empty, arguments = picked
        form = []
        for message in messages:
            if not parts and isinstance(message.get("content"), list):
                message = message | {"content": "".join(texts_of(message))}
            if empty and "content" not in message:
                message = message | {"content": ""}
            if arguments and "tool_calls" in message:
                message = message | {"tool_calls": [_other_arguments(call) for call in message["tool_calls"]]}
            form.append(message)
        yield form


def _other_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _other_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return call | {"arguments": json.loads(arguments)}
    return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}


class _Mark(NamedTuple):
    """A word in the middle of a value: a text with the word shows the value."""

    what: str  # what the value belongs to
    value: str
    word: str


class _Marker:
    """Puts a word of its own into each value of a row: whether a value itself is in a text may be chance."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []

    def __call__(self, what: str, value: Any) -> Any:
        """The value with a mark in each of its ends that holds something."""
        if isinstance(value, Mapping):
            return {key: self(what, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(what, item) for item in value]
        text = value if isinstance(value, str) else json.dumps(value)
        if not text.strip():  # templates ask whether there is something
            return value
        word = f"EchoLoraMark{len(self.marks)}x"
        # how a number is written is the template's choice: only a text can be looked for itself
        self.marks.append(_Mark(what, value if isinstance(value, str) else "", word))
        middle = len(text) // 2  # templates may ask how a text begins and ends
        return text[:middle] + word + text[middle:]

    def message(self, message: dict[str, Any], is_context: bool) -> dict[str, Any]:
        """is_context: it is a turn of the assistant in the prompt, whose reasoning is rightly left out."""
        marked, thoughts = dict(message), {}

        def thought(text: str) -> str:  # it may be given twice, of which templates show one
            if text.strip() not in thoughts:
                thoughts[text.strip()] = self("reasoning", text)
            return thoughts[text.strip()]

        def text_of(content: str) -> str:
            before, tag, answer = content.rpartition("</think>")
            if tag and not is_context:
                said, opening, thoughts_in = before.rpartition("<think>")
                before = self("content", said) + opening + thought(thoughts_in)
            return before + tag + self("content", answer)

        if isinstance(message.get("content"), list):
            marked["content"] = [part | {"text": text_of(part["text"])} for part in message["content"]]
        elif message.get("content"):
            marked["content"] = text_of(message["content"])
        for key in REASONING:
            if key in message and not is_context:
                is_text = isinstance(message[key], str)
                marked[key] = thought(message[key]) if is_text else self("reasoning", message[key])
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return marked

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        call = dict(call)
        for key in other_texts(call, CALL_KEYS):
            call[key] = self(f"text in the key {key!r} of tool calls", call[key])
        if "function" in call:
            return call | {"function": self._call(call["function"])}
        call["name"] = self("tool calls", call["name"])
        if isinstance(arguments := call.get("arguments"), str):
            arguments = json.dumps(self("tool calls", json.loads(arguments)), ensure_ascii=False)
        elif arguments is not None:
            arguments = self("tool calls", arguments)
        return call | ({} if arguments is None else {"arguments": arguments})

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Marks name and descriptions, and adds a marked parameter."""
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self.tool(tool["function"])}
        marked = self._described(tool)
        if isinstance(tool.get("name"), str):
            marked["name"] = self("tools", tool["name"])
        schema = marked.get("parameters")
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) and schema["properties"]:
            name = self("parameters of tools", next(iter(schema["properties"])))
            schema["properties"] = schema["properties"] | {name: {"type": "string"}}
        return marked

    def _described(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._described(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        return {
            key: self("descriptions of tools", item)
            if key == "description" and isinstance(item, str)
            else self._described(item)
            for key, item in value.items()
        }


def _is_written_twice(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether arguments that are JSON text are written as JSON once more."""
    arguments = [function.get("arguments") for message in messages for function in functions_of(message)]
    return any(isinstance(a, str) and '"' in a and json.dumps(a)[1:-1] in text for a in arguments)


def _shows(text: str, value: str) -> bool:
    """Whether each line of the value is in the text, as it is or as JSON writes it."""
    return value.strip() in text or all(
        line in text or json.dumps(line)[1:-1] in text or json.dumps(line, ensure_ascii=False)[1:-1] in text
        for line in map(str.strip, value.replace("<think>", "\n").splitlines())
    )


@lru_cache(maxsize=4)
def _training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """TRL's variant of a template that doesn't mark what the assistant says; None if it does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(template) else get_training_chat_template(tokenizer)


@lru_cache(maxsize=4)
def _names_in(template: str) -> frozenset[str]:
    """The variables, attributes and functions that a template names."""
    from jinja2 import Environment

    return frozenset(value for _, kind, value in Environment().lex(template) if kind == "name")


def _common_prefix(ids: list[int], others: list[int]) -> int:
    shorter = min(len(ids), len(others))
    return next((i for i in range(shorter) if ids[i] != others[i]), shorter)


# ----------------------------------------------------------------------------------------------- checking


class Lengths(NamedTuple):
    """The spread of a number of tokens."""

    shortest: int
    median: float
    longest: int

    def __str__(self) -> str:
        return f"{self.shortest} to {self.longest}, median {self.median:g}"


@dataclass(frozen=True)
class RowCounts:
    """What the checks found. Lengths are those of the rows that were kept, after shortening."""

    kept: int
    dropped_rows: list[int]  # numbers of the rows that `max_length` excludes
    answerless: int  # of these, the rows whose first `max_length` tokens hold no answer token
    truncated: int
    without_end_token: int
    merged_boundary: int
    prompt_tokens: Lengths
    answer_tokens: Lengths
    answer_tokens_total: int
    tokens_total: int
    untrained: dict[str, list[int]]  # what rows hold and are not trained on: the rows

    @property
    def dropped(self) -> int:
        return len(self.dropped_rows)


class RowView(Sequence[TokenizedRow]):
    """The rows of a tokenised dataset, read from it one by one; labels are those of answers."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return _tokenized(self._dataset[place], place)

    def __iter__(self) -> Iterator[TokenizedRow]:
        return (_tokenized(example, i) for i, example in enumerate(self._dataset))


@dataclass(frozen=True)
class PreparedData:
    """Rows that can be trained on."""

    dataset: Dataset  # input_ids, labels and ROW; with train_on_prompt also ANSWER. On disk where it is large
    counts: RowCounts
    source: str
    train_on_prompt: bool = False

    @property
    def rows(self) -> RowView:
        return RowView(self.dataset)

    def summary(self, named: int | None = None) -> list[str]:
        """The counts as lines of plain text. named: how many dropped rows to name at most; None: each one."""
        c = self.counts
        lines = [
            f"{self.source}: {c.kept} rows kept, {c.dropped} dropped, {c.truncated} with a shortened prompt",
            f"prompt tokens: {c.prompt_tokens}",
            f"answer tokens: {c.answer_tokens}, {c.answer_tokens_total} in all",
        ]
        if self.train_on_prompt:
            lines.append(f"prompts are trained on too: {c.tokens_total - c.kept} tokens with a loss in all")
        if c.dropped_rows:
            rows, rest = c.dropped_rows[:named], c.dropped_rows[named:] if named is not None else []
            lines.append(
                f"dropped as too long ({c.answerless} would keep no answer token): rows {_ranges(rows)}"
                + (f" and {len(rest)} more" if rest else "")
            )
        if c.without_end_token:
            lines.append(f"{c.without_end_token} answers end without an end-of-sequence or end-of-turn token")
        if c.merged_boundary:
            lines.append(f"{c.merged_boundary} prompts share their last token with their answer")
        lines += [f"{len(rows)} rows have {what}, not trained on" for what, rows in c.untrained.items()]
        return lines


def prepare_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    on_overlength: Overlength = "error",
    chat: bool = False,
    train_on_prompt: bool = False,
    ignore_columns: Collection[str] = (),
    source: str = "train.jsonl",
) -> PreparedData:
    """Tokenise `rows` and check each one: a boundary, a whole answer within `max_length`, an end token.

    The form of all rows is checked before the first is tokenised: rows are gone through twice. A row that is longer is
    an error, is dropped, or loses the oldest tokens of its prompt (all but one at most, and never a
    beginning-of-sequence token that the tokenizer puts first); an answer is never cut. train_on_prompt: the dataset
    made of the rows supervises every token that another one predicts, and its column completion_mask is 1 at answers.
    ignore_columns: columns that may hold something without being used. Raises EchoDataError, which names the first such
    row of `source`; a missing end token, and what a row holds and is not trained on, are warnings.
    """
    if isinstance(rows, Iterator):
        rows = list(rows)
    check_forms(rows, source, ignore_columns, chat=chat)
    check = _Check(max_length, on_overlength, end_token_ids(tokenizer), _added_bos(tokenizer), source)
    writer = _Writer(train_on_prompt)
    for index, row in enumerate(rows):
        number = row_number(row, index)
        tokenized = tokenize_row({**row, ROW: number}, tokenizer, chat, where=where_is(source, number))
        if (checked := check(tokenized)) is not None:
            writer.add(checked)
    counts = check.finish()
    return PreparedData(writer.finish(), counts, source, train_on_prompt)


class _Writer:
    """Collects rows as Arrow columns: in memory, and in a file as soon as they take more than SPILL bytes there."""

    SPILL = 64 << 20
    BATCH = 500  # rows that wait as Python's lists

    def __init__(self, train_on_prompt: bool) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        tokens = pa.list_(pa.int32())
        names = {"input_ids": tokens, "labels": tokens, ROW: pa.int64()}
        self.schema = pa.schema(names | ({ANSWER: pa.list_(pa.int8())} if train_on_prompt else {}))
        self.waiting: list[TokenizedRow] = []
        self.batches: list[Any] = []
        self.path: Path | None = None
        self.file: Any = None

    def add(self, row: TokenizedRow) -> None:
        self.waiting.append(row)
        if len(self.waiting) == self.BATCH:
            self._flush()

    def finish(self) -> Dataset:
        import pyarrow as pa
        from datasets import Dataset

        self._flush()
        if self.file is None:
            return Dataset(pa.Table.from_batches(self.batches, self.schema))
        self.file.close()
        return Dataset.from_file(str(self.path))

    def _flush(self) -> None:
        import pyarrow as pa

        rows, self.waiting = self.waiting, []
        columns: dict[str, Any] = {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            ROW: [row.row for row in rows],
        }
        if ANSWER in self.schema.names:
            columns[ANSWER] = [[int(label != IGNORED) for label in row.labels] for row in rows]
            columns["labels"] = [[IGNORED, *row.input_ids[1:]] for row in rows]
        self.batches.append(pa.record_batch(columns, schema=self.schema))
        if self.file is None and sum(batch.nbytes for batch in self.batches) > self.SPILL:
            self.path = Path(tempfile.mkstemp(".arrow", dir=_scratch())[1])
            self.file = pa.ipc.new_stream(str(self.path), self.schema)
        if self.file is not None:
            for batch in self.batches:
                self.file.write_batch(batch)
            self.batches = []


@cache
def _scratch() -> str:
    """A folder for the files of this process; it is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="echo-lora-rows-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name


def refuse_unfit_tokens(
    dataset: Dataset, source: str, *, vocabulary: int, positions: int | None, has_table: Callable[[], bool]
) -> None:
    """Tokens that the model has no embedding for, and rows longer than it has positions for.

    vocabulary: rows of the model's embedding. positions: the longest row that the model was made for, if it says so.
    has_table: whether positions are looked up in a table, beyond whose end there is nothing; asked only where it
    matters. Raises EchoDataError, which names the row. Where positions are computed a longer row is a warning.
    """
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kind = dataset.features.arrow_schema.field("input_ids").type
    if not (pa.types.is_nested(kind) and pa.types.is_integer(kind.value_type)):
        return  # what a collator of the user's own makes tokens of
    columns = [name for name in ("input_ids", ROW) if name in dataset.column_names]
    rows: Any = dataset.select_columns(columns)
    start, is_warned = 0, positions is None
    for batch in rows.with_format("arrow").iter(1000):  # whole columns at a time: rows as Python's lists are slow
        ids = batch["input_ids"]
        span = pc.min_max(pc.list_flatten(ids)).as_py()
        longest = pc.max(pc.list_value_length(ids)).as_py() or 0
        is_unknown = span["min"] is not None and not 0 <= span["min"] <= span["max"] < vocabulary
        is_long = positions is not None and longest > positions and not is_warned
        for place, example in enumerate(batch.to_pylist() if is_unknown or is_long else []):
            where, length = where_is(source, row_number(example, start + place)), len(example["input_ids"])
            for token in example["input_ids"]:
                if not 0 <= token < vocabulary:
                    raise EchoDataError(
                        f"{where} has the token id {token}, but the model's embedding has rows for 0 to "
                        f"{vocabulary - 1}. Use the model's own tokenizer, or resize the embedding first."
                    )
            if is_warned or positions is None or length <= positions:
                continue
            if has_table():
                raise EchoDataError(
                    f"{where} has {length} tokens, but the model has embeddings for {positions} positions. "
                    f"Set max_length to at most {positions}, and on_overlength, or shorten the row."
                )
            _logger.warning("%s has %d tokens, more than the %d that the model was made for.", where, length, positions)
            is_warned = True
        start += len(batch)


def check_tokenized_dataset(
    dataset: Dataset,
    *,
    max_length: int | None,
    on_overlength: Overlength,
    end_token_ids: set[int],
    source: str,
    bos_token_id: int | None = None,
) -> tuple[Dataset, RowCounts]:
    """The checks of `prepare_rows` on a dataset that has `input_ids` and `labels`, and maybe the column ROW.

    A column `completion_mask` says which labels are answer tokens. Other columns are kept. bos_token_id: the token that
    stays first when a prompt is shortened.
    """
    check = _Check(max_length, on_overlength, end_token_ids, bos_token_id, source)
    columns = [name for name in ("input_ids", "labels", ANSWER, ROW) if name in dataset.column_names]
    kept = [
        index
        for index, example in enumerate(dataset.select_columns(columns).with_format(None))
        if check(_tokenized(example, index)) is not None
    ]
    counts = check.finish()
    if counts.dropped:
        dataset = dataset.select(kept)
    if counts.truncated:
        options = {"max_length": max_length, "bos": bos_token_id}
        dataset = dataset.map(_shorten_example, fn_kwargs=options, desc="Shortening prompts")
    return dataset, counts


@dataclass
class _Check:
    """One pass over the rows of one source."""

    max_length: int | None
    on_overlength: Overlength
    end_ids: set[int]
    bos: int | None
    source: str
    dropped: list[int] = field(default_factory=list)
    answerless: int = 0
    truncated: int = 0
    prompt_lengths: array[int] = field(default_factory=lambda: array("q"))
    answer_lengths: array[int] = field(default_factory=lambda: array("q"))
    tokens: int = 0
    endless: list[int] = field(default_factory=list)  # rows whose answer has no end token
    merged: list[int] = field(default_factory=list)  # rows whose prompt ends within a token of the answer
    untrained: dict[str, list[int]] = field(default_factory=dict)
    overlong: TokenizedRow | None = None  # the first one
    overlong_count: int = 0
    longest: int = 0

    def __call__(self, row: TokenizedRow) -> TokenizedRow | None:
        """The row to train on; None for one that is dropped or will be reported by `finish`."""
        where, start, length = where_is(self.source, row.row), row.answer_start, len(row.labels)
        if start == length:
            raise EchoDataError(
                f"{where} has no answer token: all of its {length} labels are {IGNORED}. "
                "Give it an answer, or remove it."
            )
        if start == 0:
            if row.merged_tokens:
                raise EchoDataError(
                    f"{where} has no boundary: the tokenizer joins the end of the prompt and the start of the answer "
                    "into one token, so that no token is the prompt's alone. Put a space or a line break between the "
                    "two, or use the chat form."
                )
            raise EchoDataError(
                f"{where} has no boundary: its answer starts at the first token. Put a prompt before it; if there is "
                "one, its end and the start of the answer are one token: put a space or a line break between the two."
            )
        if self.max_length is not None and length > self.max_length:
            if self.on_overlength == "drop":
                self.dropped.append(row.row)
                self.answerless += start >= self.max_length
                return None
            if self.on_overlength == "error" or length - start >= self.max_length:
                self.overlong = self.overlong or row
                self.overlong_count += 1
                self.longest = max(self.longest, length)
                return None
            row = _shorten(row, self.max_length, self.bos)
            self.truncated += 1
        answer = [label for label in row.labels if label != IGNORED]
        self.tokens += len(row.labels)
        self.prompt_lengths.append(row.answer_start)
        self.answer_lengths.append(len(answer))
        if self.end_ids.isdisjoint(answer[-2:]):  # a chat template may write a newline after its end of turn
            self.endless.append(row.row)
        if row.merged_tokens:
            self.merged.append(row.row)
        for what in row.untrained:
            self.untrained.setdefault(what, []).append(row.row)
        return row

    def finish(self) -> RowCounts:
        if self.overlong is not None:
            raise EchoDataError(self._overlength_message())
        if not self.answer_lengths:
            raise EchoDataError(
                f"{self.source}: no row is left: {len(self.dropped)} were dropped as longer than max_length = "
                f"{self.max_length}. Raise max_length, or give other rows."
            )
        for problem, rows in {
            "ends its answer without an end-of-sequence or end-of-turn token": self.endless,
            "shares the last token of its prompt with its answer: the boundary lies before it": self.merged,
            **{f"has {what}: not trained on": rows for what, rows in self.untrained.items()},
        }.items():
            if rows:
                _logger.warning("%s %s (%d such rows).", where_is(self.source, rows[0]), problem, len(rows))
        return RowCounts(
            kept=len(self.answer_lengths),
            dropped_rows=self.dropped,
            answerless=self.answerless,
            truncated=self.truncated,
            without_end_token=len(self.endless),
            merged_boundary=len(self.merged),
            prompt_tokens=_lengths(self.prompt_lengths),
            answer_tokens=_lengths(self.answer_lengths),
            answer_tokens_total=sum(self.answer_lengths),
            tokens_total=self.tokens,
            untrained=self.untrained,
        )

    def _overlength_message(self) -> str:
        row, limit = self.overlong, self.max_length
        assert row is not None
        assert limit is not None
        where, start, length = where_is(self.source, row.row), row.answer_start, len(row.labels)
        if self.on_overlength == "truncate_prompt":
            problem = f"can't be shortened to its answer: that has {length - start} tokens"
            remedy = 'set on_overlength to "drop"'
        else:
            keeps = "no answer token" if start >= limit else "only a part of its answer"
            problem = f"keeps {keeps}: the prompt has {start} tokens, the answer {length - start}"
            remedy = 'set on_overlength to "truncate_prompt" or "drop"'
        return (
            f"{where} {problem}, and max_length is {limit} ({self.overlong_count} such rows).\n"
            f"Raise max_length to {self.longest}, or {remedy}."
        )


def _shorten(row: TokenizedRow, max_length: int, bos: int | None) -> TokenizedRow:
    """Drop the oldest prompt tokens of a row whose answer leaves room for at least one of them."""
    keep = _kept_columns(row, max_length, bos)
    return replace(row, input_ids=keep(row.input_ids), labels=keep(row.labels))


def _kept_columns(row: TokenizedRow, max_length: int, bos: int | None) -> Callable[[list[int]], list[int]]:
    room = max_length - (len(row.labels) - row.answer_start)
    head = 1 if room > 1 and row.input_ids[0] == bos else 0
    cut = len(row.labels) - max_length + head
    return lambda values: values[:head] + values[cut:]


def _shorten_example(example: dict[str, Any], max_length: int, bos: int | None) -> dict[str, Any]:
    if len(example["labels"]) <= max_length:
        return example
    keep = _kept_columns(TokenizedRow(example["input_ids"], _answer_labels(example)), max_length, bos)
    names = [name for name in ("input_ids", "labels", ANSWER) if name in example]
    return example | {name: keep(example[name]) for name in names}


def _tokenized(example: dict[str, Any], index: int) -> TokenizedRow:
    return TokenizedRow(example["input_ids"], _answer_labels(example), row_number(example, index))


def _answer_labels(example: dict[str, Any]) -> list[int]:
    mask = example.get(ANSWER)
    if mask is None:
        return example["labels"]
    return [label if is_answer else IGNORED for label, is_answer in zip(example["labels"], mask, strict=True)]


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as `3, 7-9`."""
    ends = [i for i, number in enumerate(numbers) if numbers[i + 1 : i + 2] != [number + 1]]
    starts = [0, *(i + 1 for i in ends[:-1])]
    runs = [(numbers[start], numbers[end]) for start, end in zip(starts, ends, strict=True)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _lengths(lengths: Sequence[int]) -> Lengths:
    return Lengths(min(lengths), median(lengths), max(lengths))


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end-of-sequence token, and what the chat template writes after an assistant's message."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template is None:
        return ends
    answer = "the-answer-of-the-assistant"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = _Template({}, tokenizer, "An example").render(messages)
    after = tokenizer(text.partition(answer)[2], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ends | (special.intersection(after) - {tokenizer.bos_token_id})


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, where the tokenizer puts it before every text."""
    is_first = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer.bos_token_id if is_first else None


# ------------------------------------------------------------------------------------------------ preview


def preview_segments(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Text and class of each token; joined, the texts are the row.

    `boundary` is the last token before the first answer token, `ignored` one after it that has no label.
    A character made of several tokens is shown at the last of them.
    """
    start, shown = row.answer_start, ""
    segments: list[Segment] = []
    for i, label in enumerate(row.labels):
        text = tokenizer.decode(row.input_ids[: i + 1], clean_up_tokenization_spaces=False)
        is_whole = not text.endswith("\ufffd") or i + 1 == len(row.labels)
        piece, shown = (text[len(shown) :], text) if is_whole else ("", shown)
        if i < start:
            segments.append((piece, "boundary" if i == start - 1 else "prompt"))
        else:
            segments.append((piece, "answer" if label != IGNORED else "ignored"))
    return segments
