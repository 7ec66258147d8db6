"""The losses at the positions that predict answer tokens, a chunk of positions at a time.           (equation 7)

    CE(off)        cross-entropy of the echo-off pass, the model that is deployed
    CE(on)         cross-entropy of the echo-on pass
    distillation   τ² · KL(teacher ‖ student), with a stop-gradient on the teacher, which is the echo-on pass unless
                   `distillation_direction` says otherwise; at all answer positions, or only where the teacher gives
                   the target a higher probability (`distillation_tokens`)                                  [O]
    CE(prompt)     if prompts are trained on: cross-entropy of the echo-off pass at all other tokens        [O]

Read `terms_and_gradient` for the equation and `distillation` for its KL term. Every term is a sum over tokens; the step
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

CHUNK_ELEMENTS = 2**23  # of one (n, V) tensor; 32 MiB in float32; four exist at a time, thirteen on a GPU
BLOCK_ELEMENTS = 2**18  # for each thread of a CPU: 1 MiB in float32


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
            of_logits = _add_terms(sums, logits, targets_N[part], config, wants_gradient=bool(gradients))  # (n, V) each
            if gradients:
                for gradient, of_chunk in zip(gradients, torch.autograd.grad(logits, leaves, of_logits), strict=True):
                    gradient[part] = of_chunk  # (n, d)
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


@torch.no_grad()
def _add_terms(
    sums: Tensor, logits_nV: list[Tensor], targets_n: Tensor, config: EchoConfig, *, wants_gradient: bool
) -> list[Tensor]:
    """Add the terms of a chunk to `sums`, (terms,); return the loss's gradient with respect to its logits, (n, V) each.

    Without wants_gradient, as in validation, nothing of the chunk's size is allocated, and the list is empty.

    On a CPU it goes through the chunk in blocks of rows that fit into the processor's cache. [O]
    """
    n, V = logits_nV[0].shape
    threads = torch.get_num_threads()
    block = n if logits_nV[0].device.type != "cpu" else max(threads, threads * BLOCK_ELEMENTS // V)
    gradients = [torch.empty_like(x) for x in logits_nV] if wants_gradient else []  # (n, V) each
    for start in range(0, n, block):
        rows = slice(start, start + block)
        terms, of_rows = terms_and_gradient([x[rows] for x in logits_nV], targets_n[rows], config)
        sums += torch.stack([terms[name] for name in NAMES])  # (terms,)
        for gradient, of_block in zip(gradients, of_rows, strict=False):
            gradient[rows] = of_block
    return gradients


def terms_and_gradient(logits_nV: list[Tensor], targets_n: Tensor, config: EchoConfig) -> tuple[Terms, list[Tensor]]:
    """CE(off), or CE(off) + CE(on) + μ · distillation, of n positions; and the gradient of this, (n, V) for each pass.

        CE = −log p(target)                              ∂CE / ∂logits = p − 1[target]

    logits_nV: [off] or [off, on], (n, V). `loss_terms` applies w and adds CE(prompt); `step.training_step` divides by
    the number of tokens. Each pass over the logits is shared by the terms, metrics and gradients that need it.
    """
    at = targets_n[:, None]  # (n, 1)
    log_p = [F.log_softmax(x.float(), dim=-1) for x in logits_nV]  # (n, V) each
    log_p_target = [x.gather(1, at) for x in log_p]  # (n, 1) each
    p = [x.exp() for x in log_p]  # (n, V) each
    ce = [-x.sum() for x in log_p_target]  # scalars
    entropy = -(p[0] * log_p[0]).sum()  # scalar
    correct = (log_p[0].argmax(-1, keepdim=True) == at).sum().float()  # scalar
    minus_one = torch.full_like(log_p_target[0], -1.0)  # (n, 1)
    gradients = [x.scatter_add_(1, at, minus_one) for x in p]  # in place
    zero = torch.zeros_like(entropy)
    if len(ce) == 1:
        return Terms(ce[0], ce[0], zero, zero, zero, entropy, correct), gradients
    teacher, student = (1, 0) if config.distillation_direction == "on_to_off" else (0, 1)
    kl_n, of_student = distillation(log_p[teacher], log_p[student], config.distillation_temperature)  # (n,), (n, V)
    if config.distillation_tokens == "teacher_better":
        # If the student follows it only there, a teacher that is worse on average can't pull it off the answer. [O]
        is_better = log_p_target[teacher] > log_p_target[student]  # (n, 1)
        kl_n, of_student = kl_n.where(is_better[:, 0], 0.0), of_student.where(is_better, 0.0)
    gradients[student].add_(of_student, alpha=config.distillation_weight)  # the teacher gets none: stop-gradient
    kl = kl_n.sum()
    loss = ce[0] + ce[1] + config.distillation_weight * kl
    return Terms(loss, ce[0], ce[1], kl, zero, entropy, correct), gradients


def distillation(log_teacher_nV: Tensor, log_student_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """τ² · KL(teacher ‖ student) at temperature τ, (n,), and its gradient with respect to the student's logits, (n, V).

        KL = Σ t (log t − log s)                         ∂ τ² KL / ∂logits = τ (s − t)

    In: logits, or log-probabilities at temperature 1, (n, V) float32. τ² keeps the gradient's size roughly independent
    of τ. Σ (s − t) = 0 is added to the sum: no term is then below zero, and what rounding does to a whole distribution
    cancels, which may exceed a small KL.
    """
    log_t = F.log_softmax(log_teacher_nV / temperature, dim=-1)  # (n, V)
    log_s = F.log_softmax(log_student_nV / temperature, dim=-1)  # (n, V)
    t, s = log_t.exp(), log_s.exp()  # (n, V) each
    log_ratio, difference = log_t.sub_(log_s), s.sub_(t)  # (n, V) each, in place
    kl_n = torch.addcmul(difference, t, log_ratio).sum(-1)  # (n,)
    return temperature**2 * kl_n, difference.mul_(temperature)
