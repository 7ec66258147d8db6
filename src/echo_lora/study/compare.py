"""Run a whole study, on this machine or on a cluster.

A run that has a record is not repeated. After an interruption, call `run_study` again: the study resumes, and its
results are the same as without the interruption.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from echo_lora.environment import processor, require_package, versions
from echo_lora.errors import EchoConfigError, EchoError, EchoInterrupt, EchoModelError
from echo_lora.method.model import EchoModel
from echo_lora.progress import progress_console, stage
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.plan import on_meta
from echo_lora.recipe.prepare import prepare, sample_of
from echo_lora.recipe.rows import source_rows, sources_of
from echo_lora.recipe.schema import Recipe
from echo_lora.study.design import Design, RunKey, Study, first_recipe, side_of
from echo_lora.study.folder import STUDY_FILE, Archive, StudyFile, read_study, restorable
from echo_lora.study.looks import confidence_at
from echo_lora.study.power import Noise, PowerEstimate, estimate_noise, power
from echo_lora.study.records import (
    RECORD,
    RUNS_FILE,
    Record,
    correct_by_task,
    read_record,
    record_path,
    tuned_on,
    write_record,
)
from echo_lora.study.report.texts import count_of
from echo_lora.study.report.verdict import difference_of, is_decided
from echo_lora.study.run import COMMIT
from echo_lora.study.workers import Engine, run_all

# Noise that the power estimate assumes without tuning runs: share of right answers, share of questions on which two
# runs differ, and standard deviation between seeds. [O]
ASSUMED = {"accuracy": 0.5, "discordance": 0.15, "seed_sd": 0.01}


def run_study(
    study: Study, engine: Engine, *, minutes: float | None = None, until_decided: bool = False, command: str = ""
) -> bool:
    """Do the runs of a study that are missing; False if `minutes` were over before the study was complete.

    minutes: start no run after that time. until_decided: stop at the first look at which the primary comparison is
    decided. Raises EchoConfigError if the folder holds a study of another design, EchoError if runs failed, after all
    others are done.
    """
    if until_decided and study.looks is None:
        raise EchoConfigError(
            f"--until-decided: the study of {study.output} declares no looks (numbers of seeds after which it may "
            "stop). Leave --until-decided out, or declare looks before the first run: with 8 seeds, looks: [3, 5, 8]."
        )
    require_package("statsmodels", "a study")  # not after hours of training
    if engine.cluster is not None:
        require_package("submitit", "a study on a cluster")
    for arm in study.arms:
        require_packages(first_recipe(study, arm), trains=True, scores=True)
    if minutes is not None and engine.cluster is not None:
        raise EchoConfigError("--minutes limits runs on this machine; on a cluster use --slurm timeout_min=…")
    if engine.cluster == "slurm" and shutil.which("srun") is None:
        raise EchoConfigError(
            "--slurm needs a machine that can submit jobs, but srun is not installed here. Leave --slurm out."
        )
    own = os.environ.get("OMP_NUM_THREADS") or "1"
    if not re.fullmatch("[1-9][0-9]{0,3}", own):
        raise EchoConfigError(
            f"OMP_NUM_THREADS = {own} must be a number of threads. Correct the variable, or unset it."
        )
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        return _run_study(study, engine, ends, until_decided, command)
    except KeyboardInterrupt as error:
        done = len(list((Path(study.output) / "runs").rglob(RECORD)))
        raise EchoInterrupt(
            f"Interrupted. {done} runs are done and kept in {study.output}. Run the same command to resume: the others "
            "continue from their newest checkpoints."
        ) from error


def _run_study(study: Study, engine: Engine, ends: float | None, until_decided: bool, command: str) -> bool:
    restored = restorable(study)  # read before anything is written
    file = _begin(study, command)
    for key, record in restored:
        if not (path := record_path(study.output, key)).is_file():
            write_record(path, record)
    archive = Archive(study)

    def run(keys: list[RunKey]) -> bool:
        return run_all(study, keys, engine, ends, lambda: archive.gather(file.chosen))

    if not run(study.tuning_runs):
        return False
    chosen = choose(study)
    with stage("Estimating the power of the study", line=False):
        known = file.model_copy(update={"chosen": chosen, "power": file.power or estimate_power(study, chosen)})
    if known != file:
        file, archive = known, Archive(study)  # whose order depends on the rates
        file.write(study.output)
    keys = study.confirmation_runs(chosen)  # seed by seed
    for look, seeds in enumerate((study.looks or []) if until_decided else [], start=1):
        if not run(keys[: seeds * len(study.arms)]):
            return False
        if _ends_at(study, look):
            return True
    return run(keys)


def _ends_at(study: Study, look: int) -> bool:
    """Whether a look decides the study; prints it. False if a later look is already complete."""
    found = read_study(study.output)
    if found.look > look:
        return False
    primary = difference_of(found, *found.design.pairs[0])
    decided = is_decided(found, primary)
    text = f"look {look} of {len(found.looks)}, {count_of(len(primary.seeds), 'seed')}: {primary.verdict}"
    progress_console().print(text + ("; decided, nothing is left to do" if decided else ""), markup=False)
    return decided


# ------------------------------------------------------------------ the design


def _begin(study: Study, command: str) -> StudyFile:
    """The study's file, which is written at the first call. Raises EchoConfigError if the design has changed."""
    recipe = first_recipe(study, study.baseline)
    if (Path(study.output) / STUDY_FILE).is_file():
        file = StudyFile.read(study.output)
        if keys := _differing(file, study.design, recipe):
            raise EchoConfigError(
                f"{study.output} holds a study with another design: {', '.join(keys)} differ. A design can't change "
                "after its first run. Choose another output."
            )
        return file
    known = ("runs", RUNS_FILE)  # what may be there before
    others = [name for name in os.listdir(study.output) if name not in known] if os.path.isdir(study.output) else []
    if others:
        raise EchoConfigError(
            f"{study.output} is not a study's folder: it has no {STUDY_FILE}, but {', '.join(sorted(others)[:3])}. "
            "Choose another output."
        )
    count_questions(study)  # fail before the training, not after it
    _prepare_rows(study)
    _require_kept_echoes(study)
    file = StudyFile(
        design=study.design,
        recipe=_without_place(recipe),
        command=command,
        versions=versions(),
        commit=COMMIT,
        processor=processor(),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    file.write(study.output)
    return file


def _prepare_rows(study: Study) -> None:
    """Prepare the rows of every arm once, for their faults and warnings: a run's are in its log alone.

    Raises EchoDataError.
    """
    recipes = [first_recipe(study, arm) for arm in study.arms]
    with stage("Reading rows", line=False):
        for place, recipe in enumerate(recipes):
            if all((recipe.model, recipe.data) != (other.model, other.data) for other in recipes[:place]):
                prepare(sample_of(recipe))


def _require_kept_echoes(study: Study) -> None:
    """Raises EchoModelError if an arm's model can't generate with its echo kept on, which follows its training."""
    for name, arm in study.arms.items():
        if not arm.keep_echo_on:
            continue
        _, model = on_meta(first_recipe(study, name))
        reason = model.why_full() if isinstance(model, EchoModel) else None
        if reason is not None:
            raise EchoModelError(
                f"arm {name}: keep_echo_on generates on a cached prefix, but {reason}. Leave keep_echo_on out."
            )


def _differing(begun: StudyFile, design: Design, recipe: Recipe) -> list[str]:
    """The keys of a design that have changed. A key that did not exist then had its default."""
    before, now = begun.design.model_dump(), design.model_dump()
    keys = [key for key in now if before.get(key) != now[key]]
    try:
        is_same = Recipe.model_validate(begun.recipe | {"output": recipe.output}) == recipe
    except ValidationError:  # a key or a value that no longer exists
        is_same = False
    return keys if is_same else [*keys, "recipe"]


def _without_place(recipe: Recipe) -> dict[str, Any]:
    """The recipe without its output: the folder may be moved."""
    return {key: value for key, value in recipe.to_dict().items() if key != "output"}


def choose(study: Study) -> dict[str, float]:
    """Each arm's learning rate: the best on validation rows, over all tuning seeds; of equals the lowest."""
    if not study.tunes:
        return {arm: study.rates(arm)[0] for arm in study.arms}
    chosen = {}
    for arm in study.arms:
        found = [(_mean_loss(study, arm, rate), rate) for rate in study.rates(arm)]
        if all(np.isinf(loss) for loss, _ in found):
            raise EchoError(f"training of arm {arm} diverged at every learning rate. Try lower ones in another study.")
        chosen[arm] = min(found)[1]
    return chosen


def _mean_loss(study: Study, arm: str, rate: float) -> float:
    """The validation loss, or minus the validation accuracy, over the tuning seeds; infinite if training diverged."""
    sign = -1 if study.tune_on == "accuracy" else 1
    found = [
        sign * tuned_on(_done_run(study, RunKey("tuning", arm, rate, seed)), study.tune_on)
        for seed in study.tuning_seeds
    ]
    return float(np.mean([value if np.isfinite(value) else np.inf for value in found]))


def _done_run(study: Study, key: RunKey) -> Record:
    path = record_path(study.output, key)
    if not path.is_file():
        raise EchoError(f"the run {key} has no record in {study.output}. Run compare again.")
    return read_record(path)


def count_questions(study: Study) -> tuple[int, ...]:
    """The number of questions of each task of the confirmation runs. Raises EchoDataError if rows can't be read."""
    recipe = first_recipe(study, study.baseline)
    tasks = recipe.evaluation.tasks
    sources = sources_of(recipe, study.score_on)
    groups = [task.data or sources for task in tasks] or [[source] for source in sources]
    split = study.score_on
    return tuple(sum(len(part) for source in group for part in source_rows(recipe, source, split)) for group in groups)


def estimate_power(study: Study, chosen: dict[str, float]) -> PowerEstimate:
    """How likely the study is to find an effect of the smallest size of interest, before its confirmation runs.

    The noise is that of the primary comparison in the tuning runs, if these have answers; else it is assumed. With
    looks, the estimate is for the last one alone; earlier ones add a little.
    """
    noise: dict[str, Any] = dict(ASSUMED)
    source = "assumed"
    arms = [side_of(side)[0] for side in study.pairs[0]]  # tuning runs are scored without the echo
    if study.tunes and study.tune_on == "accuracy" and arms[0] != arms[1]:
        pilot = [
            correct_by_task(_done_run(study, RunKey("tuning", arm, chosen[arm], seed)) for seed in study.tuning_seeds)
            for arm in arms
        ]
        noise = estimate_noise(*({task: np.array(rows) for task, rows in correct.items()} for correct in pilot))
        source = f"tuning runs of {' and '.join(arms)}" + ", without the echo" * (arms != list(study.pairs[0]))
        if len(study.tuning_seeds) < 3:  # too few to estimate how much seeds differ
            noise["seed_sd"] = max(noise["seed_sd"], ASSUMED["seed_sd"])
            source += f"; seed_sd at least {ASSUMED['seed_sd']}, assumed"
    return power(
        study.smallest_effect,
        Noise(seeds=len(study.seeds), questions=count_questions(study), **noise),
        smallest_effect=study.smallest_effect,
        margin=study.margin,
        confidence=confidence_at(study.looks, len(study.looks)) if study.looks else 0.95,
        source=source,
    )
