"""The model's output layer, applied to the hidden states of supervised positions only, for equation 7.         [O]

    logits = softcap( scale · W h )

`loss_terms` calls it for one chunk of positions at a time, so a tensor of all positions and the whole vocabulary never
exists. Scale and soft cap come from the model's configuration and are checked once against the model's own logits. If
these differ, the model computes its logits itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel

PROBED_LOGITS = (1.0, 100.0)

FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # names of the scale in configurations


@contextmanager
def without_trace(device: torch.device) -> Iterator[None]:
    """Run the model without gradient, and leave the random generators of the CPU and of this device unchanged.

    Also clears autocast's cache of cast weights: torch 2.9 caches those without gradient too, and would use them in the
    training pass that follows, so the adapter would get no gradient.
    """
    devices = [device] if device.type != "cpu" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        torch.clear_autocast_cache()


class Head:
    """The output layer of a causal language model as a function from hidden states (…, d) to logits (…, V)."""

    def __init__(self, base_model: PreTrainedModel) -> None:
        config = base_model.config.get_text_config()
        self.linear: nn.Module = base_model.get_output_embeddings()
        self.vocabulary: int = config.vocab_size
        self.softcap = getattr(config, "final_logit_softcapping", None)
        factors = [value for name in FACTORS if (value := getattr(config, name, None)) is not None]
        if getattr(config, "logits_scaling", None) is not None:
            factors.append(1 / config.logits_scaling)
        self.scale = factors[0] if factors else None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.to(hidden.device)

    @property
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.linear.parameters())

    @contextmanager
    def intercepting(self, replacement: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Collect the states that the model passes to its output layer, which then runs on one token only.

        replacement: run it on these states instead.
        """
        states: list[Tensor] = []

        def intercept(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(args[0])  # (B, K, d)
            # a copy: on a CPU the product with a view of some columns copies the whole matrix, once for each row
            return (args[0][:1, :1].detach().clone() if replacement is None else replacement, *args[1:])

        handle = self.linear.register_forward_pre_hook(intercept)
        try:
            yield states
        finally:
            handle.remove()

    @record_function("self-check")
    def why_not(self, forward: Callable[..., Any], input_ids: Tensor, position_ids: Tensor | None) -> str | None:
        """Why this does not compute the model's logits; None if it does.

        Compares both on random states, with logits of about 1 and of about 100, which a soft cap would bend. Random
        states make the result independent of the tokens: logits that happen to be zero would hide a factor.
        input_ids, position_ids: (1, T), run without gradient; the random generators are left unchanged.
        """
        with without_trace(input_ids.device):
            with self.intercepting() as states:
                forward(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            if len(states) != 1 or states[0].dim() != 3:
                return (
                    f"the model does not call its output layer {type(self.linear).__name__} once with (rows, tokens, d)"
                )
            x = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(0)).to(states[0])
            largest = self.linear(x).abs().max()
            for size in PROBED_LOGITS:
                with self.intercepting(x * (size / largest)) as states:
                    theirs = forward(
                        input_ids=input_ids, position_ids=position_ids, use_cache=False
                    ).logits  # (1, T, V)
                ours = self(x * (size / largest)).to(theirs.device)
                bound = 8 * torch.finfo(x.dtype).eps * ours.float().abs().max()
                if ours.shape != theirs.shape or not ((ours.float() - theirs.float()).abs() <= bound).all():
                    return "the model changes its logits in a way that its configuration does not mention"
        return None
