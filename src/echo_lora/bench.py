"""Cost of a training step, paired: every variant in turn within each round, ratios within the round.

    python -m echo_lora.bench --output results/step_cost.json

Machines are noisy; a round's variants share its noise, so the medians of within-round ratios are what to quote.
The variants differ in the step only: the same model, adapter, rows, losses and optimizer-free backward.

    plain          one LoRA pass, logits at predicting positions only: what `echo: false` computes
    shared_prefix  both passes, the second on the answer only
    full           both passes in full
    three_pass     as [R]: a pass without gradient for z, then both passes in full, all logits
    stock          PEFT's own forward with labels: one pass, all logits
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from echo_lora.base_models import PACKAGED, load_base_model
from echo_lora.config import EchoConfig
from echo_lora.echo import echo_representation
from echo_lora.inject import Injection
from echo_lora.losses import loss_terms
from echo_lora.model import EchoModel, get_echo_model
from echo_lora.step import align_rows, boundary_positions, injection_mask


def variants(model: EchoModel, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """The loss of one step of each variant, with gradient."""

    def echo(kind: Any, is_routed: bool) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            model.echo_config = dataclasses.replace(model.echo_config, echo_step=kind)
            return model.echo_losses(**batch, is_routed=is_routed)["loss"]

        return step

    def stock() -> torch.Tensor:
        model.echo_enabled = False
        loss = model(**batch, use_cache=False).loss
        model.echo_enabled = True
        return loss

    return {
        "plain": echo("auto", False),
        "shared_prefix": echo("shared_prefix", True),
        "full": echo("full", True),
        "three_pass": lambda: three_pass(model, batch),
        "stock": stock,
    }


def three_pass(model: EchoModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The literal step: z from a pass of its own, nothing shared, logits everywhere."""
    model.echo_enabled = False  # the plain PEFT forward
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    labels = batch["labels"]
    boundary = boundary_positions(labels)
    rows = torch.arange(len(labels))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    depth = len(states) - 1
    hidden = [states[s + 1][rows, boundary] for s in model.echo_config.resolve_source_layers(depth)]
    deltas, _, _ = model.echo(echo_representation(hidden))
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)  # (B, T), shifted
    off = model(**inputs).logits
    with model._injector.injecting(Injection(deltas, injection_mask(targets, model.echo_config.injection_mask))):
        on = model(**inputs).logits
    model.echo_enabled = True
    supervised = targets != -100
    terms = loss_terms(off[supervised], on[supervised], targets[supervised], model.echo_config)
    weighted = terms.ce_off + terms.ce_on + model.echo_config.distillation_weight * terms.distillation
    return weighted / supervised.sum()


def measure(steps: dict[str, Callable[[], torch.Tensor]], model: EchoModel, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, by variant, one figure a round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            step().backward()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Median and quartiles of each variant's time over another's, within rounds."""
    found = {}
    for name, times in seconds.items():
        paired = [a / b for a, b in zip(times, seconds[over], strict=True)]
        low, median, high = statistics.quantiles(paired, n=4)
        found[name] = {"low": low, "median": median, "high": high}
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m echo_lora.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=PACKAGED, help="base model (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=96, help="prompt tokens of every row")
    parser.add_argument("--answer", type=int, default=8, help="answer tokens of every row")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--method", choices=["lora", "dora"], default="lora")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    base = load_base_model(args.model, dtype="float32")
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM", use_dora=args.method == "dora"
    )
    model = get_echo_model(base, lora, EchoConfig()).train()
    input_ids = torch.randint(100, base.config.vocab_size, (args.rows, args.prompt + args.answer))
    labels = input_ids.clone()
    labels[:, : args.prompt] = -100
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    assert align_rows(**batch).targets.shape == (args.rows, args.answer)

    seconds = measure(variants(model, batch), model, args.rounds)
    to_plain, to_literal = ratios(seconds, "plain"), ratios(seconds, "three_pass")
    print(f"{args.rows} rows of {args.prompt}+{args.answer} tokens, {args.method}, {args.rounds} rounds")
    print(f"{'variant':14} {'seconds':>8} {'over plain (quartiles)':>26} {'over three_pass':>26}")
    for name, times in seconds.items():
        cells = [
            f"{r[name]['median']:.3f} ({r[name]['low']:.3f}-{r[name]['high']:.3f})" for r in (to_plain, to_literal)
        ]
        print(f"{name:14} {statistics.median(times):8.3f} {cells[0]:>26} {cells[1]:>26}")
    report = {
        "command": "python -m echo_lora.bench " + " ".join(sys.argv[1:] if argv is None else argv),
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "machine": platform.machine(),
        "seconds": seconds,
        "over_plain": to_plain,
        "over_three_pass": to_literal,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
