"""Routing: which steps have an echo-on pass (equation 5), and the two warm-ups. All are pure functions of the step k.

    r_k ~ Bernoulli(p_k)                          whether step k has an echo-on pass           (equation 5)
    μ_k = μ · min(1, k / (w_μ · K))               weight of the distillation                   [O]
    η_k = η · min(1, (k + 1) / (w_η · K))         learning rate of the echo networks           [O]

K is the total number of steps, w_μ is `distillation_warmup`, w_η `echo_lr_warmup`; 0 means no warm-up. p_k is linear
from 1.0 to 0.2 by default [R]. No random generator is advanced, so the draw is the same on every rank, in every
micro-batch of a step and after every resume [O].
"""

from __future__ import annotations

import hashlib

from echo_lora.errors import EchoModelError
from echo_lora.method.config import EchoConfig


def routing_probability(config: EchoConfig, step: int, total_steps: int) -> float:
    """p_k for step k (from 0) of `total_steps`: routing_start at the first step, routing_end at the last."""
    if config.routing_schedule == "constant":
        return config.routing_start
    progress = min(step / max(total_steps - 1, 1), 1.0)
    return config.routing_start + (config.routing_end - config.routing_start) * progress


def is_routed(config: EchoConfig, step: int, total_steps: int) -> bool:
    """r_k: whether step k runs the echo-on pass."""
    return _uniform(config.routing_seed, step) < routing_probability(config, step, total_steps)


def distillation_weight(config: EchoConfig, step: int, total_steps: int) -> float:
    """μ_k for step k (from 0): 0 at the first step of a warm-up, `distillation_weight` after it."""
    warmup = config.distillation_warmup * total_steps
    return config.distillation_weight * (min(step / warmup, 1.0) if warmup else 1.0)


def echo_lr_factor(config: EchoConfig, step: int, total_steps: int) -> float:
    """η_k / η for step k (from 0), in (0, 1]."""
    warmup = config.echo_lr_warmup * total_steps
    return min((step + 1) / warmup, 1.0) if warmup else 1.0


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends only on the arguments, and is the same on every platform."""
    digest = hashlib.blake2b(f"routing:{seed}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def default_clock(config: EchoConfig) -> tuple[int, int]:
    """Step and total steps when no clock was set. Raises EchoModelError unless all steps are routed the same way."""
    if config.routing_schedule == "constant" and config.routing_start in (0.0, 1.0):
        return 0, 1
    raise EchoModelError(
        "the current training step is unknown, so the echo can't decide whether this step is routed. Use EchoTrainer "
        "or EchoSFTTrainer, add EchoCallback() to your Trainer's callbacks, or call "
        "model.set_routing_clock(step, total_steps) before each step."
    )
