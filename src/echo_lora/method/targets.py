"""Which modules carry the echo: decoder layers, and the LoRA modules of the target layers."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import BlockDiagonalLinear
from torch import nn
from transformers import PreTrainedModel

from echo_lora.errors import EchoModelError

# PEFT's LoRA variants that run the module lora_A, as plain LoRA does; the others only read its weights.
RUNS_LORA_A = ("DoraLinearVariant", "KasaLinearVariant", "MiCALinearVariant", "BdLoraLinearVariant")


def decoder_layers(base_model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the outermost ModuleList of length `num_hidden_layers`.

    Raises EchoModelError if the model has none.
    """
    found = outermost_lists(base_model)
    if not found:
        depth = base_model.config.get_text_config().num_hidden_layers
        raise EchoModelError(
            f"{type(base_model).__name__} has no ModuleList of {depth} decoder layers, so source and target layers "
            "can't be found. The echo needs a decoder-only language model of transformers."
        )
    return found[0]


def outermost_lists(base_model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """Names and ModuleLists of length `num_hidden_layers` at the outermost level; only one in a supported model."""
    length = base_model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == length
    ]
    depth = min((name.count(".") for name, _ in found), default=0)
    return [(name, module) for name, module in found if name.count(".") == depth]


def target_modules(
    base_model: PreTrainedModel, target_layers: list[int], adapter: str, site: str
) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """The LoRA modules of the target layers that receive the echo, and the others with the reason, by their full names.

    The echo is added to linear modules that see each token of each row once, in order. Raises EchoModelError if a
    target layer has none, or if the low-rank branch of one has no input for site `lora_input`.
    """
    for name, module in base_model.named_modules():
        base_layer = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if isinstance(base_layer, nn.Linear) and type(base_layer).__name__.endswith("Router"):
            raise EchoModelError(
                f"{name} is a router that returns several tensors, which PEFT mistakes for a linear layer and can't "
                f"run. Exclude it: LoraConfig(exclude_modules=[{name.rpartition('.')[2]!r}])."
            )
    prefix, layers = decoder_layers(base_model)
    found: dict[str, LoraLayer] = {}
    without: dict[str, str] = {}
    for index in target_layers:
        layer, name = layers[index], f"{prefix}.{index}"
        adapted = {
            f"{name}.{path}": (module, _why_without_echo(layer, path, module, adapter))
            for path, module in layer.named_modules()
            if isinstance(module, LoraLayer) and adapter in (*module.lora_A, *module.lora_embedding_A)
        }
        in_layer = {path: module for path, (module, why) in adapted.items() if why is None}
        left_out = {path: why for path, (_, why) in adapted.items() if why is not None}
        if not in_layer:
            but = f" ({listed(left_out)})" if left_out else ""
            raise EchoModelError(
                f"target layer {index} ({name}) has no linear LoRA module of adapter {adapter!r} that can receive the "
                f"echo{but}. Widen LoraConfig.target_modules or layers_to_transform, or choose other target_layers."
            )
        found |= in_layer
        without |= left_out
    if site == "lora_input":
        for name, module in found.items():
            variant = module.lora_variant.get(adapter)
            kind = getattr(variant, "__name__", type(variant).__name__)
            if variant is not None and kind not in RUNS_LORA_A:
                raise EchoModelError(
                    f"{name} is adapted by PEFT's {kind}, which reads the weights of lora_A without running it, so an "
                    "echo at its input can't learn. Use injection_site='output'."
                )
    return found, without


def unmatched_targets(model: PeftModel, given: Any, adapter: str) -> list[str]:
    """The names in LoraConfig.target_modules with which the name of no adapted module ends.

    given: target_modules before the adapter was made. A string is a pattern or `all-linear`, for which PEFT itself
    raises an error if nothing matches. Names that PEFT replaces, such as those of experts kept in one tensor, don't
    count.
    """
    names = model.peft_config[adapter].target_modules
    if given is None or isinstance(given, str) or names is None or isinstance(names, str):
        return []
    adapted = model.base_model.targeted_module_names
    ends = set(given).intersection(names)
    return sorted(end for end in ends if not any(f".{name}".endswith(f".{end}") for name in adapted))


def _why_without_echo(layer: nn.Module, path: str, module: LoraLayer, adapter: str) -> str | None:
    """Why a LoRA module can't receive the echo, judged by its type and its path in the layer; None if it can."""
    if isinstance(module, ParamWrapper):
        return "adapts a bare parameter, such as the weights of experts or routers"
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], (nn.Linear, BlockDiagonalLinear)):
        return f"adapts a layer of type {type(module.get_base_layer()).__name__}, which is not linear"
    if isinstance(module, MultiheadAttention):
        return "adapts a whole attention module"
    parts = path.split(".")
    for end in range(1, len(parts)):
        if "expert" in parts[end - 1] and isinstance(layer.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return "belongs to one of several experts, each of which sees only some of the tokens"
    if any(part in ("encoder_attn", "crossattention") for part in parts):
        return "attends to an encoder, which this model lacks"
    if parts[-1] == "kv_b_proj":  # multi-head latent attention
        return "expands the cached states of all tokens, including the prefix's"
    return None


def listed(reasons: dict[str, str]) -> str:
    """The reasons as text, each with the first module it applies to and the number of the others."""
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {why}" for why, names in by_reason.items()
    )
