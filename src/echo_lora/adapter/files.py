"""The files of a PEFT adapter: names, tensors, configuration, hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel, PeftType, TaskType, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from echo_lora.errors import EchoCheckpointError, first_problem
from echo_lora.method.config import LARGEST_RANK

ADAPTER_FILE = "adapter_model.safetensors"

CONFIG_FILE = "adapter_config.json"

LARGEST_CONFIG = 10_000_000  # bytes

# files that tokenizers save; those of an earlier tokenizer must not stay beside another's
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. A sharded one is gathered: all processes must call this in the same order."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def adapter_tensors(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapter's whole tensors, under the names that PEFT saves them with."""
    return {name: whole(t) for name, t in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}


def adapter_hash(model: PeftModel, adapter_name: str = "default") -> str:
    """SHA-256 of the adapter's names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model, adapter_name).items()):
        data = tensor.contiguous()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)}".encode())
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.dim() else str(data.item()).encode())
    return digest.hexdigest()


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder. Raises EchoCheckpointError if the file is missing or corrupted."""
    path = Path(folder) / ADAPTER_FILE
    if not os.path.isfile(path):
        raise EchoCheckpointError(f"{path} is missing. Name the folder that holds it and adapter_config.json.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EchoCheckpointError(
            f"{path} can't be read: {error}. The file is corrupted or truncated: restore it, or save the adapter again."
        ) from error


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises EchoCheckpointError if it is missing, not a PEFT adapter's, or has values that no LoRA adapter can have.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        if not os.path.isfile(path):
            raise OSError("there is no such file")
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise OSError(f"it has {os.path.getsize(path):,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EchoCheckpointError(f"{path} can't be read: {error}. Name the folder of a PEFT adapter.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise EchoCheckpointError(f"{path} is not the configuration of a PEFT adapter. Name another folder.")
    kind = config["peft_type"]
    if not isinstance(kind, str) or kind not in PeftType.__members__:
        raise EchoCheckpointError(
            f"{path}: peft_type = {kind!r} is unknown to the installed PEFT. Correct it, or install a newer PEFT."
        )
    if kind == PeftType.LORA:
        try:
            _LoraFile.model_validate(config)
        except ValidationError as error:
            raise EchoCheckpointError(
                f"{path}: {first_problem(error)}. Restore the file that was saved with the weights."
            ) from error
    return config


class _LoraFile(BaseModel):
    """The fields of a LoRA adapter_config.json that PEFT does not check."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    r: int = Field(ge=1, le=LARGEST_RANK)
    lora_alpha: float
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    task_type: Literal[tuple(TaskType.__members__)] | None = None  # type: ignore[valid-type]
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=LARGEST_RANK)]] | None = None
    alpha_pattern: dict[str, float] | None = None


def compare_adapter(folder: Path, expected: Mapping[str, Tensor], *, trained: bool = True) -> None:
    """Raise EchoCheckpointError unless a folder holds the expected keys and values, all finite, with lora_B trained."""
    saved = read_adapter(folder)
    missing, extra = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    if missing or extra:
        raise EchoCheckpointError(
            f"{folder / ADAPTER_FILE} does not hold the adapter's keys: missing {sorted(missing)[:3]}, unexpected "
            f"{sorted(extra)[:3]} ({len(missing)} and {len(extra)} in all). Don't use this folder; save again."
        )
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise EchoCheckpointError(
                f"{folder / ADAPTER_FILE}: {name} holds values that are not finite: training diverged. Go back to an "
                "earlier checkpoint, and lower the learning rate."
            )
        if not torch.equal(tensor, expected[name].to(tensor.dtype)):
            raise EchoCheckpointError(f"{folder / ADAPTER_FILE}: {name} differs from the trained adapter. Save again.")
    lora_B = [tensor for name, tensor in saved.items() if "lora_B" in name]
    if trained and lora_B and not any(tensor.any() for tensor in lora_B):
        raise EchoCheckpointError(
            f"{folder / ADAPTER_FILE}: every lora_B is zero: the adapter was not trained. Check the learning rate, and "
            "that the adapter's parameters require gradients."
        )
