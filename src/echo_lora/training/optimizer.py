"""The echo networks' learning rate: `echo_lr_multiplier` times that of the LoRA module each one feeds, and a warm-up.

Optimizers that group parameters by name or shape (LoRA+, LoRA-FA) mix the echo's with the adapter's; here they get
groups of their own. As usual, biases and scales are not decayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from echo_lora.errors import EchoConfigError
from echo_lora.method.model import EchoModel
from echo_lora.method.routing import echo_lr_factor


def loraplus(model: PeftModel, ratio: float, args: TrainingArguments) -> Optimizer:
    """PEFT's LoRA+ optimizer of the arguments' class: matrices B learn at `ratio` times the rate of matrices A."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    settings |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": args.weight_decay}
    return create_loraplus_optimizer(model, kind, **settings)


def separate_echo(optimizer: Any, model: EchoModel) -> None:
    """Move the echo networks' parameters to groups of their own, with their own learning rate.

    Each branch of the echo gets `echo_lr_multiplier` times the rate of its module's lora_A (of lora_B if lora_A is
    frozen). Call it before creating a scheduler for the optimizer. Groups that already hold only echo parameters are
    left as they are. Raises EchoConfigError if the optimizer can't give the echo its rate.
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
    """Raises EchoConfigError if the optimizer does not train the echo at the configured learning rate."""
    if _is_separate(optimizer, model):
        return
    if model.echo_config.echo_lr_warmup:
        raise EchoConfigError(
            f"echo_lr_warmup={model.echo_config.echo_lr_warmup:g} needs the echo networks in groups of their own, but "
            f"the optimizer has them in groups with the adapter. {remedy}"
        )
    has_scheduler = all("initial_lr" in group for group in optimizer.param_groups)
    key = "initial_lr" if has_scheduler else "lr"
    for _, group, rate in _wanted(optimizer, model, key):
        now = float(group[key])
        if not math.isclose(now, rate, rel_tol=1e-6):
            raise EchoConfigError(
                f"the optimizer trains the echo networks at a learning rate of {now:g}, but echo_lr_multiplier="
                f"{model.echo_config.echo_lr_multiplier:g} asks for {rate:g}. {remedy}"
            )


@contextmanager
def warming_up(optimizer: Any, model: EchoModel, step: int, total_steps: int) -> Iterator[None]:
    """Scale the learning rate of the echo's groups for the warm-up at optimizer step `step` (from 0).

    Wraps the call of `optimizer.step()`; schedulers see the unscaled rates. EchoTrainer and EchoCallback use it.
    """
    factor = echo_lr_factor(model.echo_config, step, total_steps)
    if factor == 1:
        yield
        return
    own, _ = _groups_with(optimizer, model.echo.parameters())
    rates = [(group, group["lr"]) for group in own]
    for group, rate in rates:
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


def _is_separate(optimizer: Any, model: EchoModel) -> bool:
    """Whether the echo's trained parameters have groups of their own."""
    if any(group.get("echo") for group in optimizer.param_groups):
        return True
    own, mixed = _groups_with(optimizer, (p for p in model.echo.parameters() if p.requires_grad))
    return bool(own) and not mixed


def _groups_with(optimizer: Any, parameters: Iterable[nn.Parameter]) -> tuple[list[Any], list[Any]]:
    """The optimizer's groups that hold only these parameters, and those that hold others too."""
    ids = {id(p) for p in parameters}
    kinds = [(group, {id(p) in ids for p in group["params"]}) for group in optimizer.param_groups]
    return [g for g, kind in kinds if kind == {True}], [g for g, kind in kinds if kind == {True, False}]


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
                    "its groups, so they would not be trained, or not at their learning rate. Use another optimizer, "
                    "pass it all parameters that require gradients, or freeze the echo: "
                    "model.echo.requires_grad_(False)."
                )
            group = group_of[id(parameter)]
            rate = (of_adapter or [group])[0][key]
            if rate is None:
                raise EchoConfigError(
                    f"the optimizer {type(optimizer).__name__} has no learning rate (lr=None), so echo_lr_multiplier="
                    f"{multiplier:g} can't be applied. Set lr."
                )
            yield parameter, group, float(rate) * multiplier


def _take(group: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Move these parameters out of the group into a copy of it, together with their entries in per-parameter lists."""
    taken = {id(p) for p in parameters}
    is_taken = [id(p) in taken for p in group["params"]]
    is_left = [not value for value in is_taken]
    lists = {key: value for key, value in group.items() if isinstance(value, list) and len(value) == len(is_taken)}
    group.update({key: list(compress(value, is_left)) for key, value in lists.items()})
    return group | {key: list(compress(value, is_taken)) for key, value in lists.items()}
