"""Measuring: the memory of each program in a process of its own, then the seconds of all of them in turns.

Seconds: all programs are in one process, on one frozen base. In each round each takes one step, in a random order. The
steps of a round share the machine's noise, so ratios are taken within rounds. Memory: in one process, what a program
leaves behind would count for the next.
"""

from __future__ import annotations

import gc
import multiprocessing
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo_lora.bench.programs import CASES, Batch, Case, Program, own_batch, parse_shape, random_batch
from echo_lora.bench.report import BenchReport, BenchTable, StepMemory, table_of, write_bench
from echo_lora.environment import MemoryWatch, commit, devices, processor, versions
from echo_lora.errors import EchoConfigError, EchoError, EchoModelError
from echo_lora.files import refuse_existing
from echo_lora.models import load_tokenizer
from echo_lora.progress import progress_console, stage
from echo_lora.recipe.build import load_base
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.schema import Recipe

RECIPE = "tiny"
SHAPES = ("96x8", "256x32", "64x192")
ROUNDS = 7
QUICK_ROWS, QUICK_ROUNDS = 2, 3
MEMORY_STEPS = 2  # the second begins with the optimizer's moments


def run_bench(
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    shapes: Sequence[str] = (),
    rows: int | None = None,
    rounds: int | None = None,
    quick: bool = False,
    output: str | Path = "runs/bench",
    command: str = "",
) -> BenchReport:
    """Measure every case, and write bench.json, bench.md and bench.png into the new folder `output`.

    A shape such as 96x8 means random rows. Without shapes, the batch is the recipe's first rows; without a recipe
    either, SHAPES on `tiny`. quick: fewer rows, rounds and shapes unless given.

    Raises an EchoError for what is wrong from the start, and then writes nothing. A case that fails later, for example
    for lack of memory, is in the report with its error.
    """
    refuse_existing(output)
    source = commit()  # before the files change
    if recipe is None and not shapes:
        shapes = SHAPES[:1] if quick else SHAPES
    prompts_and_answers = [parse_shape(shape) for shape in shapes]
    loaded = load_recipe(recipe or RECIPE, overrides)
    if loaded.data.train_on_prompt:
        raise EchoConfigError(
            "bench compares steps with a loss on answers, but the recipe has data.train_on_prompt = true. "
            "Add `--set data.train_on_prompt=false`."
        )
    require_packages(loaded, trains=True)
    rows = rows or (QUICK_ROWS if quick else loaded.training.batch_size)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    with stage(f"Reading rows with the tokenizer of {loaded.model}"):
        tokenizer = load_tokenizer(loaded.model, loaded.trust_remote_code)
        batches = [random_batch(loaded, tokenizer, P, A, rows) for P, A in prompts_and_answers]
        batches = batches or [own_batch(loaded, tokenizer, Path(recipe or RECIPE).stem, rows)]
    memory = [{case: _memory(case, loaded, batch) for case in CASES} for batch in batches]
    report = BenchReport(
        command=command,
        arguments={"recipe": recipe, "set": [*overrides], "shapes": [*shapes], "rows": rows, "rounds": rounds},
        recipe=loaded.to_dict(),
        seed=loaded.seeds.initialisation,
        versions=versions(),
        commit=source,
        machine=f"{platform.system()} {platform.machine()}, {processor()}",
        device=devices()[0],
        threads=torch.get_num_threads(),
        tables=_tables(loaded, tokenizer, batches, memory, rounds),
    )
    write_bench(report, output)
    return report


# --------------------------------------------------------------------- seconds


def _tables(
    recipe: Recipe, tokenizer: Any, batches: list[Batch], memory: list[dict[Case, StepMemory | str]], rounds: int
) -> list[BenchTable]:
    """The cases whose memory could be measured, timed on each batch."""
    tables = []
    with tempfile.TemporaryDirectory() as scratch:
        with stage(f"Loading {recipe.model}"):
            base = load_base(recipe)
            works = [case for case in CASES if any(isinstance(found[case], StepMemory) for found in memory)]
            programs = {case: Program(case, recipe, base, tokenizer, batches[0], scratch) for case in works}
        for batch, found in zip(batches, memory, strict=True):
            chosen = {case: program for case, program in programs.items() if isinstance(found[case], StepMemory)}
            seconds = time_steps(chosen, batch, rounds, recipe.seeds.initialisation)
            routed = {case: program.routed for case, program in chosen.items()}
            tables.append(table_of(batch, seconds, routed, found))
    return tables


def time_steps(programs: dict[Case, Program], batch: Batch, rounds: int, seed: int) -> dict[Case, list[float]]:
    """Seconds of a step of each program, one value per round, after a round of warm-up."""
    inputs = {case: program.inputs_of(batch) for case, program in programs.items()}
    seconds: dict[Case, list[float]] = {case: [] for case in programs}
    cases, rng = list(programs), np.random.default_rng(seed)
    gc.collect()
    gc.freeze()  # shortens the collections between steps, and makes those within them equal
    for round_ in range(rounds + 1):
        with stage(f"{batch.name}: " + (f"round {round_} of {rounds}" if round_ else "warm-up")):
            for case in (cases[index] for index in rng.permutation(len(cases))):
                gc.collect()
                start = time.perf_counter()
                try:
                    programs[case].step(*inputs[case])
                except torch.OutOfMemoryError as error:
                    raise EchoModelError(
                        f"{case}, {batch.name}: out of memory. Timing needs memory for the adapters of all programs at "
                        f"once: {error} Use fewer --rows or a smaller --shape."
                    ) from error
                if round_:
                    seconds[case].append(time.perf_counter() - start)
    gc.unfreeze()
    return seconds


# ---------------------------------------------------------------------- memory


def _memory(case: Case, recipe: Recipe, batch: Batch) -> StepMemory | str:
    """The memory of a case, or its error, which is printed too."""
    try:
        with stage(f"{batch.name}: memory of {case}"):
            return in_own_process(measure_memory, case, recipe, batch)
    except ChildError as error:
        progress_console().print(f"{case}: {error}", markup=False)
        return str(error)


def measure_memory(case: Case, recipe: Recipe, batch: Batch) -> StepMemory:
    """StepMemory of a few steps of one case in this process."""
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        program = Program(case, recipe, load_base(recipe), tokenizer, batch, scratch)
        inputs = program.inputs_of(batch)
        gc.collect()
        with MemoryWatch() as watch:
            for _ in range(MEMORY_STEPS):
                program.step(*inputs)
    return StepMemory(before=watch.before, peak=watch.peak)


class ChildError(Exception):
    """A process ended without a result; the message says why."""


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function(*args)` in a process of its own.

    Raises an EchoError that it raises, and ChildError for every other failure.
    """
    # Forking a process that has imported everything and computed nothing saves the seconds of the imports. CUDA does
    # not survive a fork, and Windows has none.
    can_fork = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    context.set_forkserver_preload([__name__])
    # one task: if this process is killed, the other ends after it
    with ProcessPoolExecutor(1, context, _use_filters, ([*warnings.filters],), max_tasks_per_child=1) as pool:
        try:
            return pool.submit(function, *args).result()
        except EchoError:
            raise
        except BrokenProcessPool as error:
            raise ChildError("its process was killed, as the system does for lack of memory") from error
        except Exception as error:
            traceback.print_exc()  # with the other process's own
            raise ChildError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _use_filters(filters: list[Any]) -> None:
    warnings.filters = filters
