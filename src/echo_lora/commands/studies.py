"""Commands that compare: demo, bench, compare, report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from echo_lora.environment import require_package, require_writable
from echo_lora.errors import EchoError
from echo_lora.progress import stage
from echo_lora.terminal import (
    MAX_COUNT,
    SetOption,
    TracebackOption,
    command_line,
    complete_recipes,
    complete_studies,
    path,
    print_pairs,
    print_table,
    print_wide_table,
    starting,
)

app = typer.Typer()


@app.command(epilog="Example: echo-lora demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option(help="folder for both adapters and the scores", parser=path)] = Path(
        "runs/demo"
    ),
    traceback: TracebackOption = False,
) -> None:
    """Train LoRA and Echo-LoRA on the same rows. Then score both, and the base model."""
    require_writable(output)
    with starting():
        from echo_lora.study.demo import run_demo

    lines = run_demo(output)
    rows = sum(result.total for result in lines[0].results)
    typer.echo(f"\nExact match on {rows} held-out rows, one seed; the interval is Wilson's, over all rows.\n")
    print_table([line.table_row() for line in lines])
    typer.echo()
    print_pairs({line.name: str(line.run.adapter) for line in lines if line.run is not None})


@app.command(epilog="Example: echo-lora bench --quick")
def bench(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="recipe with the model and rows; default: tiny, on random rows",
            autocompletion=complete_recipes,
        ),
    ] = None,
    overrides: SetOption = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="PxA", help="random rows of P prompt and A answer tokens; repeatable")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="step to measure: trl_lora, trl_dora, lora, three_pass, echo or echo_dora; repeatable; "
            "default: trl_lora, lora and echo, or with method dora trl_dora and echo_dora",
        ),
    ] = None,
    checkpointing: Annotated[
        Literal["off", "on", "both"] | None, typer.Option(help="gradient checkpointing; default: the recipe's")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="rows per step; default: training.batch_size")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=2, max=MAX_COUNT, help="timed steps of each variant; default: 7")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="quick trial: 2 rows, 3 rounds, one shape")] = False,
    output: Annotated[Path, typer.Option(help="folder for bench.json, .md and .png", parser=path)] = Path("runs/bench"),
    traceback: TracebackOption = False,
) -> None:
    """Measure time and memory of a training step. Compares Echo-LoRA, LoRA, and TRL's SFTTrainer.

    If it is interrupted, run the same command to resume.
    """
    require_writable(output)
    with starting():
        from echo_lora.bench import NOTES, run_bench

    report = run_bench(
        recipe,
        overrides or (),
        shapes=shape or (),
        variants=variant or (),
        checkpointing=checkpointing,
        rows=rows,
        rounds=rounds,
        quick=quick,
        output=output,
        command=command_line(),
    )
    for table in report.tables:
        print_wide_table(table.title, table.cells())
        print_wide_table(f"{table.name}: memory", table.memory_cells())
    typer.echo("\n".join(NOTES))
    typer.echo(f"\nWritten to {output}")
    if report.failures:
        raise EchoError("\n".join(report.failures))


@app.command(
    epilog="Example, after `python scripts/pretrain_small.py --output runs/quick-lm --rows 20000 --steps 400`: "
    "echo-lora compare quick --workers 2 --minutes 30"
)
def compare(
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="YAML file, or name of a shipped study", autocompletion=complete_studies),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the study; repeatable")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="parallel runs on this machine")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="start no run after this time; run again to resume")
    ] = None,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="stop at the first of the study's looks that decides")
    ] = False,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="submit runs as Slurm job arrays; KEY is an option of submitit"),
    ] = None,
    traceback: TracebackOption = False,
) -> None:
    """Compare methods in a study. Arms, learning rates and seeds, paired, with a verdict. Run it again to resume."""
    from echo_lora.study.design import load_study, slurm_options

    if minutes is not None and not math.isfinite(minutes):
        raise typer.BadParameter("--minutes must be a finite number; leave it out for no limit")
    loaded = load_study(study, overrides or ())
    require_writable(loaded.output)
    options = None if slurm is None else slurm_options(slurm)
    with starting():
        from echo_lora.study.compare import run_study
        from echo_lora.study.report.page import summary_lines, write_report
        from echo_lora.study.workers import Engine

    engine = Engine(workers, None if options is None else "slurm", options)
    is_complete = run_study(loaded, engine, minutes=minutes, until_decided=until_decided, command=command_line())
    with stage("Writing the report"):
        report = write_report(loaded.output)
    typer.echo("\n".join(summary_lines(loaded.output)))
    typer.echo(f"\nWritten to {report}")
    if not is_complete:
        typer.echo("The time limit was reached before the study was complete. Run the same command to resume.")


@app.command(epilog="Example, after `echo-lora compare quick`: echo-lora report runs/study-quick")
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a study, complete or not", parser=path)],
    traceback: TracebackOption = False,
) -> None:
    """Write the report of a study. Makes report.html and report.md from its records."""
    require_package("statsmodels", "the report of a study")
    with starting():
        from echo_lora.study.report.page import summary_lines, write_report

    with stage("Writing the report"):
        page = write_report(folder)
    typer.echo("\n".join(summary_lines(folder)))
    typer.echo(f"\nWritten to {page} and {page.with_suffix('.md').name}")
