"""Axolotl's trainer with the echo. Apart from its module so that reading a configuration needs no trainer."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers import AxolotlTrainer

from echo_lora.method.attach import attach_echo
from echo_lora.method.config import EchoConfig
from echo_lora.training.trainer import EchoTrainerMixin


class EchoAxolotlTrainer(EchoTrainerMixin, AxolotlTrainer):
    """AxolotlTrainer, for Axolotl's own PEFT model, to which it attaches the echo of `args.echo`."""

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model=attach_echo(model, EchoConfig.from_dict(args.echo)), args=args, **kwargs)
