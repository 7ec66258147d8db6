"""Tokenised rows as one dataset, in memory or on disk, with counts of what was kept, shortened and dropped."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_lora.data.check import Overlength, RowCheck, RowCounts, SpecialTokens, as_tokenized_row, ranges_text
from echo_lora.data.forms import check_forms, row_number
from echo_lora.data.shares import repeats
from echo_lora.data.sources import ROW, where_is
from echo_lora.data.tokenize import ANSWER, IGNORED, TokenizedRow, tokenize_row

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
    format: str = ""  # of the raw rows, and why
    weight: float = 1.0

    def weighted(self, weight: float, seed: Sequence[int]) -> PreparedData:
        """The rows as often as one epoch has them: see `repeats`."""
        dataset = self.dataset.select(repeats(len(self.dataset), weight, seed))
        return replace(self, dataset=dataset, weight=weight)

    @property
    def rows(self) -> RowView:
        return RowView(self.dataset)

    def summary(self, named: int | None = None) -> list[str]:
        """The counts as lines of plain text. named: the most dropped rows to list; None lists all."""
        c = self.counts
        lines = [f"{self.source}: {self.format}"] if self.format else []
        lines += [
            f"{self.source}: {c.kept} rows kept, {c.dropped} dropped, {c.truncated} with a shortened prompt",
            f"prompt tokens: {c.prompt_tokens}",
            f"answer tokens: {c.answer_tokens}, {c.answer_tokens_total} in total",
        ]
        if self.weight != 1:
            lines.append(f"weight {self.weight:g}: {len(self.dataset)} rows an epoch")
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
    check = RowCheck(max_length, on_overlength, SpecialTokens.of(tokenizer), source)
    writer = _Writer(train_on_prompt)
    for index, row in enumerate(rows):
        number = row_number(row, index)
        tokenized = tokenize_row({**row, ROW: number}, tokenizer, chat, where=where_is(source, number))
        if (checked := check(tokenized)) is not None:
            writer.add(checked)
    counts = check.finish()
    return PreparedData(writer.finish(), counts, source, train_on_prompt)


def columns_of(row: TokenizedRow, train_on_prompt: bool) -> dict[str, Any]:
    """A row as the trainer reads it."""
    columns: dict[str, Any] = {"input_ids": row.input_ids, "labels": row.labels, ROW: row.row}
    if train_on_prompt:
        columns[ANSWER] = [int(label != IGNORED) for label in row.labels]
        columns["labels"] = [IGNORED, *row.input_ids[1:]]
    return columns


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
        columns = [columns_of(row, ANSWER in self.schema.names) for row in rows]
        batch = {name: [row[name] for row in columns] for name in self.schema.names}
        self.batches.append(pa.record_batch(batch, schema=self.schema))
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
