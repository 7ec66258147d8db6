"""Injection: adding δ to the LoRA modules of the target layers.                       (equation 4)

    lora_input:  y = W0 x + s·B A (dropout(x) + a_t δ_m)          a forward pre-hook on `lora_A[adapter]`
    output:      y = (module output) + a_t δ_m                    a forward hook on the LoRA module

`lora_A[adapter]` is the one place that LoRA, DoRA, rsLoRA and quantised bases all pass through. The hooks stay
registered and do nothing unless a pass is `injecting`. a_t is 1 at the positions named by `injection_mask`.

With gradient checkpointing the layers run again during backward, when no pass is under way any more:
`Injector.checkpoint_contexts` lets each recomputation see what its forward saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from echo_lora.errors import EchoModelError


@dataclass(frozen=True)
class Injection:
    """What one pass adds: δ (B, width) by module name, and where: mask (B, T) bool."""

    deltas: dict[str, Tensor]
    mask: Tensor


def decoder_layers(base_model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the outermost ModuleList of length `num_hidden_layers`.

    Raises EchoModelError if the model has none.
    """
    depth = base_model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise EchoModelError(
            f"{type(base_model).__name__} holds no list of {depth} decoder layers, so source and target layers "
            "can't be found. The echo needs a decoder-only language model of transformers."
        )
    return min(found, key=lambda item: item[0].count("."))


def target_modules(base_model: PreTrainedModel, target_layers: list[int], adapter: str) -> dict[str, LoraLayer]:
    """The LoRA-wrapped linear modules of the target layers, by their full name in the base model.

    Raises EchoModelError if a target layer holds none.
    """
    prefix, layers = decoder_layers(base_model)
    found: dict[str, LoraLayer] = {}
    for index in target_layers:
        in_layer = {
            f"{prefix}.{index}.{name}": module
            for name, module in layers[index].named_modules()
            if isinstance(module, LoraLayer)
            and adapter in module.lora_A
            and isinstance(module.lora_A[adapter], nn.Linear)
        }
        if not in_layer:
            raise EchoModelError(
                f"target layer {index} ({prefix}.{index}) holds no LoRA linear module of adapter {adapter!r}, so "
                "the echo has nowhere to go. Widen LoraConfig.target_modules or layers_to_transform, "
                "or choose other target_layers."
            )
        found |= in_layer
    return found


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


class Injector:
    """Owns the hooks on the target modules and the injection under way, if any."""

    def __init__(self, modules: dict[str, LoraLayer], adapter: str, site: str) -> None:
        self.adapter = adapter
        self.modules = modules
        self.current: Injection | None = None
        self._hooked: dict[str, nn.Module] = {}
        for name, module in modules.items():
            self._hooked[name] = module.lora_A[adapter]
            # bound methods and partials, not closures: a deep copy of the model copies its hooks with it
            if site == "lora_input":
                module.lora_A[adapter].register_forward_pre_hook(partial(self._add_to_input, name))
            else:
                module.register_forward_hook(partial(self._add_to_output, name))

    @staticmethod
    def widths(modules: dict[str, LoraLayer], site: str) -> dict[str, int]:
        """Number of features that δ needs for each module at this site."""
        return {n: m.in_features if site == "lora_input" else m.out_features for n, m in modules.items()}

    def lost(self) -> list[str]:
        """Modules whose lora_A is another one than the echo was made for."""
        return [
            name
            for name, module in self.modules.items()
            if self.adapter not in module.lora_A or module.lora_A[self.adapter] is not self._hooked[name]
        ]

    def injecting(self, injection: Injection | None) -> AbstractContextManager[None]:
        """Add this to every forward inside; None adds nothing."""
        return Setting(self, injection)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: the recomputation injects what the forward injected."""
        return self.injecting(self.current), self.injecting(self.current)

    @contextmanager
    def measuring(self) -> Iterator[list[Tensor]]:
        """Collect how much of the low-rank branch's output the echo makes up, in every injecting pass inside.

        Gives ‖echo's part‖ / ‖whole output of the branch, echo included‖, a mean over the injected positions, for each
        target module: scalars, float32. The branch is what the module adds to the base layer. For a diagnosis in
        eval mode: it runs the modules twice.
        """
        shares: list[Tensor] = []
        handles = [module.register_forward_hook(self._share_hook(module, shares)) for module in self.modules.values()]
        try:
            yield shares
        finally:
            for handle in handles:
                handle.remove()

    def _share_hook(self, layer: LoraLayer, shares: list[Tensor]) -> Any:
        @torch.no_grad()
        def measure(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.current is None:
                return
            is_injected = self.current.mask.to(output.device).reshape(output.shape[:-1])
            with self.injecting(None):
                own = output - layer.forward(*args)
            branch = output - layer.base_layer(*args)
            share = own[is_injected].norm(dim=-1) / branch[is_injected].norm(dim=-1).clamp(min=1e-12)  # (N,)
            shares.append(share.float().mean())

        return measure

    def _add_to_input(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.current is None or _is_weight_probe(args[0]):
            return None
        return (_add(args[0], self.current, name), *args[1:])

    def _add_to_output(self, name: str, layer: LoraLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.current is None or self.adapter not in layer.active_adapters:
            return None
        return _add(output, self.current, name)


def _is_weight_probe(x: Tensor) -> bool:
    """Whether x is the identity matrix that DoRA sends through lora_A to learn the weight's norm.

    Only a square matrix is compared, so that ordinary (B, T, d) inputs cost nothing.
    """
    return x.dim() == 2 and x.shape[0] == x.shape[1] and torch.equal(x, torch.eye(len(x)).to(x))


def _add(x: Tensor, injection: Injection, name: str) -> Tensor:
    """x + a_t δ_m, for x of shape (B, T, width), or (B·T, width) in layers that flatten their rows."""
    if not isinstance(x, Tensor):
        raise EchoModelError(
            f"{name} gives a {type(x).__name__}, not a tensor of (rows, tokens, width), as routers of experts do: "
            "there is nothing to add the echo to. Leave this module out of LoraConfig.target_modules."
        )
    mask_BT = injection.mask
    if x.shape[:-1] not in (mask_BT.shape, mask_BT.flatten().shape):
        raise EchoModelError(
            f"{name} sees an input of shape {tuple(x.shape)} where the batch has {tuple(mask_BT.shape)} "
            "(rows, tokens): the layer regroups tokens, and the echo can't tell which row each belongs to. "
            "Leave this module out of LoraConfig.target_modules."
        )
    delta = injection.deltas[name].to(x.device, x.dtype)  # (B, width)
    added = torch.where(mask_BT.to(x.device)[..., None], delta[:, None, :], 0)  # (B, T, width)
    return x + added.reshape(x.shape)
