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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo_lora.bench.estimate import TimeLeft, left_text
from echo_lora.bench.floors import count_weights, operations
from echo_lora.bench.programs import (
    VARIANTS,
    Batch,
    Case,
    Program,
    chosen_cases,
    own_batch,
    parse_shape,
    random_batch,
)
from echo_lora.bench.record import Record, tidy, unfinished
from echo_lora.bench.report import BenchReport, Measured, StepMemory
from echo_lora.environment import MemoryWatch, commit, devices, processor, versions
from echo_lora.errors import EchoConfigError, EchoError, EchoInterrupt, EchoModelError
from echo_lora.files import locked
from echo_lora.models import load_tokenizer
from echo_lora.progress import duration, progress_console, stage
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
    variants: Sequence[str] = (),
    checkpointing: str | None = None,
    rows: int | None = None,
    rounds: int | None = None,
    quick: bool = False,
    output: str | Path = "runs/bench",
    command: str = "",
) -> BenchReport:
    """Measure the chosen cases, and write bench.json, bench.md and bench.png into the folder `output`.

    A shape such as 96x8 means random rows. Without shapes, the batch is the recipe's first rows; without a recipe
    either, SHAPES on `tiny`. variants, checkpointing: see `chosen_cases`. quick: fewer rows, rounds and shapes unless
    given. bench.json is written after every round; called again, an interrupted measurement of the same settings
    resumes.

    Raises an EchoError for what is wrong from the start, and then writes nothing. A case that fails later, for example
    for lack of memory, is in the report with its error.
    """
    with locked(output):
        tidy(Path(output))
        unfinished(Path(output))  # refuses any other folder that is not empty, before the seconds of reading rows
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
        cases = chosen_cases(loaded, variants, checkpointing)
        require_packages(loaded, trains=True)
        rows = rows or (QUICK_ROWS if quick else loaded.training.batch_size)
        rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
        with stage(f"Reading rows with the tokenizer of {loaded.model}"):
            tokenizer = load_tokenizer(loaded.model, loaded.trust_remote_code)
            batches = [random_batch(loaded, tokenizer, P, A, rows) for P, A in prompts_and_answers]
            batches = batches or [own_batch(loaded, tokenizer, Path(recipe or RECIPE).stem, rows)]
        arguments = {"recipe": recipe, "set": [*overrides], "shapes": [*shapes], "rows": rows, "rounds": rounds}
        arguments |= {"cases": [str(case) for case in cases]}
        settings = {"command": command, "arguments": arguments, "recipe": loaded.to_dict(), "commit": source}
        settings |= {"seed": loaded.seeds.initialisation} | _machine()
        measured = [{case: Measured() for case in cases} for _ in batches]
        record = Record(Path(output), settings, batches, count_weights(loaded), measured)
        return _Measurement(loaded, tokenizer, record, rounds).run()


def _machine() -> dict[str, Any]:
    return {
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {processor()}",
        "device": devices()[0],
        "threads": torch.get_num_threads(),
    }


class _Measurement:
    """Measures what is missing in a record, and writes it down after every step of the way."""

    def __init__(self, recipe: Recipe, tokenizer: Any, record: Record, rounds: int) -> None:
        self.recipe, self.tokenizer, self.record, self.rounds = recipe, tokenizer, record, rounds
        self.is_said = False
        self.warm: set[int] = set()  # batches whose warm-up is over

    def run(self) -> BenchReport:
        record = self.record
        resumed = record.resume()
        cost = [
            {
                case: sum(operations(record.weights, case, batch, VARIANTS[case.variant].routing or 0.0))
                for case in found
            }
            for batch, found in zip(record.batches, record.measured, strict=True)
        ]
        self.time = TimeLeft(cost, MEMORY_STEPS)
        if resumed:
            for index, found in enumerate(record.measured):
                for case, own in found.items():
                    if own.seconds:
                        self.time.add_step(index, case, *own.seconds)
            progress_console().print(f"Resuming: {self._kept()} are kept in {record.output}.", markup=False)
            self._say_time()
        try:
            self._measure_memory()
            self._measure_seconds()
        except KeyboardInterrupt as error:
            raise EchoInterrupt(
                f"Interrupted. {self._kept()} are kept in {record.output}. Run the same command to resume."
            ) from error
        return record.finish()

    def _measure_memory(self) -> None:
        """The memory of each case in a process of its own, or the error, which is printed too."""
        for index, case in self._pending():
            batch, own = self.record.batches[index], self.record.measured[index][case]
            start = time.monotonic()
            try:
                with stage(f"{batch.name}: memory of {case}{left_text(self._left())}"):
                    own.memory, step = in_own_process(measure_memory, case, self.recipe, batch)
                self.time.add_process(index, case, time.monotonic() - start, step)
            except ChildError as error:
                progress_console().print(f"{case}: {error}", markup=False)
                own.error = str(error)
            self.record.write()
            self._say_time()

    def _measure_seconds(self) -> None:
        """The steps of the cases whose memory could be measured, in turns."""
        if not any(self._rounds_left()):
            return
        with tempfile.TemporaryDirectory() as scratch:
            with stage(f"Loading {self.recipe.model}{left_text(self._left())}"):
                base = load_base(self.recipe)
                works = dict.fromkeys(case for counts in self._rounds_left() for case in counts)
                first = self.record.batches[0]
                programs = {case: Program(case, self.recipe, base, self.tokenizer, first, scratch) for case in works}
            for index, counts in enumerate(self._rounds_left()):
                if counts:
                    self._measure_rounds(index, {case: programs[case] for case in counts})

    def _measure_rounds(self, index: int, programs: dict[Case, Program]) -> None:
        """The missing rounds of one batch, each written down when it ends."""
        found = self.record.measured[index]
        left = range(self._done(index), self.rounds)
        steps = time_steps(programs, self.record.batches[index], left, self.recipe.seeds.initialisation, self._left)
        for is_warm_up, seconds in steps:
            self.warm.add(index)
            for case, value in seconds.items():
                self.time.add_step(index, case, value)
                if not is_warm_up:
                    found[case].seconds.append(value)
                    found[case].routed = programs[case].routed
            if not is_warm_up:
                self.record.write()
            self._say_time()

    # ---------------------------------------------------------------- what is left

    def _pending(self) -> list[tuple[int, Case]]:
        """Batch and case of each memory that is yet to be measured."""
        return [
            (i, case) for i, found in enumerate(self.record.measured) for case, own in found.items() if own.is_pending
        ]

    def _done(self, index: int) -> int:
        """Rounds of a batch that are measured."""
        return max(len(own.seconds) for own in self.record.measured[index].values())

    def _rounds_left(self) -> list[dict[Case, int]]:
        """By batch, the steps that each case is yet to take, with warm-up; nothing for a case that failed."""
        left = []
        for index, found in enumerate(self.record.measured):
            count = self.rounds - self._done(index)
            count += count > 0 and index not in self.warm
            left.append({case: count for case, own in found.items() if count and own.error is None})
        return left

    def _left(self) -> float | None:
        return self.time.seconds(self._pending(), self._rounds_left())

    def _say_time(self) -> None:
        """Say once, as soon as it is known, how long this will take."""
        left = self._left()
        if left is not None and not self.is_said:
            self.is_said = True
            total = self.rounds * len(self.record.batches)
            progress_console().print(
                f"This will take about {duration(left)}: {len(self._pending())} more measurements of memory, then "
                f"{total - self._rounds()} rounds. It can be interrupted and resumed.",
                markup=False,
            )

    def _rounds(self) -> int:
        return sum(self._done(index) for index in range(len(self.record.batches)))

    def _kept(self) -> str:
        cases = [own for found in self.record.measured for own in found.values()]
        memory = f"{sum(not own.is_pending for own in cases)} of {len(cases)} measurements of memory"
        return f"{memory} and {self._rounds()} of {self.rounds * len(self.record.batches)} rounds"


# --------------------------------------------------------------------- seconds


def time_steps(
    programs: dict[Case, Program], batch: Batch, rounds: range, seed: int, left: Callable[[], float | None]
) -> Iterator[tuple[bool, dict[Case, float]]]:
    """Seconds of a step of each program, for each of these rounds (from 0), after one of warm-up, which is marked.

    left: gives the seconds left. The order within a round depends on the seed and the round alone.
    """
    inputs = {case: program.inputs_of(batch) for case, program in programs.items()}
    cases = list(programs)
    gc.collect()
    gc.freeze()  # shortens the collections between steps, and makes those within them equal
    try:
        for round_ in (-1, *rounds):
            name = "warm-up" if round_ < 0 else f"round {round_ + 1} of {rounds.stop}"
            seconds = {}
            with stage(f"{batch.name}: {name}{left_text(left())}"):
                for index in np.random.default_rng((seed, round_ + 1)).permutation(len(cases)):
                    case = cases[index]
                    gc.collect()
                    start = time.perf_counter()
                    _step(case, programs[case], inputs[case], batch)
                    seconds[case] = time.perf_counter() - start
            yield round_ < 0, seconds
    finally:
        gc.unfreeze()


def _step(case: Case, program: Program, inputs: tuple[dict[str, Any], Any], batch: Batch) -> None:
    try:
        program.step(*inputs)
    except torch.OutOfMemoryError as error:
        raise EchoModelError(
            f"{case}, {batch.name}: out of memory. Timing needs memory for the adapters of all programs at once: "
            f"{error} Use fewer --rows, a smaller --shape or fewer --variant, and another --output."
        ) from error


# ---------------------------------------------------------------------- memory


def measure_memory(case: Case, recipe: Recipe, batch: Batch) -> tuple[StepMemory, float]:
    """StepMemory of a few steps of one case in this process, and the seconds of the last."""
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        program = Program(case, recipe, load_base(recipe), tokenizer, batch, scratch)
        inputs = program.inputs_of(batch)
        gc.collect()
        with MemoryWatch() as watch:
            for _ in range(MEMORY_STEPS):
                start = time.perf_counter()
                program.step(*inputs)
                seconds = time.perf_counter() - start
    return StepMemory(before=watch.before, peak=watch.peak), seconds


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
