"""What a run shows while it works: bars on a terminal, plain lines anywhere else, both on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = ("loss", "ce_off", "ce_on", "distillation", "routing_p", "eval_loss", "learning_rate")


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def stage(text: str, *, has_bar: bool = False) -> Iterator[None]:
    """A stage of unknown length: a moving bar with the time it takes, or one line; a line if it has a bar itself."""
    console = _console()
    if has_bar or not console.is_terminal:
        console.print(f"{text} ...", markup=False)
        yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


class TrainingProgress(TrainerCallback):
    """Steps and metrics of a training run."""

    def __init__(self) -> None:
        self.console = _console()
        self.bar: Progress | None = None
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("Training"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True)
            self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = [f"{name} {logs[name]:.4g}" for name in SHOWN if logs and name in logs]
        if not shown or (logs and "train_runtime" in logs):
            return
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], description=" ".join(shown[:3]))
        else:
            seconds = time.perf_counter() - self.started
            line = f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}  {seconds:.0f} s"
            self.console.print(line, markup=False)

    def close(self) -> None:
        """Remove the bar; also after an error, which no event of the trainer tells of."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
