"""One training step of Echo-LoRA: align rows, echo-off pass, echo, echo-on pass, losses.

    rows     prompts left-padded, answers right-padded: all boundaries fall in column P-1 (mostly: see below)
    off      the ordinary pass; source layers are read at the boundary                    (equation 1)
    z, δ     echo representation, projection and gate                                     (equations 2, 3)
             z carries no gradient to the source layers, unless `source_gradient` lets it
    on       the pass again with δ injected                                               (equations 4, 6)
    loss     w · (CE(off) + CE(on) + μ · distillation) [+ CE(off) at prompt tokens]       (equation 7)

Before the boundary the two passes are identical, for nothing is injected there and a causal model's states can't
depend on later tokens. The echo-on pass therefore runs on the last A columns only and attends to the keys and
values of the echo-off pass, which stay in the autograd graph: losses and gradients are those of a second full
pass. [O] Where that does not hold (`why_full`), the second pass is run in full.

    P-1 columns           A columns
    ┌────────────────────┬─┬───────────────┐
    │ · · prompt of row 0│β│ answer …      │   off: all columns
    │ prompt of row 1    │β│ answer … · ·  │   on:  the last A columns, from β on
    └────────────────────┴─┴───────────────┘
Column c predicts the token of column c+1; the last token of a row predicts nothing and is not run. Rows with a long
prompt beside rows with a long answer would make that wide: where it is cheaper, all rows start in one column instead,
and the echo-on pass runs from the first boundary on.

Legend: `B` rows, `T` tokens in a row, `P` prompt, `A` answer, `d` hidden width, `V` vocabulary, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

from echo_lora.errors import EchoModelError
from echo_lora.method.alignment import AlignedRows, injection_mask
from echo_lora.method.config import EchoConfig
from echo_lora.method.echo import EchoNetworks, apply_control, echo_representation
from echo_lora.method.injection import Injection, Injector
from echo_lora.method.lm_head import Head
from echo_lora.method.losses import NAMES, Terms, loss_terms
from echo_lora.method.prefix import PrefixRecorder, PrefixSharing


@dataclass
class EchoOutput(Terms):
    """What one training step gives; scalars in float32, and only `loss` carries gradient.

    The terms are sums over tokens divided by `num_items_in_batch`; over the micro-batches of one optimizer step they
    add up to means. Entropy and accuracy are those of all supervised tokens, `ce_off`, `ce_on` and `distillation` those
    of answer tokens; `ce_prompt` is None where prompts are not trained on.
    """

    routed: Tensor | None = None  # bool: whether the echo-on pass was run
    echo_norm: Tensor | None = None  # mean norm of δ
    gate_mean: Tensor | None = None  # mean gate, in (0, 1)


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
    """Both passes and all losses of one (micro-)batch.

    forward: the plain PEFT model. sharing: None runs the echo-on pass in full. head: None leaves the logits to the
    model, for all answer columns at once (all columns, where prompts are trained on). num_items: supervised tokens of
    the whole optimizer step, of prompts too where they are trained on; by default those of this batch.
    answer_weight: weight of the answer's losses beside CE(prompt). echo_only:
    freezes the adapter inside, for an echo-on pass that trains the echo networks alone. With `is_routed` false this is
    a plain LoRA step, with logits at predicting positions only.
    """
    supervised = rows.targets != -100  # (B, A)
    targets_N = rows.targets[supervised]  # (N,)
    A, T = rows.targets.shape[1], rows.input_ids.shape[1]

    # echo-off pass
    recorder = None
    if is_routed and sharing is not None:
        recorder = PrefixRecorder(rows.prefix_length, sharing.depth, is_checkpointed=is_checkpointed)
    with (
        reading(source_layers if is_routed else [], rows.boundary, T, keeps_graph=config.source_gradient) as hidden,
        sharing.using(recorder) if sharing is not None else nullcontext(),
    ):
        off, off_BKd = _run(forward, head, rows, 0, None, keep=A if rows.prompt_targets is None else T)
    off_Nd = off_BKd[:, -A:][supervised]  # (N, d)

    on_Nd, echo_norm, gate_mean = None, None, None
    if is_routed:
        # echo
        z = apply_control(echo_representation(hidden, echo.standardize), config.echo_kind)  # (B, d)
        deltas, echo_norm, gate_mean = echo(z)
        mask_BA = injection_mask(rows.targets, config.injection_mask)

        # echo-on pass
        if sharing is not None and recorder is not None:
            prefix = recorder.prefix(is_detached=echo_only is not None)
            with echo_only or nullcontext(), injector.injecting(Injection(deltas, mask_BA)), sharing.using(prefix):
                _, on_BAd = _run(forward, head, rows, rows.prefix_length, prefix, keep=A)
        else:
            before = mask_BA.new_zeros(len(mask_BA), rows.prefix_length)
            injection = Injection(deltas, torch.cat([before, mask_BA], dim=1))
            with echo_only or nullcontext(), injector.injecting(injection):
                _, on_BAd = _run(forward, head, rows, 0, None, keep=A)
        on_Nd = on_BAd[supervised]  # (N, d)

    # losses
    tokens, prompt = len(targets_N), None
    if rows.prompt_targets is not None:
        is_target = rows.prompt_targets != -100  # (B, T)
        prompt = off_BKd[is_target], rows.prompt_targets[is_target]  # (M, d), (M,)
        tokens += len(prompt[1])
    terms = loss_terms(
        off_Nd,
        on_Nd,
        targets_N,
        config,
        head,
        prompt,
        answer_weight=answer_weight * (config.routed_loss_scale if is_routed else 1.0),
    )
    count = max(tokens, 1) if num_items is None else torch.as_tensor(num_items, device=off_Nd.device)
    means = {name: terms[name] / count for name in NAMES}
    if router_aux_loss_coef:
        # a mean over the batch; over the micro-batches of a step these shares add up to 1
        aux_loss = off.aux_loss.to(off_Nd.device) * tokens / count
        means["loss"] = means["loss"] + router_aux_loss_coef * aux_loss
    if prompt is None:
        del means["ce_prompt"]
    zero = means["ce_off"].new_zeros(())
    return EchoOutput(
        **means,
        routed=torch.tensor(is_routed, device=off_Nd.device),
        echo_norm=zero if echo_norm is None else echo_norm,
        gate_mean=zero if gate_mean is None else gate_mean,
    )


def _run(
    forward: Callable[..., Any], head: Head | None, rows: AlignedRows, start: int, prefix: Cache | None, *, keep: int
) -> tuple[Any, Tensor]:
    """The plain model on columns `start` …; its output, and what `head` makes logits of at the last `keep` columns."""
    with head.intercepting() if head is not None else nullcontext() as states:
        output = forward(
            input_ids=rows.input_ids[:, start:],
            attention_mask=rows.attention_mask,
            position_ids=None if rows.position_ids is None else rows.position_ids[:, start:],
            cache=prefix,
            use_cache=False,
            logits_to_keep=keep,
            # the auxiliary loss is that of the echo-off pass, and its mask must fit the columns
            **({"output_router_logits": False} if prefix is not None else {}),
        )
    return output, (output.logits if states is None else states[0])[:, -keep:].to(rows.targets.device)


@contextmanager
def reading(
    layers: list[nn.Module], column_B: Tensor, columns: int, *, keeps_graph: bool = False
) -> Iterator[list[Tensor]]:
    """Collect each layer's output at each row's column, (B, d), during the pass inside.

    keeps_graph: False stops the gradient here, so that the echo is a signal about the prompt, not a second path to
    train it. [P, R]
    """
    states: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output  # (B, T, d)
        if hidden.dim() != 3 or hidden.shape[1] != columns:
            raise EchoModelError(
                f"{type(module).__name__} returns hidden states of shape {tuple(hidden.shape)}, but the echo needs "
                f"{columns} tokens in each row. Choose source_layers whose output holds every token."
            )
        at = torch.arange(len(hidden), device=hidden.device), column_B.to(hidden.device)
        if not keeps_graph:
            states.append(hidden.detach()[at])  # (B, d), stop-gradient
            return
        # a checkpointed layer counts the tensors it saves, and runs again without this hook
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
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
    """Weight of a mixture-of-experts model's load-balancing loss, where it is switched on."""
    text = config.get_text_config()
    return float(text.router_aux_loss_coef) if getattr(text, "output_router_logits", False) else 0.0
