"""Trial: whether the step is exact on a base model, tested once by running it.   [O]

On a few tokens of our own, before the first step:

    later tokens       a token must not see them, or the state at the boundary would leak the answer
    padding            before a row it must change nothing, or all rows start in one column
    positions          the model must use position_ids, or count positions itself
    prefix             cached keys and values must replace it exactly, or the second pass runs in full
    kernels            the modules that the echo enters must run; fused kernels read their weights and never call them

On a slice of the first batch that is routed, because an attention implementation may go other ways in long rows:

    prefix             the same, in the logits and in the gradient of the embeddings

`sharing.why_full` reads what the configuration says; the trial finds what it does not say, without asking for the name
of a model or of an attention implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import Cache, PreTrainedModel

from echo_lora.errors import EchoModelError
from echo_lora.method.alignment import AlignedRows
from echo_lora.method.checkpointing import is_sharded, without_saving_hooks
from echo_lora.method.injection import is_weight_probe
from echo_lora.method.kernels import why_not_run
from echo_lora.method.lm_head import Head, without_trace
from echo_lora.method.prefix import PrefixRecorder, PrefixSharing
from echo_lora.method.refusals import WORKING
from echo_lora.method.sharing import why_full

PREFIX, SUFFIX, PADDING = 6, 6, 3  # columns of the trial
PROBE_COLUMNS = 2  # columns on which the output layer is compared with the model's own logits
SLICE = 2, 448, 64  # at most as many rows of a batch, and columns of its prefix and suffix
SHARE_OF_BATCH = 1 / 4  # at most as many of its tokens, so that the trial takes less than a step
AGREEING = 0.9  # share of the tokens that must agree: rounding may flip a router's choice of expert in a few


class Abilities:
    """Whether a base model can run on a cached prefix, and whether its output layer can be used directly; cached.

    entries: the modules that the echo enters, by name.
    """

    def __init__(self, sharing: PrefixSharing, entries: Mapping[str, nn.Module]) -> None:
        self._sharing = sharing
        self._entries = entries
        self._tried: dict[bool, str | None] = {}  # reason against sharing, by whether the trial included a prefix
        self._tried_on_batch = False
        self._why_full_on_batch: str | None = None
        self._head: Head | None = None
        self._why_no_head: str | None = None
        self._head_is_known = False

    def why_full(self, forward: Callable[..., Any], base: PreTrainedModel, device: torch.device | None) -> str | None:
        """Why the prefix can't be shared, from the configuration or from the trial. device: None skips the trial."""
        reason = why_full(base) or self._sharing.why_not or self._why_full_on_batch
        if device is None:
            return reason
        if (reason is None) not in self._tried:
            if not self._tried:
                refuse_bypass_by_trial(forward, base, self._entries, device)
            sharing = self._sharing if reason is None else None
            self._tried[reason is None] = why_full_by_trial(forward, base, sharing, device)
        return reason or self._tried[True]

    def why_full_on(self, forward: Callable[..., Any], base: PreTrainedModel, rows: AlignedRows) -> str | None:
        """Why these rows can't share their prefix; tested on the first rows that have one and are trained on."""
        if not self._tried_on_batch and rows.prefix_length > 0 and torch.is_grad_enabled():
            self._tried_on_batch = True
            self._why_full_on_batch = why_full_on_batch(forward, base, self._sharing, rows)
        return self._why_full_on_batch

    def head(
        self, forward: Callable[..., Any], base: PreTrainedModel, rows: AlignedRows
    ) -> tuple[Head | None, str | None]:
        """The output layer if the losses may apply it themselves, and otherwise why not; tested on the first row."""
        if not self._head_is_known:
            self._head_is_known = True
            self._why_no_head = "the model names no output layer"
            if base.get_output_embeddings() is not None:
                head = Head(base)
                positions = None if rows.position_ids is None else rows.position_ids[:1, -PROBE_COLUMNS:]
                self._why_no_head = head.why_not(forward, rows.input_ids[:1, -PROBE_COLUMNS:], positions)
                self._head = head if self._why_no_head is None else None
        return (None if self._head is None or self._head.is_trained else self._head), self._why_no_head


@torch.compiler.disable  # torch.compile of the whole model can't trace into it
@record_function("self-check")
def why_full_by_trial(
    forward: Callable[..., Any], base_model: PreTrainedModel, sharing: PrefixSharing | None, device: torch.device
) -> str | None:
    """Why the echo-on pass can't share the prefix, found by running a few tokens; None if it can.

    forward: the plain PEFT model. sharing: None tests only that tokens don't see later ones. Raises EchoModelError if
    they do, or if the model fails on token ids alone. Longer than most functions: it is one experiment.
    """
    name = type(base_model).__name__
    first, second, later, others = _tokens(base_model).to(device).split([PREFIX, PREFIX, SUFFIX, SUFFIX])
    rows = [torch.cat(row) for row in ((first, later), (first, others), (second, later), (second, others))]
    padded = torch.cat([first[:1].expand(PADDING), rows[0][:-PADDING]])
    input_ids = torch.stack([*rows, padded])  # (5, T)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[4, :PADDING] = 0
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)

    def logits(rows: slice, start: int = 0, **kwargs: Any) -> Tensor:
        given = {"input_ids": input_ids[rows, start:], "attention_mask": attention_mask[rows]}
        return forward(**given, use_cache=False, output_router_logits=False, **kwargs).logits.float()  # (rows, T, V)

    # eager: compiling for the shapes of a trial would be a waste
    with in_mode(base_model, training=False), without_trace(device), torch.compiler.set_stance("force_eager"):
        try:
            stock = logits(slice(4))
        except Exception as error:
            raise EchoModelError(_fails(base_model, error)) from error
        same = _Agreement(base_model, stock)
        # two pairs, because rounding may flip a router's choice of expert in one of them
        if not same(stock[0, :PREFIX], stock[1, :PREFIX]) and not same(stock[2, :PREFIX], stock[3, :PREFIX]):
            raise EchoModelError(
                f"the tokens of {name} see later ones, or two runs of it differ, so the state at the boundary would "
                f"leak the answer. The echo needs a causal language model. {WORKING}"
            )
        if sharing is None:
            return None
        recorder = PrefixRecorder(PREFIX, sharing.depth, is_checkpointed=False)
        try:
            with sharing.using(recorder):
                whole = logits(slice(5), position_ids=position_ids)
            prefix = recorder.prefix()
            with sharing.using(prefix):
                suffix = logits(slice(5), PREFIX, position_ids=position_ids[:, PREFIX:], cache=prefix)
        except Exception as error:
            return f"{name} can't run on a cached prefix ({type(error).__name__}: {error})"
    if not same(whole[:4], stock):
        return f"{name} ignores position_ids and counts positions itself"
    if not same(whole[4, PADDING:], stock[0, :-PADDING]):
        return f"padding before a row changes what {name} computes"
    if not same(suffix, whole[:, PREFIX:]):
        return f"{name} gives different results with a cached prefix than on the whole row"
    return None


@torch.compiler.disable
@record_function("self-check")
def why_full_on_batch(
    forward: Callable[..., Any], base_model: PreTrainedModel, sharing: PrefixSharing, rows: AlignedRows
) -> str | None:
    """Why these rows can't share their prefix, found by running a slice of them both ways; None if they can.

    Compares the logits and, except with FSDP, whose backward pass belongs to the training step, the gradient of a
    random weighting of them with respect to the embeddings. Longer than most functions: it is one experiment.
    """
    name, device = type(base_model).__name__, rows.input_ids.device
    rows, prefix_length = _slice_of(rows)
    is_token = rows.attention_mask.bool()
    has_gradient = not is_sharded(base_model.parameters())

    def run(start: int, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """The logits of the suffix, (B, S, V), and the embeddings that they depend on, (B, columns, d)."""
        with _watching(base_model.get_input_embeddings()) as embeddings:
            output = forward(
                input_ids=rows.input_ids[:, start:],
                attention_mask=rows.attention_mask,
                position_ids=None if rows.position_ids is None else rows.position_ids[:, start:],
                use_cache=False,
                output_router_logits=False,
                logits_to_keep=suffix,
                cache=cache,
            )
        return output.logits[:, -suffix:].float(), embeddings[0] if has_gradient and len(embeddings) == 1 else None

    suffix = rows.input_ids.shape[1] - prefix_length
    with (
        in_mode(base_model, training=False),
        without_trace(device),
        torch.set_grad_enabled(has_gradient),
        without_saving_hooks(),
        torch.compiler.set_stance("force_eager"),
    ):
        recorder = PrefixRecorder(prefix_length, sharing.depth, is_checkpointed=False)
        with sharing.using(recorder):
            full, inputs = run(0, None)
        try:
            prefix = recorder.prefix()
            with sharing.using(prefix):
                shared, suffix_inputs = run(prefix_length, prefix)
            pairs = [(shared.detach(), full.detach(), is_token[:, prefix_length:])]
            if inputs is not None and suffix_inputs is not None:
                # padding may attend to anything, and nothing depends on it
                weight = torch.randn_like(full) * is_token[:, prefix_length:, None]
                (theirs,) = torch.autograd.grad(full, [inputs], weight, retain_graph=True)
                # a kernel without a gradient for the prefix leaves it unused
                of_both = torch.autograd.grad(shared, [inputs, suffix_inputs], weight, materialize_grads=True)
                ours = torch.cat([of_both[0][:, :prefix_length], of_both[1]], dim=1)
                pairs.append((ours.float(), theirs.float(), is_token))
        except Exception as error:
            return f"{name} can't run on the cached prefix of this batch ({type(error).__name__}: {error})"
    same = _Agreement(base_model, full)
    for what, (ours, theirs, is_compared) in zip(("results", "gradients"), pairs, strict=False):
        # a token's gradient may be tiny beside the others' rounding errors
        scale = theirs[is_compared].norm(dim=-1).mean() if what == "gradients" else 0.0
        if same.share(ours[is_compared], theirs[is_compared], scale) < AGREEING:
            return f"{name} gives different {what} with a cached prefix than on whole rows of this batch"
    return None


def _slice_of(rows: AlignedRows) -> tuple[AlignedRows, int]:
    """A few rows, and the columns on both sides of where the suffix starts; and how many of these are before it."""
    count, columns = rows.input_ids.shape
    most_rows, most_prefix, most_suffix = SLICE
    chosen = sorted({0, count - 1})[: most_rows if count >= most_rows / SHARE_OF_BATCH else 1]
    budget = max(2, int(SHARE_OF_BATCH * count * columns) // len(chosen))
    suffix = min(most_suffix, columns - rows.prefix_length, budget // 2)
    prefix = min(most_prefix, rows.prefix_length, budget - suffix)
    part = chosen, slice(rows.prefix_length - prefix, rows.prefix_length + suffix)
    return dataclasses.replace(
        rows,
        input_ids=rows.input_ids[part],
        attention_mask=rows.attention_mask[part],
        position_ids=None if rows.position_ids is None else rows.position_ids[part],
    ), prefix


@contextmanager
def _watching(embeddings: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the embeddings return, as leaves of the graph."""
    returned: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        returned.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return returned[-1].clone()  # which the model may change in place

    handle = embeddings.register_forward_hook(watch)
    try:
        yield returned
    finally:
        handle.remove()


@torch.compiler.disable
@record_function("self-check")
def refuse_bypass_by_trial(
    forward: Callable[..., Any], base_model: PreTrainedModel, entries: Mapping[str, nn.Module], device: torch.device
) -> None:
    """Raises EchoModelError if the model computes, in training mode, without running a module that the echo enters."""
    input_ids = _tokens(base_model)[None, :PREFIX].to(device)
    drops_layers = bool(getattr(base_model.config.get_text_config(), "layerdrop", False))
    run: set[str] = set()
    with ExitStack() as stack:
        for name, module in entries.items():
            stack.callback(module.register_forward_pre_hook(partial(_note, run, name)).remove)
        stack.enter_context(in_mode(base_model, training=not drops_layers))
        stack.enter_context(without_trace(device))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
        except Exception as error:
            raise EchoModelError(_fails(base_model, error)) from error
    if missing := [name for name in entries if name not in run]:
        raise EchoModelError(why_not_run(base_model, missing))


def _note(run: set[str], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not is_weight_probe(args[0]):
        run.add(name)


def _fails(base_model: PreTrainedModel, error: Exception) -> str:
    return (
        f"{type(base_model).__name__} fails on a batch of a few tokens: {type(error).__name__}: {error}. The echo "
        f"needs a model that runs on token ids alone. {WORKING}"
    )


class _Agreement:
    """Whether logits agree at every token to half the digits of the dtype that they were computed in."""

    def __init__(self, base_model: PreTrainedModel, logits: Tensor) -> None:
        dtypes = {p.dtype for p in base_model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
        kind = logits.device.type
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        # in float64 too, models compute some things in float32
        self.bound = max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32)) ** 0.5

    def __call__(self, ours: Tensor, theirs: Tensor) -> bool:
        return self.share(ours, theirs) == 1

    def share(self, ours: Tensor, theirs: Tensor, scale: Tensor | float = 0.0) -> float:
        """The share of tokens that agree. ours, theirs: (..., tokens, width). scale: the least norm to compare with."""
        size = theirs.norm(dim=-1).clamp(min=1e-12).clamp(min=scale)
        return ((ours - theirs).norm(dim=-1) <= self.bound * size).float().mean().item()


def _tokens(base_model: PreTrainedModel) -> Tensor:
    """Token ids spread over the vocabulary, except those the configuration names, which may stand for an image."""
    count = 2 * (PREFIX + SUFFIX)
    vocabulary = base_model.config.get_text_config().vocab_size
    spread = dict.fromkeys(index * vocabulary // (2 * count) for index in range(2 * count))
    free = [token for token in spread if token not in _named_tokens(base_model.config.to_dict())] or [0]
    return torch.tensor(list(islice(cycle(free), count)))


def _named_tokens(config: dict[str, Any]) -> set[int]:
    named: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            named |= _named_tokens(value)
        elif str(key).endswith(("token_id", "token_index")):
            named |= set(value) if isinstance(value, list) else {value}
    return named


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run the model in training or eval mode, then restore each module's own mode."""
    others = [module for module in model.modules() if module.training != training]
    try:
        for module in others:
            module.training = training
        yield
    finally:
        for module in others:
            module.training = not training
