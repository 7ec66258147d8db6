"""Commands about a recipe: train, preview, plan."""

from __future__ import annotations

from typing import Annotated

import typer

from echo_lora.environment import is_main_process, process_count, require_writable
from echo_lora.terminal import (
    MAX_COUNT,
    STYLES,
    RecipeArgument,
    SetOption,
    TracebackOption,
    command_line,
    new_console,
    print_pairs,
    print_segments,
    starting,
)

app = typer.Typer()


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

    # a launcher's command is not known here
    command = command_line(without="--resume") if process_count() == 1 else None
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
