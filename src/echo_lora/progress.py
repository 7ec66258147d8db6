"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from echo_lora.environment import is_main_process

PATIENCE = 3.0  # seconds without a word, where there is no terminal


def progress_console() -> Console:
    """Of several processes only the first shows anything."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_main_process())


@contextmanager
def stage(text: str, *, bar: bool = True, line: bool = True) -> Iterator[None]:
    """Show a stage of unknown length: a moving bar and the elapsed time on a terminal, one line elsewhere.

    bar: False for a stage that shows its own bar. line: False to print the line only if the stage takes seconds.
    """
    console = progress_console()
    if not (bar and console.is_terminal):
        with _said(console, f"{text} ...", 0.0 if line else PATIENCE):
            yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    room = max(console.width - 32, 20)  # beside bar and time, which rich would cut first
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        progress.add_task(text if len(text) <= room else f"{text[: room - 1]}…", total=None)
        yield


@contextmanager
def _said(console: Console, line: str, patience: float) -> Iterator[None]:
    """Print the line at once, or if the block takes longer than `patience` seconds."""
    if not patience:
        console.print(line, markup=False)
        yield
        return
    timer = Timer(patience, console.print, [line], {"markup": False})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def counted(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done: call the function that this gives with the number.

    A bar on a terminal; elsewhere a line at the start, and then one whenever a tenth is done or some seconds are over.
    """
    steps = Steps(text, total)
    if not steps.is_bar:
        steps.say(f"{text} {total} ...")
    shown, last = 0, time.monotonic()

    def count(done: int) -> None:
        nonlocal shown, last
        steps.advance(done)
        if not steps.is_bar and (done == total or 10 * (done - shown) >= total or time.monotonic() - last > PATIENCE):
            steps.say(f"{done}/{total}  {steps.timing()}")
            shown, last = done, time.monotonic()

    try:
        yield count
    finally:
        steps.close()


class Steps:
    """A number of steps: on a terminal a bar with the time per step and the time left, below the lines of `say`."""

    def __init__(self, text: str, total: int, done: int = 0) -> None:
        self.console = progress_console()
        self.total, self._first, self._done = total, done, done
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn(text, markup=False), BarColumn(20), MofNCompleteColumn(), _Timing(self))
            note = TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, note, console=self.console, transient=True, refresh_per_second=4)
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    @property
    def is_bar(self) -> bool:
        return self._bar is not None

    def advance(self, done: int) -> None:
        """Show that so many steps are done, of all."""
        self._done, self._last = done, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def note(self, text: str) -> None:
        """Show a text beside the bar, if there is one."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        self.console.print(line, markup=False)

    def timing(self) -> str:
        """Time per step and time left, by the mean of the steps so far."""
        new = self._done - self._first
        if not new:
            return ""
        each = (self._last - self._started) / new
        left = each * (self.total - self._done) - (time.monotonic() - self._last)
        return f"{each:.2g} s/step, {duration(max(left, 0.0))} left"

    def close(self) -> None:
        """Remove the bar; its lines stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Timing(ProgressColumn):
    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps

    def render(self, task: Task) -> Text:
        return Text(self._steps.timing())


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
