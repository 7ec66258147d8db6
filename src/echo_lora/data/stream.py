"""Training rows that are read, tokenised and checked as they come, in an order that a seed decides.

The files are read in turns, one row of each, and again from their start when all have ended. A row is drawn from a
buffer of rows that wait. All of this depends only on files, options and seed, so a resumed run reads the rows before
its checkpoint again and continues with the same ones; `sha256` proves that they are the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from echo_lora.data.check import Overlength, RowCheck, SpecialTokens, refuse_unknown_token
from echo_lora.data.formats import FormattedRows
from echo_lora.data.forms import check_forms, row_number
from echo_lora.data.prepared import columns_of
from echo_lora.data.sources import ROW, where_is
from echo_lora.data.tokenize import ANSWER, TokenizedRow, tokenize_row
from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

_REMEMBERED = 1000  # steps whose digest is kept, so that a checkpoint need not read the rows again


@dataclass(eq=False)
class RowStream:
    """An endless sequence of tokenised rows; each iteration starts anew and gives the same rows.

    vocabulary, positions, has_table: see `refuse_unfit_tokens`. buffer: rows that wait to be drawn. rows_per_step:
    `sha256` is known for multiples of it. Iterating raises EchoDataError, which names file and row.
    """

    parts: Sequence[FormattedRows]
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    on_overlength: Overlength
    chat: bool
    train_on_prompt: bool
    ignore_columns: Collection[str]
    vocabulary: int
    positions: int | None
    has_table: Callable[[], bool]
    buffer: int
    seed: int
    rows_per_step: int
    checks: list[RowCheck] = field(default_factory=list)  # of the newest iteration
    digests: dict[int, str] = field(default_factory=dict)  # number of rows → SHA-256 of all up to it

    def dataset(self) -> IterableDataset:
        """The stream as the trainers take it."""
        from datasets import Features, IterableDataset, List, Value

        names = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), ROW: Value("int64")}
        names |= {ANSWER: List(Value("int8"))} if self.train_on_prompt else {}
        return IterableDataset.from_generator(self.__iter__, features=Features(names))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import numpy as np

        special = SpecialTokens.of(self.tokenizer)
        self.checks = [RowCheck(self.max_length, self.on_overlength, special, part.source) for part in self.parts]
        digest, warned, read = hashlib.sha256(), set[tuple[int, str]](), 0
        for epoch in count():
            before = read
            for place, number, row in _drawn(self._raw(), self.buffer, [self.seed, epoch]):
                tokenized = self._checked(place, row, warned)
                if tokenized is None:
                    continue
                columns = columns_of(tokenized, self.train_on_prompt)
                for name in ("input_ids", "labels", ANSWER):
                    digest.update(np.asarray(columns.get(name, []), dtype=np.int64).tobytes())
                read += 1
                if read % self.rows_per_step == 0:
                    self.digests[read] = digest.hexdigest()
                    self.digests.pop(read - _REMEMBERED * self.rows_per_step, None)
                yield columns if len(self.parts) == 1 else columns | {ROW: number}
            if read == before:
                raise EchoDataError(
                    f"{', '.join(part.source for part in self.parts)}: the stream has no row to train on. Name files "
                    "with rows, and see that data.max_length and data.validation_share leave some."
                )

    def sha256(self, rows: int) -> str:
        """The SHA-256 of the first rows; reads them again if it is not known. rows: a multiple of `rows_per_step`."""
        if rows == 0:
            return hashlib.sha256().hexdigest()
        if rows not in self.digests:
            for _ in islice(self, rows):
                pass
        return self.digests[rows]

    def summary(self) -> list[str]:
        """What has been read so far, as lines of text."""
        lines = []
        for part, check in zip(self.parts, self.checks, strict=True):
            lines += [f"{part.source}: {part.format.reason}"] if part.format.reason else []
            lines.append(
                f"{part.source}: a stream, {len(check.answer_lengths)} rows read, {len(check.dropped)} dropped, "
                f"{check.truncated} with a shortened prompt, {sum(check.answer_lengths)} answer tokens"
            )
        return lines

    def _raw(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Place of the file, number of the row in the epoch, and the row, which carries its number in its file."""
        numbers = count()
        waiting = {place: enumerate(part) for place, part in enumerate(self.parts)}
        while waiting:
            for place, rows in list(waiting.items()):
                if (item := next(rows, None)) is None:
                    del waiting[place]
                else:
                    index, row = item
                    yield place, next(numbers), row | {ROW: row_number(row, index)}

    def _checked(self, place: int, row: dict[str, Any], warned: set[tuple[int, str]]) -> TokenizedRow | None:
        """The row to train on; None if it is dropped."""
        source, check = self.parts[place].source, self.checks[place]
        where = where_is(source, row[ROW])
        check_forms([row], source, self.ignore_columns, chat=self.chat)
        tokenized = check(tokenize_row(row, self.tokenizer, self.chat, where=where))
        check.refuse_overlong()
        for problem, rows in check.problems().items():
            if rows and (place, problem) not in warned:
                warned.add((place, problem))
                _logger.warning("%s %s (the first such row).", where_is(source, rows[0]), problem)
        if tokenized is None:
            return None
        refuse_unknown_token(where, tokenized.input_ids, self.vocabulary)
        length = len(tokenized.input_ids)
        if self.positions is not None and length > self.positions and self.has_table():
            raise EchoDataError(
                f"{where} has {length} tokens, but the model has embeddings for {self.positions} positions. "
                f"Set max_length to at most {self.positions}, and on_overlength, or shorten the row."
            )
        return tokenized


def _drawn(items: Iterator[Any], size: int, seed: Sequence[int]) -> Iterator[Any]:
    """The items in a random order: each is drawn from the `size` that wait."""
    import numpy as np

    draw = np.random.default_rng(list(seed))
    waiting = list(islice(items, size))
    for item in items:
        place = int(draw.integers(len(waiting)))
        yield waiting[place]
        waiting[place] = item
    for place in draw.permutation(len(waiting)).tolist():
        yield waiting[place]
