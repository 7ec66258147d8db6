"""How commands talk to a terminal: errors and exit statuses, tables, coloured rows."""

from __future__ import annotations

import errno
import os
import shlex
import sys
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


MOST = 1_000_000_000  # of what can be counted: more is a slip
STYLES = {"prompt": "none", "boundary": "black on yellow", "answer": "green", "ignored": "dim"}


def path(text: str | Path) -> Path:
    """A path in which `~` stands for the home folder: shells leave it as it is in `--output=~/scores.json`."""
    if not str(text).strip():  # as of a variable that is not set; it would be the working directory
        raise typer.BadParameter(f"{text!r} is blank. Name a path.")
    return expanded(text)


class Group(TyperGroup):
    """Reports an EchoError as its message and exit status 1, a Ctrl-C with exit status 130."""

    def invoke(self, ctx: Any) -> Any:
        _calm_libraries()
        try:
            done = super().invoke(ctx)
            sys.stdout.flush()  # a full disk is to show here
            return done
        except KeyboardInterrupt as error:
            if ctx.meta.get("traceback"):
                raise
            typer.echo(str(error) or "Interrupted.", err=True)
            raise typer.Exit(130) from error
        except EchoError as error:
            message = str(error)
            if ctx.meta.get("traceback"):
                raise
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(1) from error
        except (OSError, MemoryError) as error:  # the machine's; with what is tried, the last remedy is known here only
            if ctx.meta.get("traceback") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            reason = shortened(str(error) or "there is not enough memory")
            typer.echo(f"Error: the system refuses: {reason}. Make room, or run again with --traceback.", err=True)
            raise typer.Exit(1) from error


def remember(ctx: typer.Context, value: bool) -> bool:
    ctx.meta["traceback"] = ctx.meta.get("traceback", False) or value  # meta is shared with the group's context
    return value


# ------------------------------------------------------------------- printing


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or name of a shipped recipe")]

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe; repeatable")
]

TracebackOption = Annotated[
    bool, typer.Option("--traceback", callback=remember, help="show where in the program an error arose")
]


def starting() -> Any:
    """A bar for the seconds that importing torch and transformers takes."""
    from echo_lora.progress import stage

    return stage("Starting", line=False)


def new_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def print_pairs(pairs: dict[str, str]) -> None:
    """Two columns, 80 characters wide but for words that are longer."""
    from textwrap import wrap

    for name, value in pairs.items():
        lines = [
            part
            for line in value.split("\n")
            for part in wrap(line, 63, break_long_words=False, break_on_hyphens=False) or [""]
        ]
        for i, line in enumerate(lines):
            typer.echo(f"{name if i == 0 else '':16} {line}".rstrip())


def print_table(rows: list[dict[str, str]]) -> None:
    """Columns as wide as their longest cell; each row is a mapping from the heads."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_wide_table(title: str, rows: list[dict[str, str]]) -> None:
    """As wide as the terminal allows; each row is a mapping from the heads."""
    from rich import box
    from rich.table import Table

    console = new_console()
    if not console.is_terminal:
        console.width = 140
    table = Table(*rows[0], title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    console.print(table, soft_wrap=False)


def print_segments(console: Console, segments: list[Segment]) -> None:
    """In colours on a terminal, else each run of one kind as a quoted text."""
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


def _calm_libraries() -> None:
    """Warnings and errors only, and no bars but our own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning):  # of the libraries about each other
            warnings.simplefilter("ignore", category)


def command_line() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["echo-lora", *sys.argv[1:]])
