"""The shared prefix: keys and values, recorded by the echo-off pass (equation 1) for the echo-on pass (6).     [O]

They stay in the autograd graph of the echo-off pass, so the gradient of the echo-on pass flows through them.

Under gradient checkpointing transformers removes the cache from its layers, because a layer that runs again in backward
would append its states a second time. Our cache returns the same however often it is called, so hooks pass it to the
attention modules directly, in the forward and in each recomputation. What a checkpointed layer records is part of the
graph: backward recomputes the layer when a gradient of its keys and values, or of its output, arrives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, cat, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from echo_lora.errors import EchoModelError
from echo_lora.method.checkpointing import Setting

# The names of the key-value cache in models and attention modules; `cache` since transformers 5.24.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name of this function's key-value cache argument; None if it has none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


# Arguments that a forward may lack: superfluous logits are cut off later, and the others change no result.
DISPENSABLE = {"position_ids", "logits_to_keep", "use_cache", "output_router_logits"}


def fitting(base: PreTrainedModel, cache: Cache | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass that the base's forward takes. Raises EchoModelError if it lacks a necessary one."""
    if cache is not None:
        kwargs[cache_argument(base.forward) or "past_key_values"] = cache
    taken = inspect.signature(base.forward).parameters
    if "input_ids" in taken:  # otherwise it is a wrapper that passes on any argument
        refused = kwargs.keys() - taken.keys()
        mask = kwargs.get("attention_mask")
        if "attention_mask" in refused and mask is not None and bool(mask[:, 0].all()):
            del kwargs["attention_mask"]  # all padding is on the right, where it changes nothing
            refused -= {"attention_mask"}
        if refused - DISPENSABLE:
            raise EchoModelError(
                f"{type(base).__name__}.forward takes no {', '.join(sorted(refused - DISPENSABLE))}, which a step with "
                "the echo needs. Use another model, or train this one without the echo."
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in refused}
    return kwargs


class PrefixRecorder(Cache):
    """The cache of the echo-off pass: it records the first columns of each layer and changes nothing."""

    def __init__(self, columns: int, depth: int, *, is_checkpointed: bool) -> None:
        super().__init__(layers=[_RecordingLayer(columns, is_checkpointed) for _ in range(depth)])

    def prefix(self, *, is_detached: bool = False) -> Cache:
        """The recorded prefix, for the echo-on pass; the recorder releases it and stops recording.

        is_detached: stop the gradient between the echo-on pass and the echo-off pass. Raises EchoModelError if a layer
        recorded nothing: it keeps its states elsewhere.
        """
        missing = [index for index, layer in enumerate(self.layers) if layer.recorded is None]
        if missing:
            raise EchoModelError(
                f"{len(missing)} of {len(self.layers)} layers (the first is layer {missing[0]}) did not pass their "
                "keys and values to the cache, so the prefix can't be shared. Set echo_step='full'."
            )
        return Cache(layers=[layer.handed_over(is_detached) for layer in self.layers])


class _RecordingLayer(DynamicLayer):
    def __init__(self, columns: int, is_checkpointed: bool) -> None:
        super().__init__()
        self.columns, self.is_checkpointed, self.is_over = columns, is_checkpointed, False
        self.recorded: list[Tensor] | None = None  # keys and values, each (B, heads, P-1, width)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Record the first columns; return all of them unchanged."""
        if not self.is_over:
            prefix = [states[..., : self.columns, :] for states in (key_states, value_states)]
            # a view would keep the whole row's states alive, which checkpointing should free
            self.recorded = [states.clone() for states in prefix] if self.is_checkpointed else prefix
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def handed_over(self, is_detached: bool) -> _PrefixLayer:
        assert self.recorded is not None
        layer = _PrefixLayer(*(states.detach() if is_detached else states for states in self.recorded))
        self.recorded, self.is_over = None, True
        return layer


class _PrefixLayer(DynamicLayer):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the prefix before what is given; store nothing."""
        return cat([self.keys, key_states], dim=-2), cat([self.values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class PrefixSharing:
    """Owns the hooks that pass the current cache to the attention modules."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.current: Cache | None = None
        self.depth = len(layers)
        self.why_not: str | None = None
        self.handles: list[RemovableHandle] = []
        for layer in layers:
            named = [(m, cache_argument(m.forward)) for m in layer.modules() if m is not layer]
            found = [(module, name) for module, name in named if name is not None]
            if len(found) != 1:
                self.why_not = f"{type(layer).__name__} has {len(found)} modules that take a key-value cache, not one"
                continue
            module, name = found[0]
            self.handles += [
                layer.register_forward_pre_hook(self._take_away, with_kwargs=True),
                # bound methods and partials, not closures: deepcopy must copy the hooks with the model
                module.register_forward_pre_hook(partial(self._hand_over, name), with_kwargs=True),
            ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def using(self, cache: Cache | None) -> AbstractContextManager[None]:
        """A context in which every attention module gets this cache; None changes nothing."""
        return Setting(self, cache)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: the recomputation uses the cache that the forward used."""
        return self.using(self.current), self.using(self.current)

    def _take_away(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remove the cache before transformers' checkpointing sees it, whose warning would be wrong here."""
        if self.current is None:
            return None
        return args, {key: None if key in CACHE_NAMES else value for key, value in kwargs.items()}

    def _hand_over(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if self.current is None else (args, kwargs | {name: self.current})
