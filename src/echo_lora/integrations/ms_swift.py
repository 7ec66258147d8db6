"""ms-swift's external plug-in: a tuner that makes ms-swift's own LoRA adapter and attaches the echo to it.

    swift sft --external_plugins plugin.py --tuner_type echo_lora --optimizer echo_lora ...

where plugin.py is the line `import echo_lora.integrations.ms_swift`. ms-swift takes no arguments for a plug-in, so the
fields of EchoConfig come from the environment variable ECHO_LORA_CONFIG: JSON, or the name of a JSON file. The LoRA
arguments are ms-swift's, and what it saves is a plain adapter.

The optimizer gives the echo its learning rate and adds EchoCallback. Without it a model with the echo refuses to train.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from swift.optimizers import OptimizerCallback, optimizers_map
from swift.pipelines.train.tuner import prepare_adapter
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn
from torch.utils.hooks import RemovableHandle

from echo_lora.errors import EchoConfigError
from echo_lora.method.attach import attach_echo
from echo_lora.method.config import EchoConfig
from echo_lora.method.model import EchoModel
from echo_lora.training.callback import EchoCallback
from echo_lora.training.optimizer import separate_echo
from echo_lora.training.support import refuse_arguments

NAME = "echo_lora"
VARIABLE = "ECHO_LORA_CONFIG"

# Arguments that must be off, with the reason.
_OWN_LOSS = "the echo's step computes its own losses"
REFUSED = {
    **dict.fromkeys(("enable_dft_loss", "enable_channel_loss", "loss_type", "predict_with_generate"), _OWN_LOSS),
    "use_logits_to_keep": "the step asks for the logits that it needs",
    "use_flash_ckpt": "its checkpoints would lack the echo",
}

_waiting: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()  # models that no EchoOptimizer has seen


def echo_config() -> EchoConfig:
    """The configuration of the environment variable. Raises EchoConfigError, which names the variable."""
    text = os.environ.get(VARIABLE, "{}")
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise EchoConfigError(f"{VARIABLE}={text} is neither JSON nor a file. Set it to one of them, or unset it.")
        text = path.read_text(encoding="utf-8")
    try:
        return EchoConfig.from_json(text)
    except EchoConfigError as error:
        raise EchoConfigError(f"{VARIABLE}: {error}") from error


class EchoTuner(PeftTuner):
    """`--tuner_type echo_lora`. Checkpoints are saved and loaded as PeftTuner does."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """The adapter of `--tuner_type lora` with these arguments, with the echo."""
        if args.tuner_backend != "peft" or args.init_weights == "lora-ga":
            raise EchoConfigError(
                f"--tuner_backend {args.tuner_backend} with --init_weights {args.init_weights} can't be combined with "
                "the echo. Use --tuner_backend peft, and another initialisation than lora-ga."
            )
        plain = copy.copy(args)
        plain.tuner_type = "lora"
        return _with_echo(prepare_adapter(plain, model))

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
        """A saved adapter: with the echo where it is trained further, plain for inference."""
        loaded = PeftModel.from_pretrained(model, model_id, **kwargs)
        return _with_echo(loaded) if kwargs.get("is_trainable") else loaded


class EchoOptimizer(OptimizerCallback):
    """`--optimizer echo_lora`: Trainer's optimizer, with the echo networks at their own learning rate."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        refuse_training(args, trainer.template)
        args.use_logits_to_keep = False  # otherwise ms-swift decides
        given = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and given.get("use_reentrant") is None:
            # ms-swift would set True, under which layers are recomputed without their echo
            args.gradient_checkpointing_kwargs = {**given, "use_reentrant": False}

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        echo = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not isinstance(echo, EchoModel):
            raise EchoConfigError(f"--optimizer {NAME} needs a model with the echo. Pass --tuner_type {NAME} too.")
        separate_echo(optimizer, echo)
        if (handle := _waiting.pop(echo, None)) is not None:
            handle.remove()
            self.trainer.add_callback(_Callback())
        return optimizer


class _Callback(EchoCallback):
    """EchoCallback; ms-swift resumes into a new output folder."""

    def resumed_from(self, args: Any, state: Any) -> Path:
        return Path(args.resume_from_checkpoint)


def refuse_training(args: Any, template: Any) -> None:
    """Raises EchoConfigError, which names the argument, for what can't be combined with the echo.

    args: ms-swift's training arguments. template: ms-swift's, which packs and scales.
    """
    refuse_arguments(args)
    for name, reason in REFUSED.items():
        if value := getattr(args, name, None):
            raise EchoConfigError(f"--{name} {value} can't be combined with the echo: {reason}. Leave it out.")
    for name in ("packing", "padding_free"):
        if getattr(template, name, False):
            raise EchoConfigError(f"--{name} true can't be combined with the echo: each row needs its own boundary.")
    if (size := getattr(template, "sequence_parallel_size", 1)) > 1:
        raise EchoConfigError(
            f"--sequence_parallel_size {size} can't be combined with the echo, which needs whole rows."
        )
    if not getattr(template.loss_scale, "is_binary", True):
        raise EchoConfigError(
            "--loss_scale with weights other than 0 and 1 can't be combined with the echo. Leave it out."
        )


def _with_echo(model: PeftModel) -> EchoModel:
    echo = attach_echo(model, echo_config())
    _waiting[echo] = echo.register_forward_pre_hook(_refuse_other_optimizer)
    return echo


def _refuse_other_optimizer(model: nn.Module, args: tuple[Any, ...]) -> None:
    if model.training:
        raise EchoConfigError(
            f"--tuner_type {NAME} needs --optimizer {NAME}, which gives the echo its learning rate and each step its "
            "number. Pass both."
        )


tuners_map[NAME] = EchoTuner
optimizers_map[NAME] = EchoOptimizer
