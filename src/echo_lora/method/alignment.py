"""Rows in one batch, aligned so that all answers begin in one column; where the echo is read and injected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo_lora.errors import EchoDataError


@dataclass(frozen=True)
class AlignedRows:
    """Rows as the step runs them; T = P - 1 + A columns, the first boundary in column P - 1."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 at tokens
    position_ids: Tensor | None  # (B, T) int64, from 0 at each row's first token; None: as the model counts them
    targets: Tensor  # (B, A) int64: what columns P-1 … P+A-2 predict; -100 where not supervised
    prefix_length: int  # P - 1: columns before the first boundary
    boundary: Tensor  # (B,) int64: each row's; P - 1 in all of them, or the rows start in one column
    prompt_targets: Tensor | None = None  # (B, T) int64: what columns 0 … T-1 predict outside answers, or -100


def boundary_positions(labels: Tensor) -> Tensor:
    """Column of the last token before each row's first answer token.

    labels: (B, T) int64, -100 outside the answer. Returns (B,) int64. [P]
    Raises EchoDataError if a row has no answer, or its answer starts at column 0.
    """
    is_answer = labels != -100  # (B, T)
    first = is_answer.int().argmax(1)  # (B,)
    for row in (~is_answer.any(1)).nonzero().flatten().tolist():
        raise EchoDataError(
            f"row {row} of the batch has no answer token: all its labels are -100. "
            "Drop such rows before training, or raise max_length if the answer was cut off."
        )
    for row in (first == 0).nonzero().flatten().tolist():
        raise EchoDataError(
            f"row {row} of the batch has no prompt: its first token is an answer token, so there is no boundary to "
            "read the echo from. Give the row a prompt, or use a completion-only loss."
        )
    return first - 1


def align_rows(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    completion_mask: Tensor | None = None,
    *,
    shows_length: bool = False,
    starts_together: bool = False,
) -> AlignedRows:
    """Move padding so that all boundaries fall in one column; drop what no supervised token depends on.

    input_ids, labels: (B, T); attention_mask: (B, T) or None, padding on either side. [O]
    completion_mask: (B, T), 1 at answer tokens, where the labels cover prompt tokens too; None: all labels are answers.
    In a row of several turns the prefix ends at the first answer token. Where two passes over rows that all start in
    one column run fewer columns, they do that. shows_length: a last column, which predicts nothing, has the position
    T - 1: both passes see the length that a forward of the batch as it was would have seen. starts_together: they
    always start in one column, so that no token follows padding, which a model with a state would read, and the model
    counts positions itself.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    is_token = attention_mask.bool()
    # the tokens of each row first, in their order, whatever side the padding was on
    order = (~is_token).int().argsort(dim=1, stable=True)  # (B, T)
    input_ids = input_ids.gather(1, order)
    labels = torch.where(is_token, labels, -100).gather(1, order)
    answer = labels if completion_mask is None else labels.where(completion_mask.gather(1, order).bool(), -100)

    prompt = boundary_positions(answer) + 1  # (B,) tokens up to and with the boundary
    columns = torch.arange(labels.shape[1], device=labels.device)  # (T,)
    length = torch.where(labels != -100, columns, -1).amax(1) + 1  # (B,) up to the last supervised token
    P, A = int(prompt.max()), int((length - prompt).max())
    longest, shortest = int(length.max()), int(prompt.min())
    starts = P - prompt  # (B,) column of the first token
    if starts_together or 2 * longest - shortest < P + 2 * A:  # columns of both passes
        P, A, starts = shortest, longest - shortest, torch.zeros_like(prompt)

    A += shows_length
    position = torch.arange(P + A, device=labels.device)[None] - starts[:, None]  # (B, P+A), < 0 is padding
    inside = (position >= 0) & (position < length[:, None])
    source = position.clamp(0, labels.shape[1] - 1)
    ids = torch.where(inside, input_ids.gather(1, source), input_ids.gather(1, prompt[:, None] - 1))
    targets = torch.where(inside, answer.gather(1, source), -100)
    prompt_targets = torch.where((position > 0) & (targets == -100) & inside, labels.gather(1, source), -100)
    # padding counts no further than its row: position embeddings have an end
    position_ids = position[:, :-1].clamp(min=0).minimum(length[:, None] - 1)
    if shows_length:
        position_ids[:, -1] = labels.shape[1] - 1
    return AlignedRows(
        input_ids=ids[:, :-1],
        attention_mask=inside[:, :-1].long(),
        # some count from another number (RoBERTa), or take no positions (BART)
        position_ids=None if starts_together and not shows_length else position_ids,
        targets=targets[:, P:],
        prefix_length=P - 1,
        boundary=starts + prompt - 1,
        prompt_targets=None if completion_mask is None else prompt_targets[:, 1:],
    )


def injection_mask(targets: Tensor, kind: str) -> Tensor:
    """a_t over columns P-1 … P+A-2; targets: (B, A), returns (B, A) bool.

    `predictive`: the positions whose logits predict answer tokens. [O]
    `answer`: the answer tokens. [R]
    """
    is_predictive = targets != -100
    if kind == "predictive":
        return is_predictive
    # the token of a column is the one that the column before predicts; the first boundary's is never an answer
    return torch.cat([torch.zeros_like(is_predictive[:, :1]), is_predictive[:, :-1]], dim=1)
