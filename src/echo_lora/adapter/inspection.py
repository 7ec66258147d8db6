"""What an adapter folder holds, and the problems in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType, TaskType
from torch import Tensor

from echo_lora.adapter.files import CONFIG_FILE, read_adapter, read_adapter_config
from echo_lora.adapter.serving import who_takes


def adapter_problems(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Why an adapter's tensors are unusable or do not match its configuration."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            yield f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
        elif not tensor.isfinite().all():
            yield f"{name} holds values that are not finite"
    foreign = sorted(name for name in tensors if not name.startswith("base_model.model."))
    if foreign:
        yield f"{foreign[0]} is not a PEFT key ({len(foreign)} such keys)"
    if config.get("task_type") not in (None, TaskType.CAUSAL_LM, TaskType.FEATURE_EXTRACTION):
        yield f"task_type = {config['task_type']} is not that of a causal language model, {TaskType.CAUSAL_LM.value}"
    if config["peft_type"] != PeftType.LORA:
        if any(".lora_A." in name for name in tensors):
            yield f"the weights are LoRA weights, but peft_type = {config['peft_type']}"
        return
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    if not modules:
        yield "there are no LoRA weights"
    # parameters of a module, such as those of all experts in one tensor, have their own names and shapes
    parents = tuple(f".{name.rpartition('.')[0]}" for name in config.get("target_parameters") or [])
    modules = {module for module in modules if not re.sub(r"(\.base_layer)+$", "", module).endswith(parents)}
    if config["lora_alpha"] == 0:
        yield "lora_alpha = 0: the adapter changes nothing"
    for module in sorted(modules):
        yield from _module_problems(config, tensors, module)


def missing_modules(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What the configuration says is trained besides LoRA but has no weights. PEFT fails where the base has it."""
    names = config.get("modules_to_save")
    for name in names if isinstance(names, list) else []:
        if not any(f".{name}." in key for key in tensors):
            yield f"modules_to_save names {name}, but there are no weights for it"
    if config.get("trainable_token_indices") and not any("trainable_tokens" in key for key in tensors):
        yield f"trainable_token_indices = {config['trainable_token_indices']}, but there are no token weights"


def _module_problems(config: Mapping[str, Any], tensors: Mapping[str, Tensor], module: str) -> Iterator[str]:
    own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.lora_")}
    named = module.removeprefix("base_model.model.")
    try:
        ranks = [  # matched as PEFT does
            rank
            for pattern, rank in (config.get("rank_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?({pattern})", named)
        ]
        targets = config.get("target_modules")
        if isinstance(targets, str) and targets != "all-linear" and not re.fullmatch(targets, named):
            yield f"{named} has weights, but target_modules = {targets!r} does not name it"
    except re.error as error:
        yield f"a pattern in {CONFIG_FILE} is not a valid regular expression: {error}"
        return
    if isinstance(targets, list) and not any(named == name or named.endswith(f".{name}") for name in targets):
        yield f"{named} has weights, but target_modules = {targets} does not name it"
    A, B = own.get("lora_A.weight"), own.get("lora_B.weight")
    if (A is None) != (B is None):
        yield f"{named} has no {'lora_A' if A is None else 'lora_B'}"
    elif A is not None and B is not None:
        rank = (ranks or [config["r"]])[0]
        if A.dim() < 2 or B.dim() != A.dim() or (A.shape[0], B.shape[1]) != (rank, rank) or not A.numel() * B.numel():
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            yield f"{named} has lora_A and lora_B of shapes {shapes}, which do not fit rank {rank}"
        for what, is_there, key in (
            ("DoRA magnitude", any("magnitude" in name for name in own), "use_dora"),
            ("lora_B bias", "lora_B.bias" in own, "lora_bias"),
        ):
            if is_there != bool(config.get(key)):
                yield f"{named} has {'a' if is_there else 'no'} {what}, but {key} = {config.get(key, False)}"


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter folder holds."""

    folder: Path
    method: str
    rank: int
    alpha: float
    base: str | None
    modules: list[str]  # last parts of the names of the adapted modules
    layers: int  # number of adapted modules
    parameters: int
    dtypes: list[str]
    files: list[str]
    has_chat_template: bool
    problems: list[str]  # why not to use it; empty if there are none
    readers: list[str]  # what can load it, and how
    refused_by: list[str]  # what can't, and why

    def pairs(self) -> dict[str, str]:
        """The report as names and values for a terminal."""
        pairs = {
            "adapter": str(self.folder),
            "method": f"{self.method}, rank {self.rank}, alpha {self.alpha:g}",
            "made for": self.base or "a base model that it does not name",
            "changes": f"{self.layers} modules: {', '.join(self.modules)}",
            "parameters": f"{self.parameters:,} in {', '.join(self.dtypes)}",
            "files": ", ".join(self.files),
            "chat template": "yes" if self.has_chat_template else "no",
            "problems": "\n".join(self.problems) or "none",
            "loaded by": "\n".join(self.readers) or "nothing while it has problems",
        }
        return pairs | ({"not by": "\n".join(self.refused_by)} if self.refused_by else {})


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Inspect an adapter folder without a model. Raises EchoCheckpointError if it is not one, or corrupted."""
    folder = Path(folder)
    config, tensors = read_adapter_config(folder), read_adapter(folder)
    is_lora = config["peft_type"] == PeftType.LORA
    method = config["peft_type"].lower()
    if is_lora and (config.get("use_dora") or config.get("use_rslora")):
        method = "dora" if config.get("use_dora") else "rslora"
    changed = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    lora_B = [tensor for name, tensor in tensors.items() if ".lora_B" in name]
    problems = [*adapter_problems(config, tensors), *missing_modules(config, tensors)]
    if lora_B and not any(tensor.any() for tensor in lora_B):
        problems.append("every lora_B is zero: the adapter changes nothing")
    if not problems:
        problems += _refused_by_peft(folder)
    takes, refuses = ([], []) if problems else who_takes(config, tensors)
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return AdapterReport(
        folder=folder,
        method=method,
        rank=config.get("r", 0),
        alpha=config.get("lora_alpha", 0),
        base=config.get("base_model_name_or_path"),
        modules=sorted({name.rpartition(".")[2] for name in changed}),
        layers=len(changed),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        files=files,
        has_chat_template="chat_template.jinja" in files,
        problems=problems,
        readers=takes,
        refused_by=refuses,
    )


def _refused_by_peft(folder: Path) -> list[str]:
    """Why PEFT can't read the configuration, which may be any exception of its code."""
    try:
        PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        return [f"PEFT can't read {CONFIG_FILE}: {type(error).__name__}: {error}"]
    return []
