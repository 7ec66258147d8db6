"""Complete checkpoints: a seal, written last, that lists the files and the configuration they belong to.

A run may be killed while it writes. A checkpoint without a seal was interrupted; one whose files differ from
their seal was damaged. Neither is resumed from, and no older checkpoint is deleted before a newer one is sealed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from echo_lora.errors import EchoCheckpointError

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
    seal = json.loads((folder / SEAL).read_text())
    for name, digest in seal["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise EchoCheckpointError(
                f"{folder / name} is missing or not what was saved. Resume from an earlier checkpoint."
            )
    return seal


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """The newest sealed checkpoint; newer ones without a seal are passed over, with a line that says so.

    Raises EchoCheckpointError if there is none.
    """
    found = sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []
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


def _plain(configuration: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from JSON, so that saved and current values compare."""
    return json.loads(json.dumps(configuration, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
