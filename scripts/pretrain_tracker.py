"""Pretrain a small language model that tracks swaps, and write rows of 2 to 6 hops for it to be fine-tuned on.

    python scripts/pretrain_tracker.py --output runs/tracker

Five people hold five things, and six operations follow: some swap what two people hold, the others do nothing. The
answer lists what each person holds in the end. The number of swaps is the number of hops: a composition of so many
permutations, under one and the same surface. The model, of few layers, is pretrained on 0 to 2 hops. For each number of
hops there are two training files, a few rows of which a tenth have a wrong answer and many rows without a fault, and
files of validation and test rows; no question occurs in two of them. The same seed on the same machine gives the same
weights; the rows depend on the seed alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from echo_lora.environment import commit, versions
from echo_lora.files import new_folder

PEOPLE, OPERATIONS = "abcde", 6
SWAPS = ["".join(pair) for pair in itertools.combinations(PEOPLE, 2)]
NOTHING, ASK, END, UNKNOWN = "--", "=", "<|end|>", "<|unknown|>"
THINGS = [str(1 + place) for place in range(len(PEOPLE))]
KNOWN_HOPS, HOPS = (0, 1, 2), (2, 3, 4, 5, 6)
ROWS = {"few": 800, "validation": 500, "test": 1000, "many": 8000}
WRONG = 0.1  # of the answers among the few
LAYERS, WIDTH = 4, 128


def question(generator: random.Random, hops: int) -> dict[str, str]:
    """A row: `hops` swaps in random places among the operations, and who holds what in the end."""
    held = dict(zip(PEOPLE, THINGS, strict=True))
    places = set(generator.sample(range(OPERATIONS), hops))
    operations = [generator.choice(SWAPS) if place in places else NOTHING for place in range(OPERATIONS)]
    for one, other in (operation for operation in operations if operation != NOTHING):
        held[one], held[other] = held[other], held[one]
    return {"prompt": " ".join([*operations, ASK, ""]), "completion": " ".join(held.values())}


def splits(seed: int, hops: int) -> dict[str, list[dict[str, str]]]:
    """Rows of a number of hops. Two hops have 1,500 questions in all, so their files are shorter."""
    generator = random.Random(f"{seed} {hops}")
    questions = {row["prompt"]: row for row in (question(generator, hops) for _ in range(20_000))}
    rows = iter(questions.values())
    share = min(1.0, len(questions) / (2 * ROWS["few"] + ROWS["validation"] + ROWS["test"]))
    found = {name: list(itertools.islice(rows, int(share * count))) for name, count in ROWS.items()}
    for row in generator.sample(found["few"], round(WRONG * len(found["few"]))):
        row["completion"] = " ".join(generator.sample(THINGS, len(THINGS)))
    return found


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = [END, UNKNOWN, ASK, NOTHING, *SWAPS, *THINGS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN, model_max_length=64
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int, rows: int, seed: int) -> tuple[LlamaForCausalLM, float]:
    """The model, and the mean loss of its last hundred steps."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    generator = random.Random(seed)
    started, losses = time.perf_counter(), []
    for step in range(steps):
        batch = [question(generator, generator.choice(KNOWN_HOPS)) for _ in range(rows)]
        texts = [f"{row['prompt']}{row['completion']}{END}" for row in batch]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : OPERATIONS + 1] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return model, sum(losses[-100:]) / len(losses[-100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch-size", type=int, default=64, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; remove it, or choose another folder")

    tokenizer = word_tokenizer()
    model, loss = pretrain(tokenizer, args.steps, args.batch_size, args.seed)
    record = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": loss,
        "versions": versions(),
        "commit": commit(),
    }
    with new_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for hops in HOPS:
            for name, rows in splits(args.seed, hops).items():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / f"hops-{hops}-{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / "pretraining.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
