"""Tokenised rows as one dataset, in memory or on disk, with counts of what was kept, shortened and dropped."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_lora.data.check import Overlength, RowCheck, RowCounts, added_bos, as_tokenized_row, ranges_text
from echo_lora.data.forms import check_forms, row_number
from echo_lora.data.sources import ROW, where_is
from echo_lora.data.tokenize import ANSWER, IGNORED, TokenizedRow, end_token_ids, tokenize_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class RowView(Sequence[TokenizedRow]):
    """The rows of a tokenised dataset, read one at a time, with labels at answer tokens only."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return as_tokenized_row(self._dataset[place], place)

    def __iter__(self) -> Iterator[TokenizedRow]:
        return (as_tokenized_row(row, i) for i, row in enumerate(self._dataset))


@dataclass(frozen=True)
class PreparedData:
    """Rows that can be trained on."""

    dataset: Dataset  # input_ids, labels and ROW, with train_on_prompt also ANSWER; on disk if it is large
    counts: RowCounts
    source: str
    train_on_prompt: bool = False
    is_chat: bool = False  # whether prompts went through the chat template

    @property
    def rows(self) -> RowView:
        return RowView(self.dataset)

    def summary(self, named: int | None = None) -> list[str]:
        """The counts as lines of plain text. named: the most dropped rows to list; None lists all."""
        c = self.counts
        lines = [
            f"{self.source}: {c.kept} rows kept, {c.dropped} dropped, {c.truncated} with a shortened prompt",
            f"prompt tokens: {c.prompt_tokens}",
            f"answer tokens: {c.answer_tokens}, {c.answer_tokens_total} in total",
        ]
        if self.train_on_prompt:
            lines.append(f"prompts are trained on too: {c.tokens_total - c.kept} tokens with a loss in total")
        if c.dropped_rows:
            rows, rest = c.dropped_rows[:named], c.dropped_rows[named:] if named is not None else []
            lines.append(
                f"dropped as too long ({c.answerless} would keep no answer token): rows {ranges_text(rows)}"
                + (f" and {len(rest)} more" if rest else "")
            )
        if c.without_end_token:
            lines.append(f"{c.without_end_token} answers end without an end-of-sequence or end-of-turn token")
        if c.merged_boundary:
            lines.append(
                f"{c.merged_boundary} rows have one token for the end of the prompt and the start of the answer"
            )
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
    forms_are_checked: bool = False,
) -> PreparedData:
    """Tokenise `rows` and check each one: a boundary, a whole answer within `max_length`, an end token.

    The form of all rows is checked before the first is tokenised, so rows are read twice. on_overlength: a longer row
    is an error, is dropped, or loses the oldest tokens of its prompt (never all of them, and never a
    beginning-of-sequence token that the tokenizer puts first); an answer is never cut. train_on_prompt: labels cover
    every token but the first, and the column completion_mask is 1 at answer tokens. ignore_columns: columns that may go
    unused. forms_are_checked: the rows have passed `check_forms`. Raises EchoDataError, which names the first bad row
    of `source`; warns about missing end tokens and about content that is not trained on.
    """
    if not forms_are_checked:
        rows = list(rows) if isinstance(rows, Iterator) else rows
        check_forms(rows, source, ignore_columns, chat=chat)
    check = RowCheck(max_length, on_overlength, end_token_ids(tokenizer), added_bos(tokenizer), source)
    writer, is_chat = _Writer(train_on_prompt), chat
    for index, row in enumerate(rows):
        number = row_number(row, index)
        is_chat = is_chat or "messages" in row or isinstance(row.get("prompt"), list)
        tokenized = tokenize_row({**row, ROW: number}, tokenizer, chat, where=where_is(source, number))
        if (checked := check(tokenized)) is not None:
            writer.add(checked)
    counts = check.finish()
    return PreparedData(writer.finish(), counts, source, train_on_prompt, is_chat)


class _Writer:
    """Collects rows as Arrow columns: in memory, or in a file once they exceed SPILL bytes."""

    SPILL = 64 << 20
    BATCH = 500  # rows buffered as Python lists

    def __init__(self, train_on_prompt: bool) -> None:
        import pyarrow as pa

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
    """A temporary folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="echo-lora-rows-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name
