"""Which start lets the echo matter: one short training per setting, judged on rows held out from training.

    python scripts/echo_defaults.py --output results/echo_defaults.jsonl

Two reasoning-gym tasks, split into train and validation; every setting sees the same rows, the same initial adapter and
the same order, with every step routed. One line per evaluation is appended to the output; settings that are in it
already are skipped, so an interrupted study goes on where it stopped. `--report` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from echo_lora import EchoConfig, get_echo_model
from echo_lora.adapter.files import adapter_hash
from echo_lora.data.generated import reasoning_gym_splits
from echo_lora.data.tokenize import TokenizedRow, tokenize_row
from echo_lora.models import load_base_model, load_tokenizer
from echo_lora.packaged import PACKAGED

TASKS = {
    "chain_sum": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 3, "max_words": 6},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "third-party constants": {"scale_init": 0.1, "gate_bias_init": -2.0, "echo_lr_multiplier": 1.0},
    "open gate, x3": {"scale_init": 1.0, "gate_bias_init": 0.0, "echo_lr_multiplier": 3.0},
    "open gate, x10": {"scale_init": 1.0, "gate_bias_init": 0.0, "echo_lr_multiplier": 10.0},
    "zero (no echo), x10": {"scale_init": 1.0, "gate_bias_init": 0.0, "echo_lr_multiplier": 10.0, "echo_kind": "zero"},
    "output, open gate, x3": {
        "scale_init": 1.0,
        "gate_bias_init": 0.0,
        "echo_lr_multiplier": 3.0,
        "injection_site": "output",
    },
    "output, open gate, x10": {
        "scale_init": 1.0,
        "gate_bias_init": 0.0,
        "echo_lr_multiplier": 10.0,
        "injection_site": "output",
    },
}


def collate(rows: list[TokenizedRow]) -> dict[str, torch.Tensor]:
    width = max(len(row.input_ids) for row in rows)
    pad = [width - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([r.input_ids + [0] * p for r, p in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - p) + [0] * p for p in pad]),
        "labels": torch.tensor([r.labels + [-100] * p for r, p in zip(rows, pad, strict=True)]),
    }


def validate(model: Any, rows: list[TokenizedRow]) -> dict[str, float]:
    """Means over the answer tokens of held-out rows, with the echo on."""
    model.eval()
    sums = {"ce_off": 0.0, "ce_on": 0.0, "distillation": 0.0, "token_accuracy": 0.0}
    tokens = sum(label != -100 for row in rows for label in row.labels)
    with torch.no_grad():
        for i in range(0, len(rows), 16):
            output = model.echo_losses(**collate(rows[i : i + 16]), is_routed=True, num_items_in_batch=tokens)
            for name in sums:
                sums[name] += float(output[name])
    model.train()
    return sums


def train(setting: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per evaluation."""
    tokenizer = load_tokenizer(PACKAGED)
    splits = [
        reasoning_gym_splits(task, {"train": 600, "validation": 64}, seed=args.seed, params=params)
        for task, params in TASKS.items()
    ]
    train_rows, held_out = (
        [tokenize_row(row, tokenizer, chat=True) for split in splits for row in split[part]]
        for part in ("train", "validation")
    )
    base = load_base_model(PACKAGED, dtype="float32")
    torch.manual_seed(args.seed)
    modules = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM")
    model = get_echo_model(base, lora, EchoConfig(routing_schedule="constant", **setting)).train()
    start = adapter_hash(model)
    echo = list(model.echo.parameters())
    of_echo = {id(p) for p in echo}
    adapter = [p for p in model.parameters() if p.requires_grad and id(p) not in of_echo]
    optimizer = torch.optim.AdamW(
        [
            {"params": adapter, "lr": args.learning_rate},
            {"params": echo, "lr": args.learning_rate * model.echo_config.echo_lr_multiplier},
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 10) * (1 - s / args.steps))
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    lines, recent = [], []
    for step in range(args.steps):
        batch = collate([train_rows[order[(8 * step + i) % len(order)]] for i in range(8)])
        output = model.echo_losses(**batch, is_routed=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapter, *echo], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append({k: float(output[k]) for k in ("ce_off", "ce_on", "distillation", "echo_norm", "gate_mean")})
        if (step + 1) % args.every == 0:
            mean = {f"train_{k}": sum(r[k] for r in recent) / len(recent) for k in recent[0]}
            lines.append({"step": step + 1, "initial_adapter": start, **mean, **validate(model, held_out)})
            recent = []
    return lines


def report(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of the last evaluation of every setting."""
    head = [
        "setting",
        "steps",
        "train on - off",
        "val CE(off)",
        "val on - off",
        "val distillation",
        "norm of δ",
        "gate",
    ]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(line["setting"] for line in lines):
        for line in (line for line in lines if line["setting"] == name):
            cells = [
                *(name, str(line["step"]), f"{line['train_ce_on'] - line['train_ce_off']:+.4f}"),
                *(f"{line['ce_off']:.4f}", f"{line['ce_on'] - line['ce_off']:+.4f}", f"{line['distillation']:.5f}"),
                *(f"{line['train_echo_norm']:.2f}", f"{line['train_gate_mean']:.2f}"),
            ]
            table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="names of settings")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if not args.report:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = {name: version(name) for name in ("torch", "transformers", "peft", "reasoning-gym")}
        for name in args.only:
            if any(line["setting"] == name and line["seed"] == args.seed for line in lines):
                continue
            found = [
                {"setting": name, "config": SETTINGS[name], "seed": args.seed, "learning_rate": args.learning_rate}
                | {"of": args.steps, "commit": commit, "versions": about}
                | line
                for line in train(SETTINGS[name], args)
            ]
            lines += found
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:  # one write, so that a stop leaves whole settings only
                file.write("".join(json.dumps(line) + "\n" for line in found))
            print(report(found), flush=True)
    print(report(lines))


if __name__ == "__main__":
    main()
