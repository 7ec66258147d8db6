"""How time and memory of a step grow with rows, length, layers, rank and width, and how far `plan` is off.

    python scripts/scaling.py --output results/scaling

One quantity at a time is varied, from a small Llama with random weights in bfloat16, up to the shape of a model of 1.1
billion parameters; after that come ten shapes drawn at random. Each point, with and without the echo, runs in a
process of its own. Every point is written to OUTPUT/scaling.json when it is done, so that an interruption loses one;
the same command resumes. OUTPUT/scaling.md has the table, with the slopes of the lines in OUTPUT/scaling.png.
--plan-again plans the measured points anew, after `plan` has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echo_lora.bench.floors import count_weights, operations
from echo_lora.bench.measure import in_own_process, measure_memory
from echo_lora.bench.programs import VARIANTS, Case, random_batch
from echo_lora.environment import commit, processor, versions
from echo_lora.files import write_text
from echo_lora.models import load_tokenizer
from echo_lora.packaged import PACKAGED
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.plan import PeakMemory, Shape
from echo_lora.recipe.schema import Recipe

Point = dict[str, int]
SMALL: Point = {"rows": 8, "prompt": 96, "answer": 16, "layers": 8, "rank": 16, "width": 512, "inner": 1536, "heads": 8}
LARGE: Point = SMALL | {"rows": 2, "layers": 22, "width": 2048, "inner": 5632, "heads": 32}  # as TinyLlama-1.1B
SWEEPS: dict[str, list[Point]] = {
    "rows": [SMALL | {"rows": rows} for rows in (2, 4, 8, 16, 32, 64)],
    "length": [SMALL | {"prompt": 24 * n, "answer": 4 * n} for n in (1, 2, 4, 8, 16, 32)],
    "layers": [SMALL | {"layers": layers} for layers in (4, 8, 16, 32)],
    "rank": [SMALL | {"rank": rank} for rank in (4, 16, 64, 256)],
    "width": [SMALL | {"width": w, "inner": 3 * w, "heads": w // 64} for w in (128, 256, 512, 1024, 2048)] + [LARGE],
}
VOCABULARY, KEY_HEADS = 32_000, 4
VARIANT = {"LoRA": "lora", "echo": "echo"}


def drawn(count: int = 10) -> list[Point]:
    """Shapes that nothing was fitted on."""
    generator = random.Random(1)
    points = []
    for _ in range(count):
        heads = generator.choice([4, 8, 12])
        width = 64 * heads
        points.append(
            {
                "rows": generator.randint(1, 24),
                "prompt": generator.randint(16, 400),
                "answer": generator.randint(2, 120),
            }
            | {"layers": generator.randint(3, 24), "rank": generator.choice([4, 8, 32, 64]), "width": width}
            | {"inner": int(width * generator.uniform(2, 4)), "heads": heads}
        )
    return points


def points() -> dict[str, Point]:
    found = {f"{sweep} {n}": point for sweep, sweep_points in SWEEPS.items() for n, point in enumerate(sweep_points)}
    return found | {f"drawn {n}": point for n, point in enumerate(drawn())}


# ------------------------------------------------------------------ measuring


def measure(point: Point, *, is_checkpointed: bool) -> dict[str, Any]:
    """Seconds and peak bytes of a step with and without the echo, beside what is expected."""
    found = {}
    with recipes(point, is_checkpointed) as both:
        for name, recipe in both.items():
            batch = random_batch(recipe, load_tokenizer(PACKAGED), point["prompt"], point["answer"], point["rows"])
            case = Case(VARIANT[name], is_checkpointed)
            memory, seconds = in_own_process(measure_memory, case, recipe, batch)
            floor = sum(operations(count_weights(recipe), case, batch, VARIANTS[case.variant].routing or 0.0))
            found[name] = {"seconds": seconds, "before": memory.before, "peak": memory.peak, "operations": floor}
            found[name] |= in_own_process(plan_of, recipe, point)
    return found


@contextmanager
def recipes(point: Point, is_checkpointed: bool) -> Iterator[dict[str, Recipe]]:
    """The recipes without and with the echo, and the base that they name, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(save_base, point, f"{folder}/base")
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe_of(point, is_checkpointed)))
        yield {name: load_recipe(path, [f"echo={str(name == 'echo').lower()}"]) for name in VARIANT}


def save_base(point: Point, folder: str) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point["width"],
        intermediate_size=point["inner"],
        num_hidden_layers=point["layers"],
        num_attention_heads=point["heads"],
        num_key_value_heads=min(KEY_HEADS, point["heads"]),
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(PACKAGED).save_pretrained(folder)


def recipe_of(point: Point, is_checkpointed: bool) -> dict[str, Any]:
    return {
        "model": "./base",
        "dtype": "bfloat16",
        "lora": {"r": point["rank"], "alpha": 2 * point["rank"], "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "data": {"train": "rows.jsonl"},
        "training": {"batch_size": point["rows"], "gradient_checkpointing": is_checkpointed},
        "output": "run",
    }


def plan_of(recipe: Recipe, point: Point) -> dict[str, Any]:
    """What `echo-lora plan` expects at the peak, and its parts."""
    memory = PeakMemory(recipe)(Shape(point["prompt"], point["answer"], point["rows"]), point["rows"])
    parts = {"base": memory.base, "trained": memory.states, "activations": memory.activations or 0}
    return {"planned": memory.total, "parts": parts | {"libraries": memory.process}}


def plan_again(record: dict[str, Any], is_checkpointed: bool) -> None:
    """Put what this commit's `plan` expects beside what the record measured."""
    for name, found in record["points"].items():
        if "error" in found:
            continue
        with recipes(found["point"], is_checkpointed) as both:
            for kind, recipe in both.items():
                found[kind] |= in_own_process(plan_of, recipe, found["point"])
        print(name, {kind: f"{found[kind]['planned'] / found[kind]['peak'] - 1:+.0%}" for kind in VARIANT}, flush=True)
    record["planned_at"] = commit()


# ----------------------------------------------------------------- the report


def slope(sizes: list[float], values: list[float]) -> float:
    """Of the line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def size_of(sweep: str, point: Point) -> int:
    return point["prompt"] + point["answer"] if sweep == "length" else point[sweep]


def page(record: dict[str, Any]) -> str:
    about = record["about"]
    shown = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        "# How a step grows", "",
        f"`{about['command']}`, commit {about['commit']}; {about['processor']}, {about['threads']} threads.",
        *([f"Planned at commit {record['planned_at']}."] if "planned_at" in record else []),
        f"{shown}.", "",
        "Random weights in bfloat16, vocabulary 32,000, adapter in float32 on q, v and down; every step routed. A peak",
        "is that of the process, with its libraries; seconds are those of the second of two steps.", "",
        "| point | rows | tokens | layers | width | rank | LoRA | echo | over LoRA | expected | peak, LoRA | planned | "
        "peak, echo | planned | most of it |", "|---|" + "---:|" * 13 + "---|",
    ]  # fmt: skip
    off = []
    for name, found in record["points"].items():
        point = found["point"]
        cells = [name, point["rows"], f"{point['prompt']}+{point['answer']}", point["layers"], point["width"]]
        if "error" in found:
            lines.append(f"| {' | '.join(map(str, [*cells, point['rank'], found['error'][:80]]))} |")
            continue
        lora, echo = found["LoRA"], found["echo"]
        cells += [point["rank"], f"{lora['seconds']:.2f} s", f"{echo['seconds']:.2f} s"]
        cells += [f"{echo['seconds'] / lora['seconds']:.2f}", f"{echo['operations'] / lora['operations']:.2f}"]
        for own in (lora, echo):
            error = own["planned"] / own["peak"] - 1
            off.append((name, error))
            cells += [f"{own['peak'] / 1e9:.2f} GB", f"{error:+.0%}"]
        cells.append(max(echo["parts"], key=echo["parts"].get))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for kind, chosen in (("sweeps", False), ("drawn shapes", True)):
        errors = [abs(error) for name, error in off if name.startswith("drawn") == chosen]
        if errors:
            lines += ["", f"`plan` on the {kind}: off by {np.mean(errors):.1%} on average, at most {max(errors):.1%}."]
    lines += [
        "", "Slopes of the logarithms over the larger half of each sweep:", "",
        "| varied | seconds, LoRA | seconds, echo | peak without libraries, LoRA | echo |", "|---|" + "---:|" * 4,
    ]  # fmt: skip
    for sweep in SWEEPS:
        own = [found for name, found in record["points"].items() if name.startswith(sweep) and "error" not in found]
        own = [found for found in own if not (sweep == "width" and found["point"]["rows"] != SMALL["rows"])]
        own = own[len(own) // 2 - 1 :] if len(own) > 3 else own
        if len(own) < 2:
            continue
        sizes = [size_of(sweep, found["point"]) for found in own]
        cells = [f"{slope(sizes, [found[name]['seconds'] for found in own]):.2f}" for name in VARIANT]
        cells += [f"{slope(sizes, [_net(found[name]) for found in own]):.2f}" for name in VARIANT]
        lines.append(f"| {sweep} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "![Seconds and peak memory over each quantity, on logarithmic axes](scaling.png)", ""]
    )


def _net(own: dict[str, Any]) -> float:
    return max(own["peak"] - own["parts"]["libraries"], 1.0)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(3.2 * len(SWEEPS), 6), sharey="row", constrained_layout=True)
    for column, sweep in enumerate(SWEEPS):
        own = [found for name, found in record["points"].items() if name.startswith(sweep) and "error" not in found]
        sizes = [size_of(sweep, found["point"]) for found in own]
        for name, style in zip(VARIANT, ("o-", "s-"), strict=True):
            axes[0, column].loglog(sizes, [found[name]["seconds"] for found in own], style, label=name, markersize=4)
            axes[1, column].loglog(sizes, [found[name]["peak"] / 1e9 for found in own], style, markersize=4)
            axes[1, column].loglog(sizes, [found[name]["planned"] / 1e9 for found in own], "k:", linewidth=1)
        axes[1, column].set_xlabel(sweep)
    axes[0, 0].set_ylabel("seconds of a step")
    axes[1, 0].set_ylabel("peak, GB (dotted: planned)")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(record: dict[str, Any], folder: Path) -> None:
    write_text(folder / "scaling.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "scaling.md", page(record))
    draw(record, folder / "scaling.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--minutes", type=float, default=60, help="start no point after this time")
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--plan-again", action="store_true", help="measure nothing; plan the measured points anew")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "scaling.json"
    about = {
        "command": "python scripts/scaling.py" + " --checkpointing" * args.checkpointing, "commit": commit(),
        "versions": versions(), "processor": processor(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    record = json.loads(path.read_text()) if path.is_file() else {"about": about, "points": {}}
    if args.plan_again:
        plan_again(record, args.checkpointing)
        write(record, args.output)
        return
    if record["about"] != json.loads(json.dumps(about)):
        sys.exit(f"{path} is of another machine, version, setting or commit. Choose another --output.")
    start, left = time.monotonic(), 0
    for name, point in points().items():
        if args.only not in name or name in record["points"]:
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left += 1
            continue
        try:
            found = measure(point, is_checkpointed=args.checkpointing)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        record["points"][name] = {"point": point} | found
        write(record, args.output)
        print(name, found.get("error") or {k: f"{v['seconds']:.2f} s" for k, v in found.items()}, flush=True)
    print(f"{left} points are left. Call it again." if left else "Nothing is left.")


if __name__ == "__main__":
    main()
