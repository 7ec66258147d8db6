"""Complete checkpoints: a seal, written last, that lists the files and the configuration they belong to.

A run may be killed while it writes. A checkpoint without a seal was interrupted; one whose files differ from
their seal was damaged. Neither is resumed from, and no older checkpoint is deleted before a newer one is sealed.

Its tensors are whole, however many processes held parts of them, so that any number of processes can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer_utils import sort_checkpoints

from echo_lora.errors import EchoCheckpointError
from echo_lora.export import whole

logger = logging.getLogger(__name__)

SEAL = "echo_checkpoint.json"


def seal_checkpoint(folder: Path, *, configuration: dict[str, Any], initial_adapter_sha256: str | None) -> None:
    """Declare the checkpoint complete: every file in it with its SHA-256, and what decides the run's result."""
    seal = {
        "initial_adapter_sha256": initial_adapter_sha256,
        "configuration": _plain(configuration),
        "files": {
            str(path.relative_to(folder)): _sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != SEAL
        },
    }
    temporary = folder / f".{SEAL}.tmp"
    temporary.write_text(json.dumps(seal, indent=2))
    temporary.replace(folder / SEAL)


def read_seal(folder: Path) -> dict[str, Any]:
    """The seal of a checkpoint, after comparing every file with it. Raises EchoCheckpointError."""
    if not (folder / SEAL).is_file():
        raise EchoCheckpointError(
            f"{folder} has no {SEAL}: it was interrupted while being written, or is not a checkpoint of this package. "
            "Resume from an earlier checkpoint."
        )
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        seal["initial_adapter_sha256"], seal["configuration"].keys(), seal["files"].keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EchoCheckpointError(
            f"{folder / SEAL} is damaged: {error!r}. Resume from an earlier checkpoint."
        ) from error
    for name, digest in seal["files"].items():
        if not os.path.isfile(folder / name) or _sha256(folder / name) != digest:
            raise EchoCheckpointError(
                f"{folder / name} is missing or not what was saved. Resume from an earlier checkpoint."
            )
    return seal


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """The newest sealed checkpoint; newer ones without a seal are passed over, with a line that says so.

    Raises EchoCheckpointError if there is none.
    """
    found = sort_checkpoints(str(output_dir)) if os.path.isdir(output_dir) else []
    for folder in map(Path, reversed(found)):
        if (folder / SEAL).is_file():
            return folder
        logger.warning("%s was not finished, or is of another program; passing over it.", folder)
    raise EchoCheckpointError(f"{output_dir} holds no complete checkpoint to resume from. Start without resuming.")


def has_complete_checkpoint(output_dir: str | Path) -> bool:
    """Whether there is anything to resume from."""
    return any(Path(output_dir).glob(f"checkpoint-*/{SEAL}"))


def compare_configuration(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises EchoCheckpointError with the differences, if there are any."""
    current = _plain(current)
    differences = [
        f"  {key}: checkpoint {saved.get(key)!r}, now {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differences:
        raise EchoCheckpointError(
            f"{folder} was made with another configuration, so going on would give neither run's result:\n"
            + "\n".join(differences)
            + "\nRestore these values, or start anew in another output folder."
        )


def fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, of which each process may hold a part.

    Raises EchoCheckpointError if the names differ.
    """
    if targets.keys() != values.keys():
        raise EchoCheckpointError(
            f"the checkpoint holds other tensors than the model: {sorted(targets.keys() ^ values.keys())[:3]} are in "
            "one only. Resume from a checkpoint of this run."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_part(values[name], target))


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors; every process has to ask."""
    saved = optimizer.state_dict()
    states = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    return saved | {"state": states}


def load_whole_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict()` for parameters of which each process holds a part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {
            name: _part(value, parameters[index]) if getattr(value, "shape", None) == parameters[index].shape else value
            for name, value in state.items()
        }
        for index, state in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": states})


def _part(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor, where `like` is shared out."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _plain(configuration: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from JSON, so that saved and current values compare."""
    return json.loads(json.dumps(configuration, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
