"""Commands about a recipe: init, train, preview, plan, schema."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echo_lora.environment import is_main_process, process_count, require_writable
from echo_lora.files import refuse_existing_file, write_text
from echo_lora.terminal import (
    MAX_COUNT,
    STYLES,
    OptionalRecipeArgument,
    RecipeArgument,
    SetOption,
    TracebackOption,
    command_line,
    new_console,
    path,
    print_pairs,
    print_segments,
    starting,
)

if TYPE_CHECKING:
    from echo_lora.recipe.prepare import Preview

MODEL_HELP = "base model: a folder, a hub id, or packaged:smollm2-135m"
DATA_HELP = "rows: a file, a pattern, a folder, or owner/name of the hub"

app = typer.Typer()


@app.command(epilog="Example: echo-lora init rows.csv --model packaged:smollm2-135m")
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    output: Annotated[
        Path | None, typer.Option(help="file to write; default: the name of the data, with .yaml", parser=path)
    ] = None,
    overrides: SetOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Write a recipe for a model and your rows. Shows some rows, and what to run next."""
    with starting():
        from echo_lora.recipe.first import first_recipe, name_of
        from echo_lora.recipe.prepare import preview_of

    file = output or Path(f"{name_of(data)}.yaml")
    require_writable(file, is_file=True)
    refuse_existing_file(file)
    first = first_recipe(model, data, file.parent, overrides or ())
    _show(preview_of(first.recipe, first.tokenizer, first.rows, 2))
    command = f"echo-lora train {shlex.quote(str(file))}"
    write_text(file, f"# {command}\n{first.text}")
    typer.echo(f"\nWritten to {file}. To train: {command}")


@app.command(epilog="Example: echo-lora train tiny --set training.steps=8 --set output=runs/first")
def train(
    recipe: OptionalRecipeArgument = None,
    model: Annotated[str | None, typer.Option(help=f"without a recipe: {MODEL_HELP}")] = None,
    data: Annotated[str | None, typer.Option(help=f"without a recipe: {DATA_HELP}")] = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume from the newest complete checkpoint")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Train the recipe's adapter. The saved copy is verified before its folder appears.

    Without a recipe, --model and --data train by the recipe that init would write.
    """
    from echo_lora.recipe.load import load_recipe

    # a launcher's command is not known here
    command = command_line(without="--resume") if process_count() == 1 else None
    if recipe is not None:
        if model is not None or data is not None:
            raise typer.BadParameter("give a recipe, or --model and --data; a recipe's keys are changed by --set")
        loaded = load_recipe(recipe, overrides or ())
    else:
        if model is None or data is None:
            raise typer.BadParameter("give a recipe, or both --model and --data")
        if resume or process_count() > 1:
            raise typer.BadParameter(
                "--model and --data begin a run in one process. To resume, or to train in several, give the "
                "recipe.yaml of the run's folder, or one from echo-lora init"
            )
        with starting():
            from echo_lora.recipe.first import first_recipe
            from echo_lora.recipe.record import RECIPE_FILE
        loaded = first_recipe(model, data, Path(), overrides or ()).recipe
        command = f"echo-lora train {shlex.quote(str(Path(loaded.output) / RECIPE_FILE))}"
    if not resume:
        require_writable(loaded.output)
    with starting():
        from echo_lora.recipe.train import run

    result = run(loaded, resume=resume, command=command)
    if is_main_process():
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
        from echo_lora.recipe.prepare import preview as preview_recipe

    _show(preview_recipe(loaded, rows))


@app.command(epilog="Example: echo-lora plan tiny --set method=dora")
def plan(recipe: RecipeArgument, overrides: SetOption = None, traceback: TracebackOption = False) -> None:
    """Show what training would do. A dry run: layers, parameters, steps, estimated memory and cost; no weights."""
    from echo_lora.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with starting():
        from echo_lora.recipe.plan import plan as plan_recipe

    print_pairs(plan_recipe(loaded).pairs())


@app.command(epilog="Example: echo-lora schema")
def schema(traceback: TracebackOption = False) -> None:
    """Print the JSON schema of recipes. Editors complete and check keys by it."""
    from echo_lora.recipe.load import SCHEMA

    typer.echo(SCHEMA.read_text(encoding="utf-8"), nl=False)


def _show(shown: Preview) -> None:
    console = new_console()
    if console.is_terminal:
        console.print("Legend: ", *(f"[{style}] {name} [/]" for name, style in STYLES.items()))
    for where, segments in shown.rows:
        console.print(f"\n{where}", markup=False)
        print_segments(console, segments)
    console.print()
    for line in shown.summary:
        console.print(line, markup=False)
