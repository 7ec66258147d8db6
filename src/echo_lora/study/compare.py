"""`compare`: do all runs of a study, here or on a cluster, in as many sittings as it takes.

    output/
      study.json       the design, the chosen learning rates, the power estimate
      runs/            one folder per run: its record, its adapter, its log
      runs.jsonl.gz    all records, one in a line: with study.json, all that a report needs

Every run that has a record stays as it is. A study that was killed goes on when it is called again, and ends with the
same numbers as one that was not.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from echo_lora.environment import processor, versions
from echo_lora.errors import EchoConfigError, EchoError, EchoInterrupt
from echo_lora.progress import progress_console
from echo_lora.recipe.rows import source_rows
from echo_lora.study.design import RunKey, Study, confirmation_keys, recipe_of, tuning_keys
from echo_lora.study.folder import KNOWN, done_run, gathered, write_json
from echo_lora.study.looks import confidence_at
from echo_lora.study.power import estimate_noise, power
from echo_lora.study.records import STUDY_FILE, correct_by_task, read_about, read_study, run_accuracy
from echo_lora.study.report.format import count_of
from echo_lora.study.report.verdict import difference_of, is_decided
from echo_lora.study.run import COMMIT, RECORD, has_record, write_record
from echo_lora.study.workers import Engine, run_all

# Noise that the power estimate assumes where no pilot tells: share of right answers, of questions on which two runs
# differ, and standard deviation between seeds. [O]
ASSUMED = {"accuracy": 0.5, "discordance": 0.15, "seed_sd": 0.01}


def compare(
    study: Study, engine: Engine, *, minutes: float | None = None, until_decided: bool = False, command: str = ""
) -> bool:
    """Do what is left of a study; False if `minutes` ended before the study did.

    minutes: no run is begun after that time. until_decided: stop at the first of the study's looks at which its primary
    comparison is decided. Raises EchoConfigError if the folder holds a study of another design, EchoError if runs
    failed, after all others have been done.
    """
    if until_decided and study.looks is None:
        raise EchoConfigError(
            f"--until-decided: the study of {study.output} declares no looks, the numbers of seeds after which it may "
            "stop. Leave --until-decided out, or declare looks before the first run: with 8 seeds, looks: [3, 5, 8]."
        )
    if find_spec("statsmodels") is None:  # not after hours of training
        raise EchoError('A study needs statsmodels. Run: pip install "echo-lora[study]"')
    if minutes is not None and engine.cluster is not None:
        raise EchoConfigError("--minutes limits runs on this machine; on a cluster use --slurm timeout_min=…")
    if engine.cluster == "slurm" and shutil.which("srun") is None:
        raise EchoConfigError(
            "--slurm needs a machine that submits jobs, but there is no srun. Leave --slurm out here."
        )
    own = os.environ.get("OMP_NUM_THREADS") or "1"
    if not re.fullmatch("[1-9][0-9]{0,3}", own):
        raise EchoConfigError(
            f"OMP_NUM_THREADS = {own} must be a number of threads. Correct the variable, or unset it."
        )
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        return _compare(study, engine, ends, until_decided, command)
    except KeyboardInterrupt as error:
        done = len(list((Path(study.output) / "runs").rglob(RECORD)))
        raise EchoInterrupt(
            f"Interrupted; {done} runs are done and kept in {study.output}. Repeat the command: the others go on from "
            "their newest checkpoints."
        ) from error


def _compare(study: Study, engine: Engine, ends: float | None, until_decided: bool, command: str) -> bool:
    restored = gathered(study)  # read before anything is written
    about = _begin(study, command)
    for key, record in restored:
        if not has_record(study, key):
            write_record(study, key, record)
    if not run_all(study, about, tuning_keys(study), engine, ends):
        return False
    about["chosen"] = chosen = choose(study)
    if about.get("power") is None:
        about["power"] = estimate_power(study, chosen)
    keys = confirmation_keys(study, chosen)  # seed by seed
    for look, seeds in enumerate((study.looks or []) if until_decided else [], start=1):
        if not run_all(study, about, keys[: seeds * len(study.arms)], engine, ends):
            return False
        if _ends_at(study, look):
            return True
    return run_all(study, about, keys, engine, ends)


def _ends_at(study: Study, look: int) -> bool:
    """Whether the study is decided at a look, unless a later one has been reached already; says so."""
    found = read_study(study.output)
    if found.look > look:
        return False
    primary = difference_of(found, *found.pairs[0])
    decided = is_decided(found, primary)
    text = f"look {look} of {len(found.looks)}, {count_of(len(primary.seeds), 'seed')}: {primary.verdict}"
    progress_console().print(text + ("; decided, nothing is left to do" if decided else ""), markup=False)
    return decided


# ------------------------------------------------------------------ the design


def _begin(study: Study, command: str) -> dict[str, Any]:
    """The study's file: written before the first run, and the same at every later call."""
    path = Path(study.output) / STUDY_FILE
    first = RunKey("confirmation", study.baseline, study.rates(study.baseline)[0], study.seeds[0])
    base = recipe_of(study, first)
    recipe = base.to_dict()
    recipe.pop("output")  # the folder may be moved
    if path.is_file():
        about = read_about(path)
        begun = about.get("design", {}) | {"recipe": about.get("recipe")}
        not_default = study.model_dump(mode="json", exclude_defaults=True)
        not_default["recipe"] = base.model_dump(mode="json", exclude_defaults=True)
        if keys := _differing(begun, study.design() | {"recipe": recipe}, not_default):
            raise EchoConfigError(
                f"{study.output} holds a study that was begun with another design; {', '.join(keys)} differ. "
                "A design is not changed after its first run: choose another output."
            )
        return about
    others = [name for name in os.listdir(study.output) if name not in KNOWN] if os.path.isdir(study.output) else []
    if others:
        raise EchoConfigError(
            f"{study.output} has no {STUDY_FILE}, but {', '.join(sorted(others)[:3])}: it is no study's folder. Choose "
            "another output."
        )
    about = {
        "name": Path(study.output).name,
        "title": study.title,
        "question": study.question,
        "baseline": study.baseline,
        "arms": {
            name: {"label": arm.label or name, "role": arm.role, "overrides": arm.set}
            for name, arm in study.arms.items()
        },
        "comparisons": [list(pair) for pair in study.pairs],
        "learning_rates": {name: study.rates(name) for name in study.arms},
        "tuning_seeds": study.tuning_seeds if study.tunes else [],
        "seeds": study.seeds,
        "smallest_effect": study.smallest_effect,
        "margin": study.margin,
        "looks": study.looks,
        "score_on": study.score_on,
        "design": study.design(),
        "recipe": recipe,
        "command": command,
        "versions": versions(),
        "commit": COMMIT,
        "processor": processor(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_json(path, about)
    return about


def _differing(begun: dict[str, Any], now: dict[str, Any], not_default: dict[str, Any]) -> list[str]:
    """The keys of a design that were begun with another value. A key that did not exist then was at its default."""
    return [
        key
        for key, value in now.items()
        if (not _is_same(begun[key], value, not_default.get(key)) if key in begun else key in not_default)
    ]


def _is_same(begun: Any, now: Any, not_default: Any) -> bool:
    if isinstance(begun, dict) and isinstance(now, dict):
        return begun.keys() <= now.keys() and not _differing(begun, now, not_default or {})
    if isinstance(begun, list) and isinstance(now, list) and len(begun) == len(now):
        return all(map(_is_same, begun, now, not_default or [None] * len(now)))
    return begun == now


def choose(study: Study) -> dict[str, float]:
    """Each arm's learning rate: the best one on validation rows, over all tuning seeds; of equals the lowest."""
    if not study.tunes:
        return {arm: study.rates(arm)[0] for arm in study.arms}
    best: dict[str, list[tuple[float, float]]] = {arm: [] for arm in study.arms}
    for arm in study.arms:
        for rate in study.rates(arm):
            records = [done_run(study, RunKey("tuning", arm, rate, seed)) for seed in study.tuning_seeds]
            best[arm].append((-float(np.mean([_tuned_on(study, record) for record in records])), rate))
        if all(np.isinf(worst) for worst, _ in best[arm]):
            raise EchoError(f"training of arm {arm} diverged at every learning rate. Try lower ones in another study.")
    return {arm: min(found)[1] for arm, found in best.items()}


def _tuned_on(study: Study, record: dict[str, Any]) -> float:
    """What is to be high: the mean accuracy of the tasks, or minus the last loss on validation rows.

    Minus infinity where training diverged.
    """
    if "diverged" in record:
        return -np.inf
    if study.tune_on == "accuracy":
        return run_accuracy(record)
    last = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry][-1]
    return -last if np.isfinite(last) else -np.inf


def estimate_power(study: Study, chosen: dict[str, float]) -> dict[str, Any]:
    """How likely the study is to find an effect of the smallest size of interest, before its runs have begun.

    The noise is that of the first comparison in the tuning runs, where there are any with answers; else it is assumed.
    With looks the estimate is that of the last one alone; the earlier ones add a little.
    """
    recipe = recipe_of(study, RunKey("confirmation", study.baseline, chosen[study.baseline], study.seeds[0]))
    tasks = recipe.evaluation.tasks
    sources = getattr(recipe.data, study.score_on) or []
    groups = [task.data or sources for task in tasks] or [[source] for source in sources]
    questions = [sum(len(source_rows(recipe, source, study.score_on)) for source in group) for group in groups]
    noise: dict[str, Any] = dict(ASSUMED)
    source = "assumed"
    if study.tunes and study.tune_on == "accuracy":
        pilot = [
            correct_by_task(done_run(study, RunKey("tuning", arm, chosen[arm], seed)) for seed in study.tuning_seeds)
            for arm in study.pairs[0]
        ]
        noise = estimate_noise(*({task: np.array(rows) for task, rows in correct.items()} for correct in pilot))
        source = f"tuning runs of {' and '.join(study.pairs[0])}"
        if len(study.tuning_seeds) < 3:  # too few to tell how much seeds differ
            noise["seed_sd"] = max(noise["seed_sd"], ASSUMED["seed_sd"])
            source += f"; seed_sd at least {ASSUMED['seed_sd']}, assumed"
    found = power(
        study.smallest_effect,
        seeds=len(study.seeds),
        questions=questions,
        smallest_effect=study.smallest_effect,
        margin=study.margin,
        confidence=confidence_at(study.looks, len(study.looks)) if study.looks else 0.95,
        **noise,
    )
    return found.to_dict() | {"source": source}
