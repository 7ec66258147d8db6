"""The learning rate of the echo networks: `echo_lr_multiplier` times that of the LoRA module that each one feeds, and
a warm-up of its own.

Optimizers that treat parameters by name or shape (LoRA+, LoRA-FA) put the echo's among the adapter's; here they get
groups of their own. Like biases elsewhere, the echo's biases and scales are not decayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any

from torch import nn

from echo_lora.errors import EchoConfigError
from echo_lora.method.model import EchoModel
from echo_lora.method.routing import echo_lr_factor


def separate_echo(optimizer: Any, model: EchoModel) -> None:
    """Move the echo networks' parameters to groups of their own, with their learning rate.

    A branch of the echo gets `echo_lr_multiplier` times the rate of its module's lora_A (of lora_B where that is not
    trained). Call it before a scheduler is made for the optimizer. Groups that hold nothing but the echo stay as they
    are: they were made on purpose. Raises EchoConfigError if the optimizer can't give the echo its rate.
    """
    if _is_separate(optimizer, model):
        return
    moved: dict[tuple[int, float, bool], tuple[dict[str, Any], list[nn.Parameter]]] = {}
    for parameter, group, rate in _wanted(optimizer, model, "lr"):
        is_decayed = parameter.dim() > 1
        moved.setdefault((id(group), rate, is_decayed), (group, []))[1].append(parameter)
    for (_, rate, is_decayed), (group, parameters) in moved.items():
        own = _take(group, parameters) | {"lr": rate, "echo": True}
        if "weight_decay" in own and not is_decayed:
            own["weight_decay"] = 0.0
        optimizer.add_param_group(own)


def refuse_shared_rate(optimizer: Any, model: EchoModel, remedy: str) -> None:
    """Raises EchoConfigError if the optimizer does not train the echo at its own rate."""
    if _is_separate(optimizer, model):
        return
    if model.echo_config.echo_lr_warmup:
        raise EchoConfigError(
            f"echo_lr_warmup={model.echo_config.echo_lr_warmup:g} needs the echo networks in groups of their own, but "
            f"the optimizer holds them together with the adapter. {remedy}"
        )
    for _, group, rate in _wanted(optimizer, model, "initial_lr" if _has_scheduler(optimizer) else "lr"):
        now = float(group["initial_lr"] if _has_scheduler(optimizer) else group["lr"])
        if not math.isclose(now, rate, rel_tol=1e-6):
            raise EchoConfigError(
                f"the optimizer trains the echo networks at a learning rate of {now:g}, but echo_lr_multiplier="
                f"{model.echo_config.echo_lr_multiplier:g} asks for {rate:g}. {remedy}"
            )


@contextmanager
def warming_up(optimizer: Any, model: EchoModel, step: int, total_steps: int) -> Iterator[None]:
    """Inside, the echo's groups have the learning rate of optimizer step `step` (from 0) in their warm-up.

    For the call of `optimizer.step()`; schedulers see the rates as they were. EchoTrainer and EchoCallback do this.
    """
    factor = echo_lr_factor(model.echo_config, step, total_steps)
    if factor == 1:  # of most steps
        yield
        return
    of_echo = {id(p) for p in model.echo.parameters()}
    own = [g for g in optimizer.param_groups if g["params"] and {id(p) for p in g["params"]} <= of_echo]
    rates = [(group, group["lr"]) for group in own]
    for group, rate in rates:
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


def _has_scheduler(optimizer: Any) -> bool:
    return all("initial_lr" in group for group in optimizer.param_groups)


def _is_separate(optimizer: Any, model: EchoModel) -> bool:
    """Whether no group holds parameters of the echo and others."""
    if any(group.get("echo") for group in optimizer.param_groups):
        return True
    of_echo = {id(p) for p in model.echo.parameters() if p.requires_grad}
    mixed = [{id(p) in of_echo for p in group["params"]} for group in optimizer.param_groups]
    return {True} in mixed and {True, False} not in mixed


def _wanted(optimizer: Any, model: EchoModel, key: str) -> Iterator[tuple[nn.Parameter, dict[str, Any], float]]:
    """Every trained parameter of the echo, the group that holds it, and the rate it should have."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    multiplier = model.echo_config.echo_lr_multiplier
    for branch, weights in model.echo_branches():
        of_adapter = [group_of[id(weight)] for weight in weights if id(weight) in group_of]
        for parameter in branch.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) not in group_of:
                raise EchoConfigError(
                    f"the optimizer {type(optimizer).__name__} does not hold the parameters of the echo networks in "
                    "its groups, so they would not be trained, or not at their learning rate. Choose another one, give "
                    "it all parameters that require gradients, or freeze the echo: model.echo.requires_grad_(False)."
                )
            group = group_of[id(parameter)]
            rate = (of_adapter or [group])[0][key]
            if rate is None:
                raise EchoConfigError(
                    f"the optimizer {type(optimizer).__name__} has no learning rate (lr=None), so echo_lr_multiplier="
                    f"{multiplier:g} can't be applied. Give it one."
                )
            yield parameter, group, float(rate) * multiplier


def _take(group: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Take these out of the group; a group like it that holds them, with what lists say of each parameter."""
    taken = {id(p) for p in parameters}
    is_taken = [id(p) in taken for p in group["params"]]
    is_left = [not value for value in is_taken]
    lists = {key: value for key, value in group.items() if isinstance(value, list) and len(value) == len(is_taken)}
    group.update({key: list(compress(value, is_left)) for key, value in lists.items()})
    return group | {key: list(compress(value, is_taken)) for key, value in lists.items()}
