"""How much of the echo representation z tells rows apart, by depth, in the pretrained base.

    python scripts/echo_similarity.py --output results/echo_similarity.json

For rows of one task: the mean cosine between the z of two rows, and the share of z's energy that varies over rows (the
rest is the same vector in all of them). A representation that is constant within a task can only act as a bias.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from echo_lora import EchoConfig
from echo_lora.data.generated import reasoning_gym_splits
from echo_lora.data.tokenize import tokenize_row
from echo_lora.method.echo import echo_representation
from echo_lora.models import load_base_model, load_tokenizer
from echo_lora.packaged import PACKAGED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer, base = load_tokenizer(PACKAGED), load_base_model(PACKAGED, dtype="float32").eval()
    depth = base.config.num_hidden_layers
    groups = {"source (default)": EchoConfig().resolve_source_layers(depth)}
    groups |= {"target (default)": EchoConfig().resolve_target_layers(depth)}
    groups |= {f"layer {i}": [i] for i in (depth // 2, depth - 2)}
    found = {}
    for task in ("chain_sum", "letter_counting"):
        rows = reasoning_gym_splits(task, {"train": args.rows}, seed=args.seed)["train"]
        tokenized = [tokenize_row(row, tokenizer, chat=True) for row in rows]
        states = []
        with torch.no_grad():
            for row in tokenized:
                layers = base(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
                states.append(torch.stack([h[0, row.answer_start - 1] for h in layers[1:]]))  # (L, d)
        for name, group in groups.items():
            z = echo_representation([torch.stack([s[i] for s in states]) for i in group])  # (rows, d)
            cosine = F.normalize(z) @ F.normalize(z).T
            n = len(z)
            energy = z.pow(2).sum()
            largest = z.pow(2).mean(0).sort(descending=True).values
            found[f"{task}, {name}"] = {
                "layers": group,
                "mean_cosine": ((cosine.sum() - n) / (n * (n - 1))).item(),
                "share_that_varies": ((z - z.mean(0)).pow(2).sum() / energy).item(),
                "share_in_two_coordinates": (largest[:2].sum() / largest.sum()).item(),
            }
    print("| rows, z read from | layers | mean cosine | share that varies | share in two coordinates |")
    print("|---|---|---|---|---|")
    for name, f in found.items():
        figures = f"{f['mean_cosine']:.4f} | {f['share_that_varies']:.4f} | {f['share_in_two_coordinates']:.3f}"
        print(f"| {name} | {f['layers']} | {figures} |")
    args.output.write_text(json.dumps({"rows": args.rows, "seed": args.seed, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
