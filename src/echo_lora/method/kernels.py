"""Fused LoRA kernels: functions that read an adapter's weights without running its modules, so no echo could enter.

`fused_kernels` knows two libraries by the home of their functions, before anything runs. `trial.refuse_bypass_by_trial`
finds what it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from echo_lora.method.targets import decoder_layers

# Prefix of the Python module that holds the functions, the name to show, and what to do.
LIBRARIES = (
    (
        "unsloth",
        "Unsloth",
        "Load the model with transformers and add the adapter with peft, in a process that does not import unsloth",
    ),
    (
        "axolotl.kernels.lora",
        "Axolotl's LoRA kernels",
        "Set lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel to false",
    ),
)


def fused_kernels(base_model: PreTrainedModel) -> str | None:
    """What is wrong if a known library has replaced functions of the decoder layers; None if there is no such one."""
    prefix, layers = decoder_layers(base_model)
    for path, module in layers.named_modules(prefix=prefix):
        for attribute, home in _homes(module):
            for start, library, advice in LIBRARIES:
                if home.startswith(start):
                    return (
                        f"{path}.{attribute} comes from {home}: {library} would compute adapted layers without running "
                        f"their LoRA modules, so the echo would not enter. {advice}."
                    )
    return None


def why_not_run(base_model: PreTrainedModel, missing: list[str]) -> str:
    """The message for LoRA modules that a forward does not run. It names the parent whose forward was replaced."""
    culprit = ""
    parts = missing[0].split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        module = base_model.get_submodule(path)
        replaced = [(attribute, home) for attribute, home in _homes(module) if home not in _own_homes(module)]
        if replaced:
            attribute, home = replaced[0]
            culprit = f" {path}.{attribute} was replaced by a function of {home}: undo that."
            break
    return (
        f"{missing[0]} does not run in the model's forward ({len(missing)} such modules), so the echo would not enter "
        "it. A fused kernel that reads the adapter's weights does this, and so does a module the model never calls."
        f"{culprit or ' Turn such kernels off, or leave the module out of LoraConfig.target_modules.'}"
    )


def _homes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The functions a module computes with, by attribute: its forward, and functions set on the object itself."""
    own = {"forward": type(module).forward} | {
        name: value for name, value in vars(module).items() if inspect.isroutine(value)
    }
    for name, function in own.items():
        yield name, _home(function)


def _home(function: Any) -> str:
    return getattr(function, "__module__", None) or ""


def _own_homes(module: nn.Module) -> set[str]:
    """Python modules in which the forward of this class or of its bases belongs."""
    return {kind.__module__ for kind in type(module).__mro__}
