"""Packing: from rows joined end to end to rows of their own, which alignment needs.                                 [O]

TRL's `packing` and `padding_free`, and transformers' DataCollatorWithFlattening, join rows and say where each begins. A
step with the echo pads the rows again before it runs them: each has a boundary of its own, and no attention crosses
rows, whatever the attention implementation.

Shapes: `B` rows, `T` tokens in a row, `b` and `t` of the packed batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from echo_lora.errors import EchoDataError

# Inputs that say where rows begin; all that a batch holds must agree.
BOUNDARIES = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
_DESCRIPTIONS = {*BOUNDARIES, "max_length_q", "max_length_k"}
_PADDING = {"input_ids": 0, "labels": -100, "completion_mask": 0}


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a batch says where its rows begin, and has no attention_mask, which pads or mixes rows instead."""
    return batch.get("attention_mask") is None and any(batch.get(name) is not None for name in BOUNDARIES)


def unpacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A packed batch as rows (B, T), padded on the right, with an attention_mask; another batch as it is.

    input_ids, labels, completion_mask: (b, t) int64. position_ids: (b, t), 0 at each row's first token. seq_idx:
    (b, t), the number of each token's row. cu_seq_lens_q, cu_seq_lens_k: (B+1,), the ends of the rows, for b = 1. Rows
    of one token at the end are padding. Raises EchoDataError where these contradict each other.
    """
    if not is_packed(batch) or batch.get("input_ids") is None:
        return dict(batch)
    input_ids = batch["input_ids"]
    is_first, is_token = (mask.flatten() for mask in _rows_of(batch))  # (b·t,) each
    row = is_first.cumsum(0)[is_token]  # (tokens,)
    _, length = row.unique_consecutive(return_counts=True)  # (B,)
    first = (is_first & is_token).nonzero()  # (B, 1)
    columns = torch.arange(int(length.max()))  # (T,)
    inside = (columns < length[:, None]).to(input_ids.device)  # (B, T)
    source = (first + columns).clamp(max=input_ids.numel() - 1).to(input_ids.device)  # (B, T)
    rows = {name: value for name, value in batch.items() if name not in _DESCRIPTIONS}
    for name, padding in _PADDING.items():
        if (values := batch.get(name)) is not None:
            rows[name] = values.flatten()[source].where(inside, padding)  # (B, T)
    return rows | {"attention_mask": inside.long()}


def tokens_of_rows(batch: Mapping[str, Any]) -> Tensor:
    """Where a packed batch has tokens, not padding; (b, t) bool, on the CPU."""
    return _rows_of(batch)[1]


def _rows_of(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Where rows begin, and where there are tokens, not padding; (b, t) bool each, on the CPU."""
    shape = batch["input_ids"].shape
    found = {name: _beginnings(name, batch[name].cpu(), shape) for name in BOUNDARIES if batch.get(name) is not None}
    (name, is_first), *others = found.items()
    for other, begins in others:
        if not torch.equal(begins, is_first):
            raise EchoDataError(
                f"the batch is packed, but {name} and {other} put the beginnings of its rows in different places. "
                "Leave one of them out."
            )
    # a collator's padding is at position 0 everywhere, so it looks like rows of one token
    last = torch.where(is_first, -1, torch.arange(shape[1])).amax(1, keepdim=True)  # (b, 1)
    is_token = torch.arange(shape[1]) <= last  # (b, t)
    if not is_token.any():
        raise EchoDataError("no row of the packed batch has two tokens. Give each a prompt and an answer.")
    return is_first, is_token


def _beginnings(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """Where rows begin according to one of the inputs; (b, t) bool."""
    is_first = torch.ones(shape, dtype=torch.bool)
    if name.startswith("cu_seq_lens"):
        ends = values.tolist()
        if shape[0] != 1 or values.dim() != 1 or ends[:1] != [0] or ends[-1] != shape[1] or ends != sorted(set(ends)):
            raise EchoDataError(
                f"{name} is {ends}, but in a packed batch of shape {tuple(shape)} (one row, tokens) it must rise from "
                f"0 to {shape[1]}. Correct it, or leave it out where position_ids say where rows begin."
            )
        is_first[:] = False
        is_first[0, ends[:-1]] = True
        return is_first
    if values.shape != shape:
        raise EchoDataError(
            f"{name} has shape {tuple(values.shape)}, but input_ids have {tuple(shape)}. To train on packed rows, give "
            "a number for each token."
        )
    if name == "seq_idx":
        is_first[:, 1:] = values.diff(dim=1) != 0
        return is_first
    is_first = values == 0
    follows = torch.zeros_like(is_first)
    follows[:, 1:] = values.diff(dim=1) == 1
    if bool((wrong := ~is_first & ~follows).any()):
        row, column = wrong.nonzero()[0].tolist()
        raise EchoDataError(
            f"position_ids must count the tokens of each row from 0, but row {row}, column {column} of the batch has "
            f"{int(values[row, column])}. Correct them, or leave them out and pass an attention_mask."
        )
    return is_first
