"""Echo-LoRA: train LoRA and DoRA adapters with an echo of deep hidden states; deploy plain adapters.

The public names below are resolved on first use, so that `echo_lora.cli` can answer `--help` without
importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "attach_echo": "method.attach",
    "EchoConfig": "method.config",
    "EchoError": "errors",
    "EchoModel": "method.model",
    "get_echo_model": "method.model",
    "EchoOutput": "method.step",
    "EchoTrainer": "training.trainer",
    "EchoSFTTrainer": "training.sft",
    "EchoCallback": "training.callback",
    "save_verified": "adapter.export",
    "separate_echo": "training.optimizer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'echo_lora' has no attribute {name!r}")
    return getattr(import_module(f"echo_lora.{_HOME[name]}"), name)
