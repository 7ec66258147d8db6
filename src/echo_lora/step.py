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
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from echo_lora.config import EchoConfig
from echo_lora.echo import EchoNetworks, apply_control, echo_representation
from echo_lora.errors import EchoDataError, EchoModelError
from echo_lora.head import Head
from echo_lora.inject import Injection, Injector
from echo_lora.losses import loss_terms
from echo_lora.prefix import PrefixRecorder, PrefixSharing, cache_argument

ROPE_OF_FIXED_ANGLES = ("default", "linear", "llama3", "yarn", "proportional", "mrope")


@dataclass
class EchoOutput(ModelOutput):
    """What one training step gives; scalars in float32, and only `loss` carries gradient.

    The terms, the entropy and the accuracy are sums over tokens divided by `num_items_in_batch`; over the
    micro-batches of one optimizer step they add up to means. Entropy and accuracy are those of all supervised tokens,
    `ce_off`, `ce_on` and `distillation` those of answer tokens.
    """

    loss: Tensor | None = None
    ce_off: Tensor | None = None
    ce_on: Tensor | None = None
    distillation: Tensor | None = None
    routed: Tensor | None = None  # bool: whether the echo-on pass was run
    echo_norm: Tensor | None = None  # mean norm of δ
    gate_mean: Tensor | None = None  # mean gate, in (0, 1)
    entropy: Tensor | None = None
    token_accuracy: Tensor | None = None
    ce_prompt: Tensor | None = None  # None where prompts are not trained on


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
            "Drop such rows before training, or raise max_length if their answers were cut off."
        )
    for row in (first == 0).nonzero().flatten().tolist():
        raise EchoDataError(
            f"row {row} of the batch has no prompt: its first token is already an answer token, so there is no "
            "boundary to read the echo from. Give the row a prompt, or use a completion-only loss."
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


def angles_depend_on_length(config: Any) -> bool:
    """Whether the model's rotary angles depend on the largest position of a batch, as with dynamic NTK or LongRoPE."""

    def kinds(parameters: Any) -> Iterator[str | None]:
        if isinstance(parameters, dict):
            yield parameters.get("rope_type", parameters.get("type"))
            for of_layer_type in parameters.values():
                yield from kinds(of_layer_type)

    text = config.get_text_config()
    found = {kind for name in ("rope_parameters", "rope_scaling") for kind in kinds(getattr(text, name, None))}
    return not found <= {None, *ROPE_OF_FIXED_ANGLES}


def why_full(base_model: PreTrainedModel) -> str | None:
    """Why the echo-on pass can't share the prefix with the echo-off pass exactly; None if it can."""
    config = base_model.config.get_text_config()
    if getattr(base_model, "_is_stateful", False):
        return f"{type(base_model).__name__} carries a recurrent state"
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"the model has layers of type {', '.join(sorted(others))}"
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or []):
        return "some layers use the keys and values of others"
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"attention {config._attn_implementation!r} has not been shown to agree with and without a prefix"
    if cache_argument(base_model.forward) is None:
        return f"{type(base_model).__name__} takes no key-value cache"
    return None


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
    loss, ce_off, ce_on, distillation, entropy, correct, ce_prompt = (term / count for term in terms)
    if router_aux_loss_coef:
        # a mean over the batch; over the micro-batches of a step these shares add up to 1
        loss = loss + router_aux_loss_coef * off.aux_loss.to(loss.device) * tokens / count
    zero = ce_off.new_zeros(())
    return EchoOutput(
        loss=loss,
        ce_off=ce_off,
        ce_on=ce_on,
        distillation=distillation,
        routed=torch.tensor(is_routed, device=loss.device),
        echo_norm=zero if echo_norm is None else echo_norm,
        gate_mean=zero if gate_mean is None else gate_mean,
        entropy=entropy,
        token_accuracy=correct,
        ce_prompt=None if prompt is None else ce_prompt,
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
                f"{type(module).__name__} gives hidden states of shape {tuple(hidden.shape)} where the echo reads "
                f"those of {columns} tokens in each row. Choose source_layers whose output holds every token."
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
            f"{len(layers)} source layers gave {len(states)} states: the model skips some of them (as those that "
            "attend to images, in a text), or runs some more than once. Choose other source_layers."
        )
