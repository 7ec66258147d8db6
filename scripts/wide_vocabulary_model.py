"""A small random Llama with a vocabulary of 128,000, whose step's memory is that of its logits, and little else.

    python scripts/wide_vocabulary_model.py runs/wide
    echo-lora bench tiny --shape 64x192 --set model=runs/wide --output runs/wide-bench

The tokenizer is the packaged model's; it knows fewer tokens, and rows of random ids use all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echo_lora.files import new_folder
from echo_lora.models import load_tokenizer
from echo_lora.packaged import PACKAGED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the model; must not exist")
    output = parser.parse_args().output

    tokenizer = load_tokenizer(PACKAGED)
    config = LlamaConfig(
        vocab_size=128_000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with new_folder(output) as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"Written to {output}")


if __name__ == "__main__":
    main()
