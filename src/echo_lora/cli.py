"""The command `echo-lora`: what its commands have in common, and the entry point."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from echo_lora import __version__
from echo_lora.commands import adapters, data, inference, recipes, studies
from echo_lora.environment import process_count
from echo_lora.errors import EchoConfigError
from echo_lora.terminal import Group


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"echo-lora {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: echo-lora train tiny",
)


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Train LoRA and DoRA adapters with an echo of deep hidden states; deploy plain adapters."""
    if ctx.invoked_subcommand != "train" and (processes := process_count()) > 1:
        raise EchoConfigError(
            f"echo-lora {ctx.invoked_subcommand} runs in one process, but was launched in {processes}. Only "
            "`train` runs in several."
        )


for module in (recipes, inference, adapters, studies):
    app.add_typer(module.app)
app.add_typer(data.app, name="data")


def main() -> None:
    """The entry point."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that its encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    try:
        app(prog_name="echo-lora")
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        status = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads may outlive the interpreter otherwise, and abort it


if __name__ == "__main__":
    main()
