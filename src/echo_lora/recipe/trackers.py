"""Experiment trackers: where they write, the run's project, and that a run's tracking ends with the run.

transformers reports to them; what it does not pass on, they read from environment variables. A variable that the user
has set wins over the run's folder, and a key of the recipe over a variable.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_lora.environment import is_main_process
from echo_lora.recipe.record import LOGS
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.sections import PROJECT

# tracker: environment variable of its folder, and of its project
FOLDERS = {
    "tensorboard": "TENSORBOARD_LOGGING_DIR",
    "wandb": "WANDB_DIR",
    "mlflow": "MLFLOW_TRACKING_URI",
    "trackio": "TRACKIO_DIR",
    "swanlab": "SWANLAB_LOG_DIR",
}
PROJECTS = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}

# tracker: its open run, and what ends it. transformers ends those of TensorBoard and trackio
RUNS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "wandb": (lambda package: package.run, "finish"),
    "mlflow": (lambda package: package.active_run(), "end_run"),
    # before 0.8 there is no has_run, and from then on get_run raises an error if there is none
    "swanlab": (lambda package: getattr(package, "has_run", package.get_run)(), "finish"),
}


@contextmanager
def tracking(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Send the metrics of the training inside to the recipe's trackers, with what they write in `folder`/logs.

    Create the trainer inside, too. Afterwards the environment is as before, and no run stays open, in which the next
    training of this process would continue; a run that was open before stays so.
    """
    wanted = recipe.training.report_to
    ours = [name for name in wanted if name in RUNS and not _open_run(name)]
    variables = _variables(recipe, folder / LOGS)
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        if "swanlab" in ours and is_main_process():
            _begin_swanlab(recipe)
        yield
    finally:
        try:
            for name in ours:
                if _open_run(name):
                    getattr(sys.modules[name], RUNS[name][1])()
        finally:
            for variable, value in before.items():
                if value is None:
                    os.environ.pop(variable, None)
                else:
                    os.environ[variable] = value


def _begin_swanlab(recipe: Recipe) -> None:
    """In the place of transformers, which fails from swanlab 0.8 on: github.com/hiyouga/LlamaFactory/pull/10711."""
    import swanlab

    project = recipe.training.project or os.environ.get("SWANLAB_PROJECT") or PROJECT
    swanlab.init(project=project, experiment_name=recipe.training.run_name or Path(recipe.output).name)


def _open_run(name: str) -> Any:
    return RUNS[name][0](importlib.import_module(name))


def _variables(recipe: Recipe, logs: Path) -> dict[str, str]:
    """The environment variables to set; makes the folders, which some trackers don't."""
    variables = {}
    for name in recipe.training.report_to:
        if FOLDERS[name] not in os.environ:
            folder = (logs / name).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            # MLflow refuses to write into a plain folder
            variables[FOLDERS[name]] = f"sqlite:///{folder.as_posix()}/mlflow.db" if name == "mlflow" else str(folder)
        if name in PROJECTS and (recipe.training.project or PROJECTS[name] not in os.environ):
            variables[PROJECTS[name]] = recipe.training.project or PROJECT
    return variables
