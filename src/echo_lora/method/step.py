"""One training step of Echo-LoRA: echo-off pass, echo, echo-on pass, losses.

    off      the ordinary forward pass; source layers are read at the boundary β        (equation 1)
    z, δ     echo representation, then projection and gate                              (equations 2, 3)
    on       the forward pass again, with δ injected                                    (equations 4, 6)
    loss     w · (CE(off) + r · (CE(on) + μ · distillation)) + CE(prompt)               (equation 7)

Routing (equation 5) decides which steps have an echo-on pass; with r = 0 this is a plain LoRA step. μ is μ_k of
`routing.distillation_weight`, which `EchoModel.echo_losses` puts into the configuration of the step. CE(prompt) is the
echo-off pass's cross-entropy of prompts that are trained on, and w = answer_weight · (routed_loss_scale if r else 1).

Why the second pass is nearly free [O]: nothing is injected before the boundary, and the states of a causal model don't
depend on later tokens, so before the boundary both passes are identical. The echo-on pass runs on the last A columns
only and attends to the keys and values of the echo-off pass. These stay in the autograd graph, so losses and gradients
are exactly those of a second full pass; with dropout, of one that has the same masks on the prefix. Where that does not
hold (`sharing.why_full`), the second pass runs in full.

    P-1 columns           A columns
    ┌────────────────────┬─┬───────────────┐
    │ · · prompt of row 0│β│ answer …      │   off: all columns
    │ prompt of row 1    │β│ answer … · ·  │   on:  the last A columns, starting at β
    └────────────────────┴─┴───────────────┘
Column c predicts the token of column c+1; the last token of a row predicts nothing and is not run. `alignment.py` moves
the padding so that all boundaries are in column P-1. If both passes would run fewer columns with all rows starting in
one column, as with a long prompt next to a long answer, that layout is used: the echo-on pass starts at the first
boundary, P is the shortest prompt, and A is what follows.

Legend: `B` rows, `T` tokens in a row, `P` prompt, `A` answer, `d` hidden width, `V` vocabulary, `L` decoder layers.
Also used here: `N` supervised answer positions of all rows, `M` positions that predict trained prompt tokens, and `K`
columns whose final states are kept: A, or T if prompts are trained on. Without `head` the states are logits: read V for
d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import Cache, PretrainedConfig

from echo_lora.errors import EchoModelError
from echo_lora.method.alignment import AlignedRows, injection_mask
from echo_lora.method.checkpointing import without_saving_hooks
from echo_lora.method.config import EchoConfig
from echo_lora.method.echo import EchoNetworks, apply_control, echo_representation
from echo_lora.method.injection import Injection, Injector
from echo_lora.method.lm_head import Head
from echo_lora.method.losses import NAMES, Terms, loss_terms
from echo_lora.method.prefix import PrefixRecorder, PrefixSharing


@dataclass
class EchoOutput(Terms):
    """The result of one training step; float32 scalars, of which only `loss` carries gradient.

    Terms are sums over tokens divided by `num_items_in_batch`; over the micro-batches of one optimizer step they add up
    to means. Entropy and accuracy cover all supervised tokens; `ce_off`, `ce_on` and `distillation` cover answer
    tokens; `ce_prompt` is None unless prompts are trained on.
    """

    routed: Tensor | None = None  # bool, on the CPU: whether there was an echo-on pass
    echo_norm: Tensor | None = None  # mean norm of δ
    gate_mean: Tensor | None = None  # mean gate, in (0, 1)
    logits = None  # not a field: the step keeps none, but trainers such as ms-swift's ask


def training_step(
    forward: Callable[..., Any],
    source_layers: list[nn.Module],
    echo: EchoNetworks,
    injector: Injector,
    config: EchoConfig,
    rows: AlignedRows,
    *,
    is_routed: bool,
    sharing: PrefixSharing | None,
    head: Head | None,
    is_checkpointed: bool = False,
    num_items: Tensor | int | None = None,
    answer_weight: float = 1.0,
    echo_only: AbstractContextManager | None = None,
    router_aux_loss_coef: float = 0.0,
) -> EchoOutput:
    """Both passes and all losses of one (micro-)batch. Longer than most functions, to show the equations in order.

    forward: the plain PEFT model. is_routed: r_k of equation 5; if false, this is a plain LoRA step with logits only at
    supervised positions. sharing: None runs the echo-on pass in full. head: None leaves the logits to the model, for
    all kept columns at once. num_items: supervised tokens of the whole optimizer step; by default those of this batch.
    answer_weight: weight of the answer losses relative to CE(prompt). echo_only: freezes the adapter inside, so that
    the echo-on pass trains only the echo networks.
    """
    A, T = rows.targets.shape[1], rows.input_ids.shape[1]

    # equation 1: the echo-off pass
    recorder = None
    if is_routed and sharing is not None:
        recorder = PrefixRecorder(rows.prefix_length, sharing.depth, is_checkpointed=is_checkpointed)
    with (
        record_function("echo-off pass"),  # the names of the step's parts in torch's profiler
        reading(source_layers if is_routed else [], rows.boundary, T, keeps_graph=config.source_gradient) as hidden,
        sharing.using(recorder) if sharing is not None else nullcontext(),
    ):
        keep = A if rows.prompt_targets is None else T
        off, off_BKd = _run(forward, head, rows, 0, None, keep=keep)  # (B, K, d)

    on_BAd = echo_norm = gate_mean = None
    if is_routed:
        # equations 2 and 3: z, then δ for each target module
        with record_function("echo networks"):
            z = apply_control(echo_representation(hidden, echo.standardize), config.echo_kind)  # (B, d)
            deltas, echo_norm, gate_mean = echo(z)  # each δ: (B, width of its module)

        # equations 4 and 6: the echo-on pass, on the answer columns or on all of them
        mask = injection_mask(rows.targets, config.injection_mask)  # (B, A)
        start, prefix = 0, None
        if sharing is not None and recorder is not None:
            # echo_only: stop-gradient, because the prefix belongs to the adapter, which this pass must not train
            start, prefix = rows.prefix_length, recorder.prefix(is_detached=echo_only is not None)
        else:
            mask = F.pad(mask, (rows.prefix_length, 0))  # (B, T): nothing is injected before the boundary
        with (
            record_function("echo-on pass"),
            echo_only or nullcontext(),
            # the model gets the prefix below, for its mask and positions; its attention modules get it here, by hooks
            injector.injecting(Injection(deltas, mask)),
            sharing.using(prefix) if sharing is not None else nullcontext(),
        ):
            _, on_BAd = _run(forward, head, rows, start, prefix, keep=A)  # (B, A, d)

    # equation 7: the losses
    weight = answer_weight * (config.routed_loss_scale if is_routed else 1.0)
    terms = _loss_sums(off_BKd, on_BAd, rows, config, head, weight)
    count = max(rows.tokens, 1) if num_items is None else num_items
    if isinstance(count, Tensor):  # a number would wait for the device to be copied there
        count = count.to(off_BKd.device)
    means = {name: terms[name] / count for name in NAMES}
    if router_aux_loss_coef:
        # the model's loss is a mean over the batch; weighted by its share of the tokens, it adds up over micro-batches
        means["loss"] = means["loss"] + router_aux_loss_coef * (off.aux_loss.to(off_BKd.device) * rows.tokens / count)
    if rows.prompt_targets is None:
        del means["ce_prompt"]
    zero = means["ce_off"].new_zeros(())
    return EchoOutput(
        **means,
        routed=torch.tensor(is_routed),
        echo_norm=zero if echo_norm is None else echo_norm,
        gate_mean=zero if gate_mean is None else gate_mean,
    )


@record_function("losses")
def _loss_sums(
    off_BKd: Tensor, on_BAd: Tensor | None, rows: AlignedRows, config: EchoConfig, head: Head | None, weight: float
) -> Terms:
    """Equation 7 as sums over tokens. weight: of the answer losses."""
    A = rows.targets.shape[1]
    answers = rows.answers  # (N,), (N,): where both cross-entropies and the distillation are
    targets_N = rows.targets[answers]  # (N,)
    off_Nd = off_BKd[:, -A:][answers]  # (N, d)
    on_Nd = None if on_BAd is None else on_BAd[answers]  # (N, d)
    prompt = None
    if rows.prompt_targets is not None and rows.prompts is not None:
        prompt = off_BKd[rows.prompts], rows.prompt_targets[rows.prompts]  # (M, d), (M,)
    return loss_terms(off_Nd, on_Nd, targets_N, config, head, prompt, answer_weight=weight)


def _run(
    forward: Callable[..., Any], head: Head | None, rows: AlignedRows, start: int, prefix: Cache | None, *, keep: int
) -> tuple[Any, Tensor]:
    """Run the plain model on the columns from `start`; its output, and the states (or logits) of the last `keep`."""
    with head.intercepting() if head is not None else nullcontext() as states:
        output = forward(
            input_ids=rows.input_ids[:, start:],  # (B, T - start)
            attention_mask=rows.attention_mask,  # (B, T): the prefix is attended to
            position_ids=None if rows.position_ids is None else rows.position_ids[:, start:],  # (B, T - start)
            cache=prefix,
            use_cache=False,
            logits_to_keep=keep,
            # the auxiliary loss is the echo-off pass's; on a prefix, its mask would not fit the columns
            **({"output_router_logits": False} if prefix is not None else {}),
        )
    kept = (output.logits if states is None else states[0])[:, -keep:]  # (B, keep, d)
    return output, kept.to(rows.targets.device)


@contextmanager
def reading(
    layers: list[nn.Module], column_B: Tensor, columns: int, *, keeps_graph: bool = False
) -> Iterator[list[Tensor]]:
    """Collect h^s of equation 1, each layer's output at each row's column, (B, d), during the pass inside.

    keeps_graph: let gradient flow from the echo into the source layers. By default it stops here, so that the echo is a
    signal about the prompt, not a second path to train it. [P, R]
    """
    states: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output  # (B, T, d)
        if hidden.dim() != 3 or hidden.shape[1] != columns:
            raise EchoModelError(
                f"{type(module).__name__} returns hidden states of shape {tuple(hidden.shape)}, but the echo needs "
                f"{columns} tokens in each row. Choose source_layers whose output holds every token."
            )
        at = torch.arange(len(hidden), device=hidden.device), column_B.to(hidden.device)  # (B,), (B,)
        if not keeps_graph:
            states.append(hidden.detach()[at])  # (B, d), stop-gradient: the echo must not train the source layers
            return
        # a checkpointed layer counts its saved tensors, and is recomputed without this hook
        with without_saving_hooks():
            states.append(hidden[at])  # (B, d)

    handles = [layer.register_forward_hook(read) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
    if len(states) != len(layers):
        raise EchoModelError(
            f"{len(layers)} source layers returned {len(states)} states: the model skips some of them (such as image "
            "layers in a text-only batch) or runs some more than once. Choose other source_layers."
        )


def router_aux_loss_coef(config: PretrainedConfig) -> float:
    """Weight of a mixture-of-experts model's load-balancing loss; 0 if it is off."""
    text = config.get_text_config()
    return float(text.router_aux_loss_coef) if getattr(text, "output_router_logits", False) else 0.0
