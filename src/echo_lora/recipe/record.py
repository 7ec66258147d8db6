"""A run's output folder: claiming it, the result in `run.json`, the plot of its losses, and cleaning up."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_lora.environment import gigabytes
from echo_lora.errors import EchoCheckpointError
from echo_lora.files import refuse_existing, remove_empty, remove_files, remove_leftovers
from echo_lora.method import losses
from echo_lora.training.checkpoint import (
    complete_checkpoints,
    has_complete_checkpoint,
    last_complete_checkpoint,
    remove_unfinished,
)

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"  # written first, with its defaults, so that the run can be resumed and repeated
LOGS = "logs"  # what experiment trackers write
STARTED = "started.json"  # the recipe, in checkpoints/: marks the folder as a run's own


@dataclass(frozen=True)
class RunResult:
    """A finished run; `run.json` holds the same fields."""

    output: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    rows: list[str]  # the training rows, as lines of text
    steps: int
    resumed_at: int  # the step from which this process resumed; 0 if it did not
    seconds: float  # of training, in this process
    peak_memory: int  # bytes: of the process on a CPU, of torch's tensors on a GPU
    deployed_parameters: int  # of the adapter
    echo_parameters: int  # of the echo, which is discarded
    data_sha256: str  # of the tokenised training rows
    initial_adapter_sha256: str
    adapter_sha256: str
    final: dict[str, float]  # the last value of every metric
    history: list[dict[str, float]]
    processes: int = 1  # each with batch_size rows per pass
    is_alpaca: bool = False  # whether plain prompts are in Alpaca's layout
    is_chat: bool | None = None  # whether prompts went through the chat template; None if only some did

    @property
    def adapter(self) -> Path:
        return Path(self.output) / "adapter"

    def pairs(self) -> dict[str, str]:
        """Labels and values for the terminal."""
        shown = ("loss", *losses.SHOWN, "eval_loss")
        is_scored = self.recipe["data"].get("test") or self.recipe["evaluation"]["tasks"]
        return {
            "adapter": str(self.adapter),
            "steps": f"{self.steps} in {self.seconds:.0f} s, peak memory {gigabytes(self.peak_memory)}",
            "parameters": f"{self.deployed_parameters:,} saved, {self.echo_parameters:,} of the echo discarded",
            "last losses": ", ".join(f"{name} {self.final[name]:.4g}" for name in shown if name in self.final),
            "try it": f"echo-lora chat {self.output} --base",
            **({"score it": f"echo-lora eval {self.output} --base"} if is_scored else {}),
        }

    @classmethod
    def read(cls, output: str | Path) -> RunResult:
        """The result of a finished run. Raises EchoCheckpointError if the folder holds none."""
        path = Path(output) / RUN_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields | {"output": str(output)})  # the folder may have moved
        except (OSError, ValueError, TypeError) as error:
            raise EchoCheckpointError(
                f"{path} is not the record of a finished run: {error}. Pass the output folder of `echo-lora train`."
            ) from error


def plot_losses(history: list[dict[str, float]], path: Path) -> None:
    """Plot the losses, with the routing probability on a second axis, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    has_echo = any("ce_off" in entry for entry in history)
    for name in (*(losses.SHOWN if has_echo else ["loss"]), "eval_loss"):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
    axes.set(xlabel="optimizer step", ylabel="nats per supervised token")
    if has_echo:
        points = [(entry["step"], entry["routing_p"]) for entry in history if "routing_p" in entry]
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), color="0.7", linestyle="--")
        right.set(ylabel="routing_p (dashed)", ylim=(0, 1.05))
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def claim_folder(output: Path, checkpoints: Path, resume: bool) -> None:
    """Claim the output folder. Raises EchoCheckpointError if it is not empty, or has nothing to resume from."""
    if resume:
        if os.path.exists(output / RUN_FILE):
            raise EchoCheckpointError(
                f"{output} holds a finished run; there is nothing to resume. Its adapter is in adapter/."
            )
        if not has_complete_checkpoint(checkpoints):
            last_complete_checkpoint(checkpoints)  # raises the error
        return
    is_run = (checkpoints / STARTED).is_file() and not (output / RUN_FILE).exists()
    if is_run and not has_complete_checkpoint(checkpoints):  # killed before its first checkpoint
        remove_unfinished(checkpoints)
        return
    try:
        refuse_existing(output)
    except EchoCheckpointError as error:
        hint = "To continue its training, resume (--resume). " if is_run else ""
        raise EchoCheckpointError(f"{error} {hint}The recipe's key is output.") from None


def tidy_folder(output: Path, checkpoints: Path, is_new: bool) -> None:
    """Remove the unfinished files of this run, and its folders if they are then empty.

    Failing to remove something is only a warning: an error would hide the one that ended the run.
    """
    try:
        for name in (
            output / "adapter",
            output / "loss.png",
            output / RUN_FILE,
            output / RECIPE_FILE,
            checkpoints / STARTED,
        ):
            remove_leftovers(name)
        remove_unfinished(checkpoints)
        own = [STARTED, "README.md"]  # TRL writes the second
        if checkpoints.is_dir() and {path.name for path in checkpoints.iterdir()} <= set(own):
            remove_files(checkpoints, own)
            (output / RECIPE_FILE).unlink(missing_ok=True)
            if (output / LOGS).is_dir() and not (output / RUN_FILE).exists():
                shutil.rmtree(output / LOGS)
        if is_new:
            remove_empty(output)
    except OSError as error:
        logger.warning("%s could not be cleaned up: %s", output, error)


def resume_hint(checkpoints: Path, command: str | None = None) -> str:
    """What an interruption leaves, and how to continue. command: what was run, without --resume."""
    if complete := complete_checkpoints(checkpoints):
        how = "repeat the command with --resume." if command is None else f"run: {command} --resume"
        return f"The newest complete checkpoint, {complete[-1]}, is kept. To resume from it, {how}"
    return "There is no complete checkpoint yet, so nothing is kept: repeat the command to start again."
