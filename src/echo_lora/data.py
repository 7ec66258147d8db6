"""From rows to token ids and labels, with every check before the first step.

A row is one of TRL's forms: `prompt` and `completion` as strings, the same two as lists of messages, or a
conversation in `messages`. The ids and labels are those that TRL's SFTTrainer makes of it. What the echo
adds is a demand: each row has a **boundary**, the last token before its first answer token, and keeps its
whole answer. A row that can't is an error that names it, never a silent loss.

`row` is the index of a row in its source, from 0; a JSON Lines file has it on line `row + 1`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from echo_lora.errors import EchoDataError
from echo_lora.sources import where_is

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
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

    @property
    def answer_start(self) -> int:
        """Column of the first answer token; T if there is none."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


# --------------------------------------------------------------------------------------------- tokenising


def tokenize_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool = False, where: str | None = None
) -> TokenizedRow:
    """Ids and labels of `row`, as TRL's SFTTrainer makes them.

    chat: put a plain prompt and completion into the chat template, as a user's and an assistant's message.
    where: how errors name the row. Raises EchoDataError for a row without a prompt or without an answer.
    """
    number = _number(row, 0)
    where = where or f"row {number}"
    row = _checked(row, where)
    if "messages" in row:
        rendered = _apply_template(
            row, row["messages"], tokenizer, where, trains=True, return_assistant_tokens_mask=True
        )
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        if 1 not in mask:
            raise EchoDataError(
                f"{where} keeps no answer token: the chat template of {tokenizer.name_or_path} marks "
                "nothing as the assistant's. Put what it says between {% generation %} and {% endgeneration %} in the "
                "template, or give the row as prompt and completion."
            )
        labels = [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]
        return TokenizedRow(list(ids), labels, number)

    row = _as_chat(row) if chat else row
    if isinstance(row["prompt"], str):
        if tokenizer.eos_token is None:
            raise EchoDataError(
                f"{where} can't be ended: {tokenizer.name_or_path} has no end-of-sequence token. "
                "Set tokenizer.eos_token."
            )
        completion = row["completion"].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        prompt_ids = tokenizer(text=row["prompt"])["input_ids"]
        ids = tokenizer(text=row["prompt"] + completion)["input_ids"]
    else:
        prompt = _apply_template(row, row["prompt"], tokenizer, where, add_generation_prompt=True)
        prompt_ids = prompt["input_ids"]
        ids = _apply_template(row, row["prompt"] + row["completion"], tokenizer, where)["input_ids"]
    start = _common_prefix(prompt_ids, ids)
    labels = [IGNORED] * start + list(ids[start:])
    return TokenizedRow(list(ids), labels, number, merged_tokens=len(prompt_ids) - start)


def render_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> str:
    """The prompt as text, special tokens included, for generation and scoring.

    Tokenised with `add_special_tokens=False` it gives the ids before the row's first answer token. A
    conversation is rendered up to its first assistant message. Without a completion in the row, the prompt
    is rendered as it stands. Raises EchoDataError if no text gives these ids.
    """
    where = f"row {_number(row, 0)}"
    if row.get("messages") is None and row.get("completion") is None:
        is_chat = isinstance(row.get("prompt"), list)
        completion = [{"role": "assistant", "content": "?"}] if is_chat else "?"
        return _prompt_text(_checked({**row, "completion": completion}, where), tokenizer, chat, where)
    tokenized = tokenize_row(row, tokenizer, chat)
    ids = tokenized.input_ids[: tokenized.answer_start]
    text = _prompt_text(_checked(row, where), tokenizer, chat, where)
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
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        messages = row["messages"][:first]
    elif isinstance(row["prompt"], str):
        with_special, plain = (
            tokenizer(row["prompt"], add_special_tokens=special)["input_ids"] for special in (True, False)
        )
        added = with_special[: len(with_special) - len(plain)]  # a beginning-of-sequence token, if any
        return "".join(tokenizer.convert_ids_to_tokens(added)) + row["prompt"]
    else:
        messages = row["prompt"]
    return _apply_template(row, messages, tokenizer, where, add_generation_prompt=True, tokenize=False)


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row without its empty columns, if it is of a known form with a prompt and an answer."""
    row = {name: value for name, value in row.items() if value is not None}  # Arrow fills gaps with None
    names = ", ".join(row) or "none"
    if "messages" in row and "prompt" not in row:
        _check_messages(row["messages"], "messages", where)
        turns = [message for message in row["messages"] if message["role"] == "assistant"]
        if not any(_has_text(turn) for turn in turns):
            raise EchoDataError(f"{where} has no assistant message with text. Write one, or remove the row.")
        return {name: value for name, value in row.items() if name != "completion"}
    if "text" in row and "completion" not in row:
        raise EchoDataError(
            f"{where} has only text: nothing says where the prompt ends and the answer begins, and the echo "
            "is read at this boundary. Give the two as prompt and completion."
        )
    for column in ("prompt", "completion"):
        if column not in row:
            raise EchoDataError(
                f"{where} has no {column}. Present: {names}. Add it, or say with columns which one it is."
            )
    row.pop("messages", None)  # as in TRL, prompt and completion come first
    kinds = {type(row["prompt"]), type(row["completion"])}
    if kinds == {list}:
        for column in ("prompt", "completion"):
            _check_messages(row[column], column, where)
        is_empty = not any(_has_text(message) for message in row["completion"])
    elif kinds == {str}:
        if not row["prompt"]:
            raise EchoDataError(f"{where} has an empty prompt. Write one, or remove the row.")
        is_empty = not row["completion"].strip()
    else:
        raise EchoDataError(
            f"{where}: prompt is a {type(row['prompt']).__name__} and completion a "
            f"{type(row['completion']).__name__}. Give both as strings, or both as lists of messages."
        )
    if is_empty:
        raise EchoDataError(f"{where} has an empty answer. Write one, or remove the row.")
    return row


def _check_messages(messages: Any, column: str, where: str) -> None:
    is_conversation = isinstance(messages, list) and messages
    if not is_conversation or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise EchoDataError(
            f"{where}: {column} is not a list of messages. "
            'Write it as [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        )


def _has_text(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    return bool(content.strip() if isinstance(content, str) else content or message.get("tool_calls"))


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), str):
        return row
    return row | {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def _apply_template(
    row: Mapping[str, Any],
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    trains: bool = False,
    tokenize: bool = True,
    **options: Any,
) -> Any:
    """The conversation through the chat template, which gets what TRL gives it."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise EchoDataError(
            f"{where} needs a chat template, and {tokenizer.name_or_path} has none. "
            "Give prompt and completion as strings and leave chat off, or name a chat model."
        )
    try:
        template = _training_template(tokenizer, str(tokenizer.chat_template)) if trains else None
        tools = row.get("tools")
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=tokenize,
            return_dict=tokenize,
            **options | row.get("chat_template_kwargs", {}),
        )
    except (TemplateError, ValueError) as error:
        raise EchoDataError(
            f"{where} can't go through the chat template of {tokenizer.name_or_path}: {error}\n"
            "Correct the roles of its messages, or set another chat template."
        ) from error


@lru_cache(maxsize=4)
def _training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """TRL's variant of a template that doesn't mark what the assistant says; None if it does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(template) else get_training_chat_template(tokenizer)


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

    @property
    def dropped(self) -> int:
        return len(self.dropped_rows)


@dataclass(frozen=True)
class PreparedData:
    """Rows that can be trained on."""

    rows: list[TokenizedRow]
    counts: RowCounts
    source: str
    train_on_prompt: bool = False

    def to_dataset(self) -> Dataset:
        """A datasets.Dataset with the columns input_ids, labels and row.

        With train_on_prompt the labels cover every token that another one predicts, and completion_mask is 1 at those
        of the answer.
        """
        from datasets import Dataset

        names = ("input_ids", "labels", "row")
        columns = {name: [getattr(row, name) for row in self.rows] for name in names}
        if self.train_on_prompt:
            columns["completion_mask"] = [[int(label != IGNORED) for label in row.labels] for row in self.rows]
            columns["labels"] = [[IGNORED, *row.input_ids[1:]] for row in self.rows]
        return Dataset.from_dict(columns)

    def summary(self, named: int | None = None) -> list[str]:
        """The counts as lines of plain text. named: how many dropped rows to name at most; None: each one."""
        c = self.counts
        lines = [
            f"{self.source}: {c.kept} rows kept, {c.dropped} dropped, {c.truncated} with a shortened prompt",
            f"prompt tokens: {c.prompt_tokens}",
            f"answer tokens: {c.answer_tokens}, {c.answer_tokens_total} in all",
        ]
        if self.train_on_prompt:
            tokens = sum(len(row.input_ids) - 1 for row in self.rows)
            lines.append(f"prompts are trained on too: {tokens} tokens with a loss in all")
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
        return lines


def prepare_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    on_overlength: Overlength = "error",
    chat: bool = False,
    train_on_prompt: bool = False,
    source: str = "train.jsonl",
) -> PreparedData:
    """Tokenise `rows` and check each one: a boundary, a whole answer within `max_length`, an end token.

    A row that is longer is an error, is dropped, or loses the oldest tokens of its prompt (all but one at
    most, and never a beginning-of-sequence token that the tokenizer puts first); an answer is never cut.
    train_on_prompt: the dataset made of the rows supervises prompt tokens too; the rows are the same.
    Raises EchoDataError, which names the first such row of `source`; a missing end token is a warning.
    """
    check = _Check(max_length, on_overlength, end_token_ids(tokenizer), _added_bos(tokenizer), source)
    kept = []
    for index, row in enumerate(rows):
        number = _number(row, index)
        tokenized = tokenize_row({**row, "row": number}, tokenizer, chat, where=where_is(source, number))
        if (checked := check(tokenized)) is not None:
            kept.append(checked)
    return PreparedData(kept, check.finish(), source, train_on_prompt)


def check_tokenized_dataset(
    dataset: Dataset,
    *,
    max_length: int | None,
    on_overlength: Overlength,
    end_token_ids: set[int],
    source: str,
    bos_token_id: int | None = None,
) -> tuple[Dataset, RowCounts]:
    """The checks of `prepare_rows` on a dataset that has `input_ids` and `labels`, and maybe `row`.

    A column `completion_mask` says which labels are answer tokens. Other columns are kept. bos_token_id: the token that
    stays first when a prompt is shortened.
    """
    check = _Check(max_length, on_overlength, end_token_ids, bos_token_id, source)
    columns = [name for name in ("input_ids", "labels", "completion_mask", "row") if name in dataset.column_names]
    kept = [
        index
        for index, example in enumerate(dataset.select_columns(columns).with_format(None))
        if check(TokenizedRow(example["input_ids"], _answer_labels(example), _number(example, index))) is not None
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
    prompt_lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    endless: list[int] = field(default_factory=list)  # rows whose answer has no end token
    merged: list[int] = field(default_factory=list)  # rows whose prompt ends within a token of the answer
    overlong: list[TokenizedRow] = field(default_factory=list)

    def __call__(self, row: TokenizedRow) -> TokenizedRow | None:
        """The row to train on; None for one that is dropped or will be reported by `finish`."""
        where, start, length = where_is(self.source, row.row), row.answer_start, len(row.labels)
        if start == length:
            raise EchoDataError(
                f"{where} has no answer token: all of its {length} labels are {IGNORED}. "
                "Give it an answer, or remove it."
            )
        if start == 0:
            raise EchoDataError(
                f"{where} has no boundary: its answer starts at the first token. Put a prompt before it."
            )
        if self.max_length is not None and length > self.max_length:
            if self.on_overlength == "drop":
                self.dropped.append(row.row)
                self.answerless += start >= self.max_length
                return None
            if self.on_overlength == "error" or length - start >= self.max_length:
                self.overlong.append(row)
                return None
            row = _shorten(row, self.max_length, self.bos)
            self.truncated += 1
        answer = [label for label in row.labels if label != IGNORED]
        self.prompt_lengths.append(row.answer_start)
        self.answer_lengths.append(len(answer))
        if self.end_ids.isdisjoint(answer[-2:]):  # a chat template may write a newline after its end of turn
            self.endless.append(row.row)
        if row.merged_tokens:
            self.merged.append(row.row)
        return row

    def finish(self) -> RowCounts:
        if self.overlong:
            raise EchoDataError(self._overlength_message())
        if not self.answer_lengths:
            raise EchoDataError(
                f"{self.source}: no row is left: {len(self.dropped)} were dropped as longer than max_length = "
                f"{self.max_length}. Raise max_length, or give other rows."
            )
        for problem, rows in {
            "ends its answer without an end-of-sequence or end-of-turn token": self.endless,
            "shares the last token of its prompt with its answer: the boundary lies before it": self.merged,
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
        )

    def _overlength_message(self) -> str:
        row, limit = self.overlong[0], self.max_length
        assert limit is not None
        where, start, length = where_is(self.source, row.row), row.answer_start, len(row.labels)
        if self.on_overlength == "truncate_prompt":
            problem = f"can't be shortened to its answer: that has {length - start} tokens"
            remedy = 'set on_overlength to "drop"'
        else:
            keeps = "no answer token" if start >= limit else "only a part of its answer"
            problem = f"keeps {keeps}: the prompt has {start} tokens, the answer {length - start}"
            remedy = 'set on_overlength to "truncate_prompt" or "drop"'
        longest = max(len(row.labels) for row in self.overlong)
        return (
            f"{where} {problem}, and max_length is {limit} ({len(self.overlong)} such rows).\n"
            f"Raise max_length to {longest}, or {remedy}."
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
    names = [name for name in ("input_ids", "labels", "completion_mask") if name in example]
    return example | {name: keep(example[name]) for name in names}


def _answer_labels(example: dict[str, Any]) -> list[int]:
    mask = example.get("completion_mask")
    if mask is None:
        return example["labels"]
    return [label if is_answer else IGNORED for label, is_answer in zip(example["labels"], mask, strict=True)]


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as `3, 7-9`."""
    ends = [i for i, number in enumerate(numbers) if numbers[i + 1 : i + 2] != [number + 1]]
    starts = [0, *(i + 1 for i in ends[:-1])]
    runs = [(numbers[start], numbers[end]) for start, end in zip(starts, ends, strict=True)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _lengths(lengths: list[int]) -> Lengths:
    return Lengths(min(lengths), median(lengths), max(lengths))


def _number(row: Mapping[str, Any], index: int) -> int:
    number = row.get("row")
    return number if isinstance(number, int) else index


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end-of-sequence token, and what the chat template writes after an assistant's message."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template is None:
        return ends
    answer = "the-answer-of-the-assistant"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = _apply_template({}, messages, tokenizer, "An example", tokenize=False)
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
