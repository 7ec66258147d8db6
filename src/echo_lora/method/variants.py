"""LoRA variants such as PiSSA, for which PEFT changes the base's weights when it creates the adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

logger = logging.getLogger(__name__)

SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")  # initialisations that subtract the initial s·B A from the base


def changes_base(config: PeftConfig | Mapping[str, Any]) -> str | None:
    """The setting that makes this adapter change the base's weights when it is created; None if there is none."""
    values = config if isinstance(config, Mapping) else vars(config)
    initialisation = values.get("init_lora_weights")
    if str(initialisation).lower().startswith((*SUBTRACTED, "loftq")):
        return f"init_lora_weights={initialisation!r}"
    return "kasa_config" if values.get("kasa_config") else None


def warn_of_changed_base(config: PeftConfig) -> None:
    """Tell people who save the adapter themselves what fits the base that they have."""
    if (what := changes_base(config)) is not None:
        logger.warning(
            "%s changed the base's weights, so checkpoints only fit the changed base. Save the adapter with "
            "save_verified, which checks it on the original one, and with as_lora=True converts it to a plain LoRA.",
            what,
        )


def as_drawn(model: PeftModel, adapter_name: str) -> dict[str, Tensor] | None:
    """The initial tensors of an adapter whose initialisation subtracts them from the base's weights; otherwise None."""
    if not str(model.peft_config[adapter_name].init_lora_weights).lower().startswith(SUBTRACTED):
        return None
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if any(tensor.is_meta for tensor in state.values()):  # a dry run
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
