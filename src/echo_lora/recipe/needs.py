"""The optional packages that a recipe needs. Asked for before anything is loaded, and without importing torch."""

from __future__ import annotations

from echo_lora.environment import require_package
from echo_lora.packaged import PACKAGED, require_wheel
from echo_lora.recipe.schema import SPLITS, Recipe


def require_packages(recipe: Recipe, *, trains: bool = False, scores: bool = False) -> None:
    """Raise an EchoError that names the first package that is missing, and the command that installs it.

    trains, scores: what will be done, besides reading the rows and the base model.
    """
    if trains:
        for name in recipe.training.report_to:
            require_package(name, f"training.report_to = {name}", "or leave it out")
        if "8bit" in recipe.training.optimizer:
            require_package(
                "bitsandbytes", f"training.optimizer = {recipe.training.optimizer}", "or choose another optimizer"
            )
    if recipe.quantization is not None:
        require_package("bitsandbytes", f"quantization = {recipe.quantization}", "or leave it out")
    if scores:
        require_package("lm-eval", "scoring")
    sources = [source for split in SPLITS for source in getattr(recipe.data, split) or []]
    for source in (*sources, *(source for task in recipe.evaluation.tasks for source in task.data or [])):
        if source.task is not None:
            require_package("reasoning-gym", f"the task {source.task!r}")
    require_model(recipe.model)


def require_model(reference: str) -> None:
    """Raise EchoModelError if this is the packaged model and a package of it is missing."""
    if reference == PACKAGED:
        require_wheel()
