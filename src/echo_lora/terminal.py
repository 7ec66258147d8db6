"""What commands share: arguments, errors and exit statuses, tables, coloured rows."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from echo_lora.data.sources import expanded
from echo_lora.errors import EchoError, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from echo_lora.data.preview import Segment


MAX_COUNT = 1_000_000_000  # of an option that counts something: more is a typing error
STYLES = {"prompt": "none", "boundary": "black on yellow", "answer": "green", "ignored": "dim"}


def path(text: str | Path) -> Path:
    """Parse a path. Expands `~`, which shells leave alone in `--output=~/scores.json`."""
    if not str(text).strip():  # from an unset variable; Path("") would be the working directory
        raise typer.BadParameter(f"{text!r} is blank. Name a path.")
    return expanded(text)


SECONDS_TO_REPORT = 30  # for the first process of a launch


class Group(TyperGroup):
    """Reports an error as its message, with exit status 1, or 130 for Ctrl-C. `--traceback` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        _quiet_libraries()
        try:
            done = super().invoke(ctx)
            sys.stdout.flush()  # raises here if the disk is full
            return done
        except (KeyboardInterrupt, EchoError, OSError, MemoryError) as error:
            if ctx.meta.get("traceback") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            status = 1
            if isinstance(error, KeyboardInterrupt):
                message, status = str(error) or "Interrupted.", 130
            elif isinstance(error, EchoError):
                message = f"Error: {error}"
            else:
                reason = shortened(str(error) or "not enough memory")
                message = f"Error: the system reports: {reason}. Free some space, or run again with --traceback."
            if not getattr(error, "is_repeated", False):
                is_launched = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
                if is_launched and _is_in_all(error) and os.environ.get("LOCAL_RANK", "0") != "0":
                    # the machine's first process reports it; the launcher ends all others as soon as one has ended
                    time.sleep(SECONDS_TO_REPORT)
                typer.echo(message, err=True)
            raise typer.Exit(status) from error


def _is_in_all(error: BaseException) -> bool:
    """Whether an error occurs in all processes of a launch alike, so that one should report it."""
    torch = sys.modules.get("torch")
    return torch is None or not torch.distributed.is_initialized() or isinstance(error, KeyboardInterrupt)


def _set_traceback(ctx: typer.Context, value: bool) -> bool:
    ctx.meta["traceback"] = ctx.meta.get("traceback", False) or value  # meta is shared with the group's context
    return value


def complete_recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes, for the shell; where none fits, it completes files."""
    from echo_lora.recipe.load import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_studies(incomplete: str) -> list[str]:
    """The same for studies."""
    from echo_lora.study.design import shipped_studies

    return [name for name in shipped_studies() if name.startswith(incomplete)]


_RECIPE = typer.Argument(
    metavar="RECIPE", help="YAML file, or name of a shipped recipe", autocompletion=complete_recipes
)

RecipeArgument = Annotated[str, _RECIPE]

OptionalRecipeArgument = Annotated[str | None, _RECIPE]

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe; repeatable")
]

TracebackOption = Annotated[
    bool, typer.Option("--traceback", callback=_set_traceback, help="show the Python traceback of an error")
]


# ------------------------------------------------------------------- printing


def starting() -> Any:
    """A progress bar while torch and transformers are imported, which takes seconds."""
    from echo_lora.progress import stage

    return stage("Starting", line=False)


def new_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def print_pairs(pairs: dict[str, str]) -> None:
    """Print two columns, wrapped at 80 characters."""
    from textwrap import wrap

    for name, value in pairs.items():
        lines = [
            wrapped
            for line in value.split("\n")
            for wrapped in wrap(line, 63, break_long_words=False, break_on_hyphens=False) or [""]
        ]
        for i, line in enumerate(lines):
            typer.echo(f"{name if i == 0 else '':16} {line}".rstrip())


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows, each a mapping from the column heads, in columns as wide as their longest cell."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_wide_table(title: str, rows: list[dict[str, str]]) -> None:
    """Print rows, each a mapping from the column heads, in a table that fits the terminal."""
    from rich import box
    from rich.table import Table

    console = new_console()
    if not console.is_terminal:
        console.width = 160
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # an ellipsis would hide digits
    for row in rows:
        table.add_row(*row.values())
    console.print(table, soft_wrap=False)


def print_segments(console: Console, segments: list[Segment]) -> None:
    """Print tokens in colours on a terminal, elsewhere each run of one kind as a quoted string."""
    import json
    from itertools import groupby

    from rich.text import Text

    if console.is_terminal:
        text = Text()
        for piece, kind in segments:
            text.append(piece.replace("\n", "⏎\n") or "·", STYLES[kind])
        console.print(text)
        return
    for kind, group in groupby(segments, key=lambda segment: segment[1]):
        pieces = [piece for piece, _ in group]
        quoted = json.dumps("".join(pieces), ensure_ascii=False)
        console.print(f"{kind:9} {len(pieces):4}  {quoted}", markup=False)


def _quiet_libraries() -> None:
    """Limit libraries to warnings and errors, and hide their progress bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    # it warns of every product whose dtype it changes, and of a kernel that it can't get from the hub
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning):  # libraries about each other
            warnings.simplefilter("ignore", category)


def command_line(without: str | None = None) -> str:
    """The command line, quoted so that it can be run again, without one of its words."""
    return shlex.join(["echo-lora", *(word for word in sys.argv[1:] if word != without)])
