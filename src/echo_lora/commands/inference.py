"""Commands that ask a trained adapter: chat, generate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echo_lora.environment import require_writable
from echo_lora.errors import EchoDataError
from echo_lora.files import refuse_existing_file
from echo_lora.terminal import MAX_COUNT, TracebackOption, path, starting

if TYPE_CHECKING:
    from echo_lora.recipe.generation import Conversation
    from echo_lora.recipe.speaker import Speaker

app = typer.Typer()

TargetArgument = Annotated[
    str, typer.Argument(metavar="RUN_OR_ADAPTER", help="output folder of a run, adapter folder, or trained recipe")
]
BaseModelOption = Annotated[
    str | None, typer.Option("--base-model", help="base model; default: the one named by the run or the adapter")
]
SystemOption = Annotated[str | None, typer.Option(help="system message")]
TokensOption = Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="longest answer in tokens")]
TemperatureOption = Annotated[float, typer.Option(min=0, max=100, help="0: always take the likeliest token; 1: sample")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of the samples")]
TemplateOption = Annotated[
    bool | None,
    typer.Option("--template/--no-template", help="put prompts through the chat template; default: as in training"),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the base model; run.json can't allow it")
]


@app.command(epilog='Example, after `echo-lora train tiny`: echo-lora chat runs/tiny --prompt "What is 12 + 30?"')
def chat(
    target: TargetArgument,
    prompt: Annotated[str | None, typer.Option(help="print the answer to this prompt and end")] = None,
    base: Annotated[bool, typer.Option("--base", help="let the base model answer too")] = False,
    system: SystemOption = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    template: TemplateOption = None,
    base_model: BaseModelOption = None,
    trust_remote_code: TrustOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Talk to the adapter. Prompts are put as in training; without a terminal, each line of the input is one."""
    with starting():
        from echo_lora.recipe.generation import Conversation
        from echo_lora.recipe.speaker import Decoding, load_speaker

    speaker = load_speaker(
        target, base_model=base_model, with_base=base, template=template, trust_remote_code=trust_remote_code
    )
    decoding = Decoding(max_new_tokens, temperature, seed)
    talks = [Conversation(speaker, decoding, system, is_base) for is_base in ((False, True) if base else (False,))]
    if prompt is not None:
        _answer(talks, prompt)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        typer.echo(_greeting(speaker), err=True)
        _converse(talks, _typed_lines(), is_patient=True)
    else:
        _converse(talks, (line.rstrip("\r\n") for line in sys.stdin), is_patient=False)


@app.command(epilog="Example, after `echo-lora train tiny`: echo-lora generate runs/tiny p.txt --output a.jsonl")
def generate(
    target: TargetArgument,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help=".txt with a prompt per line, or rows with prompt or messages", parser=path
        ),
    ],
    output: Annotated[Path, typer.Option(help="JSON Lines file for rows and answers; must not exist", parser=path)],
    base: Annotated[bool, typer.Option("--base", help="add the base model's answers")] = False,
    system: SystemOption = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="prompts answered at a time")] = 8,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    template: TemplateOption = None,
    base_model: BaseModelOption = None,
    trust_remote_code: TrustOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Answer a file of prompts. The answers are in the column `generated`, those of --base in `generated_base`."""
    require_writable(output, is_file=True)
    refuse_existing_file(output)
    with starting():
        from echo_lora.files import locked
        from echo_lora.recipe.generation import answer_file, prompts_of
        from echo_lora.recipe.speaker import Decoding, load_speaker

    rows = prompts_of(prompts)
    with locked(output):
        speaker = load_speaker(
            target, base_model=base_model, with_base=base, template=template, trust_remote_code=trust_remote_code
        )
        decoding = Decoding(max_new_tokens, temperature, seed)
        answer_file(speaker, rows, output, decoding, batch_size=batch_size, with_base=base, system=system)
    typer.echo(f"Written to {output}")


# ------------------------------------------------------------------- the conversation


def _greeting(speaker: Speaker) -> str:
    how = "the chat template" if speaker.uses_template else "no chat template: each prompt is answered by itself"
    return f"{speaker.adapter} on {speaker.base}, with {how}. /reset forgets, /quit or Ctrl-D ends, Ctrl-C interrupts."


def _typed_lines() -> Iterator[str]:
    """Lines typed at a terminal until Ctrl-D; Ctrl-C discards a line."""
    with suppress(ImportError):  # on Windows
        import readline  # noqa: F401  # gives `input` editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n/quit or Ctrl-D ends.", err=True)


def _converse(talks: list[Conversation], lines: Iterator[str], *, is_patient: bool) -> None:
    """Answer each line. is_patient: go on after an interrupted answer and after a question that can't be asked."""
    for line in lines:
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            for talk in talks:
                talk.messages.clear()
        elif line.strip():
            try:
                _answer(talks, line)
            except (KeyboardInterrupt, EchoDataError) as error:
                if not is_patient:
                    raise
                said = "Interrupted." if isinstance(error, KeyboardInterrupt) else f"{error} /reset forgets all so far."
                typer.echo(f"\n{said}", err=True)


def _answer(talks: list[Conversation], text: str) -> None:
    """Print the answers, word by word."""
    for talk in talks:
        if len(talks) > 1:
            typer.echo("base: " if talk.is_base else "adapter: ", nl=False)
        talk.ask(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
