"""The losses at the positions that predict answer tokens, a chunk of positions at a time.           (equation 7)

    CE(off)        cross-entropy of the echo-off pass, the model that is deployed
    CE(on)         cross-entropy of the echo-on pass
    distillation   τ² · KL(teacher ‖ student), with a stop-gradient on the teacher, which is the echo-on pass unless
                   `distillation_direction` says otherwise; at all answer positions, or only where the teacher gives
                   the target a higher probability (`distillation_tokens`)                                  [O]
    CE(prompt)     if prompts are trained on: cross-entropy of the echo-off pass at all other tokens        [O]

Read `chunk_terms` for the equation and `distillation` for its KL term. Every term is a sum over tokens; the step
divides it by the supervised tokens of the whole optimizer step, so any split into micro-batches gives the same
gradient.

Logits of all positions would take most of the memory. So forward goes through the positions in chunks and computes for
each chunk the logits, the terms and their gradient with respect to the hidden states; backward only scales that
gradient and needs neither logits nor the output layer. The result does not depend on the chunk size.

Shapes: `N` supervised positions, `n` of a chunk, `M` that predict prompt tokens, `d` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from echo_lora.method.checkpointing import without_saving_hooks
from echo_lora.method.config import EchoConfig
from echo_lora.method.lm_head import Head

CHUNK_ELEMENTS = 2**23  # of one (n, V) tensor; about ten of them exist at a time, 32 MiB each in float32


@dataclass
class Terms(ModelOutput):
    """Sums over the supervised positions, or means; float32 scalars, of which only `loss` carries gradient.

    The names of the fields are the names in the step's output, in logs, plots and model cards.
    """

    loss: Tensor | None = None  # w · (CE(off) + r · (CE(on) + μ · distillation)) + CE(prompt)
    ce_off: Tensor | None = None
    ce_on: Tensor | None = None
    distillation: Tensor | None = None
    ce_prompt: Tensor | None = None
    entropy: Tensor | None = None  # of the echo-off distribution, in nats
    token_accuracy: Tensor | None = None  # positions where the echo-off argmax is the target


NAMES = tuple(field.name for field in fields(Terms))
ROUTED = ("ce_on", "distillation")  # the terms of the echo-on pass; zero in an unrouted step
SHOWN = ("ce_off", *ROUTED, "ce_prompt")  # the terms that logs and plots show, in this order


@torch.compiler.disable  # torch.compile can't trace torch.autograd.grad inside forward
def loss_terms(
    off_Nd: Tensor,
    on_Nd: Tensor | None,
    targets_N: Tensor,
    config: EchoConfig,
    head: Head | None = None,
    prompt: tuple[Tensor, Tensor] | None = None,
    *,
    answer_weight: float = 1.0,
) -> Terms:
    """Equation 7, as sums over positions.

    off_Nd, on_Nd: (N, d) hidden states of any float dtype; on_Nd is None in an unrouted step, whose CE(on) and
    distillation are zero. targets_N: (N,) int64, all supervised. head: the frozen output layer, (n, d) → (n, V); None
    if the states are already logits, (N, V). prompt: echo-off states (M, d) and targets (M,) of trained prompt tokens;
    they count in loss, entropy and accuracy. answer_weight: w, which affects `loss` only. With N = 0 every term is
    zero, but the loss stays connected to the states, so that no rank waits for a gradient.
    """
    terms = Terms(*_ChunkedTerms.apply(off_Nd, on_Nd, targets_N, config, head))
    if answer_weight != 1:
        terms["loss"] = answer_weight * terms["loss"]
    if prompt is not None:
        of_prompt = Terms(*_ChunkedTerms.apply(prompt[0], None, prompt[1], config, head))
        for name in ("loss", "entropy", "token_accuracy"):
            terms[name] = terms[name] + of_prompt[name]
        terms["ce_prompt"] = of_prompt["ce_off"]
    return terms


class _ChunkedTerms(torch.autograd.Function):
    """Computes the terms and the loss's gradient in forward, chunk by chunk; backward only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        off_Nd: Tensor,
        on_Nd: Tensor | None,
        targets_N: Tensor,
        config: EchoConfig,
        head: Head | None,
    ) -> tuple[Tensor, ...]:
        states = [off_Nd] if on_Nd is None else [off_Nd, on_Nd]
        gradients = [torch.empty_like(x) for x in states] if any(ctx.needs_input_grad) else []  # (N, d) each
        sums = torch.zeros(len(NAMES), device=off_Nd.device)  # (terms,)
        chunk = max(1, CHUNK_ELEMENTS // (off_Nd.shape[-1] if head is None else head.vocabulary))
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(bool(gradients)), without_saving_hooks():
                # (n, d) each, stop-gradient: the graph of a chunk ends here, and is freed with the chunk
                leaves = [x[part].detach().requires_grad_(bool(gradients)) for x in states]
                logits = [leaf if head is None else head(leaf) for leaf in leaves]  # (n, V) each
                terms = chunk_terms(logits, targets_N[part], config)
            if gradients:
                for gradient, of_chunk in zip(gradients, torch.autograd.grad(terms["loss"], leaves), strict=True):
                    gradient[part] = of_chunk  # (n, d)
            sums += torch.stack([terms[name] for name in NAMES]).detach()  # (terms,), stop-gradient: frees the graph
        ctx.save_for_backward(*gradients)
        loss, *others = (total.clone() for total in sums)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable  # the gradient has no graph: a second derivative must be an error, not a wrong number
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # in float32: a scaled loss overflows float16, and bfloat16 would round 1/N
        of_off, *of_on = ((gradient.float() * grad_loss).to(gradient.dtype) for gradient in ctx.saved_tensors)  # (N, d)
        return of_off, of_on[0] if of_on else None, None, None, None


def chunk_terms(logits_nV: list[Tensor], targets_n: Tensor, config: EchoConfig) -> Terms:
    """CE(off), or CE(off) + CE(on) + μ · distillation, for a chunk of positions. logits_nV: [off] or [off, on], (n, V).

    `loss_terms` applies w and adds CE(prompt); `step.training_step` divides by the number of tokens.
    """
    off = logits_nV[0].float()  # (n, V)
    log_off = F.log_softmax(off, dim=-1)  # (n, V)
    ce_off = F.nll_loss(log_off, targets_n, reduction="sum")  # scalar
    with torch.no_grad():  # stop-gradient: metrics
        entropy = -(log_off.exp() * log_off).sum()  # scalar
        correct = (off.argmax(-1) == targets_n).sum().float()  # scalar
    zero = ce_off.new_zeros(())
    if len(logits_nV) == 1:
        return Terms(ce_off, ce_off, zero, zero, zero, entropy, correct)
    on = logits_nV[1].float()  # (n, V)
    log_on = F.log_softmax(on, dim=-1)  # (n, V)
    ce_on = F.nll_loss(log_on, targets_n, reduction="sum")  # scalar
    on_teaches = config.distillation_direction == "on_to_off"
    teacher, student = (on, off) if on_teaches else (off, on)  # (n, V) each
    kl_n = distillation(teacher_NV=teacher, student_NV=student, temperature=config.distillation_temperature)  # (n,)
    if config.distillation_tokens == "teacher_better":
        log_teacher, log_student = (log_on, log_off) if on_teaches else (log_off, log_on)  # (n, V) each
        kl_n = kl_n.where(is_better(log_teacher, log_student, targets_n), 0.0)  # (n,)
    kl = kl_n.sum()
    return Terms(ce_off + ce_on + config.distillation_weight * kl, ce_off, ce_on, kl, zero, entropy, correct)


@torch.no_grad()
def is_better(log_teacher_NV: Tensor, log_student_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Where the teacher gives the target a higher probability than the student does; (N,) bool, without gradient.

    If the student follows it only there, a teacher that is worse on average can't pull it away from the answer. [O]
    """
    at = targets_N[:, None]  # (N, 1)
    return (log_teacher_NV.gather(1, at) > log_student_NV.gather(1, at))[:, 0]  # (N,)


def distillation(*, teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """τ² · KL(teacher ‖ student) at temperature τ; (N, V) logits in, (N,) float32 out.

    τ² keeps the gradient's size roughly independent of τ.
    """
    # (N, V), stop-gradient: the student moves towards the teacher, not the teacher towards the student
    teacher = F.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)
    student = F.log_softmax(student_NV.float() / temperature, dim=-1)  # (N, V)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)  # (N,)
