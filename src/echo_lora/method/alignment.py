"""Alignment: moving padding so that all answers start in one column; where the echo is read and injected.

Computes β, the boundary at which equation 1 reads, and a_t, the positions at which equation 4 injects.

With all boundaries in one column, the echo-on pass can run on the columns from there on, for all rows at once. The
drawing is in `step.py`. Shapes: `B` rows, `T` tokens in a row, `P` prompt, `A` answer.

Whatever the host must know of a batch is read here, before the first pass, while the device has nothing to do yet. From
there to the end of backward nothing waits for the device, so that the launches of the echo-on pass, which is short,
overlap with the work of the passes around it.   [O]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from echo_lora.errors import EchoDataError


@dataclass(frozen=True)
class AlignedRows:
    """Rows as the step runs them: T = P - 1 + A columns, with the first boundary in column P - 1."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 at tokens
    position_ids: Tensor | None  # (B, T) int64, from 0 at each row's first token; None: the model counts them itself
    targets: Tensor  # (B, A) int64: what columns P-1 … P+A-2 predict; -100 where not supervised
    prefix_length: int  # P - 1: columns before the first boundary
    boundary: Tensor  # (B,) int64: column of β in each row; P - 1 in all of them, unless the rows start in one column
    answers: tuple[Tensor, ...]  # (N,) int64 each: row and column in `targets` of what is supervised
    prompt_targets: Tensor | None = None  # (B, T) int64: what columns 0 … T-1 predict outside answers, or -100
    prompts: tuple[Tensor, ...] | None = None  # (M,) int64 each: the same in `prompt_targets`

    @property
    def tokens(self) -> int:
        """How many tokens are supervised."""
        return sum(len(positions[0]) for positions in (self.answers, self.prompts) if positions is not None)


def boundary_positions(labels: Tensor) -> Tensor:
    """β: column of the last token before each row's first answer token. [P]

    labels: (B, T) int64, -100 outside the answer. Returns (B,) int64. Raises EchoDataError if a row has no answer, or
    its answer starts at column 0.
    """
    is_answer = labels != -100  # (B, T)
    first = is_answer.int().argmax(1)  # (B,)
    lacks_answer, starts_answer = torch.stack([~is_answer.any(1), is_answer[:, 0]]).tolist()  # one wait for the device
    if any(lacks_answer):
        raise EchoDataError(
            f"row {lacks_answer.index(True)} of the batch has no answer token: all its labels are -100. "
            "Drop such rows before training, or raise max_length if the answer was cut off."
        )
    if any(starts_answer):
        raise EchoDataError(
            f"row {starts_answer.index(True)} of the batch has no prompt: its first token is an answer token, so there "
            "is no boundary to read the echo from. Give the row a prompt, or use a completion-only loss."
        )
    return first - 1  # (B,)


@record_function("alignment")
def align_rows(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    completion_mask: Tensor | None = None,
    *,
    shows_length: bool = False,
    starts_together: bool = False,
) -> AlignedRows:
    """Move padding so that all boundaries fall in one column; drop what no supervised token depends on. [O]

    input_ids, labels: (B, T); attention_mask: (B, T) or None, padding on either side. completion_mask: (B, T), 1 at
    answer tokens, if the labels cover prompt tokens too; None means that all labels are answers. In a row of several
    turns, the boundary is before the first answer. If two passes over rows that all start in one column run fewer
    columns, that layout is used.

    shows_length: add a last column, which predicts nothing, with the position T - 1, so that both passes see the same
    length as a forward of the original batch. starts_together: always start all rows in one column, so that no token
    follows padding, which a recurrent model would read; the model then counts positions itself.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    is_token = attention_mask.bool()  # (B, T)
    # each row's tokens first, in order, whichever side the padding is on
    order = (~is_token).int().argsort(dim=1, stable=True)  # (B, T)
    input_ids = input_ids.gather(1, order)  # (B, T)
    labels = torch.where(is_token, labels, -100).gather(1, order)  # (B, T)
    answer = labels if completion_mask is None else labels.where(completion_mask.gather(1, order).bool(), -100)

    prompt = boundary_positions(answer) + 1  # (B,) number of tokens up to and including the boundary
    columns = torch.arange(labels.shape[1], device=labels.device)  # (T,)
    length = torch.where(labels != -100, columns, -1).amax(1) + 1  # (B,) number of tokens up to the last supervised one
    P, A, starts = _layout(prompt, length, starts_together)
    A += shows_length
    position = torch.arange(P + A, device=labels.device)[None] - starts[:, None]  # (B, P+A), negative at padding
    inside = (position >= 0) & (position < length[:, None])  # (B, P+A)
    source = position.clamp(0, labels.shape[1] - 1)  # (B, P+A)
    ids = torch.where(inside, input_ids.gather(1, source), input_ids.gather(1, prompt[:, None] - 1))  # (B, P+A)
    targets = torch.where(inside, answer.gather(1, source), -100)  # (B, P+A)
    prompt_targets = torch.where((position > 0) & (targets == -100) & inside, labels.gather(1, source), -100)
    # at padding the position stays within the row: position embeddings have an end
    position_ids = position[:, :-1].clamp(min=0).minimum(length[:, None] - 1)  # (B, P-1+A)
    if shows_length:
        position_ids[:, -1] = labels.shape[1] - 1
    # column c predicts the token of column c+1: inputs lose the last column, targets the first ones
    targets, prompt_targets = targets[:, P:], prompt_targets[:, 1:]  # (B, A), (B, P-1+A)
    trains_prompts = completion_mask is not None
    return AlignedRows(
        input_ids=ids[:, :-1],  # (B, P-1+A)
        attention_mask=inside[:, :-1].long(),  # (B, P-1+A)
        # None because some models start at another number (RoBERTa) or take no positions (BART)
        position_ids=None if starts_together and not shows_length else position_ids,
        targets=targets,  # (B, A)
        prefix_length=P - 1,
        boundary=starts + prompt - 1,  # (B,)
        answers=(targets != -100).nonzero(as_tuple=True),  # (N,), (N,)
        prompt_targets=prompt_targets if trains_prompts else None,
        prompts=(prompt_targets != -100).nonzero(as_tuple=True) if trains_prompts else None,  # (M,), (M,)
    )


def _layout(prompt: Tensor, length: Tensor, starts_together: bool) -> tuple[int, int, Tensor]:
    """P, A, and the column (B,) of each row's first token. prompt, length: (B,) tokens of prompt and of row."""
    extremes = torch.stack([prompt.max(), (length - prompt).max(), length.max(), prompt.min()])  # (4,)
    P, A, longest, shortest = extremes.tolist()
    if starts_together or 2 * longest - shortest < P + 2 * A:  # columns of both passes, in either layout
        return shortest, longest - shortest, torch.zeros_like(prompt)
    return P, A, P - prompt


def injection_mask(targets: Tensor, kind: str) -> Tensor:
    """a_t of equation 4 over columns P-1 … P+A-2; targets: (B, A), returns (B, A) bool.

    `predictive`: the positions whose logits predict answer tokens. [O]
    `answer`: the answer tokens. [R]
    """
    is_predictive = targets != -100  # (B, A)
    if kind == "predictive":
        return is_predictive
    # shifted right by one: a column's own token is what the column before predicts; column P-1 holds no answer token
    return torch.cat([torch.zeros_like(is_predictive[:, :1]), is_predictive[:, :-1]], dim=1)  # (B, A)
