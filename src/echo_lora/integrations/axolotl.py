"""Axolotl's plug-in: LoRA and QLoRA runs of Axolotl train with the echo, and write the adapter they always write.

    plugins: [echo_lora.integrations.axolotl.EchoPlugin]
    adapter: lora
    echo:
      target_layers: [4, 5, 6, 7]

`echo` takes the fields of EchoConfig. The adapter is Axolotl's own, and its trainer attaches the echo (`attach_echo`).
Only settings are read here: Axolotl prints an ImportError of a plug-in and trains on without it, so everything that
could raise one is imported later.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from echo_lora.errors import EchoConfigError
from echo_lora.method.config import EchoConfig

logger = logging.getLogger(__name__)

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")

# Settings that must be off, with the reason.
_BOUNDARY = "each row needs its own boundary between prompt and answer"
_OWN_LOSS = "the echo's step computes its own losses"
_RECOMPUTED = "layers would be recomputed without their echo"
REFUSED = {
    **dict.fromkeys(("sample_packing", "eval_sample_packing", "batch_flattening", "pretraining_dataset"), _BOUNDARY),
    "train_on_inputs": "with prompts among the labels no token says where the answer begins",
    **dict.fromkeys(KERNELS, "fused kernels read the adapter's weights without running its modules"),
    **dict.fromkeys(("rl", "reward_model", "process_reward_model"), "the echo is for supervised fine-tuning"),
    **dict.fromkeys(("use_eaft", "liger_fused_linear_cross_entropy", "cut_cross_entropy"), _OWN_LOSS),
    "relora": "it merges the adapter and starts it again, while the echo would go on from the old one",
    "lisa_n_layers": "it freezes layers at random, also those that the echo enters",
    "activation_offloading": _RECOMPUTED,
    "trainer_cls": "the plug-in brings a trainer class of its own",
}


class EchoArgs(BaseModel):
    """The plug-in's part of Axolotl's configuration, which this class is mixed into.

    echo: fields of EchoConfig.
    """

    echo: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_echo(self) -> EchoArgs:
        """Raises EchoConfigError, which pydantic reports, for a setting that can't be combined with the echo."""
        EchoConfig.from_dict(self.echo or {})
        refuse_settings(self)
        return self


@dataclass
class EchoTrainingArguments:
    """Mixed into Axolotl's training arguments. echo: fields of EchoConfig; None without the plug-in."""

    echo: dict[str, Any] | None = field(default=None, metadata={"help": "fields of EchoConfig"})


def refuse_settings(cfg: Any) -> None:
    """Raises EchoConfigError, which names the setting of the YAML file, the reason and the remedy."""

    def value(name: str) -> Any:
        return getattr(cfg, name, None)

    if value("adapter") not in ("lora", "qlora"):
        raise EchoConfigError(f"adapter: {value('adapter')} can't carry the echo. Set adapter: lora, or qlora.")
    for name, reason in REFUSED.items():
        if value(name):
            raise EchoConfigError(f"{name}: {value(name)} can't be combined with the echo: {reason}. Leave it out.")
    for name in ("context_parallel_size", "tensor_parallel_size"):
        if (value(name) or 1) > 1:
            raise EchoConfigError(
                f"{name}: {value(name)} can't be combined with the echo, which needs whole rows and modules. Set it to "
                "1."
            )
    if isinstance(value("gradient_checkpointing"), str):
        raise EchoConfigError(
            f"gradient_checkpointing: {value('gradient_checkpointing')} can't be combined with the echo: "
            f"{_RECOMPUTED}. Set it to true."
        )


class EchoPlugin(BasePlugin):
    """See the module's docstring. Every hook does nothing in a configuration that does not list the plug-in."""

    def register(self, cfg: Any) -> None:
        """Set what Axolotl would turn on by itself: LoRA kernels, and reentrant checkpointing."""
        if not _is_listed(cfg):
            return
        if off := [name for name in KERNELS if cfg.get(name) is None]:
            logger.info("LoRA kernels bypass the modules that the echo enters: %s set to false.", ", ".join(off))
            cfg.update(dict.fromkeys(off, False))
        if cfg.get("gradient_checkpointing") is True and not cfg.get("gradient_checkpointing_kwargs"):
            cfg["gradient_checkpointing_kwargs"] = {"use_reentrant": False}

    def get_input_args(self) -> str:
        return f"{__name__}.{EchoArgs.__name__}"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.{EchoTrainingArguments.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        return {"echo": dict(cfg.get("echo") or {})} if _is_listed(cfg) else None

    def get_trainer_cls(self, cfg: Any) -> Any:
        if not _is_listed(cfg):
            return None
        from echo_lora.integrations.axolotl_trainer import EchoAxolotlTrainer

        return EchoAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raises EchoConfigError if another plug-in's trainer is used: Axolotl takes the first that it is offered."""
        from echo_lora.integrations.axolotl_trainer import EchoAxolotlTrainer

        if _is_listed(cfg) and not isinstance(trainer, EchoAxolotlTrainer):
            raise EchoConfigError(
                f"the trainer is {type(trainer).__name__}, from another plug-in, so there would be no echo. List one "
                "of the two plug-ins only."
            )


def _is_listed(cfg: Any) -> bool:
    """Whether this configuration lists the plug-in; Axolotl also calls those of earlier ones in the process."""
    return f"{__name__}.{EchoPlugin.__name__}" in (cfg.get("plugins") or [])
