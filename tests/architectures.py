"""Tiny random models of real architectures, by the name that test ids show."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from echo_lora import EchoConfig, EchoModel, get_echo_model
from echo_lora.method.alignment import AlignedRows, align_rows

VOCAB = 61
LAYERS = 4
WIDTH = 32

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALL_LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]

# name: (config class, arguments, LoRA target modules)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE, _ALL_LINEAR),
    # windows shorter than the rows, so that a cache which drops old tokens would be found out
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 5}, _ALL_LINEAR),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE, _ALL_LINEAR),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 8}, _ALL_LINEAR),
    "gemma": ("GemmaConfig", _LLAMA_LIKE | {"head_dim": 8}, _ALL_LINEAR),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5}, _ALL_LINEAR),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5}, _ALL_LINEAR),
    "phi3": ("Phi3Config", _LLAMA_LIKE, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE, _ALL_LINEAR),
    "smollm3": ("SmolLM3Config", _LLAMA_LIKE, _ALL_LINEAR),
    "granite": ("GraniteConfig", _LLAMA_LIKE | {"logits_scaling": 2.0}, _ALL_LINEAR),
    "mixtral": ("MixtralConfig", _LLAMA_LIKE | {"num_local_experts": 4}, ["q_proj", "v_proj", "o_proj"]),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        ["c_attn", "c_fc", "c_proj"],
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"},
        ["query_key_value", "dense_h_to_4h"],
    ),
    # flattens its rows to (B*T, d) in the feed-forward part
    "opt": (
        "OPTConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS}
        | {"num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH}
        | {"dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0},
        ["q_proj", "v_proj", "fc1", "fc2"],
    ),
}


def tiny_base(name: str = "llama", *, seed: int = 0, attention: str | None = None) -> Any:
    """A random model in float32; weights larger than by default, so that attention and gates matter."""
    config_class, arguments, _ = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**arguments)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def lora_config(name: str = "llama", *, method: str = "lora", **kwargs: Any) -> LoraConfig:
    arguments: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ARCHITECTURES[name][2],
        "task_type": "CAUSAL_LM",
        "use_dora": method == "dora",
        "use_rslora": method == "rslora",
        "fan_in_fan_out": name == "gpt2",
    }
    return LoraConfig(**arguments | kwargs)


def tiny_echo_model(
    name: str = "llama",
    *,
    method: str = "lora",
    attention: str | None = None,
    started: bool = True,
    **config: Any,
) -> EchoModel:
    """An EchoModel in training mode, always routed; `started` gives every parameter an effect."""
    defaults = {
        "source_layers": [1, 2],
        "target_layers": [0, 1],
        "routing_schedule": "constant",
        "bottleneck": 8,
    }
    echo_config = EchoConfig(**defaults | {"scale_init": 1.0} | config)
    torch.manual_seed(1)
    peft_config = lora_config(name, method=method, init_lora_weights=not started)
    model = get_echo_model(tiny_base(name, attention=attention), peft_config, echo_config)
    if started:
        for branch in model.echo.branches.values():
            nn.init.normal_(branch.W2.weight, std=0.1)
            nn.init.normal_(branch.U2.weight, std=0.1)
    model.train()
    model.why_full(torch.device("cpu"))  # tried before the first step: no pass that tests count
    model._abilities._tried_on_batch = True
    return model


Row = tuple[list[int], list[int]]


def random_row(generator: torch.Generator, prompt: int, answer: int, *, gap: tuple[int, int] | None = None) -> Row:
    """(token ids, labels) with `prompt` unsupervised tokens first; gap = (at, length) unsupervised in the answer."""
    ids = torch.randint(3, VOCAB, (prompt + answer,), generator=generator).tolist()
    labels = [-100] * prompt + ids[prompt:]
    if gap is not None:
        at, length = gap
        for t in range(prompt + at, min(prompt + at + length, len(ids))):
            labels[t] = -100
    return ids, labels


def collate(rows: list[Row], side: str = "right", *, train_on_prompt: bool = False) -> dict[str, torch.Tensor]:
    """Pad rows on one side, as a data collator does; side "both" gives padding on either, "packed" joins the rows.

    train_on_prompt: labels of all tokens, and a completion_mask with 1 where the rows have a label.
    """
    if side == "packed":
        return _joined(rows, train_on_prompt)
    width = max(len(ids) for ids, _ in rows) + (2 if side == "both" else 0)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        missing = width - len(ids)
        left = {"right": 0, "left": missing, "both": min(1, missing)}[side]
        right = missing - left
        batch["input_ids"].append([0] * left + ids + [0] * right)
        batch["attention_mask"].append([0] * left + [1] * len(ids) + [0] * right)
        batch["labels"].append([-100] * left + labels + [-100] * right)
    if train_on_prompt:
        batch["completion_mask"] = [[int(label != -100) for label in labels] for labels in batch["labels"]]
        batch["labels"] = [
            [token if inside else -100 for token, inside in zip(ids, mask, strict=True)]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    return {key: torch.tensor(value) for key, value in batch.items()}


def _joined(rows: list[Row], train_on_prompt: bool) -> dict[str, Any]:
    """What TRL's collator makes of the rows if it joins them, with padding at the end."""
    collate = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=8)
    batch = collate([{"input_ids": ids, "labels": ids if train_on_prompt else labels} for ids, labels in rows])
    if train_on_prompt:
        is_answer = [int(label != -100) for _, labels in rows for label in labels]
        is_answer += [0] * (batch["input_ids"].shape[1] - len(is_answer))
        batch["completion_mask"] = torch.tensor([is_answer])
    return batch


def one_row() -> AlignedRows:
    """A prompt of one token and an answer of two."""
    return align_rows(torch.tensor([[3, 4, 5]]), None, torch.tensor([[-100, 4, 5]]))
