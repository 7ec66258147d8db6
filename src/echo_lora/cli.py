"""The command `echo-lora`: parse, call one function, print.

Commands import what they need when they run: torch and transformers take seconds, and `--help` must not.
"""

from __future__ import annotations

import io
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from echo_lora import __version__
from echo_lora.environment import require_writable
from echo_lora.errors import EchoError
from echo_lora.terminal import (
    MAX_COUNT,
    STYLES,
    Group,
    RecipeArgument,
    SetOption,
    TracebackOption,
    command_line,
    new_console,
    path,
    print_pairs,
    print_segments,
    print_table,
    print_wide_table,
    starting,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"echo-lora {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: echo-lora train tiny",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Train LoRA and DoRA adapters with an echo of deep hidden states; deploy plain adapters."""


@app.command(epilog="Example: echo-lora train tiny --set training.steps=8 --set output=runs/first")
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume from the newest complete checkpoint")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Train the recipe's adapter. The saved copy is verified before its folder appears."""
    from echo_lora.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if not resume:
        require_writable(loaded.output)
    with starting():
        from echo_lora.recipe.train import run

    result = run(loaded, resume=resume)
    print_pairs(result.pairs())


@app.command(epilog="Example: echo-lora preview tiny --rows 2")
def preview(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    rows: Annotated[int, typer.Option(min=0, max=MAX_COUNT, help="rows to show from each source")] = 3,
    traceback: TracebackOption = False,
) -> None:
    """Show training rows token by token. Prompt, boundary, answer and ignored tokens are marked."""
    from echo_lora.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with starting():
        from echo_lora.recipe.plan import preview as preview_recipe

    shown = preview_recipe(loaded, rows)
    console = new_console()
    if console.is_terminal:
        console.print("Legend: ", *(f"[{style}] {name} [/]" for name, style in STYLES.items()))
    for where, segments in shown.rows:
        console.print(f"\n{where}", markup=False)
        print_segments(console, segments)
    console.print()
    for line in shown.summary:
        console.print(line, markup=False)


@app.command(epilog="Example: echo-lora plan tiny --set method=dora")
def plan(recipe: RecipeArgument, overrides: SetOption = None, traceback: TracebackOption = False) -> None:
    """Show what training would do. A dry run: layers, parameters, steps, estimated memory and cost; no weights."""
    from echo_lora.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with starting():
        from echo_lora.recipe.plan import plan as plan_recipe

    print_pairs(plan_recipe(loaded).pairs())


@app.command("eval", epilog="Example: echo-lora eval tiny --set data.limit=16")
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_ADAPTER", help="recipe, output folder of a run, or its adapter folder")
    ],
    overrides: SetOption = None,
    adapter: Annotated[
        Path | None, typer.Option(help="adapter to score; default: the one in the recipe's output folder", parser=path)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="score the base model too")] = False,
    output: Annotated[Path | None, typer.Option(help="write scores and predictions as JSON", parser=path)] = None,
    run_generated_code: Annotated[
        bool,
        typer.Option("--run-generated-code", help="allow tasks of kind code, which run code that the model writes"),
    ] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="run it even if no sandbox works: it can then read your files")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="run code that comes with the base model; run.json can't allow it"),
    ] = False,
    traceback: TracebackOption = False,
) -> None:
    """Score the adapter on the recipe's tasks. An untrained recipe scores the base model."""
    if output is not None:
        require_writable(output, is_file=True)
    with starting():
        from echo_lora.files import locked
        from echo_lora.recipe.scoring import resolve, score_recipe, write_scores

    trusted = ["trust_remote_code=true"] if trust_remote_code else []
    recipe, found = resolve(target, [*(overrides or ()), *trusted], adapter)
    with nullcontext() if output is None else locked(output):
        allowed = {"run_generated_code": run_generated_code, "allow_unsandboxed": allow_unsandboxed}
        scores = score_recipe(recipe, found, with_base=base, **allowed)
        if output is not None:
            write_scores(recipe, scores, output)
    if found is not None:
        print_pairs({"adapter": str(found)})
    print_table([row for one in scores for row in one.table()])
    for line in (line for one in scores for line in one.averages()):
        typer.echo(line)
    if output is not None:
        typer.echo(f"Written to {output}")


@app.command(epilog="Example, after `echo-lora train tiny`: echo-lora merge runs/tiny/adapter runs/merged --verify")
def merge(
    adapter: Annotated[Path, typer.Argument(help="folder of the adapter", parser=path)],
    output: Annotated[Path, typer.Argument(help="folder for the merged model; must not exist", parser=path)],
    base: Annotated[str | None, typer.Option(help="base model; default: the one named by the adapter")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="dtype to merge and save in; auto: the base model's"),
    ] = "auto",
    verify: Annotated[bool, typer.Option("--verify", help="load the saved model and compare its logits too")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the base model")
    ] = False,
    traceback: TracebackOption = False,
) -> None:
    """Merge an adapter into its base model. Logits are compared before anything is written."""
    require_writable(output)
    with starting():
        from echo_lora.adapter.merge import merge as merge_adapter

    done = merge_adapter(adapter, output, base=base, dtype=dtype, verify=verify, trust_remote_code=trust_remote_code)
    print_pairs(done.pairs())


@app.command(epilog="Example: echo-lora doctor")
def doctor(
    adapter: Annotated[Path | None, typer.Argument(help="folder of an adapter to inspect", parser=path)] = None,
    traceback: TracebackOption = False,
) -> None:
    """Show versions and devices. Given an adapter folder, inspect it and say what can load it.

    The exit status is 1 if the adapter has problems.
    """
    from echo_lora.environment import OPTIONAL, devices, installed, versions

    report = None
    if adapter is not None:
        from echo_lora.adapter.inspection import inspect_adapter

        report = inspect_adapter(adapter)
    print_pairs(versions())
    print_pairs({name: installed(name) or f"not installed ({use})" for name, use in OPTIONAL.items()})
    print_pairs({"devices": "\n".join(devices())})
    if report is None:
        return
    typer.echo()
    print_pairs(report.pairs())
    if report.problems:
        raise EchoError(
            f"{report.folder} has the problems listed above. Don't use it: save it again, or download it again."
        )


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
        typer.Argument(metavar="RECIPE", help="recipe with the model and rows; default: tiny, on random rows"),
    ] = None,
    overrides: SetOption = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="PxA", help="random rows of P prompt and A answer tokens; repeatable")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="rows per step; default: training.batch_size")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=2, max=MAX_COUNT, help="timed steps of each method; default: 7")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="quick trial: 2 rows, 3 rounds, one shape")] = False,
    output: Annotated[Path, typer.Option(help="folder for bench.json, .md and .png", parser=path)] = Path("runs/bench"),
    traceback: TracebackOption = False,
) -> None:
    """Measure time and memory of a training step. Compares Echo-LoRA, LoRA, and TRL's SFTTrainer."""
    require_writable(output)
    with starting():
        from echo_lora.bench import NOTES, run_bench

    report = run_bench(
        recipe,
        overrides or (),
        shapes=shape or (),
        rows=rows,
        rounds=rounds,
        quick=quick,
        output=output,
        command=command_line(),
    )
    for table in report.tables:
        print_wide_table(table.title, table.cells())
    typer.echo("\n".join(NOTES))
    typer.echo(f"\nWritten to {output}")
    if report.failures:
        raise EchoError("\n".join(report.failures))


@app.command(
    epilog="Example, after `python scripts/pretrain_small.py --output runs/quick-lm --rows 20000 --steps 400`: "
    "echo-lora compare quick --workers 2 --minutes 30"
)
def compare(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="YAML file, or name of a shipped study")],
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
    report = write_report(loaded.output)
    typer.echo("\n".join(summary_lines(loaded.output)))
    typer.echo(f"\nWritten to {report}")
    if not is_complete:
        typer.echo("The time limit was reached before the study was complete. Run the same command to resume.")


data_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Import the published benchmarks for recipes and lm-eval.",
    epilog="Example, beside LLM-Adapters' dataset/: echo-lora data import dataset data/commonsense",
)

app.add_typer(data_app, name="data")


@data_app.command("import", epilog="Example, beside LLM-Adapters' dataset/: echo-lora data import dataset data/all")
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

    report = import_data(None if hub else source, output or source, tasks=task or (), hold_out=hold_out)
    print_table([count.table_row() for count in report.counts])
    for note in report.notes:
        typer.echo(f"Note: {note}")
    for warning in report.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    typer.echo(f"Written to {report.output}")


@app.command(epilog="Example, after `echo-lora compare quick`: echo-lora report runs/study-quick")
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a study, complete or not", parser=path)],
    traceback: TracebackOption = False,
) -> None:
    """Write the report of a study. Makes report.html and report.md from its records."""
    with starting():
        from echo_lora.study.report.page import summary_lines, write_report

    page = write_report(folder)
    typer.echo("\n".join(summary_lines(folder)))
    typer.echo(f"\nWritten to {page} and {page.with_suffix('.md').name}")


def main() -> None:
    """The entry point."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that its encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="echo-lora")


if __name__ == "__main__":
    main()
