"""`compare`: do all runs of a study, here or on a cluster, in as many sittings as it takes.

    output/
      study.json       the design, the chosen learning rates, the power estimate
      runs/            one folder per run: its record, its adapter, its log
      runs.jsonl.gz    all records, one in a line: with study.json, all that a report needs

Every run that has a record stays as it is. A study that was killed goes on when it is called again, and ends with the
same numbers as one that was not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echo_lora.environment import processor, versions
from echo_lora.errors import EchoConfigError, EchoDataError, EchoError, EchoInterrupt
from echo_lora.files import write_file
from echo_lora.progress import progress_console
from echo_lora.rows import source_rows
from echo_lora.study.design import RunKey, Study, confirmation_keys, recipe_of, tuning_keys
from echo_lora.study.execute import COMMIT, RECORD, execute, has_record, read_record, write_record
from echo_lora.study.layout import count_of
from echo_lora.study.looks import confidence_at
from echo_lora.study.records import (
    RUNS_FILE,
    STUDY_FILE,
    correct_by_task,
    problem_of_run,
    read_about,
    read_runs,
    read_study,
    run_accuracy,
    write_archive,
)
from echo_lora.study.statistics import estimate_noise, power
from echo_lora.study.verdict import difference_of, is_decided

KNOWN = ("runs", RUNS_FILE)  # what a study's folder may hold before its file is written
# Noise that the power estimate assumes where no pilot tells: share of right answers, of questions on which two runs
# differ, and standard deviation between seeds. [O]
ASSUMED = {"accuracy": 0.5, "discordance": 0.15, "seed_sd": 0.01}


@dataclass(frozen=True)
class Engine:
    """Where runs are done.

    workers: processes on this machine. cluster: name of a cluster of submitit ("slurm"), which then gets the runs as
    job arrays with these `options`; None: this machine.
    """

    workers: int = 1
    cluster: Literal["slurm", "local", "debug"] | None = None
    options: dict[str, Any] | None = None


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
    restored = _gathered(study)  # read before anything is written
    about = _begin(study, command)
    for key, record in restored:
        if not has_record(study, key):
            write_record(study, key, record)
    if not _do(study, about, tuning_keys(study), engine, ends):
        return False
    about["chosen"] = chosen = choose(study)
    if about.get("power") is None:
        about["power"] = estimate_power(study, chosen)
    keys = confirmation_keys(study, chosen)  # seed by seed
    for look, seeds in enumerate((study.looks or []) if until_decided else [], start=1):
        if not _do(study, about, keys[: seeds * len(study.arms)], engine, ends):
            return False
        if _ends_at(study, look):
            return True
    return _do(study, about, keys, engine, ends)


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
    _write_json(path, about)
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
            records = [_done(study, RunKey("tuning", arm, rate, seed)) for seed in study.tuning_seeds]
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
            correct_by_task(_done(study, RunKey("tuning", arm, chosen[arm], seed)) for seed in study.tuning_seeds)
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


def _done(study: Study, key: RunKey) -> dict[str, Any]:
    record = read_record(study, key)
    if record is None:
        raise EchoError(f"the run {key} has no record in {study.output}. Call compare again to have it done.")
    return record


def _gather(study: Study, about: dict[str, Any]) -> None:
    """Write the study's file, and the records there are in one."""
    _write_json(Path(study.output) / STUDY_FILE, about)
    keys = tuning_keys(study) + (confirmation_keys(study, about["chosen"]) if "chosen" in about else [])
    records = [record for key in keys if (record := read_record(study, key)) is not None]
    _check_pairing(records)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_archive(Path(study.output) / RUNS_FILE, text)


def _check_pairing(records: Iterable[dict[str, Any]]) -> None:
    """Runs that are compared began alike and answered the same questions. Raises EchoError.

    In a seed, adapters of one kind started from the same weights; arms with one `data` section saw the same rows; all
    were asked the same questions; the base knew the general text equally well.
    """
    first: dict[str, tuple[dict[str, Any], Any]] = {}
    for record in records:
        if "diverged" in record:
            continue
        recipe, general = record["recipe"], record["general"] or {}
        alike = {
            "start from the same adapter": (
                [record["seed"], recipe["method"], recipe["model"], recipe["lora"]],
                record["initial_adapter_sha256"],
            ),
            "train on the same rows": ([recipe["data"], recipe["model"]], record["data_sha256"]),
            "answer the same questions": ([record["stage"]], record["questions_sha256"]),
            "have the same base": ([recipe["model"]], f"{general.get('before', 0.0):.4f}"),
        }
        for what, (group, value) in alike.items():
            other, expected = first.setdefault(json.dumps([what, group], sort_keys=True), (record, value))
            if value != expected:
                raise EchoError(
                    f"arms {other['arm']} (seed {other['seed']}) and {record['arm']} (seed {record['seed']}) did not "
                    f"{what}, so they are not paired. Has something changed between their runs? Remove the older ones "
                    "and compare again."
                )


def _gathered(study: Study) -> list[tuple[RunKey, dict[str, Any]]]:
    """Runs that are known from the gathered records alone, as after a clone.

    A record names its run, and the run its folder: names that are none of the design's are not turned into paths.
    Raises EchoDataError for such a record, and for one that is not a run's.
    """
    path = Path(study.output) / RUNS_FILE
    rates = [dict(zip(study.arms, chosen, strict=True)) for chosen in zip(*map(study.rates, study.arms), strict=True)]
    keys = [*tuning_keys(study), *(key for chosen in rates for key in confirmation_keys(study, chosen))]
    found = []
    for number, record in read_runs(path):
        problem = problem_of_run(record)
        key = None if problem else next((key for key in keys if asdict(key).items() <= record.items()), None)
        if key is None:
            raise EchoDataError(
                f"{path}:{number}: {problem or 'it is the record of none of the runs of this study'}. Remove the line, "
                "or choose another output."
            )
        found.append((key, record))
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    write_file(path, lambda file: file.write_text(text + "\n", encoding="utf-8"))


# -------------------------------------------------------------------- the runs


def _do(study: Study, about: dict[str, Any], keys: list[RunKey], engine: Engine, ends: float | None) -> bool:
    """Do the runs that have no record yet; False if time was up before that. Raises EchoError if some failed.

    All records are gathered after each run, so that a report of what there is can be made at any time.
    """
    _gather(study, about)
    left = [key for key in keys if not has_record(study, key)]
    if not left:
        return True
    console = progress_console()
    console.print(f"{len(keys) - len(left)} of {len(keys)} {keys[0].stage} runs are done", markup=False)
    started, done, failed = time.monotonic(), 0, []
    runs = _on_cluster(study, left, engine) if engine.cluster else _on_this_machine(study, left, engine, ends)
    for key, error in runs:
        done += 1
        seconds = time.monotonic() - started
        state = "done" if error is None else "FAILED"
        console.print(f"{done}/{len(left)}  {key}  {state}  {seconds:.0f} s", markup=False)
        _gather(study, about)
        if error is not None:
            failed.append(f"{key}: {error}\n  log: {Path(study.output) / key.folder / 'log.txt'}")
    if failed:
        raise EchoError(
            f"{len(failed)} of {len(left)} runs failed. Mend the cause and compare again.\n" + "\n".join(failed)
        )
    return done == len(left)


def _on_this_machine(
    study: Study, keys: list[RunKey], engine: Engine, ends: float | None
) -> Iterator[tuple[RunKey, str | None]]:
    """Runs in worker processes; each run that ended, and its error. A run that another process holds comes last."""
    own = os.environ.get("OMP_NUM_THREADS") or None
    threads = int(own or max(1, (os.cpu_count() or 1) // engine.workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import torch
    pool = ProcessPoolExecutor(
        engine.workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(threads,)
    )
    try:
        waiting, held = list(reversed(keys)), list[RunKey]()
        running: dict[Future, RunKey] = {}
        while waiting or held or running:
            is_over = ends is not None and time.monotonic() > ends
            while not is_over and (waiting or held) and len(running) < engine.workers:
                key, wait_for_it = (waiting.pop(), False) if waiting else (held.pop(), True)
                running[pool.submit(_logged, study, key, wait_for_it)] = key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if (error := future.result()) == HELD:
                    held.append(key)
                else:
                    yield key, error
    except BrokenProcessPool as error:
        raise EchoError(
            "a worker process was killed, perhaps for lack of memory. Lower --workers, then compare again: finished "
            "runs are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        if own is None:
            del os.environ["OMP_NUM_THREADS"]


HELD = "held"


def _logged(study: Study, key: RunKey, wait_for_it: bool) -> str | None:
    """`execute`, with all it prints in the run's log; None, its error, or HELD."""
    folder = Path(study.output) / key.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return None if execute(study, key, wait=wait_for_it) else HELD
        except Exception as error:  # one run must not end the others; compare reports it
            import traceback

            traceback.print_exc()
            return str(error) or repr(error)


def _start_worker(threads: int) -> None:
    """A worker's settings. It ends when its parent is killed: it would wait for work for ever."""
    import torch

    torch.set_num_threads(threads)

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # what is complete on disk stays so at any moment
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_cluster(study: Study, keys: list[RunKey], engine: Engine) -> Iterator[tuple[RunKey, str | None]]:
    """Runs as a job array of submitit; the study's folder must be one that all machines see."""
    try:
        import submitit
    except ImportError as error:
        raise EchoConfigError('runs on a cluster need submitit. Run: pip install "echo-lora[cluster]"') from error
    try:
        executor = submitit.AutoExecutor(folder=Path(study.output) / "jobs", cluster=engine.cluster)
        executor.update_parameters(**(engine.options or {}))
        jobs = executor.map_array(_logged, [study] * len(keys), keys, [False] * len(keys))
    except (NameError, ValueError, TypeError) as error:
        raise EchoConfigError(f"submitit refuses the options {engine.options}: {error}") from error
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise EchoError(f"the runs could not be submitted: {error}. Mend it and compare again.") from error
    for key, job in zip(keys, jobs, strict=True):
        try:
            found = job.result()
            yield key, "another process is at it; compare again when it has ended" if found == HELD else found
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
            yield key, f"its job failed: {error}"
