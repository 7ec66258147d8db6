"""Scoring a recipe: the base, the adapter, or both on its evaluation tasks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import norm

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
from echo_lora.models import canonical, load_tokenizer, on_accelerator
from echo_lora.progress import progress_console, stage
from echo_lora.recipe.build import load_base
from echo_lora.recipe.load import load_recipe, recipe_of_run
from echo_lora.recipe.needs import require_packages
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


@dataclass(frozen=True)
class Difference:
    """Accuracy of the adapter minus that of the base, as a share, with its 95 % interval."""

    task: str  # or "mean of tasks"
    base: float
    adapter: float
    low: float
    high: float

    @property
    def estimate(self) -> float:
        return self.adapter - self.base


MEAN = "mean of tasks"


def differences(base: Scores, adapter: Scores) -> list[Difference]:
    """The difference on each task and, with several, on their unweighted mean.

    The interval is the adjusted Wald interval for paired shares of Bonett and Price (2012, Journal of Educational and
    Behavioral Statistics 37:479): one imagined question is added to those that only the one, and only the other, got
    right. The mean treats tasks as independent.
    """
    found, centres, variances = [], [], []
    for one, other in zip(base.results, adapter.results, strict=True):
        pairs = list(zip(one.correct_per_row, other.correct_per_row, strict=True))
        lost, gained = ((sum(pair == kind for pair in pairs) + 1) / (len(pairs) + 2) for kind in ((1, 0), (0, 1)))
        centres.append(gained - lost)
        variances.append((gained + lost - (gained - lost) ** 2) / (len(pairs) + 2))
        found.append(_difference(one.task, one.accuracy, other.accuracy, centres[-1], variances[-1]))
    if (tasks := len(found)) > 1:
        shares = ([getattr(result, name) for result in found] for name in ("base", "adapter"))
        first, second, centre = (sum(values) / tasks for values in (*shares, centres))
        found.append(_difference(MEAN, first, second, centre, sum(variances) / tasks**2))
    return found


def _difference(task: str, base: float, adapter: float, centre: float, variance: float) -> Difference:
    width = float(norm.ppf(0.975)) * math.sqrt(variance)
    return Difference(task, base, adapter, max(centre - width, -1.0), min(centre + width, 1.0))


def comparison(base: Scores, adapter: Scores) -> list[dict[str, str]]:
    """Base, adapter and their difference, a row per task, for the terminal."""
    rows = []
    by_task = {result.task: (one, result) for one, result in zip(base.results, adapter.results, strict=True)}
    for found in differences(base, adapter):
        pair = by_task.get(found.task)
        rows.append(
            {
                "task": found.task,
                "rows": str(pair[0].total) if pair else "",
                "base": f"{found.base:.1%}",
                "adapter": f"{found.adapter:.1%}",
                "difference": f"{100 * found.estimate:+.1f}",
                "95 % interval": f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
                "unreadable": " / ".join(f"{result.unreadable:.1%}" for result in pair) if pair else "",
            }
        )
    return rows


COMPARED = (
    "difference: adapter minus base in points, both on the same rows; the interval says nothing about other seeds",
    "unreadable: answers in which the task's pattern finds nothing, of base / adapter; they count as wrong",
)


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
    require_packages(recipe, scores=True)
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
        model = on_accelerator(model)
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
    if len(scores) == 2:
        record["differences"] = [asdict(found) | {"estimate": found.estimate} for found in differences(*scores)]
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
