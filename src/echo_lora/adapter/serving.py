"""Which programs take an adapter as it is, and which need it merged: one table, for `echo-lora doctor` and the docs.

The columns PEFT, transformers and merged are tested. Those of the servers were read in the source of the release that
`SERVERS` names; they need a GPU and were not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftType
from torch import Tensor

from echo_lora.method.variants import changes_base

SERVERS = {"vLLM": "0.33", "SGLang": "0.5.23"}

READERS = ("PEFT", "transformers", *SERVERS, "merged")

# "no": not supported. "wrong": it loads, and computes something else than PEFT does.
Answer = Literal["yes", "no", "wrong"]

# The values that vLLM's --max-lora-rank can have.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

HOW = {
    "PEFT": "peft.PeftModel.from_pretrained",
    "transformers": "model.load_adapter",
    "vLLM": "--enable-lora --lora-modules NAME=FOLDER --max-lora-rank {rank}",
    "SGLang": "--enable-lora --lora-paths NAME=FOLDER",
    "merged": "`echo-lora merge`, then every program that reads a model folder of transformers",
}


@dataclass(frozen=True)
class Trait:
    """Something an adapter can have, and the programs that don't take it; all others of `READERS` do."""

    name: str  # for people, with the names of LoraConfig
    is_in: Callable[[Mapping[str, Any], Mapping[str, Tensor]], bool]  # given the configuration and the tensors
    refused: Mapping[str, Answer]

    def answer(self, reader: str) -> Answer:
        return self.refused.get(reader, "yes")


def _is_set(key: str) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], bool]:
    return lambda config, tensors: bool(config.get(key))


def _has_whole_embeddings(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    return any("lora_embedding_" in name or name.endswith(".base_layer.weight") for name in tensors)


TRAITS = (
    Trait("`use_rslora`", _is_set("use_rslora"), {"SGLang": "wrong"}),
    Trait("`use_dora`", _is_set("use_dora"), {"transformers": "wrong", "vLLM": "no", "SGLang": "no"}),
    Trait("`rank_pattern`", _is_set("rank_pattern"), {"SGLang": "wrong"}),
    Trait("`alpha_pattern`", _is_set("alpha_pattern"), {"SGLang": "wrong"}),
    Trait("`modules_to_save`", _is_set("modules_to_save"), {"vLLM": "no", "SGLang": "no"}),
    Trait("`trainable_token_indices`", _is_set("trainable_token_indices"), {"vLLM": "no", "SGLang": "no"}),
    Trait("embeddings or output layer in `target_modules`", _has_whole_embeddings, {"vLLM": "no", "SGLang": "no"}),
    Trait("`target_parameters`", _is_set("target_parameters"), {"vLLM": "no", "SGLang": "no"}),
    Trait("`lora_bias` (base without biases)", _is_set("lora_bias"), {"vLLM": "no", "SGLang": "no", "merged": "no"}),
    Trait("`bias`, other than `none`", lambda c, t: c.get("bias", "none") != "none", {"vLLM": "no", "SGLang": "no"}),
    Trait(
        "an initialisation that changes the base (PiSSA, OLoRA, KaSA)",
        lambda config, tensors: changes_base(config) is not None,
        {"vLLM": "no", "SGLang": "wrong"},
    ),
    Trait("`layer_replication`", _is_set("layer_replication"), {"vLLM": "no", "SGLang": "no", "merged": "no"}),
    Trait(
        "`alora_invocation_tokens`",
        _is_set("alora_invocation_tokens"),
        {"transformers": "wrong", "vLLM": "no", "SGLang": "wrong", "merged": "no"},
    ),
    Trait(
        "another method of PEFT (IA³, LoHa)",
        lambda config, tensors: config["peft_type"] != PeftType.LORA,
        {"vLLM": "no", "SGLang": "no"},
    ),
)


def who_takes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """What can load an adapter, with how, and what can't, with why: lines for a terminal."""
    found = [trait for trait in TRAITS if trait.is_in(config, tensors)]
    is_lora = config["peft_type"] == PeftType.LORA
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()]) if is_lora else 1
    allowed = next((value for value in VLLM_RANKS if value >= rank), None)
    takes, refuses = [], []
    for reader in READERS:
        reasons = {trait.name: trait.answer(reader) for trait in found if trait.answer(reader) != "yes"}
        name = f"{reader} {SERVERS[reader]}" if reader in SERVERS else reader
        if reader == "vLLM" and allowed is None:
            reasons[f"rank {rank}, of at most {VLLM_RANKS[-1]}"] = "no"
        if not reasons:
            takes.append(f"{name}: {HOW[reader].format(rank=allowed)}")
        else:
            what = "does not support it" if "no" in reasons.values() else "loads it but computes something else"
            if reader == "merged":
                what = "it can't be merged"
            refuses.append(f"{name}: {what} ({', '.join(reasons)})".replace("`", ""))
    if refuses and takes[-1].startswith("merged"):
        refuses.append("Merge it for these.")
    return takes, refuses


def serving_table() -> list[list[str]]:
    """The rows of the table in docs/serving.md, the first with the names of the columns."""
    header = ["an adapter with", *(f"{reader} {SERVERS.get(reader, '')}".strip() for reader in READERS)]
    rows = [[trait.name, *(_shown(trait.answer(reader)) for reader in READERS)] for trait in TRAITS]
    return [header, ["none of the following", *("yes" for _ in READERS)], *rows]


def _shown(answer: Answer) -> str:
    return "**wrong**" if answer == "wrong" else answer
