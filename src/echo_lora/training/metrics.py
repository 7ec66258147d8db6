"""Means of the loss terms between two log entries, over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echo_lora.method import losses
from echo_lora.method.step import EchoOutput


class Meter:
    """Sums up the outputs of the steps since the last log.

    answer_weight: weight of answer tokens relative to prompt tokens in the loss.
    """

    ALWAYS = tuple(name for name in losses.NAMES if name not in ("loss", *losses.ROUTED))
    STATE = ("echo_norm", "gate_mean")  # means over a batch

    def __init__(self, answer_weight: float = 1.0) -> None:
        self.answer_weight = answer_weight
        self.reset()

    def reset(self) -> None:
        self.optimizer_steps = self.routed_steps = self.routed_batches = 0
        self.is_routed = False  # of the current optimizer step
        self.sums: dict[str, Tensor] = {}

    def add(self, output: EchoOutput) -> None:
        self.is_routed = bool(output.routed)
        self.routed_batches += self.is_routed
        for name in (*self.ALWAYS, *losses.ROUTED, *self.STATE):
            if name in output:
                self.sums[name] = self.sums.get(name, 0.0) + output[name].detach()

    def end_step(self) -> None:
        self.optimizer_steps += 1
        self.routed_steps += self.is_routed

    def metrics(self, add_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over tokens and steps, for terms of the echo over routed steps only. add_ranks(x) sums over processes.

        `loss` is the cross-entropy of the deployed, echo-off pass over all supervised tokens, so it compares with that
        of a run without the echo and with `eval_loss`.
        """
        if not self.optimizer_steps or not self.sums:
            return {}
        total = {name: add_ranks(value).item() for name, value in self.sums.items()}
        ranks = add_ranks(torch.ones((), device=self.sums["ce_off"].device)).item()
        out = {name: total[name] / self.optimizer_steps for name in self.ALWAYS if name in total}
        out["loss"] = self.answer_weight * out["ce_off"] + out.get("ce_prompt", 0.0)
        out["mean_token_accuracy"] = out.pop("token_accuracy")  # TRL's name
        out["routed"] = self.routed_steps / self.optimizer_steps  # the same on every rank
        if self.routed_steps:
            out |= {name: total[name] / self.routed_steps for name in losses.ROUTED}
            out |= {name: total[name] / (self.routed_batches * ranks) for name in self.STATE}
        return out
