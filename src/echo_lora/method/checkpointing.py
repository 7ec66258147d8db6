"""Gradient checkpointing: in backward, a recomputed layer must see what its forward saw.

That is the injection (equation 4), the shared prefix (equation 6), and which parameters were frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from echo_lora.errors import EchoModelError
from echo_lora.method.config import EchoConfig


class Setting(AbstractContextManager[None]):
    """Sets `owner.current` inside. Reentrant: every recomputation of a checkpointed layer enters it again."""

    def __init__(self, owner: Any, value: Any) -> None:
        self.owner, self.value = owner, value
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before.append(self.owner.current)
        self.owner.current = self.value

    def __exit__(self, *exception: object) -> None:
        self.owner.current = self.before.pop()


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a model with these parameters is spread over processes, as by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def without_saving_hooks() -> AbstractContextManager[None]:
    """A context in which autograd saves tensors as they are.

    Others may have asked to save them elsewhere, as torch's checkpointing and the offloading of activations do. They
    count on one backward pass through each saved tensor, which a graph of our own within a pass is not part of.
    """
    # stop-gradient: an operator that saves its own output would keep itself, and all before it, alive for ever
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)


class Freezing:
    """Keeps the echo-on pass from training the adapter if `echo_on_updates` is `echo_only`.                    [O]"""

    def __init__(self) -> None:
        self.current: list[nn.Parameter] = []

    def in_echo_on_pass(
        self, adapted: nn.Module, config: EchoConfig, is_checkpointed: bool
    ) -> AbstractContextManager[None] | None:
        """A context in which the adapter gets no gradient, in recomputations too; None if it should get one.

        Raises EchoModelError where the parameters can't be frozen reliably.
        """
        if config.echo_on_updates == "all" or not torch.is_grad_enabled():
            return None
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        reason = None
        if is_sharded(trained):
            reason = "with parameters that are sharded across processes, as by FSDP2"
        elif is_checkpointed and len({parameter.device for parameter in trained}) > 1:
            reason = "with gradient checkpointing in a model on several devices"
        if reason is not None:
            raise EchoModelError(
                f"echo_on_updates='echo_only' can't be combined {reason}: the adapter would not be frozen reliably in "
                "the echo-on pass. Use echo_on_updates='all'."
            )
        return _All([Setting(self, trained), _Frozen(trained)])

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: a recomputation saves what the forward saved."""
        return _Frozen(self.current), _Frozen(self.current)


class _Frozen(AbstractContextManager[None]):
    """Sets requires_grad to False inside. Reentrant, like Setting."""

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


def _enabling(base: PreTrainedModel) -> Callable[..., None]:
    """The base's method that enables checkpointing; Axolotl and ms-swift pin transformers with the older name only."""
    return getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable


class Checkpointing:
    """Gradient checkpointing of the base's layers, with these `context_fn`s of torch's checkpoint added."""

    def __init__(self, *contexts: ContextFn) -> None:
        self.contexts = contexts
        self._places: tuple[PreTrainedModel, list[nn.Module]] | None = None

    def _functions(self, base: PreTrainedModel) -> list[Any]:
        """The functions with which modules of the base checkpoint their layers; empty if checkpointing is off."""
        if self._places is None or self._places[0] is not base:  # a search of all modules in each step takes its time
            self._places = base, [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]
        on = [module for module in self._places[1] if getattr(module, "gradient_checkpointing", False)]
        return [getattr(module, "_gradient_checkpointing_func", None) for module in on]

    def enable(self, base: PreTrainedModel, arguments: dict[str, Any] | None, **kwargs: Any) -> None:
        """As the base's own. Raises EchoModelError for use_reentrant=True, which supports no contexts."""
        checkpointing = {"use_reentrant": False, **(arguments or {})}
        if checkpointing["use_reentrant"]:
            raise EchoModelError(
                "gradient checkpointing with use_reentrant=True would recompute the echo-on pass without its echo. "
                "Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        checkpointing["context_fn"] = _JoinedContexts(checkpointing.get("context_fn"), *self.contexts)
        _enabling(base)(checkpointing, **kwargs)

    def is_enabled(self, base: PreTrainedModel) -> bool:
        """Whether the base checkpoints its layers in training mode."""
        return bool(self._functions(base))

    def is_on(self, base: PreTrainedModel) -> bool:
        """Whether layers are recomputed. Adds our contexts if checkpointing was enabled without them."""
        if not base.training:
            return False
        functions = self._functions(base)
        if functions and is_compiled(base):
            raise EchoModelError(
                "torch.compile can't trace gradient checkpointing with the contexts that the echo needs. Don't compile "
                "the layers, or set gradient_checkpointing=False (activation_checkpointing in newer transformers)."
            )
        for function in functions:
            arguments = dict(getattr(function, "keywords", {}))
            if not isinstance(arguments.get("context_fn"), _JoinedContexts):
                self.enable(base, arguments)
                break
        return bool(functions)

    def leave(self, base: PreTrainedModel) -> None:
        """Remove our contexts; checkpointing stays on."""
        for function in self._functions(base):
            arguments = dict(getattr(function, "keywords", {}))
            if isinstance(context := arguments.get("context_fn"), _JoinedContexts):
                del arguments["context_fn"]
                _enabling(base)(arguments | context.theirs)
                break


def is_compiled(base: PreTrainedModel) -> bool:
    # looked up in dictionaries: for a name that it lacks, a module's own look-up is slow, and this runs in each step
    return any(vars(m).get("_compiled_call_impl") is not None or "_orig_mod" in m._modules for m in base.modules())


class _JoinedContexts:
    """A `context_fn` that enters ours, and the user's if there is one, as with selective checkpointing."""

    def __init__(self, theirs: ContextFn | None, *ours: ContextFn) -> None:
        self.theirs = {} if theirs is None else {"context_fn": theirs}
        self.functions = (*self.theirs.values(), *ours)

    def __call__(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        forward, recompute = zip(*(function() for function in self.functions), strict=True)
        return _All(forward), _All(recompute)


class _All(AbstractContextManager[None]):
    """Several contexts as one; reentrant if they are."""

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
