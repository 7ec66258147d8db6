"""The echo's state in a checkpoint."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from echo_lora.adapter.files import ADAPTER_FILE, adapter_tensors, compare_adapter, whole
from echo_lora.data.tokenize import ANSWER
from echo_lora.errors import EchoCheckpointError
from echo_lora.files import use_umask
from echo_lora.method.model import EchoModel
from echo_lora.training.checkpoint import file_hash, fill

ECHO_STATE = "echo_state.safetensors"


@contextmanager
def no_code(checkpoint: str | None) -> Iterator[None]:
    """Turn torch's refusal to unpickle code into an EchoCheckpointError that names the checkpoint."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise EchoCheckpointError(
            f"{checkpoint} holds a pickle with code, which was not run: {error} Resume from a checkpoint that you made "
            "yourself."
        ) from error


def adapter_folder(folder: Path, model: PeftModel) -> Path:
    """The folder in which PEFT saves the active adapter."""
    name = model.active_adapters[0]
    return folder if name == "default" else folder / name


def save_echo(model: EchoModel, folder: Path, *, should_save: bool) -> None:
    """Save the echo into a checkpoint, with the hash of the adapter next to it. Call it in every process."""
    tensors = {name: whole(tensor) for name, tensor in model.echo.tensors().items()}
    if should_save:
        adapter = adapter_folder(folder, model) / ADAPTER_FILE
        save_file(tensors, folder / ECHO_STATE, {"adapter_sha256": file_hash(adapter)} if adapter.is_file() else None)
        use_umask(folder, [folder / ECHO_STATE])


def restore_echo(model: EchoModel, folder: Path) -> None:
    """Load the echo of a checkpoint whose adapter the stock Trainer has loaded. Call it in every process.

    Raises EchoCheckpointError if model, adapter file and echo file don't belong together.
    """
    expected = adapter_tensors(model, model.active_adapters[0])
    adapter, path = adapter_folder(folder, model), folder / ECHO_STATE
    try:
        compare_adapter(adapter, expected, trained=False)
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("adapter_sha256")
        if known != file_hash(adapter / ADAPTER_FILE):
            raise EchoCheckpointError(f"{path} was saved with another adapter.")
    except (EchoCheckpointError, SafetensorError, OSError) as error:
        raise EchoCheckpointError(
            f"the stock Trainer has loaded an adapter, but EchoCallback can't find its echo in {folder}: {error} "
            "Training would continue with a different echo. Resume from a checkpoint in output_dir that was saved with "
            "EchoCallback, or use EchoTrainer or EchoSFTTrainer."
        ) from error
    fill(model.echo.tensors(), load_file(path))


def dataset_hash(dataset: Any) -> str:
    """SHA-256 of token ids, labels and answer masks; "stream" for data that can't be read twice."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return "stream"
    digest = hashlib.sha256()
    columns = [c for c in ("input_ids", "labels", ANSWER) if c in dataset.column_names]
    for batch in dataset.select_columns(columns).iter(1000):
        for column in columns:
            for values in batch[column]:
                digest.update(np.asarray(values, dtype=np.int64).tobytes())
    return digest.hexdigest()
