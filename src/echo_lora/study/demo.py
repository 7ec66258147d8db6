"""The demonstration: base, LoRA and Echo-LoRA on the same rows, from the same initial adapter, in one table.

Each arm is `echo-lora train demo` in its own process, so that its peak memory is its own. An arm that is trained
is not trained again; an interrupted one is resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

from echo_lora.adapter.files import ADAPTER_FILE
from echo_lora.environment import gigabytes
from echo_lora.errors import EchoError, EchoInterrupt
from echo_lora.evaluate import TaskResult
from echo_lora.files import write_text
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.record import RUN_FILE, RunResult
from echo_lora.recipe.scoring import score_recipe
from echo_lora.training.checkpoint import has_complete_checkpoint

RECIPE = "demo"

ARMS = {"LoRA": ("lora", "echo=false"), "Echo-LoRA": ("echo-lora", "echo=true")}


@dataclass(frozen=True)
class ModelScore:
    """A model's scores on all tasks, and how it was trained."""

    name: str
    results: list[TaskResult]
    run: RunResult | None  # None for the base

    @property
    def overall(self) -> tuple[float, float, float]:
        """Share of right answers over all tasks, with its 95 % Wilson interval."""
        correct, total = sum(r.correct for r in self.results), sum(r.total for r in self.results)
        interval = binomtest(correct, total).proportion_ci(method="wilson")
        return correct / total, interval.low, interval.high

    @property
    def adapter_bytes(self) -> int:
        return 0 if self.run is None else (self.run.adapter / ADAPTER_FILE).stat().st_size

    def table_row(self) -> dict[str, str]:
        share, low, high = self.overall
        scores = {result.task: f"{result.accuracy:.1%}" for result in self.results}
        scores |= {"all": f"{share:.1%}", "95 % interval": f"{low:.1%} to {high:.1%}"}
        if self.run is None:
            return {"model": self.name, **scores, "training": "-", "peak": "-", "adapter": "-"}
        return {
            "model": self.name,
            **scores,
            "training": f"{self.run.seconds:.0f} s",
            "peak": gigabytes(self.run.peak_memory),
            "adapter": f"{self.adapter_bytes / 1e6:.1f} MB",
        }


def run_demo(output: str | Path) -> list[ModelScore]:
    """Train both arms where needed, score them and the base on held-out rows, and write `scores.json`.

    Raises an EchoError if an arm fails, or if the arms did not start from the same adapter.
    """
    output = Path(output)
    require_packages(load_recipe(RECIPE), trains=True, scores=True)
    try:
        return _run_demo(output)
    except KeyboardInterrupt as error:
        raise EchoInterrupt(
            f"Interrupted. Run the same command to resume: what is complete in {output} is kept."
        ) from error


def _run_demo(output: Path) -> list[ModelScore]:
    runs = {name: _trained(output / folder, setting) for name, (folder, setting) in ARMS.items()}
    if len({run.initial_adapter_sha256 for run in runs.values()}) != 1:
        raise EchoError(
            f"the arms in {output} did not start from the same initial adapter, so they can't be compared. "
            "Remove the folder and run the demonstration again."
        )
    scored: list[ModelScore] = []
    for name, run in runs.items():
        recipe = load_recipe(RECIPE, [f"output={run.output}"])
        scores = score_recipe(recipe, run.adapter, with_base=not scored)
        if not scored:
            scored.append(ModelScore("base", scores[0].results, None))
        scored.append(ModelScore(name, scores[-1].results, run))
    record = [{"model": one.name, "results": [r.to_dict() for r in one.results]} for one in scored]
    write_text(output / "scores.json", json.dumps(record, indent=2))
    return scored


def _trained(folder: Path, setting: str) -> RunResult:
    if not os.path.isfile(folder / RUN_FILE):
        command = [sys.executable, "-m", "echo_lora.cli", "train", RECIPE]
        command += ["--set", setting, "--set", f"output={folder}"]
        if has_complete_checkpoint(folder / "checkpoints"):
            command.append("--resume")
        if subprocess.run(command).returncode:
            raise EchoError(f"training {folder} failed; see the error above. What is complete is kept.")
    return RunResult.read(folder)
