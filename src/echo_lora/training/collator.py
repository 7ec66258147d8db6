"""Collation: row numbers and answer masks next to the batch, packed or not; the weighted loss on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from echo_lora.data.forms import row_number
from echo_lora.data.sources import KEPT_NAME, ROW
from echo_lora.data.tokenize import ANSWER
from echo_lora.errors import EchoDataError
from echo_lora.method.packing import is_packed, tokens_of_rows

LENGTHS = "seq_lengths"  # TRL's column: the lengths of the rows that were packed into one


class RowCollator:
    """The user's collator; row numbers, and answer masks if wanted, bypass it and are added to its batch."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], wants_answers: bool = True) -> None:
        self.collate, self.wants_answers = collate, wants_answers

    @property
    def tokenizer(self) -> Any:
        """Trainer looks here for a tokenizer to save with the model."""
        return getattr(self.collate, "tokenizer", None)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        has_answers = self.wants_answers and all(ANSWER in feature and "labels" in feature for feature in features)
        carried = {ROW, ANSWER} if has_answers else {ROW}
        rows = [_row_numbers(feature, place) for place, feature in enumerate(features) if ROW in feature]
        batch = self.collate([{k: v for k, v in feature.items() if k not in carried} for feature in features])
        if len(rows) == len(features):
            batch[ROW] = torch.tensor([*chain(*rows)])
        if has_answers:
            batch[ANSWER] = _at_tokens([feature[ANSWER] for feature in features], batch)
        return batch


def _at_tokens(masks: list[list[int]], batch: dict[str, Any]) -> Tensor:
    """The rows' masks at the columns where the collator put their tokens, (B, T); 0 at padding."""
    if is_joined := is_packed(batch):
        is_token = tokens_of_rows(batch)
    else:
        is_token = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    lengths = [len(mask) for mask in masks]
    lengths = [sum(lengths)] if is_joined and len(is_token) == 1 else lengths
    if is_token.sum(1).tolist() != lengths:
        raise EchoDataError(
            f"the data collator turns rows of {lengths} tokens into rows of {is_token.sum(1).tolist()}, so it is "
            "unknown which of them are answers. Use a collator that only pads and returns an attention_mask."
        )
    at_tokens = torch.zeros_like(batch["input_ids"])
    at_tokens[is_token] = torch.tensor([value for mask in masks for value in mask], dtype=at_tokens.dtype)
    return at_tokens


def _row_numbers(feature: dict[str, Any], place: int) -> list[int]:
    """The numbers of a row, or of the rows that were packed into one."""
    number = feature[ROW]
    return list(number) if isinstance(number, (list, tuple)) else [row_number(feature, place)]


class WeightedForward:
    """A model without the echo whose answer tokens count `weight` times in TRL's loss."""

    def __init__(self, model: Any, is_answer: Tensor, weight: float) -> None:
        self.model, self.is_answer, self.weight = model, is_answer, weight  # is_answer: (B, T)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        is_answer = self.is_answer[:, 1:].to(outputs.log_probs.device).bool()  # (B, T-1): of the token predicted
        outputs.log_probs = outputs.log_probs * torch.where(is_answer, self.weight, 1.0)
        return outputs


def numbered(dataset: Any, source: str) -> Any:
    """The dataset with a column ROW that numbers its rows from 0; a stream is returned unchanged.

    A tokenised dataset keeps the numbers it has: its preparation may have dropped or packed rows. Raises EchoDataError
    if such a column holds anything but integers.
    """
    import pyarrow as pa

    if not isinstance(dataset, Dataset) or holds_packed(dataset):
        return dataset
    if ROW in dataset.column_names:
        column = dataset.data.column(ROW)
        if not pa.types.is_integer(column.type):
            raise EchoDataError(f"the {source} has {KEPT_NAME}")
        if "input_ids" in dataset.column_names and not column.null_count:
            return dataset
        dataset = dataset.remove_columns(ROW)
    return dataset.add_column(ROW, list(range(len(dataset))))


def packed(dataset: Dataset, max_length: int, strategy: str, num_proc: int | None) -> Dataset:
    """The rows packed as TRL packs them; ROW then lists the numbers of each one's rows, and answer masks are kept."""
    from trl.data_utils import pack_dataset  # here, because integrations use this module beside another TRL

    columns = [name for name in ("input_ids", "labels", ANSWER) if name in dataset.column_names]
    dataset = dataset.select_columns([*columns, ROW])
    dataset = dataset.map(_number_per_token, num_proc=num_proc)  # TRL packs columns of lists, one item a token
    dataset = pack_dataset(dataset, max_length, strategy, {"num_proc": num_proc, "desc": "Packing"})
    return dataset.map(_number_per_row, num_proc=num_proc)


def _number_per_token(row: dict[str, Any]) -> dict[str, Any]:
    return {ROW: [row[ROW]] * len(row["input_ids"])}


def _number_per_row(row: dict[str, Any]) -> dict[str, Any]:
    return {ROW: [row[ROW][end - 1] for end in accumulate(row[LENGTHS])]}


def holds_packed(dataset: Any) -> bool:
    """Whether `packed` made this dataset."""
    return (
        isinstance(dataset, Dataset)
        and {ROW, LENGTHS} <= set(dataset.column_names)
        and isinstance(dataset[0][ROW], list)
    )


def rows_of_packed(dataset: Dataset) -> Dataset:
    """The token ids and numbers of the rows that `packed` got."""
    options = {"batched": True, "remove_columns": dataset.column_names}
    return dataset.with_format(None).map(_pieces, **options)


def _pieces(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    cut = [
        ids[end - length : end]
        for ids, lengths in zip(batch["input_ids"], batch[LENGTHS], strict=True)
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]
    return {"input_ids": cut, ROW: [*chain(*batch[ROW])]}
