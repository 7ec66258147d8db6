"""Where runs are done: worker processes on this machine, or jobs on a cluster.

submitit has a local executor too, but it starts all jobs at once, lets them outlive this process, hides the GPUs unless
they are asked for, and ends a job after minutes unless told otherwise.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

from echo_lora.errors import EchoConfigError, EchoError
from echo_lora.progress import progress_console
from echo_lora.study.design import RunKey, Study
from echo_lora.study.records import record_path
from echo_lora.study.run import execute

HELD = "held"  # in the place of an error: another process is doing the run


@dataclass(frozen=True)
class Engine:
    """Where runs are done.

    workers: processes on this machine. cluster: submitit's name of a cluster ("slurm"), which gets the runs as job
    arrays with these `options`; None: this machine.
    """

    workers: int = 1
    cluster: Literal["slurm", "local", "debug"] | None = None
    options: dict[str, Any] | None = None


# -------------------------------------------------------------------- the runs


def run_all(study: Study, keys: list[RunKey], engine: Engine, ends: float | None, gather: Callable[[], None]) -> bool:
    """Do the runs without a record; False if time was up first. Raises EchoError if runs failed, after the others.

    gather: collects all records; called after each run, so that a report can be written at any time.
    """
    gather()
    left = [key for key in keys if not record_path(study.output, key).is_file()]
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
        gather()
        if error is not None:
            failed.append(f"{key}: {error}\n  log: {Path(study.output) / key.folder / 'log.txt'}")
    if failed:
        raise EchoError(
            f"{len(failed)} of {len(left)} runs failed. Fix the cause and run compare again.\n" + "\n".join(failed)
        )
    return done == len(left)


def _on_this_machine(
    study: Study, keys: list[RunKey], engine: Engine, ends: float | None
) -> Iterator[tuple[RunKey, str | None]]:
    """Yields each run that ended, and its error. A run that another process is doing comes last."""
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
            "a worker process was killed, perhaps for lack of memory. Lower --workers and run compare again: finished "
            "runs are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        if own is None:
            del os.environ["OMP_NUM_THREADS"]


def _logged(study: Study, key: RunKey, wait_for_it: bool) -> str | None:
    """`execute` with its output in the run's log. Returns None, its error, or HELD."""
    folder = Path(study.output) / key.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return None if execute(study, key, wait=wait_for_it) else HELD
        except Exception as error:  # must not end the other runs; run_all reports it
            traceback.print_exc()
            return str(error) or repr(error)


def _start_worker(threads: int) -> None:
    """Set up a worker. It ends if its parent is killed: else it would wait for work forever."""
    import torch

    torch.set_num_threads(threads)

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # files on disk are complete at any moment
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_cluster(study: Study, keys: list[RunKey], engine: Engine) -> Iterator[tuple[RunKey, str | None]]:
    """Yields as above, from a job array of submitit; all machines must see the study's folder."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=Path(study.output) / "jobs", cluster=engine.cluster)
        executor.update_parameters(**(engine.options or {}))
        jobs = executor.map_array(_logged, [study] * len(keys), keys, [False] * len(keys))
    except (NameError, ValueError, TypeError) as error:
        raise EchoConfigError(f"submitit refuses the options {engine.options}: {error}") from error
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise EchoError(f"the runs could not be submitted: {error}. Fix this and run compare again.") from error
    for key, job in zip(keys, jobs, strict=True):
        try:
            found = job.result()
            yield key, "another process is doing it; run compare again when it has ended" if found == HELD else found
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
            yield key, f"its job failed: {error}"
