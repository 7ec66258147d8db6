"""Where the time of a step goes, beside what its arithmetic would take: our LoRA step and an echo step.

    python scripts/profile_step.py --output results/bench/profile

Both steps of each shape run under torch's profiler, in turns. The time of every operator counts for the part of the
step whose forward called it; that of backward too, because autograd numbers its nodes as the forward makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from echo_lora.bench.floors import count_weights, floors
from echo_lora.bench.programs import Case, Program, parse_shape, random_batch
from echo_lora.environment import commit, processor, versions
from echo_lora.files import write_text
from echo_lora.models import load_tokenizer
from echo_lora.recipe.build import load_base
from echo_lora.recipe.load import load_recipe

STEP = "step"
CHECK = "self-check"
FORWARD = (CHECK, "alignment", "echo-off pass", "echo networks", "echo-on pass", "losses")  # named in the step itself
BACKWARD = "autograd::engine::evaluate_function: "
ACCUMULATION = "AccumulateGrad"
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("attention",),
    "copies": ("aten::copy_", "aten::cat"),
}
FIRST_PASS = ("echo-off pass", "echo-off pass, backward")
SECOND_PASS = ("echo-on pass", "echo-on pass, backward")
LOSSES = ("losses", "losses, backward")
OTHERS = {  # of which the echo step's surplus is shown
    "first pass": FIRST_PASS,
    "echo networks, gradients, optimizer": (
        "echo networks",
        "echo networks, backward",
        "gradients added up",
        "optimizer",
    ),
    "the rest": ("rest",),
}
KINDS_SHOWN = [*KINDS, "other operators", "Python and dispatch"]


def parts(events: list[FunctionEvent]) -> dict[str, dict[str, float]]:
    """Milliseconds of all profiled steps: by part, and by kind of operator."""
    forward_part: dict[int, str] = {}  # of each node of the graph, by its number
    for event in events:
        if event.sequence_nr >= 0 and _node(event) is None:
            forward_part.setdefault(event.sequence_nr, _ancestor(event))
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if not _within(event, STEP):
            continue
        node = _node(event)
        if node is None:
            part = _ancestor(event)
        elif ACCUMULATION in node.name:
            part = "gradients added up"
        else:
            part = f"{forward_part.get(node.sequence_nr, 'rest')}, backward"
        found[part][_kind(event.name)] += event.self_cpu_time_total / 1000
    return {part: dict(kinds) for part, kinds in found.items()}


def _kind(name: str) -> str:
    for kind, names in KINDS.items():
        if name in names or any(own in name for own in names if not own.startswith("aten::")):
            return kind
    return "other operators" if name.startswith("aten::") else "Python and dispatch"


def _parents(event: FunctionEvent) -> Any:
    while event is not None:
        yield event
        event = event.cpu_parent


def _within(event: FunctionEvent, name: str) -> bool:
    return any(parent.name == name for parent in _parents(event))


def _node(event: FunctionEvent) -> FunctionEvent | None:
    """The node of the graph whose backward this is part of."""
    return next((parent for parent in _parents(event) if parent.name.startswith(BACKWARD)), None)


def _ancestor(event: FunctionEvent) -> str:
    """The innermost named part that an operator of the forward, or of the optimizer, belongs to."""
    for parent in _parents(event):
        if parent.name in FORWARD:
            return parent.name
        if parent.name.startswith(("Optimizer.step", "Optimizer.zero_grad")):
            return "optimizer"
    return "rest"


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Parts of the LoRA step and of the echo step, in milliseconds per step, and the floors of the shape."""
    recipe = load_recipe("tiny", args.set)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    batch = random_batch(recipe, tokenizer, *parse_shape(shape), args.rows)
    cases = [Case("lora", False), Case("echo", False)]
    with tempfile.TemporaryDirectory() as scratch:
        base = load_base(recipe)
        programs = {case: Program(case, recipe, base, tokenizer, batch, scratch) for case in cases}
        inputs = {case: program.inputs_of(batch) for case, program in programs.items()}
        found: dict[str, list[dict[str, dict[str, float]]]] = {case.variant: [] for case in cases}
        for _ in range(args.rounds + 1):
            for case in cases:
                with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
                    programs[case].step(*inputs[case])
                found[case.variant].append(parts(list(profiler.events())))
    floor = floors(count_weights(recipe), cases[1], batch, 1.0)
    first = found["echo"][0]
    check = _sum(first, [part for part in first if part.startswith(CHECK)])
    medians = {variant: _medians(rounds[1:]) for variant, rounds in found.items()}  # the first is a warm-up
    return {"floors": vars(floor), "check": check} | medians


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    names = {part: {kind for own in rounds for kind in own.get(part, {})} for own in rounds for part in own}
    return {
        part: {kind: statistics.median(own.get(part, {}).get(kind, 0.0) for own in rounds) for kind in sorted(kinds)}
        for part, kinds in names.items()
    }


def _sum(step: dict[str, dict[str, float]], parts: Sequence[str], kinds: Sequence[str] = ()) -> float:
    return sum(ms for part in parts for kind, ms in step.get(part, {}).items() if not kinds or kind in kinds)


def above_the_floor(shapes: dict[str, Any]) -> list[str]:
    """What an echo step takes beside a LoRA step, and in brackets what it would take if only arithmetic took time.

    That is, for the second pass, the time of the LoRA step's pass times the share of tokens that run again; for the
    losses, twice the time of the LoRA step's.
    """
    columns = []
    for shape, found in shapes.items():
        lora, echo = found["lora"], found["echo"]
        prompt, answer = parse_shape(shape)
        share = answer / (prompt + answer)
        floor = found["floors"]["both"] * _sum(lora, lora)
        cells = {
            "LoRA step": f"{_sum(lora, lora):.0f}",
            "echo step": f"{_sum(echo, echo):.0f} ({floor:.0f})",
        }
        for kind in KINDS_SHOWN:
            ideal = share * _sum(lora, FIRST_PASS, [kind])
            cells[f"second pass, {kind}"] = f"{_sum(echo, SECOND_PASS, [kind]):.0f} ({ideal:.0f})"
        cells["losses"] = f"{_sum(echo, LOSSES):.0f} ({2 * _sum(lora, LOSSES):.0f})"
        for name, parts in OTHERS.items():
            cells[f"{name}, more than in a LoRA step"] = f"{_sum(echo, parts) - _sum(lora, parts):.0f}"
        columns.append(cells)
    lines = [f"| | {' | '.join(shapes)} |", "|---|" + "---:|" * len(shapes)]
    lines += [f"| {row} | {' | '.join(column[row] for column in columns)} |" for row in columns[0]]
    return ["## Above the floor", "", " ".join((above_the_floor.__doc__ or "").split()), "", *lines, ""]


def table(shape: str, found: dict[str, Any]) -> list[str]:
    """Milliseconds of each part, and the share of it that each kind of operator takes in the echo step."""
    lora, echo = found["lora"], found["echo"]
    total = {"lora": _sum(lora, lora), "echo": _sum(echo, echo)}
    kinds = KINDS_SHOWN
    floor, check = found["floors"], found["check"]
    lines = [
        f"## {shape}", "",
        f"LoRA step {total['lora']:.0f} ms, echo {total['echo']:.0f} ms, {total['echo'] / total['lora']:.2f} times; "
        f"the floor is {floor['both']:.2f} (decoder layers {floor['layers']:.2f}). The self-check of the first step "
        f"took {check:.0f} ms, {check / total['echo'] / 100:.2%} of a hundred steps.", "",
        f"| part | LoRA, ms | echo, ms | {' | '.join(kinds)} |", "|---|---:|---:|" + "---:|" * len(kinds),
    ]  # fmt: skip
    order = sorted(lora.keys() | echo.keys(), key=lambda part: -_sum(echo, [part]))
    for part in order:
        own = echo.get(part, {})
        cells = [f"{_sum(lora, [part]):.0f}", f"{_sum(echo, [part]):.0f}"]
        lines.append(f"| {part} | {' | '.join(cells + [f'{own.get(kind, 0.0):.0f}' for kind in kinds])} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/profile"))
    parser.add_argument("--shape", action="append", help="as for `echo-lora bench`; repeatable")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--draw", action="store_true", help="measure nothing; write the page of OUTPUT's record anew")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "profile.json"
    if args.draw:
        write_text(path.with_suffix(".md"), page(json.loads(path.read_text())))
        return
    about = {
        "command": " ".join(["python scripts/profile_step.py", *sys.argv[1:]]), "commit": commit(),
        "versions": versions(), "processor": processor(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    record: dict[str, Any] = {"about": about, "shapes": {}}
    for shape in args.shape or ["96x8", "160x20", "256x32", "64x192"]:
        record["shapes"][shape] = measure(shape, args)
        print("\n".join(table(shape, record["shapes"][shape])), flush=True)
        write_text(path, json.dumps(record, indent=1) + "\n")
        write_text(path.with_suffix(".md"), page(record))


def page(record: dict[str, Any]) -> str:
    about, shapes = record["about"], record["shapes"]
    shown = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version) + "."
    return "\n".join(
        [
            "# Where a step's time goes", "",
            f"`{about['command']}`, commit {about['commit']}; {about['processor']}, {about['threads']} threads.",
            shown, "",
            "Milliseconds, the medians of the rounds; the kinds of operators are those of the echo step.", "",
            *above_the_floor(shapes), *(line for shape, found in shapes.items() for line in table(shape, found)),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
