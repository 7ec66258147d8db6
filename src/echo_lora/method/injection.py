"""Injection: adding δ to the LoRA modules of the target layers.                       (equation 4)

    output:      y = (module output) + a_t δ_m                    a forward hook on the LoRA module (default)
    lora_input:  y = W0 x + s·B A (dropout(x) + a_t δ_m)          a forward pre-hook on `lora_A[adapter]`

a_t is 1 at the positions of `alignment.injection_mask`; `_add` computes x + a_t δ_m. The hooks stay registered and do
nothing outside `injecting`.

At `lora_input` one hook fits LoRA, DoRA, rsLoRA and quantised bases, which all run `lora_A[adapter]`. There DoRA also
scales δ: y = (m / ‖W0 + s·B A‖) · (W0 x + s·B A (x + a_t δ_m)). Its norm is computed from the weights, without δ, which
is why `is_weight_probe` leaves such a call alone.

With gradient checkpointing, layers run again during backward, when no pass is injecting any more:
`Injector.checkpoint_contexts` makes each recomputation see what its forward saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from echo_lora.errors import EchoModelError
from echo_lora.method.checkpointing import Setting


@dataclass(frozen=True)
class Injection:
    """What a pass adds: δ (B, width) by module name, and a_t, the positions: mask (B, columns of the pass) bool."""

    deltas: dict[str, Tensor]
    mask: Tensor
    _positions: dict[Any, Tensor] = field(default_factory=dict)

    def positions(self, x: Tensor) -> Tensor:
        """a_t as (B, columns, 1) zeros and ones of x's dtype and device, made once for all modules."""
        key = x.dtype, x.device
        if key not in self._positions:
            self._positions[key] = self.mask[..., None].to(x.device, x.dtype)
        return self._positions[key]


class Injector:
    """Owns the hooks on the target modules, and the current injection.

    entries: by the name of a target module, the module that carries the hook: the LoRA module itself, or its lora_A.
    """

    def __init__(self, modules: dict[str, LoraLayer], adapter: str, site: str) -> None:
        self.adapter = adapter
        self.modules = modules
        self.current: Injection | None = None
        self.entries: dict[str, nn.Module] = {}
        for name, module in modules.items():
            # bound methods and partials, not closures: deepcopy must copy the hooks with the model
            if site == "lora_input":
                self.entries[name] = module.lora_A[adapter]
                self.entries[name].register_forward_pre_hook(partial(self._add_to_input, name))
            else:
                self.entries[name] = module
                module.register_forward_hook(partial(self._add_to_output, name))

    def follow(self, base_model: nn.Module) -> None:
        """Move the hooks to each module's present lora_A: EVA makes PEFT replace it when the rank changes.

        Raises EchoModelError for a module that has left the model, such as one whose rank EVA sets to 0.
        """
        module: Any  # mypy does not know the attributes of LoraLayer
        for name, module in self.modules.items():
            lora_A = module.lora_A
            if base_model.get_submodule(name) is not module or self.adapter not in lora_A:
                raise EchoModelError(
                    f"{name} lost its adapter {self.adapter!r} after the echo was attached to it, so its echo can't "
                    "learn. Keep the adapter; with EVA use EvaConfig(rho=1.0), which leaves all ranks as they are."
                )
            if self.entries[name] is not module and self.entries[name] is not lora_A[self.adapter]:
                self.entries[name] = lora_A[self.adapter]
                self.entries[name].register_forward_pre_hook(partial(self._add_to_input, name))

    @staticmethod
    def widths(modules: dict[str, LoraLayer], site: str) -> dict[str, int]:
        """Number of features that δ needs for each module at this site."""
        return {n: m.in_features if site == "lora_input" else m.out_features for n, m in modules.items()}

    def injecting(self, injection: Injection | None) -> AbstractContextManager[None]:
        """A context in which every forward adds this injection; None adds nothing."""
        return Setting(self, injection)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: the recomputation injects what the forward injected."""
        return self.injecting(self.current), self.injecting(self.current)

    @contextmanager
    def measuring(self) -> Iterator[list[Tensor]]:
        """Collect the echo's share of each target module's low-rank branch, in every injecting pass inside.

        The share is ‖echo's part‖ / ‖output of the branch, echo included‖, a mean over the injected positions: float32
        scalars. The branch is what the module adds to its base layer. For a diagnosis in eval mode: it runs the modules
        twice.
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
        if self.current is None or is_weight_probe(args[0]):
            return None
        return (_add(args[0], self.current, name), *args[1:])

    def _add_to_output(self, name: str, layer: LoraLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.current is None or self.adapter not in layer.active_adapters:
            return None
        return _add(output, self.current, name)


def is_weight_probe(x: Tensor) -> bool:
    """Whether x is the identity matrix that DoRA sends through lora_A to compute the weight's norm.

    Only square matrices are compared, so ordinary (B, T, d) inputs cost nothing.
    """
    return x.dim() == 2 and x.shape[0] == x.shape[1] and torch.equal(x, torch.eye(len(x)).to(x))


def _add(x: Tensor, injection: Injection, name: str) -> Tensor:
    """x + a_t δ_m of equation 4, for x of shape (B, T, width), or (B·T, width) in layers that flatten rows."""
    if not isinstance(x, Tensor):
        raise EchoModelError(
            f"{name} returns a {type(x).__name__}, as routers of experts do, not a tensor of (rows, tokens, width) "
            "that the echo can be added to. Leave this module out of LoraConfig.target_modules."
        )
    mask_BT = injection.mask
    if x.shape[:-1] not in (mask_BT.shape, mask_BT.flatten().shape):
        raise EchoModelError(
            f"{name} sees an input of shape {tuple(x.shape)}, but the batch has {tuple(mask_BT.shape)} (rows, tokens): "
            "the layer regroups tokens, so the echo can't tell which row each one belongs to. "
            "Leave this module out of LoraConfig.target_modules."
        )
    delta = injection.deltas[name].to(x.device, x.dtype)[:, None, :]  # (B, 1, width)
    by_row = x.reshape(*mask_BT.shape, -1)  # (B, T, width)
    return torch.addcmul(by_row, injection.positions(x), delta).reshape(x.shape)  # (B, T, width) or (B·T, width)
