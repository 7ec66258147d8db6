"""Stochastic routing: r_k ~ Bernoulli(p_k), as a pure function of (seed, optimizer step).   (equation 5)

No generator is advanced, so the draw is the same on every rank, in every micro-batch of a step and after
every resume. [O] The schedule is linear from 1.0 to 0.2 over training. [R]
"""

from __future__ import annotations

import hashlib

from echo_lora.config import EchoConfig


def routing_probability(config: EchoConfig, step: int, total_steps: int) -> float:
    """p_k of optimizer step `step` (from 0) of `total_steps`: routing_start at the first, routing_end at the last."""
    if config.routing_schedule == "constant":
        return config.routing_start
    progress = min(step / max(total_steps - 1, 1), 1.0)
    return config.routing_start + (config.routing_end - config.routing_start) * progress


def is_routed(config: EchoConfig, step: int, total_steps: int) -> bool:
    """Whether step `step` runs the echo-on pass."""
    return _uniform(config.routing_seed, step) < routing_probability(config, step, total_steps)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, on any platform."""
    digest = hashlib.blake2b(f"routing:{seed}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
