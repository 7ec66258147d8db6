"""Study folders as `echo-lora compare` leaves them, with records that are made up but look like those of real runs.

    python tests/study_records.py FOLDER

writes one to look at: six arms, five seeds, two tasks.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ARMS: dict[str, dict[str, Any]] = {
    "lora": {"label": "LoRA", "set": {"echo": False}},
    "echo-lora": {"label": "Echo-LoRA", "keep_echo_on": True},
    "zero": {"label": "zero (R-Drop)", "role": "control", "set": {"echo_config.echo_kind": "zero"}},
    "noise": {"role": "control", "set": {"echo_config.echo_kind": "noise"}},
    "shuffled": {"role": "control", "set": {"echo_config.echo_kind": "shuffled"}},
    "lora-long": {
        "label": "LoRA, same compute",
        "role": "control",
        "set": {"echo": False, "training.epochs": 5},
    },
}
RATES = [0.0005, 0.001, 0.002, 0.004]
SHIFT = {"lora": 0.0, "echo-lora": 0.2, "zero": 0.12, "noise": -0.05, "shuffled": 0.02, "lora-long": 0.08}  # in logits
RECIPE: dict[str, Any] = {
    "model": "runs/quick-lm",
    "method": "lora",
    "dtype": "float32",
    "lora": {"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "echo": True,
    "echo_config": {"echo_kind": "echo", "distillation_weight": 1.0, "temperature": 2.0},
    "training": {"epochs": 4, "batch_size": 16, "learning_rate": 0.002, "schedule": "cosine"},
    "seeds": {"initialisation": 1, "data_order": 1, "routing": 1},
}
VERSIONS = {"echo-lora": "0.1.0", "python": "3.11.2", "torch": "2.9.0", "transformers": "5.23.0", "peft": "0.21.0"}


def write_study(
    folder: str | Path,
    *,
    arms: Sequence[str] = tuple(ARMS),
    comparisons: Sequence[tuple[str, str]] | None = None,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    tasks: Sequence[str] = ("chain_sum", "letter_counting"),
    questions: int = 300,
    rates: Sequence[float] = tuple(RATES),
    has_confirmation: bool = True,
    keep: Callable[[dict[str, Any]], bool] = lambda record: True,
    change: Callable[[dict[str, Any]], None] = lambda record: None,
    about: dict[str, Any] | None = None,
    design: dict[str, Any] | None = None,
    smallest_effect: float = 0.01,
    shift: dict[str, float] | None = None,
) -> Path:
    """Write study.json and runs.jsonl.gz.

    keep: which records to write. change: what to alter in each. about: keys of study.json to set, None removes one;
    design: those of its design. shift: an arm's advantage in logits.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shift = SHIFT | (shift or {})
    chosen = {arm: rates[min(2, len(rates) - 1)] for arm in arms}
    study: dict[str, Any] = {
        "design": {
            "title": "Does the echo help a small model add?",
            "question": "Is an adapter trained with the echo better at sums than the same LoRA adapter without it?",
            "arms": {arm: ARMS[arm] for arm in arms},
            "baseline": arms[0],
            "comparisons": None if comparisons is None else [list(pair) for pair in comparisons],
            "learning_rates": list(rates),
            "tuning_seeds": [0],
            "seeds": list(seeds),
            "smallest_effect": smallest_effect,
        },
        "recipe": RECIPE,
        "command": "echo-lora compare small --workers 2",
        "versions": VERSIONS,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "processor": "AMD EPYC, 2 cores",
        "started": "2026-11-02T09:30:00+00:00",
        "power": None,
    }
    records = []
    if len(rates) > 1:
        for arm in arms:
            for rate in rates:
                peak = -((np.log(rate / 0.002)) ** 2) / 4  # best at 0.002
                records.append(_record("tuning", arm, rate, 0, tasks, 80, shift[arm] + peak))
    if has_confirmation:
        study["chosen"] = chosen
        for seed in seeds:
            records += [_record("confirmation", a, chosen[a], seed, tasks, questions, shift[a]) for a in arms]
    for part, changes in ((study, about or {}), (study["design"], design or {})):
        for key, value in changes.items():
            if value is None:
                part.pop(key, None)
            else:
                part[key] = value
    records = [record for record in records if keep(record)]
    for record in records:
        change(record)
    (folder / "study.json").write_text(json.dumps(study, indent=2) + "\n", encoding="utf-8")
    write_runs(folder, [json.dumps(record) for record in records])
    return folder


def write_runs(folder: Path, lines: Sequence[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    (folder / "runs.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def without_history(record: dict[str, Any]) -> None:
    record["history"] = []


def _record(
    stage: str, arm: str, rate: float, seed: int, tasks: Sequence[str], questions: int, ability: float
) -> dict[str, Any]:
    rng = np.random.default_rng([len(stage), seed, list(ARMS).index(arm), round(rate * 1e6)])
    luck = np.random.default_rng([7, seed]).normal(0, 0.15) + rng.normal(0, 0.08)  # of the seed, of the run
    is_echo = ARMS[arm].get("set", {}).get("echo", True)
    part = "validation" if stage == "tuning" else "test"
    scores = []
    keeps_echo = stage == "confirmation" and arm == "echo-lora"
    for echo in (False, True) if keeps_echo else (False,):
        for number, task in enumerate(tasks):
            easy = np.random.default_rng([11, number, questions]).normal(0.4 - 0.5 * number, 1.6, questions)
            share = 1 / (1 + np.exp(-(easy + ability + luck + 0.3 * echo)))
            correct = rng.random(questions) * 0.3 + 0.35 < share
            unreadable = float(np.round(rng.uniform(0, 0.02), 4))
            scores.append({"part": part, "echo": echo, "seconds": 4.0, "result": _result(task, correct, unreadable)})
    steps = 80 if arm != "lora-long" else 100
    seconds = {"lora": 61.0, "lora-long": 77.0}.get(arm, 78.0) * rng.uniform(0.97, 1.04)
    before = 3.2
    return {
        "stage": stage,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "recipe": RECIPE | {"training": RECIPE["training"] | {"learning_rate": rate}},
        "versions": VERSIONS,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "device": "cpu",
        "steps": steps,
        "seconds": round(seconds, 2),
        "peak_memory": int(1.1e9 if is_echo else 0.95e9),
        "deployed_parameters": 184_320,
        "echo_parameters": 96_256 if is_echo and arm != "zero" else 0,
        "initial_adapter_sha256": hashlib.sha256(f"start {seed}".encode()).hexdigest(),
        "adapter_sha256": hashlib.sha256(f"{stage} {arm} {rate} {seed}".encode()).hexdigest(),
        "rows": ["train: chain_sum, 1,280 rows"],
        "history": _history(arm, steps, rate, bool(is_echo), rng),
        "scores": scores,
        "general": {"before": before, "after": before + float(rng.normal(0.03, 0.01)), "tokens": 1024},
    }


def _result(task: str, correct: np.ndarray, unreadable: float) -> dict[str, Any]:
    return {
        "task": task,
        "kind": "generate",
        "metric": "exact_match",
        "filter": "extract",
        "correct": int(correct.sum()),
        "total": len(correct),
        "accuracy": float(correct.mean()),
        "low": max(0.0, float(correct.mean()) - 0.05),
        "high": min(1.0, float(correct.mean()) + 0.05),
        "unreadable": unreadable,
        "seconds": 4.0,
        "lm_eval_version": "0.4.13",
        "task_version": 1.0,
        "correct_per_row": [bool(value) for value in correct],
        "predictions": ["7" if value else "8" for value in correct],
    }


def _history(arm: str, steps: int, rate: float, is_echo: bool, rng: np.random.Generator) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    for step in range(4, steps + 1, 4):
        ce = 0.4 + 1.8 * float(np.exp(-step / 25)) + rng.normal(0, 0.02)
        gap = {"echo-lora": -0.12, "noise": 0.05, "shuffled": 0.02}.get(arm, 0.0) * (1 - float(np.exp(-step / 20)))
        entry: dict[str, Any] = {"step": step, "learning_rate": rate * (1 - step / steps), "grad_norm": 1.0}
        if is_echo:
            distillation = 0.02 + 0.1 * float(np.exp(-step / 30)) + abs(rng.normal(0, 0.004))
            on = ce + gap + rng.normal(0, 0.01)
            entry |= {"loss": ce + on + distillation, "ce_off": ce, "ce_on": on, "distillation": distillation}
            entry |= {"routed": 0.6, "routing_p": 0.6}
            if arm != "zero":
                entry |= {"echo_norm": 0.2 + step / 100 + rng.normal(0, 0.02), "gate_mean": 0.5 + step / 900}
        else:
            entry |= {"loss": ce, "mean_token_accuracy": 0.8}
        history.append(entry)
        if step % 20 == 0:
            held = ce + 0.05
            check: dict[str, Any] = {"step": step, "eval_loss": held}
            if is_echo:
                check |= {
                    "eval_ce_off": held,
                    "eval_ce_on": held + gap * 0.7 + rng.normal(0, 0.005),
                    "eval_distillation": 0.03,
                }
                check |= {"eval_echo_norm": 0.2 + step / 100, "eval_gate_mean": 0.5 + step / 900}
                check |= {"eval_echo_share": 0.05 + step / 1000}
            history.append(check)
    history.append({"step": steps, "train_runtime": 60.0})
    return history


if __name__ == "__main__":
    write_study(
        sys.argv[1],
        comparisons=[
            ("echo-lora", "lora"),
            ("echo-lora", "zero"),
            ("zero", "lora"),
            ("noise", "lora"),
            ("lora-long", "lora"),
        ],
    )
