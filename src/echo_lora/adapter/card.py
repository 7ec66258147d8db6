"""The model card of a trained adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_lora.method import losses
from echo_lora.method.config import EchoConfig

METHODS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}

CARD_METRICS = (
    *("loss", "eval_loss", *losses.SHOWN),
    *("mean_token_accuracy", "echo_norm", "gate_mean"),
)


def model_card(run: Mapping[str, Any], echo_config: EchoConfig | None) -> str:
    """README.md of an adapter: how it was trained and how to load it. run: the fields of `run.json`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("echo_lora"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.j2").render(
        **run,
        echo_config=None if echo_config is None else echo_config.to_dict(),
        method=METHODS.get(run["recipe"]["method"], run["recipe"]["method"]),
        packaged=run["recipe"]["model"].startswith("packaged:"),
        of_hub=not run["recipe"]["model"].startswith("packaged:") and not Path(run["recipe"]["model"]).is_absolute(),
        shown=CARD_METRICS,
    )
