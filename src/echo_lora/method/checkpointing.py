"""Contexts of gradient checkpointing: a recomputation finds the cache, the injection and the noise of its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Setting(AbstractContextManager[None]):
    """Sets `owner.current` inside; entered again by every backward that recomputes a checkpointed layer."""

    def __init__(self, owner: Any, value: Any) -> None:
        self.owner, self.value = owner, value
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before.append(self.owner.current)
        self.owner.current = self.value

    def __exit__(self, *exception: object) -> None:
        self.owner.current = self.before.pop()


class Freezing:
    """Keeps the echo-on pass from training the adapter, where `echo_on_updates` is `echo_only`.                [O]"""

    def __init__(self) -> None:
        self.current: list[nn.Parameter] = []

    @contextmanager
    def frozen(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """What runs inside gives these no gradient, nor does its recomputation."""
        with Setting(self, parameters), _Frozen(parameters):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: a recomputation saves what the forward saved."""
        return _Frozen(self.current), _Frozen(self.current)


class _Frozen(AbstractContextManager[None]):
    """Parameters that require no gradient inside; entered again by every backward that recomputes a layer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.frozen: list[list[nn.Parameter]] = []

    def __enter__(self) -> None:
        self.frozen.append([parameter for parameter in self.parameters if parameter.requires_grad])
        for parameter in self.frozen[-1]:
            parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for parameter in self.frozen.pop():
            parameter.requires_grad_(True)


ContextFn = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def checkpoint_functions(base: PreTrainedModel) -> list[Any]:
    """The functions by which modules of the base checkpoint their layers; none where checkpointing is off."""
    on = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    return [getattr(module, "_gradient_checkpointing_func", None) for module in on]


class JoinedContexts:
    """A `context_fn` that enters ours, and theirs for those who bring one, such as selective checkpointing."""

    def __init__(self, theirs: ContextFn | None, *ours: ContextFn) -> None:
        self.theirs = {} if theirs is None else {"context_fn": theirs}
        self.functions = (*self.theirs.values(), *ours)

    def __call__(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        forward, recompute = zip(*(function() for function in self.functions), strict=True)
        return _All(forward), _All(recompute)


class _All(AbstractContextManager[None]):
    """Several contexts as one, which may be entered again if they may."""

    def __init__(self, contexts: Iterable[AbstractContextManager]) -> None:
        self.contexts = list(contexts)
        self.stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stacks.append(stack.pop_all())

    def __exit__(self, *exception: Any) -> None:
        self.stacks.pop().__exit__(*exception)
