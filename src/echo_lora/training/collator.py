"""Collation: row numbers and answer masks next to the batch; the weighted loss on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from echo_lora.data.forms import row_number
from echo_lora.data.sources import KEPT_NAME, ROW
from echo_lora.data.tokenize import ANSWER
from echo_lora.errors import EchoDataError


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
        rows = [row_number(feature, place) for place, feature in enumerate(features) if ROW in feature]
        batch = self.collate([{k: v for k, v in feature.items() if k not in carried} for feature in features])
        if len(rows) == len(features):
            batch[ROW] = torch.tensor(rows)
        if has_answers:
            batch[ANSWER] = _at_tokens([feature[ANSWER] for feature in features], batch)
        return batch


def _at_tokens(masks: list[list[int]], batch: dict[str, Any]) -> Tensor:
    """The rows' masks at the columns where the collator put their tokens, (B, T); 0 at padding."""
    is_token = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    lengths = [len(mask) for mask in masks]
    if is_token.sum(1).tolist() != lengths:
        raise EchoDataError(
            f"the data collator turns rows of {lengths} tokens into rows of {is_token.sum(1).tolist()}, so it is "
            "unknown which of them are answers. Use a collator that only pads and returns an attention_mask."
        )
    at_tokens = torch.zeros_like(batch["input_ids"])
    at_tokens[is_token] = torch.tensor([value for mask in masks for value in mask], dtype=at_tokens.dtype)
    return at_tokens


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

    A tokenised dataset keeps the numbers it has: its preparation may have dropped rows. Raises EchoDataError if such a
    column holds anything but integers.
    """
    import pyarrow as pa

    if not isinstance(dataset, Dataset):
        return dataset
    if ROW in dataset.column_names:
        column = dataset.data.column(ROW)
        if not pa.types.is_integer(column.type):
            raise EchoDataError(f"the {source} has {KEPT_NAME}")
        if "input_ids" in dataset.column_names and not column.null_count:
            return dataset
        dataset = dataset.remove_columns(ROW)
    return dataset.add_column(ROW, list(range(len(dataset))))
