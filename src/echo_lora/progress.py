"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from echo_lora.environment import is_main_process


def progress_console() -> Console:
    """Of several processes only the first shows anything."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_main_process())


@contextmanager
def stage(text: str, *, bar: bool = True, line: bool = True) -> Iterator[None]:
    """Show a stage of unknown length: a moving bar and the elapsed time on a terminal, one line elsewhere.

    bar: False for a stage that shows its own bar. line: False to print nothing where there is no terminal.
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
