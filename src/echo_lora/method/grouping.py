"""Grouping: rows of a batch that differ much in length run in several groups, so that fewer columns are padding.   [O]

Each group is aligned by itself and goes through both passes; the losses add up, so it is one step with one gradient.
A group saves columns but has a price: its kernels are launched once more. The rows are put in order of length, of
prompt or of answer, and each order is cut where columns and prices together are fewest, which dynamic programming finds
exactly; the cheapest of the three is used. Most batches stay whole.

Shapes: `B` rows, `T` tokens in a row, `P` prompt, `A` answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from echo_lora.method.alignment import AlignedRows, align_rows
from echo_lora.method.checkpointing import is_compiled, is_sharded
from echo_lora.method.config import EchoConfig
from echo_lora.method.losses import NAMES
from echo_lora.method.sharing import angles_depend_on_length
from echo_lora.method.step import EchoOutput, router_aux_loss_coef

# The price of a group, in columns of one row that it must save. On a CPU, measured: about 65 columns with LoRA and 150
# with DoRA, which computes the norms of its weights once more (hidden size 576). On a GPU, estimated: the two passes of
# a layer and their backward launch about 500 kernels of 5 µs; at 400 TFLOP/s that is the time of 10^12 operations, of
# which a column takes 4 per parameter. For a layer of LLaMA-7B that is 1,240 columns, for smaller ones more.       [O]
CPU_PRICE = 128
LAUNCHES = 1e12 / 4
MOST_BLOCKS = 32  # places to cut are looked for between at most as many blocks of rows


def price_of_group(base: PreTrainedModel, layer: nn.Module, config: EchoConfig, *, starts_together: bool) -> float:
    """The columns that a further group must save; infinite where groups would change the step, or hang or slow it.

    layer: one of the base's decoder layers, whose size counts. starts_together: whether all rows must start in one
    column, so that the model counts positions itself.
    """
    embeddings = base.get_input_embeddings()
    changes = (
        starts_together
        or config.mixes_rows
        or angles_depend_on_length(base.config)
        or router_aux_loss_coef(base.config) > 0  # a mean over the tokens that run together
        or getattr(embeddings, "neftune_noise_alpha", None) is not None  # one noise for both passes of a step
    )
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # processes may split their rows differently, and these communicate in every pass
    hangs = is_distributed and (config.normalization == "standardize" or is_sharded(base.parameters()))
    # every new shape would be compiled; outside of training nobody waits
    slows = torch.compiler.is_compiling() or is_compiled(base) or not torch.is_grad_enabled()
    if changes or hangs or slows:
        return math.inf
    if base.device.type == "cpu":
        return CPU_PRICE
    return LAUNCHES / sum(parameter.numel() for parameter in layer.parameters())


def aligned_groups(
    batch: Mapping[str, Any],
    *,
    price: float,
    passes: tuple[int, int],
    shows_length: bool,
    starts_together: bool,
) -> list[AlignedRows]:
    """The rows of a batch, aligned in one group or in several.

    batch: input_ids, labels, and perhaps attention_mask and completion_mask. price, passes: of `groups_of`. The others
    are those of `align_rows`, which raises EchoDataError for a row without prompt or answer.
    """
    rows: list[Any] = [batch.get(name) for name in ("input_ids", "attention_mask", "labels", "completion_mask")]
    groups: list[list[int]] = []
    if 2 * batch["input_ids"].numel() > price:  # otherwise no group could save its price
        prompt, length = _lengths(*rows[1:])
        if min(prompt) > 0:  # `align_rows` names the row without prompt or answer
            groups = groups_of(prompt, length, price=price, passes=passes)
    parts = [rows]
    if len(groups) > 1:
        places = [torch.tensor(group, device=batch["input_ids"].device) for group in groups]
        parts = [[None if values is None else values[place] for values in rows] for place in places]
    return [align_rows(*part, shows_length=shows_length, starts_together=starts_together) for part in parts]


def _lengths(attention_mask: Any, labels: Tensor, completion_mask: Tensor | None) -> list[list[int]]:
    """Each row's tokens up to the boundary, and up to the last supervised one; the prompt is 0 without an answer."""
    is_token = torch.ones_like(labels) if attention_mask is None else attention_mask
    count = is_token.cumsum(1)  # (B, T)
    is_supervised = (labels != -100) & is_token.bool()  # (B, T)
    is_answer = is_supervised if completion_mask is None else is_supervised & completion_mask.bool()
    prompt = count.where(is_answer, labels.shape[1] + 1).amin(1) - 1  # (B,)
    prompt = prompt.where(is_answer.any(1), 0)
    length = count.where(is_supervised, 0).amax(1)  # (B,)
    return torch.stack([prompt, length]).tolist()  # one wait for the device


def groups_of(
    prompt: Sequence[int], length: Sequence[int], *, price: float, passes: tuple[int, int]
) -> list[list[int]]:
    """The rows in groups that run the fewest columns, each group's price included.

    prompt, length: each row's tokens up to the boundary and in all. price: in columns of one row. passes: how many run
    all columns, and how many only those of the answers.
    """
    keys = (length, prompt, [total - start for start, total in zip(prompt, length, strict=True)])
    ways = []
    for key in keys:
        order = sorted(range(len(length)), key=key.__getitem__)
        size = math.ceil(len(order) / MOST_BLOCKS)
        blocks = [order[start : start + size] for start in range(0, len(order), size)]
        shapes = [_shape([prompt[i] for i in block], [length[i] for i in block]) for block in blocks]
        cost, cuts = _cheapest_cuts(shapes, price, passes)
        ends = [*cuts[1:], len(blocks)]
        ways.append((cost, [[*chain(*blocks[a:b])] for a, b in zip(cuts, ends, strict=True)]))
    return min(ways, key=lambda way: way[0])[1]


class _Shape(NamedTuple):
    """What decides how many columns a group of rows runs."""

    rows: int
    longest_prompt: int
    shortest_prompt: int
    longest_answer: int
    longest: int

    def with_rows_of(self, other: _Shape) -> _Shape:
        return _Shape(
            self.rows + other.rows,
            max(self.longest_prompt, other.longest_prompt),
            min(self.shortest_prompt, other.shortest_prompt),
            max(self.longest_answer, other.longest_answer),
            max(self.longest, other.longest),
        )

    def columns(self, passes: tuple[int, int]) -> int:
        """Columns of all rows and passes, in the layout that `align_rows` takes."""
        wide, answer = self.longest_prompt + self.longest_answer - 1, self.longest_answer
        start_together = self.longest - 1, self.longest - self.shortest_prompt
        if sum(start_together) < wide + answer:
            wide, answer = start_together
        return self.rows * (passes[0] * wide + passes[1] * answer)


def _shape(prompt: list[int], length: list[int]) -> _Shape:
    answer = max(total - start for start, total in zip(prompt, length, strict=True))
    return _Shape(len(prompt), max(prompt), min(prompt), answer, max(length))


def _cheapest_cuts(shapes: list[_Shape], price: float, passes: tuple[int, int]) -> tuple[float, list[int]]:
    """The cost of the cheapest way to cut a list of blocks into groups, and the first block of each group."""
    costs, firsts = [0.0], [0]  # of the blocks before each place; the first block of the last group there
    for end in range(1, len(shapes) + 1):
        group = shapes[end - 1]
        best, first = math.inf, 0
        for start in range(end - 1, -1, -1):
            group = group if start == end - 1 else group.with_rows_of(shapes[start])
            cost = costs[start] + group.columns(passes) + price
            if cost < best:
                best, first = cost, start
        costs.append(best)
        firsts.append(first)
    cuts, end = [], len(shapes)
    while end:
        end = firsts[end]
        cuts.append(end)
    return costs[-1], cuts[::-1]


def in_groups(
    step: Callable[[AlignedRows, Any], EchoOutput], groups: list[AlignedRows], num_items: Tensor | int | None
) -> EchoOutput:
    """The output of a step that runs its rows in groups. step(rows, num_items): `training_step` on one of them."""
    if len(groups) == 1:
        return step(groups[0], num_items)
    if num_items is None:
        num_items = sum(rows.tokens for rows in groups)
    outputs = [step(rows, num_items) for rows in groups]
    shares = [len(rows.input_ids) / sum(len(rows.input_ids) for rows in groups) for rows in groups]

    def total(name: str, weights: Sequence[float]) -> Tensor:
        return torch.stack([weight * output[name] for weight, output in zip(weights, outputs, strict=True)]).sum(0)

    return EchoOutput(
        **{name: total(name, [1.0] * len(groups)) for name in NAMES if name in outputs[0]},
        routed=outputs[0].routed,
        echo_norm=total("echo_norm", shares),  # a mean over rows, as is the gate
        gate_mean=total("gate_mean", shares),
    )
