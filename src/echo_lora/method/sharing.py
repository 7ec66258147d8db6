"""Whether the echo-on pass can run on the answer columns only, judged by the model's configuration (equation 6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from echo_lora.method.prefix import cache_argument

ROPE_OF_FIXED_ANGLES = ("default", "linear", "llama3", "yarn", "proportional", "mrope")


def angles_depend_on_length(config: Any) -> bool:
    """Whether rotary angles depend on the largest position in the batch, as with dynamic NTK or LongRoPE."""

    def kinds(parameters: Any) -> Iterator[str | None]:
        if isinstance(parameters, dict):
            yield parameters.get("rope_type", parameters.get("type"))
            for of_layer_type in parameters.values():
                yield from kinds(of_layer_type)

    text = config.get_text_config()
    found = {kind for name in ("rope_parameters", "rope_scaling") for kind in kinds(getattr(text, name, None))}
    return not found <= {None, *ROPE_OF_FIXED_ANGLES}


def why_full(base_model: PreTrainedModel) -> str | None:
    """Why the echo-on pass can't share the prefix of the echo-off pass exactly; None if it can."""
    config = base_model.config.get_text_config()
    if getattr(base_model, "_is_stateful", False):
        return f"{type(base_model).__name__} has a recurrent state"
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"the model has layers of type {', '.join(sorted(others))}"
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or []):
        return "some layers reuse the keys and values of others"
    if cache_argument(base_model.forward) is None:
        return f"{type(base_model).__name__} takes no key-value cache"
    return None
