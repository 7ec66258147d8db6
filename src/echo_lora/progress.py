"""Bars on a terminal, plain lines anywhere else, both on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def progress_console() -> Console:
    """Where progress is shown."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def stage(text: str, *, bar: bool = True, line: bool = True) -> Iterator[None]:
    """A stage of unknown length: on a terminal a moving bar with the time it takes, elsewhere one line.

    bar: False for a stage that shows a bar of its own. line: False for a stage that is not worth a line.
    """
    console = progress_console()
    if not (bar and console.is_terminal):
        if line:
            console.print(f"{text} ...", markup=False)
        yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        progress.add_task(text, total=None)
        yield
