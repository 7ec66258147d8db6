"""Estimate memory and time of a training step of LLaMA-7B and Llama-3-8B, on one GPU and sharded over eight.

    python scripts/estimate_llama.py --overhead 1.1

Nothing of this size is run. Activations are the bytes that autograd keeps of the true shapes on the meta device, as
`echo-lora plan` counts them; time is arithmetic divided by an assumed rate. `--overhead` is the ratio of an echo step
to its floor, as `echo-lora bench` measured it on another model and machine. Prints a Markdown table.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from echo_lora import EchoConfig, get_echo_model
from echo_lora.recipe.plan import Shape, activation_bytes

SHAPES = {
    "LLaMA-7B": {"vocab_size": 32_000, "intermediate_size": 11_008},
    "Llama-3-8B": {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8},
}
ROWS, P, A = 16, 192, 16  # rows of a step and their tokens, as long commonsense questions with an answer sentence
MEAN_ROUTING = 0.6  # of the default schedule
LORA = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overhead", type=float, required=True, help="echo step over its floor, as measured")
    parser.add_argument("--tflops", type=float, default=125.0, help="assumed bfloat16 rate of one GPU, achieved")
    args = parser.parse_args()
    print(f"{ROWS} rows of {P}+{A} tokens, bfloat16 base, float32 adapter, AdamW, {args.tflops:g} TFLOP/s per GPU\n")
    print(
        "| model | GPUs | checkpointing | weights and states | activations, LoRA | Echo-LoRA | step, LoRA | Echo-LoRA |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for gpus in (1, 8):
            for is_checkpointed in (False, True):
                print(row(name, shape, gpus, is_checkpointed, args.overhead, args.tflops * 1e12))


def row(name: str, shape: dict, gpus: int, is_checkpointed: bool, overhead: float, rate: float) -> str:
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **shape)
    with torch.device("meta"):
        base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model = get_echo_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA), EchoConfig()).train()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adapter = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith("echo."))
    echo = sum(p.numel() for p in model.echo.parameters())
    rows = ROWS // gpus
    one_layer = frozen * 2 / config.num_hidden_layers if gpus > 1 else 0  # gathered while it computes
    fixed = (frozen * 2 + (adapter + echo) * 16) / gpus + one_layer
    batch = Shape(P, A, rows)
    plain, with_echo = (activation_bytes(model, batch, A, "cuda", has_echo) for has_echo in (False, True))
    assert plain is not None
    assert with_echo is not None
    passes = 6 if is_checkpointed else 4  # forward and gradient of inputs, 2 operations a weight each; and again
    seconds = passes * frozen * rows * (P + A) / rate
    floor = (P + (1 + MEAN_ROUTING) * A) / (P + A)
    cells = [fixed / 1e9, plain / 1e9, with_echo / 1e9, seconds, seconds * floor * overhead]
    units = ["GB", "GB", "GB", "s", "s"]
    return (
        f"| {name} | {gpus} | {'on' if is_checkpointed else 'off'} | "
        + " | ".join(f"{c:.2f} {u}" for c, u in zip(cells, units, strict=True))
        + " |"
    )


if __name__ == "__main__":
    main()
