"""The model's output layer, applied to the hidden states of supervised positions only.   [O]

    logits = softcap( scale · W h )

`loss_terms` calls it for one chunk of positions at a time, so that no tensor of all positions and the whole vocabulary
ever exists. What a model does to the result of its output layer is read from its configuration and then compared with
the model's own logits, not taken on trust: a model that does something else keeps its own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # what configurations call a factor of logits


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
    def intercepting(self) -> Iterator[list[Tensor]]:
        """Collect what the model sends to its output layer, which then works on the first column only."""
        states: list[Tensor] = []

        def intercept(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(args[0])  # (B, A, d)
            return (args[0][:, :1].detach(), *args[1:])

        handle = self.linear.register_forward_pre_hook(intercept)
        try:
            yield states
        finally:
            handle.remove()

    def why_not(self, forward: Callable[..., Any], input_ids: Tensor) -> str | None:
        """Why this is not what the model computes; None if it is. input_ids: (1, T), run without gradient."""
        devices = [input_ids.device] if input_ids.device.type != "cpu" else []
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            with self.intercepting() as states:
                own = forward(input_ids=input_ids, use_cache=False).logits[:, 0]  # (1, V)
            if len(states) != 1 or states[0].dim() != 3:
                return f"the output layer {type(self.linear).__name__} was not called once with (rows, tokens, d)"
            ours = self(states[0][:, :1])[:, 0]
        if ours.shape == own.shape and torch.allclose(ours.float().to(own.device), own.float(), rtol=1e-2, atol=1e-3):
            return None
        return "the model does more to its logits than its configuration tells"
