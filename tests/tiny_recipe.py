"""A folder with a tiny random model, its tokenizer, rows and a recipe: a whole run in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import tiny_tokenizer

ROWS = [
    {"prompt": f"Count the words: {'one ' * n}.", "completion": f" {n} words" + " in this line" * (n % 3)}
    for n in range(1, 13)
]


def tiny_folder(
    folder: Path, *, width: int = 32, layers: int = 4, inner: int = 48, vocabulary: int = 400, seed: int = 0
) -> Path:
    """A base model with a tokenizer of 400 tokens, as save_pretrained writes it."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_document(model: Path | str = "./base") -> dict[str, Any]:
    """The recipe as a mapping; its paths start at the folder it is written to."""
    return {
        "model": str(model),
        "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        "echo": True,
        "echo_config": {"source_layers": [1, 2], "target_layers": [0, 1], "bottleneck": 8},
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "training": {"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "log_every": 1},
    }


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """`folder`/recipe.yaml with its model and rows beside it; changes replace top-level keys."""
    if not (folder / "base").exists():
        tiny_folder(folder / "base")
    write_rows(folder / "train.jsonl")
    write_rows(folder / "test.jsonl", ROWS[:4])
    document = tiny_document() | {"output": str(folder / "run")} | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path
