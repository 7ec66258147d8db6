"""Pretrain a language model of two million parameters from scratch, for studies with many seeds.

    python scripts/pretrain_small.py --output runs/small-lm

Its text comes from packages alone: questions and answers of 13 reasoning-gym tasks in a chat format, and nine tenths
of the story that reasoning-gym ships. The last tenth is written to `general.txt`, as held-out general text. The tasks
that the studies fine-tune on are not among the 13. The same seed on the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from reasoning_gym import create_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from echo_lora.environment import commit, versions
from echo_lora.files import new_folder

# Task: its share of the rows, and parameters that keep numbers small and answers short.
TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "aiw": (1, {}),
    "base_conversion": (1, {"max_value": 64, "max_base": 8}),
    "basic_arithmetic": (8, {"max_terms": 3, "max_digits": 2, "operators": ["+", "-"], "allow_parentheses": False}),
    "count_bits": (1, {"max_n": 255}),
    "family_relationships": (1, {}),
    "gcd": (1, {"max_value": 60}),
    "isomorphic_strings": (1, {}),
    "lcm": (1, {"max_value": 20}),
    "number_filtering": (3, {"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 99}),
    "number_sequence": (2, {}),
    "sentence_reordering": (3, {"max_words_in_sentence": 8}),
    "simple_equations": (2, {"max_terms": 2, "max_value": 20}),
    "syllogism": (1, {}),
}
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LENGTH, WIDTH, LAYERS, VOCABULARY = 256, 128, 8, 1024
LONGEST = 900  # characters of a question; longer ones are left out


def story() -> tuple[str, str]:
    """The text to train on, and the tenth that is held out."""
    text = (files("reasoning_gym") / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    cut = text.rindex("\n\n", 0, len(text) * 9 // 10)
    return text[:cut], text[cut:]


def documents(rows: int, seed: int) -> list[str]:
    """`rows` questions with answers, task by task in proportion to the weights above, shuffled."""
    share = rows / sum(weight for weight, _ in TASKS.values())
    texts = []
    for name, (weight, parameters) in TASKS.items():
        data = create_dataset(name, size=round(weight * share), seed=seed, **parameters)
        for item in data:
            if len(item["question"]) <= LONGEST:
                texts.append(f"{USER}{item['question']}{ASSISTANT}{item['answer']}{END}")
    random.Random(seed).shuffle(texts)
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=1024)
    fast.chat_template = CHAT
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=120_000, help="questions to train on")
    parser.add_argument("--steps", type=int, default=3_500)
    parser.add_argument("--batch-size", type=int, default=8, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; remove it, or choose another folder")

    started = time.perf_counter()
    text, held_out = story()
    texts = documents(args.rows, args.seed)
    tokenizer = train_tokenizer([text, *texts[:20_000]])
    ids = [tokenizer.encode(one) for one in texts]
    paragraphs = [tokenizer.encode(one + END) for one in text.split("\n\n")]
    for copy in range(8):  # the story is short: several times among the questions
        ids += random.Random(copy).sample(paragraphs, len(paragraphs))
    random.Random(args.seed).shuffle(ids)
    stream = torch.tensor([token for document in ids for token in document])
    sequences = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)  # (sequences, LENGTH)
    print(f"{len(texts):,} questions, {len(stream):,} tokens, {time.perf_counter() - started:.0f} s", flush=True)

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(100, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (warmup + 1), 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps))),
    )
    order = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    place = torch.empty(0, dtype=torch.long)
    for step in range(args.steps):
        if len(place) < args.batch_size:
            place = torch.randperm(len(sequences), generator=order)
        rows, place = place[: args.batch_size], place[args.batch_size :]
        loss = model(input_ids=sequences[rows], labels=sequences[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{args.steps}  loss {recent:.3f}  {time.perf_counter() - started:.0f} s", flush=True)

    record = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.steps * args.batch_size * LENGTH,
        "final_loss": sum(losses[-100:]) / len(losses[-100:]),
        "seconds": round(time.perf_counter() - started),
        "versions": versions(),
        "commit": commit(),
    }
    with new_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "general.txt").write_text(held_out, encoding="utf-8")
        (folder / "pretraining.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
