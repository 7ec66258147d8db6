"""A training run to be killed, in a process that has imported everything before it began."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import matplotlib.figure  # noqa: F401

from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.train import run
from echo_lora.training.checkpoint import has_complete_checkpoint

STEPS = 8


def train(recipe: Path, output: Path, errors: Connection) -> None:
    """As `echo-lora train`, with --resume where there is something to resume from; `errors` gets what it prints."""
    os.dup2(errors.fileno(), 2)
    run(load_recipe(recipe, [f"output={output}"]), resume=has_complete_checkpoint(output / "checkpoints"))
