"""The command group `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echo_lora.environment import require_writable
from echo_lora.progress import stage
from echo_lora.terminal import MAX_COUNT, TracebackOption, path, print_table, starting

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Import the published benchmarks for recipes and lm-eval.",
    epilog="Example, beside LLM-Adapters' dataset/: echo-lora data import dataset data/commonsense",
)


@app.command("import", epilog="Example, beside LLM-Adapters' dataset/: echo-lora data import dataset data/all")
def import_(
    source: Annotated[
        Path, typer.Argument(help="folder with one folder per task, or commonsense_170k.json", parser=path)
    ],
    output: Annotated[Path | None, typer.Argument(help="folder for the rows; must not exist", parser=path)] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="import only this task; repeatable")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="download from the hub; give OUTPUT as the only argument")] = False,
    hold_out: Annotated[
        int, typer.Option(min=0, max=MAX_COUNT, help="prompts of each train split to hold out for validation")
    ] = 0,
    traceback: TracebackOption = False,
) -> None:
    """Import benchmarks. Writes rows with complete prompts, lm-eval tasks and a recipe, and checks row counts."""
    if hub != (output is None):
        raise typer.BadParameter("give SOURCE and OUTPUT, or --hub and OUTPUT")
    require_writable(output or source)
    with starting():
        from echo_lora.benchmarks.importing import import_data

    with stage("Importing"):
        report = import_data(None if hub else source, output or source, tasks=task or (), hold_out=hold_out)
    print_table([count.table_row() for count in report.counts])
    for note in report.notes:
        typer.echo(f"Note: {note}")
    for warning in report.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    typer.echo(f"Written to {report.output}")
