"""Checks of tokenised rows: answers, lengths, token numbers."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from echo_lora.data.forms import row_number
from echo_lora.data.sources import ROW, where_is
from echo_lora.data.tokenize import ANSWER, IGNORED, TokenizedRow, end_token_ids
from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

Overlength = Literal["error", "drop", "truncate_prompt"]

RARE = "\U00012000"  # a cuneiform sign, which no vocabulary has
NO_TOKEN = "text that the vocabulary has no token for"


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
    dropped_rows: list[int]  # numbers of the rows that exceed `max_length`
    answerless: int  # how many of these have no answer token within `max_length`
    truncated: int
    without_end_token: int
    merged_boundary: int
    prompt_tokens: Lengths
    answer_tokens: Lengths
    answer_tokens_total: int
    tokens_total: int
    untrained: dict[str, list[int]]  # content that is not trained on, with the numbers of its rows

    @property
    def dropped(self) -> int:
        return len(self.dropped_rows)


def refuse_unfit_tokens(
    dataset: Dataset, source: str, *, vocabulary: int, positions: int | None, has_table: Callable[[], bool]
) -> None:
    """Raises EchoDataError, which names the row, for token ids and positions that the model has no embedding for.

    vocabulary: rows of the model's embedding. positions: the model's maximum length, if its configuration has one.
    has_table: whether positions come from an embedding table; called only if a row is too long. Where positions are
    computed, such a row is only a warning.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = dataset.features.arrow_schema.field("input_ids").type
    if not (pa.types.is_nested(kind) and pa.types.is_integer(kind.value_type)):
        return  # the user's own collator makes token ids of it
    columns = [name for name in ("input_ids", ROW) if name in dataset.column_names]
    rows: Any = dataset.select_columns(columns)
    start, is_warned = 0, positions is None
    for batch in rows.with_format("arrow").iter(1000):  # whole Arrow columns: Python lists are slow
        ids = batch["input_ids"]
        span = pc.min_max(pc.list_flatten(ids)).as_py()
        longest = pc.max(pc.list_value_length(ids)).as_py() or 0
        is_unknown = span["min"] is not None and not 0 <= span["min"] <= span["max"] < vocabulary
        is_long = positions is not None and longest > positions and not is_warned
        for place, row in enumerate(batch.to_pylist() if is_unknown or is_long else []):
            where, length = where_is(source, row_number(row, start + place)), len(row["input_ids"])
            refuse_unknown_token(where, row["input_ids"], vocabulary)
            if is_warned or positions is None or length <= positions:
                continue
            if has_table():
                raise EchoDataError(
                    f"{where} has {length} tokens, but the model has embeddings for {positions} positions. "
                    f"Set max_length to at most {positions}, and on_overlength, or shorten the row."
                )
            _logger.warning("%s has %d tokens, more than the model's maximum of %d.", where, length, positions)
            is_warned = True
        start += len(batch)


def refuse_unknown_token(where: str, ids: list[int], vocabulary: int) -> None:
    """Raises EchoDataError for a token id that the model's embedding has no row for."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise EchoDataError(
                f"{where} has the token id {token}, but the model's embedding has rows for 0 to {vocabulary - 1}. Use "
                "the model's own tokenizer, or resize the embedding first."
            )


class SpecialTokens(NamedTuple):
    """Ids of a tokenizer that mean something to the checks."""

    ends: set[int]
    bos: int | None = None  # of a tokenizer that puts it before every text: stays first when a prompt is shortened
    unknown: int | None = None  # what text becomes that the vocabulary has no token for

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        ends, bos, unknown = end_token_ids(tokenizer), tokenizer.bos_token_id, tokenizer.unk_token_id
        # many tokenizers have an unknown token and never use it: they fall back to bytes
        is_used = unknown in tokenizer(RARE, add_special_tokens=False)["input_ids"] and unknown not in ends
        return cls(ends, bos if tokenizer("a")["input_ids"][0] == bos else None, unknown if is_used else None)


def check_tokenized_dataset(
    dataset: Dataset,
    *,
    max_length: int | None,
    on_overlength: Overlength,
    special: SpecialTokens,
    source: str,
) -> tuple[Dataset, RowCounts]:
    """The checks of `prepare_rows` for a dataset that already has `input_ids` and `labels`; other columns are kept.

    If there is a column `completion_mask`, it marks which labels are answer tokens.
    """
    check = RowCheck(max_length, on_overlength, special, source)
    columns = [name for name in ("input_ids", "labels", ANSWER, ROW) if name in dataset.column_names]
    kept = [
        index
        for index, row in enumerate(dataset.select_columns(columns).with_format(None))
        if check(as_tokenized_row(row, index)) is not None
    ]
    counts = check.finish()
    if counts.dropped:
        dataset = dataset.select(kept)
    if counts.truncated:
        options = {"max_length": max_length, "bos": special.bos}
        dataset = dataset.map(_shorten_columns, fn_kwargs=options, desc="Shortening prompts")
    return dataset, counts


@dataclass
class RowCheck:
    """One pass over the rows of one source."""

    max_length: int | None
    on_overlength: Overlength
    special: SpecialTokens
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
        """The row to train on, or None if it is dropped or `finish` will report it."""
        where, start, length = where_is(self.source, row.row), row.answer_start, len(row.labels)
        if start == length:
            raise EchoDataError(
                f"{where} has no answer token: all of its {length} labels are {IGNORED}. "
                "Give it an answer, or remove it."
            )
        if start == 0:
            if row.merged_tokens:
                raise EchoDataError(
                    f"{where} has no boundary: the tokenizer merges the end of the prompt and the start of the answer "
                    "into one token, so no token belongs to the prompt alone. Put a space or a line break between the "
                    "two, or use the chat form."
                )
            raise EchoDataError(
                f"{where} has no boundary: its answer starts at the first token. Add a prompt. If the row has one, its "
                "end and the start of the answer are one token: put a space or a line break between them."
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
            keep = _kept_columns(row, self.max_length, self.special.bos)
            row = replace(row, input_ids=keep(row.input_ids), labels=keep(row.labels))
            self.truncated += 1
        answer = [label for label in row.labels if label != IGNORED]
        self.tokens += len(row.labels)
        self.prompt_lengths.append(row.answer_start)
        self.answer_lengths.append(len(answer))
        if self.special.ends.isdisjoint(answer[-2:]):  # chat templates may write a newline after the end of a turn
            self.endless.append(row.row)
        if row.merged_tokens:
            self.merged.append(row.row)
        lost = (NO_TOKEN,) if self.special.unknown in row.input_ids else ()
        for what in (*row.untrained, *lost):
            self.untrained.setdefault(what, []).append(row.row)
        return row

    def refuse_overlong(self) -> None:
        """Raises EchoDataError if a row so far is too long, and neither dropped nor shortened."""
        if self.overlong is not None:
            raise EchoDataError(self._overlength_message())

    def problems(self) -> dict[str, list[int]]:
        """What people should hear of, with the numbers of its rows, of which there may be none."""
        return {
            "ends its answer without an end-of-sequence or end-of-turn token": self.endless,
            "has one token for the end of its prompt and the start of its answer, after the boundary": self.merged,
            **{f"has {what}: not trained on": rows for what, rows in self.untrained.items()},
        }

    def finish(self) -> RowCounts:
        self.refuse_overlong()
        if not self.answer_lengths:
            raise EchoDataError(
                f"{self.source}: no row is left: {len(self.dropped)} were dropped because they are longer than "
                f"max_length = {self.max_length}. Raise max_length, or use other rows."
            )
        for problem, rows in self.problems().items():
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
            problem = f"can't be shortened: its answer alone has {length - start} tokens"
            remedy = 'set on_overlength to "drop"'
        else:
            keeps = "no answer token" if start >= limit else "only part of its answer"
            problem = f"keeps {keeps}: the prompt has {start} tokens, the answer {length - start}"
            remedy = 'set on_overlength to "truncate_prompt" or "drop"'
        return (
            f"{where} {problem}, and max_length is {limit} ({self.overlong_count} such rows).\n"
            f"Raise max_length to {self.longest}, or {remedy}."
        )


def _kept_columns(row: TokenizedRow, max_length: int, bos: int | None) -> Callable[[list[int]], list[int]]:
    """Drops the oldest prompt tokens from a row's columns; the answer must leave room for at least one."""
    room = max_length - (len(row.labels) - row.answer_start)
    head = 1 if room > 1 and row.input_ids[0] == bos else 0
    cut = len(row.labels) - max_length + head
    return lambda values: values[:head] + values[cut:]


def _shorten_columns(row: dict[str, Any], max_length: int, bos: int | None) -> dict[str, Any]:
    if len(row["labels"]) <= max_length:
        return row
    keep = _kept_columns(as_tokenized_row(row, 0), max_length, bos)
    return row | {name: keep(row[name]) for name in ("input_ids", "labels", ANSWER) if name in row}


def as_tokenized_row(row: dict[str, Any], index: int) -> TokenizedRow:
    """A dataset's row, with labels at answer tokens only."""
    labels, mask = row["labels"], row.get(ANSWER)
    if mask is not None:
        labels = [label if is_answer else IGNORED for label, is_answer in zip(labels, mask, strict=True)]
    return TokenizedRow(row["input_ids"], labels, row_number(row, index))


def ranges_text(numbers: list[int]) -> str:
    """Rising numbers as `3, 7-9`."""
    ends = [i for i, number in enumerate(numbers) if numbers[i + 1 : i + 2] != [number + 1]]
    starts = [0, *(i + 1 for i in ends[:-1])]
    runs = [(numbers[start], numbers[end]) for start, end in zip(starts, ends, strict=True)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _lengths(lengths: Sequence[int]) -> Lengths:
    return Lengths(min(lengths), median(lengths), max(lengths))
