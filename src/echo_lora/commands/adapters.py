"""Commands about a trained adapter: eval, merge, doctor."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from echo_lora.environment import require_package, require_writable
from echo_lora.errors import EchoError
from echo_lora.terminal import SetOption, TracebackOption, complete_recipes, path, print_pairs, print_table, starting

app = typer.Typer()


@app.command("eval", epilog="Example: echo-lora eval tiny --set data.limit=16")
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_ADAPTER",
            help="recipe, output folder of a run, or its adapter folder",
            autocompletion=complete_recipes,
        ),
    ],
    overrides: SetOption = None,
    adapter: Annotated[
        Path | None, typer.Option(help="adapter to score; default: the one in the recipe's output folder", parser=path)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="score the base model too, and compare")] = False,
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
    """Score the adapter on the recipe's tasks. An untrained recipe scores the base model.

    The scores of a run are added to its model card, unless --set changes the recipe.
    """
    require_package("lm-eval", "scoring")
    if output is not None:
        require_writable(output, is_file=True)
    with starting():
        from echo_lora.files import locked
        from echo_lora.recipe.scoring import COMPARED, add_to_card, comparison, resolve, score_recipe, write_scores

    trusted = ["trust_remote_code=true"] if trust_remote_code else []
    recipe, found = resolve(target, [*(overrides or ()), *trusted], adapter)
    with nullcontext() if output is None else locked(output):
        allowed = {"run_generated_code": run_generated_code, "allow_unsandboxed": allow_unsandboxed}
        scores = score_recipe(recipe, found, with_base=base, **allowed)
        if output is not None:
            write_scores(recipe, scores, output)
    if found is not None:
        print_pairs({"adapter": str(found)})
    print_table(comparison(*scores) if len(scores) == 2 else scores[0].table())
    for line in (line for one in scores for line in one.averages()):
        typer.echo(line)
    if len(scores) == 2:
        typer.echo("\n" + "\n".join(COMPARED))
    if output is not None:
        typer.echo(f"Written to {output}")
    if found is not None and (card := add_to_card(recipe, found, scores)) is not None:
        typer.echo(f"Added to the model card {card}")


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
        with starting():
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
