"""Complete checkpoints: a seal, written last, that lists the files and the configuration they belong to.

A run may be killed while it writes. A checkpoint without a seal was interrupted; one whose files differ from the seal
is damaged. A resume uses neither, and no older checkpoint is deleted before a newer one is sealed.

Only files that a trainer saved are ever removed. While a checkpoint has no seal, because it is being saved or removed,
a record beside its folder tells its files from other files; a folder with neither is left alone.

Tensors are saved whole, even if they were sharded, so a run can resume on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from echo_lora.adapter.files import CONFIG_FILE, TOKENIZER_FILES, whole
from echo_lora.errors import EchoCheckpointError
from echo_lora.files import remove_empty, remove_files, use_umask, write_text

logger = logging.getLogger(__name__)

SEAL = "echo_checkpoint.json"
RECORD = ".unfinished.json"  # beside the folder, .checkpoint-4.unfinished.json: made before it, removed after it
IN_PROGRESS = "checkpoint-is-incomplete.txt"  # the marker of enable_jit_checkpoint in transformers
LOADED = (".safetensors", ".bin", ".pt", ".pth")  # files that a trainer loads by name

# What a trainer writes into a checkpoint; an interrupted write leaves temporary files of safetensors and of ours.
WRITTEN = (
    *(f"*{suffix}" for suffix in LOADED),
    *("trainer_state.json", CONFIG_FILE, "README.md", *TOKENIZER_FILES, IN_PROGRESS, ".tmp*", f".{SEAL}.*"),
)


def begin_checkpoint(folder: Path) -> None:
    """Call before saving a checkpoint: removes what an earlier run saved there, and records the files of others."""
    remove_checkpoint(folder)
    others = {name: _state(folder / name) for name in _files(folder) if name != IN_PROGRESS}
    _record(folder).parent.mkdir(parents=True, exist_ok=True)
    # need not be atomic: a truncated record means that nothing was saved yet
    _record(folder).write_text(json.dumps({"others": others}), encoding="utf-8")


def seal_checkpoint(
    folder: Path,
    *,
    configuration: dict[str, Any],
    initial_adapter_sha256: str | None,
    num_tokens: int = 0,
    loss_sum: tuple[float, int] = (0.0, 0),
) -> None:
    """Declare the checkpoint complete: write its files' SHA-256 and the configuration that decides the run's result.

    Its files are those written since `begin_checkpoint`. num_tokens: tokens trained on so far, as TRL logs them; a
    resume continues the count. loss_sum: the logged loss, summed over the steps since the given one.
    """
    names = [name for name in _new_files(folder) if name != IN_PROGRESS]
    use_umask(folder, [folder / name for name in names])
    seal = {
        "initial_adapter_sha256": initial_adapter_sha256,
        "num_tokens": num_tokens,
        "loss_sum": loss_sum,
        "configuration": _plain(configuration),
        "files": {name: file_hash(folder / name) for name in names},
    }
    text = json.dumps(seal, indent=2)
    write_text(folder / SEAL, text)
    _record(folder).unlink()


def read_seal(folder: Path) -> dict[str, Any]:
    """The seal of a checkpoint, after comparing every file with it.

    Raises EchoCheckpointError, which names the newest sound checkpoint beside it and how to resume from that, or the
    file to remove.
    """
    try:
        seal = _sound_seal(folder)
    except EchoCheckpointError as error:
        raise EchoCheckpointError(_with_remedy(str(error), folder)) from error
    for name in _files(folder):
        if Path(name).suffix in LOADED and name not in seal["files"]:
            raise EchoCheckpointError(
                f"{folder / name} was added after the checkpoint was written, and could be loaded instead of what was "
                "saved. Remove it, then resume again."
            )
    return seal


def checkpoint_folder(output_dir: str | Path, state: TrainerState) -> Path:
    """Where Trainer saves the checkpoint of the current step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if it has another name."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", folder.name)
    return int(match[1]) if match else None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-1, checkpoint-2, … of a run, in order of their steps (clocks may be set back)."""
    found = [(step, path) for path in Path(output_dir).glob("checkpoint-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The sealed checkpoints of a run, in order of their steps."""
    return [folder for folder in checkpoints_in(output_dir) if (folder / SEAL).is_file()]


def has_complete_checkpoint(output_dir: str | Path) -> bool:
    """Whether there is anything to resume from."""
    return bool(complete_checkpoints(output_dir))


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """The newest sealed checkpoint. Warns about newer, unsealed ones; raises EchoCheckpointError if there is none."""
    complete = complete_checkpoints(output_dir)
    for folder in reversed(checkpoints_in(output_dir)):
        if folder in complete:
            return folder
        logger.warning("%s is incomplete, or was written by another program; skipping it.", folder)
    raise EchoCheckpointError(f"{output_dir} holds no complete checkpoint to resume from. Start without resuming.")


def rotate_checkpoints(newest: Path, limit: int | None, best: str | Path | None = None) -> None:
    """Remove the oldest sealed checkpoints until `limit` are left; None or 0 keeps all.

    The `newest`, which was just written, the one of the highest step and the best are always kept.
    """
    sealed = complete_checkpoints(newest.parent)
    kept = {newest.resolve(), sealed[-1].resolve()} | ({Path(best).resolve()} if best else set())
    surplus = len(sealed) - max(limit or len(sealed), len(kept))
    for folder in [folder for folder in sealed if folder.resolve() not in kept][: max(surplus, 0)]:
        remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove what was saved into a checkpoint, and the folder if it is then empty.

    A folder with neither seal nor record is not ours and stays.
    """
    record = _record(folder)
    try:
        if (folder / SEAL).is_file():
            (folder / SEAL).replace(record)  # so that an interrupted removal can be completed later
        if record.is_file():
            remove_files(folder, [SEAL, *_recorded_files(folder)])
            record.unlink()
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def remove_unfinished(output_dir: Path) -> None:
    """Remove the files of checkpoints whose saving or removal was interrupted."""
    for record in output_dir.glob(f".checkpoint-*{RECORD}"):
        folder = record.with_name(record.name.removesuffix(RECORD)[1:])
        if (folder / SEAL).is_file():  # interrupted after the seal was written
            record.unlink()
        else:
            remove_checkpoint(folder)


def clear_checkpoints(output_dir: Path) -> None:
    """Remove all checkpoints of a study's run, sealed or not, TRL's card, and the folder if it is then empty."""
    remove_unfinished(output_dir)
    for folder in checkpoints_in(output_dir):
        remove_checkpoint(folder)
    remove_files(output_dir, ["README.md"])
    remove_empty(output_dir)


def _record(folder: Path) -> Path:
    """Where a checkpoint being saved lists the files that were there before, or one being removed keeps its seal."""
    return folder.with_name(f".{folder.name}{RECORD}")


def _recorded_files(folder: Path) -> list[str]:
    """What was saved into a folder without a seal; nothing if the record is truncated or damaged."""
    try:
        record = json.loads(_record(folder).read_text(encoding="utf-8"))
        if "others" in record:  # the user may have added files since the interruption
            return [name for name in _new_files(folder) if any(Path(name).match(pattern) for pattern in WRITTEN)]
        return [name for name in record["files"] if _is_inside(name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _new_files(folder: Path) -> list[str]:
    """The files in a folder that were added or rewritten since its saving began."""
    others = json.loads(_record(folder).read_text(encoding="utf-8"))["others"]
    return [name for name in _files(folder) if name != SEAL and others.get(name) != _state(folder / name)]


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _state(path: Path) -> list[int]:
    """A fingerprint that changes when the file is rewritten."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _seal(folder: Path) -> dict[str, Any]:
    """The seal, unverified. Raises EchoCheckpointError if it is missing or damaged."""
    path = folder / SEAL
    if not path.is_file():
        raise EchoCheckpointError(
            f"{folder} has no {SEAL}: its writing was interrupted, or it is not a checkpoint of this package."
        )
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        is_one = isinstance(seal["configuration"], dict) and all(map(_is_inside, seal["files"].keys()))
        is_one = is_one and isinstance(seal["num_tokens"], int)
        loss_sum, first = seal.get("loss_sum", (0.0, 0))  # version 0.1 had none
        is_one = is_one and isinstance(loss_sum, float) and isinstance(first, int)
        seal["initial_adapter_sha256"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EchoCheckpointError(f"{path} is damaged: {error!r}.") from error
    if not is_one:
        raise EchoCheckpointError(f"{path} is damaged: it lacks a list of files in its folder, or a number of tokens.")
    return seal


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder, on any operating system."""
    return not any(part.anchor or ".." in part.parts for part in (PurePosixPath(name), PureWindowsPath(name)))


def _sound_seal(folder: Path) -> dict[str, Any]:
    seal = _seal(folder)
    for name, digest in seal["files"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != digest:
            raise EchoCheckpointError(f"{folder / name} is missing or differs from what was saved.")
    return seal


def _with_remedy(problem: str, damaged: Path) -> str:
    """The problem of a checkpoint that can't be resumed from, and what to do about it."""
    newer = [damaged]
    for folder in reversed(checkpoints_in(damaged.parent)):
        try:
            _sound_seal(folder)
        except EchoCheckpointError:
            newer += [folder] if folder.resolve() != damaged.resolve() else []
            continue
        away = " and ".join(map(str, sorted(newer)))
        return (
            f"{problem} The newest sound checkpoint is {folder}. To resume from it, move {away} away and resume again "
            f"(echo-lora train … --resume), or pass resume_from_checkpoint={str(folder)!r} in a script."
        )
    return f"{problem} There is no sound checkpoint beside it: start again in another output folder."


def compare_configuration(
    folder: Path, saved: dict[str, Any], current: dict[str, Any], name_of: Callable[[str], str] = str
) -> None:
    """Raises EchoCheckpointError, which lists the differences. name_of: the user's name for a key."""
    current = _plain(current)
    keys = saved.keys() | current.keys()
    if saved.get("base.sha256") == current.get("base.sha256"):  # the same base, even if it was moved
        keys -= {"adapter.base_model_name_or_path"}
    differences = [
        f"  {name_of(key)}: checkpoint {saved.get(key)!r}, now {current.get(key)!r}"
        for key in sorted(keys)
        if saved.get(key) != current.get(key)
    ]
    if differences:
        raise EchoCheckpointError(
            f"{folder} was saved with another configuration, so resuming would reproduce neither run:\n"
            + "\n".join(differences)
            + "\nRestore these values, or start again in another output folder."
        )


def describe_base(model: PeftModel) -> dict[str, Any]:
    """What in the base decides a run's result: dtype, attention, quantisation, and the SHA-256 of its loaded weights.

    Call it before training shards the model. Takes about a second per gigabyte, in up to 8 threads.
    """
    base = model.get_base_model()
    config = getattr(base, "config", None)  # the user's own module may have none
    quantisation: Any = getattr(config, "quantization_config", None)
    return {
        "dtype": str(getattr(base, "dtype", None)).removeprefix("torch."),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "quantization": quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation,
        "sha256": _weights_hash(model),
    }


def _weights_hash(model: PeftModel) -> str:
    of_adapters = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save.")
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if isinstance(tensor, Tensor) and not any(part in name for part in of_adapters)
    }

    def digest(tensor: Tensor) -> str:
        data = tensor.detach().cpu().contiguous()
        found = hashlib.sha256(f"{data.dtype}:{tuple(data.shape)}".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib frees the interpreter's lock
        digests = dict(zip(weights, pool.map(digest, weights.values()), strict=True))
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the targets of the same names, which may be sharded.

    Raises EchoCheckpointError if names or shapes differ.
    """
    if targets.keys() != values.keys():
        raise EchoCheckpointError(
            f"the checkpoint and the model have different tensors: {sorted(targets.keys() ^ values.keys())[:3]} are in "
            "only one of them. Resume from a checkpoint of this run."
        )
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise EchoCheckpointError(
                f"{name} has the shape {tuple(values[name].shape)} in the checkpoint but {tuple(target.shape)} in the "
                "model. Resume from a checkpoint of this run."
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_part(values[name], target))


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors. Call it in every process."""
    saved = optimizer.state_dict()
    states = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    return saved | {"state": states}


def load_whole_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict()` for sharded parameters."""
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
    """The shard of a whole tensor that this process holds, if `like` is sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _plain(configuration: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from JSON, so that saved and current values compare."""
    return json.loads(json.dumps(configuration, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
