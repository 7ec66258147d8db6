"""The three loss terms, over the positions that predict answer tokens.                 (equation 7)

    CE(off)        cross-entropy of the echo-off pass: the model that is deployed
    CE(on)         cross-entropy of the echo-on pass
    distillation   τ² · KL(teacher ‖ student), the teacher without gradient

Every term is a sum over tokens divided by `num_items`, the number of supervised tokens of the whole optimizer
step, so that any split of a step into micro-batches gives the same gradient.

Shapes: `N` supervised positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from echo_lora.config import EchoConfig

CHUNK = 1024  # positions whose float32 log-probabilities exist at one time


class Terms(NamedTuple):
    """Sums over the supervised positions; float32 scalars."""

    ce_off: Tensor
    ce_on: Tensor
    distillation: Tensor
    entropy: Tensor  # of the echo-off distribution, in nats, without gradient
    correct: Tensor  # positions where the echo-off argmax is the target, without gradient


def loss_terms(off_NV: Tensor, on_NV: Tensor | None, targets_N: Tensor, config: EchoConfig) -> Terms:
    """Sums of all terms.

    off_NV, on_NV: (N, V) logits of any float dtype; on_NV is None in a step that is not routed, whose
    CE(on) and distillation are zero. targets_N: (N,) int64, all of them supervised. With N = 0 every term
    is a zero that is still connected to the logits, so that no rank waits for a gradient.
    """

    def chunk_terms(off: Tensor, on: Tensor | None, targets: Tensor) -> Terms:
        log_off = F.log_softmax(off.float(), dim=-1)  # (n, V)
        ce_off = F.nll_loss(log_off, targets, reduction="sum")
        with torch.no_grad():
            entropy = -(log_off.exp() * log_off).sum()
            correct = (off.argmax(-1) == targets).sum().float()
        if on is None:
            zero = ce_off.new_zeros(())
            return Terms(ce_off, zero, zero, entropy, correct)
        ce_on = F.cross_entropy(on.float(), targets, reduction="sum")
        if config.distillation_direction == "on_to_off":
            kl = distillation(teacher_NV=on, student_NV=off, temperature=config.distillation_temperature)
        else:
            kl = distillation(teacher_NV=off, student_NV=on, temperature=config.distillation_temperature)
        return Terms(ce_off, ce_on, kl, entropy, correct)

    if len(targets_N) <= CHUNK:
        return chunk_terms(off_NV, on_NV, targets_N)
    # Recompute each chunk's float32 tensors in backward rather than keep all of them.
    chunks = [
        _recomputed(chunk_terms, off_NV[i : i + CHUNK], None if on_NV is None else on_NV[i : i + CHUNK], t)
        for i, t in zip(range(0, len(targets_N), CHUNK), targets_N.split(CHUNK), strict=True)
    ]
    return Terms(*(torch.stack(term).sum() for term in zip(*chunks, strict=True)))


def distillation(*, teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """τ² · Σ_N KL(teacher ‖ student) at temperature τ; (N, V) logits in, a float32 scalar out.

    τ² keeps the gradient's size independent of τ. Gradient flows to the student only.
    """
    teacher = F.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)  # stop-gradient: the teacher leads
    student = F.log_softmax(student_NV.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def _recomputed(function: Callable[..., Terms], *args: Tensor | None) -> Terms:
    return checkpoint(function, *args, use_reentrant=False)
