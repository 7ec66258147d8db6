"""Scoring a recipe: the base, the adapter, or both on its evaluation tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from echo_lora.adapter.card import CARD_FILE, read_card, with_scores
from echo_lora.adapter.export import probe_ids
from echo_lora.adapter.files import CONFIG_FILE
from echo_lora.adapter.merge import load_adapter
from echo_lora.benchmarks.protocols import commonsense_average
from echo_lora.data.sources import expanded
from echo_lora.environment import versions
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.evaluate import TaskResult, score
from echo_lora.evaluate.harness import require_permission
from echo_lora.evaluate.programs import describe_sandbox
from echo_lora.evaluate.tasks import check_rows
from echo_lora.files import refuse_locked, write_text
from echo_lora.models import canonical, load_tokenizer
from echo_lora.progress import progress_console, stage
from echo_lora.recipe.build import load_base
from echo_lora.recipe.load import load_recipe, recipe_of_run
from echo_lora.recipe.record import RUN_FILE
from echo_lora.recipe.rows import evaluation_rows
from echo_lora.recipe.schema import Recipe


@dataclass(frozen=True)
class Scores:
    """The results of one model on all tasks."""

    model: Literal["base", "adapter"]
    adapter: str | None  # its folder
    results: list[TaskResult]

    @property
    def commonsense_average(self) -> float | None:
        """The unweighted mean of LLM-Adapters' eight commonsense accuracies; None unless all eight were scored."""
        return commonsense_average({result.task: result.accuracy for result in self.results})

    def table(self) -> list[dict[str, str]]:
        """One row per task, for the terminal."""
        return [
            {
                "model": self.model,
                "task": result.task,
                "rows": str(result.total),
                "correct": f"{result.accuracy:.1%}",
                "95 % interval": f"{result.low:.1%} to {result.high:.1%}",
                "unreadable": f"{result.unreadable:.1%}",
            }
            for result in self.results
        ]

    def averages(self) -> list[str]:
        """The averages over classes or tasks, one per line."""
        values = {f"{result.task}, macro": result.macro_accuracy for result in self.results}
        values["commonsense, mean of eight"] = self.commonsense_average
        return [f"{self.model}: {name}: {value:.1%}" for name, value in values.items() if value is not None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "adapter": self.adapter,
            "commonsense_average": self.commonsense_average,
            "results": [result.to_dict() for result in self.results],
        }


def resolve(
    target: str, overrides: Sequence[str] = (), adapter: str | Path | None = None
) -> tuple[Recipe, Path | None]:
    """The recipe and the adapter to score.

    target: a recipe (with the adapter in its output folder, if it has been trained), the output folder of a run, or an
    adapter folder inside one. A run's own trust_remote_code is ignored. Raises EchoConfigError, or EchoCheckpointError,
    also while another process is training into the folder.
    """
    folder = expanded(target)
    if not os.path.isdir(folder):
        recipe = load_recipe(target, overrides)
        trained = Path(recipe.output) / "adapter"
        if adapter is None:  # a run that is still training has not written it yet
            refuse_locked(recipe.output)
        return recipe, Path(adapter) if adapter is not None else trained if trained.is_dir() else None
    is_adapter = (folder / CONFIG_FILE).is_file()
    run = folder.resolve().parent if is_adapter else folder
    refuse_locked(run)
    if not (run / RUN_FILE).is_file():
        raise EchoCheckpointError(
            f"{folder} has no {RUN_FILE} {'beside' if is_adapter else 'in'} it, which would say what to score it on. "
            "Pass a recipe, and the adapter with --adapter."
        )
    own = folder if is_adapter else folder / "adapter"
    return recipe_of_run(run / RUN_FILE, overrides), Path(adapter) if adapter is not None else own


def score_recipe(
    recipe: Recipe,
    adapter: Path | None,
    *,
    with_base: bool,
    run_generated_code: bool = False,
    allow_unsandboxed: bool = False,
) -> list[Scores]:
    """Score the adapter on the recipe's evaluation tasks, and before it the base if `with_base` or without an adapter.

    run_generated_code, allow_unsandboxed: see `score`. Raises EchoConfigError if a task needs them and they are not
    set, EchoCheckpointError if the adapter does not fit the recipe's model.
    """
    require_permission([task.build() for task in recipe.evaluation.tasks], run_generated_code, allow_unsandboxed)
    if any(task.kind == "code" for task in recipe.evaluation.tasks):
        progress_console().print(f"Generated code runs {describe_sandbox(allow_unsandboxed)}")
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    options: dict[str, Any] = {
        "batch_size": recipe.evaluation.batch_size,
        "run_generated_code": run_generated_code,
        "allow_unsandboxed": allow_unsandboxed,
    }
    with stage("Rendering the rows of the evaluation"):
        tasks = evaluation_rows(recipe, tokenizer)
        for task, rows in tasks:
            check_rows(task, rows)  # before the model is loaded
    with stage(f"Loading {recipe.model}"):
        base: Any = load_base(recipe)
        model = base.eval() if adapter is None else load_adapter(base, adapter, require_same_name=True)
        _require_numbers(model, recipe.model if adapter is None else str(adapter))
    scores = []
    if adapter is None or with_base:
        with stage("Scoring the base", bar=False), nullcontext() if adapter is None else model.disable_adapter():
            scores.append(Scores("base", None, score(model, tokenizer, tasks, **options)))
    if adapter is not None:
        with stage("Scoring the adapter", bar=False):
            results = score(model, tokenizer, tasks, **options)
        scores.append(Scores("adapter", str(adapter), results))
    return scores


def _require_numbers(model: Any, name: str) -> None:
    """Raises EchoModelError for a model whose logits are not finite."""
    with torch.no_grad():
        logits = model(input_ids=probe_ids(model)).logits
    if not logits.isfinite().all():
        raise EchoModelError(
            f"{name} gives logits that are not finite: its weights may be damaged, or its training may have diverged. "
            "Score another model, or use another dtype."
        )


def write_scores(recipe: Recipe, scores: list[Scores], path: str | Path) -> None:
    """Write recipe, versions and scores, with every prediction, as JSON. Raises EchoCheckpointError if it can't."""
    record = {"recipe": recipe.to_dict(), "versions": versions(), "models": [one.to_dict() for one in scores]}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_text(Path(path), text)


def add_to_card(recipe: Recipe, adapter: Path, scores: list[Scores]) -> Path | None:
    """Add the scores to the model card in a run's adapter folder; everything else in it stays as it is.

    Returns the card; None, without changing anything, if the adapter has none that can be written or if the recipe is
    not the run's own: scores of other rows or settings don't describe the run. Raises EchoCheckpointError if the card
    can't be read.
    """
    card, run = adapter / CARD_FILE, adapter.resolve().parent / RUN_FILE
    if not card.is_file() or not run.is_file() or not os.access(adapter, os.W_OK):
        return None
    own = {"model": canonical(recipe.model), "trust_remote_code": False}
    if recipe.model_copy(update=own) != recipe_of_run(run):
        return None
    results = [{"model": one.model} | result.to_dict() for one in scores for result in one.results]
    write_text(card, with_scores(read_card(card), results))
    return card
