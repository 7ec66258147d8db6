"""What leaves training: a plain PEFT adapter, proved by reading it back.

`save_verified` writes to a temporary name, loads the result with PEFT's own loader beside the trained adapter,
compares keys, values and logits, and only then gives the folder its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from echo_lora.config import EchoConfig, first_problem
from echo_lora.errors import EchoCheckpointError
from echo_lora.files import new_folder
from echo_lora.schema import LARGEST_RANK

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
LARGEST_CONFIG = 10_000_000  # bytes
# What a tokenizer may leave in a folder: an earlier one must not stay beside the files of another.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
METHODS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
CARD_METRICS = (
    *("loss", "eval_loss", "ce_off", "ce_on", "distillation", "ce_prompt", "mean_token_accuracy"),
    *("echo_norm", "gate_mean"),
)
_PROOF = "echo-proof"  # name of the second adapter during the proof
PROBE_TOKENS = 16


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, gathered if each process holds a part of it: then all have to ask, in the same order."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def adapter_tensors(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors, whole, by the names that PEFT saves them under."""
    return {name: whole(t) for name, t in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}


def adapter_hash(model: PeftModel, adapter_name: str = "default") -> str:
    """SHA-256 of the adapter's names, dtypes and bytes: equal exactly if two adapters are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model, adapter_name).items()):
        data = tensor.contiguous()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)}".encode())
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.dim() else str(data.item()).encode())
    return digest.hexdigest()


def model_card(run: Mapping[str, Any], echo_config: EchoConfig | None) -> str:
    """README.md of an adapter: how it was made, and that nothing of the echo is needed to use it.

    run: the fields of `run.json`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("echo_lora"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.j2").render(
        **run,
        echo_config=None if echo_config is None else echo_config.to_dict(),
        method=METHODS[run["recipe"]["method"]],
        packaged=run["recipe"]["model"].startswith("packaged:"),
        of_hub=not run["recipe"]["model"].startswith("packaged:") and not Path(run["recipe"]["model"]).is_absolute(),
        shown=CARD_METRICS,
    )


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder. Raises EchoCheckpointError if the file is missing or corrupted."""
    path = Path(folder) / ADAPTER_FILE
    if not os.path.isfile(path):
        raise EchoCheckpointError(f"{path} is missing. Name the folder that holds adapter_config.json beside it.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EchoCheckpointError(
            f"{path} can't be read: {error}. The file is corrupted or cut off; restore it or save the adapter again."
        ) from error


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises EchoCheckpointError if it is missing, not an adapter's, or says of a LoRA adapter what none can have.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        if not os.path.isfile(path):
            raise OSError("there is no such file")
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise OSError(f"it has {os.path.getsize(path):,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EchoCheckpointError(f"{path} can't be read: {error}. Name the folder of a PEFT adapter.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise EchoCheckpointError(f"{path} is not the configuration of a PEFT adapter. Name another folder.")
    kind = config["peft_type"]
    if not isinstance(kind, str) or kind not in PeftType.__members__:
        raise EchoCheckpointError(
            f"{path}: peft_type = {kind!r} is unknown to the installed PEFT. Correct it, or install a newer PEFT."
        )
    if kind == PeftType.LORA:
        try:
            _LoraFile.model_validate(config)
        except ValidationError as error:
            raise EchoCheckpointError(
                f"{path}: {first_problem(error)}. Restore the file that was saved with the weights."
            ) from error
    return config


class _LoraFile(BaseModel):
    """What an adapter_config.json says of the weights beside it, and what PEFT does not check when it reads it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    r: int = Field(ge=1, le=LARGEST_RANK)
    lora_alpha: float
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    task_type: Literal[tuple(TaskType.__members__)] | None = None  # type: ignore[valid-type]
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=LARGEST_RANK)]] | None = None
    alpha_pattern: dict[str, float] | None = None


def adapter_problems(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Why the tensors of an adapter file are not those of its configuration, or not to be used."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            yield f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
        elif not tensor.isfinite().all():
            yield f"{name} holds values that are not finite"
    foreign = sorted(name for name in tensors if not name.startswith("base_model.model."))
    if foreign:
        yield f"{foreign[0]} is not a key of PEFT ({len(foreign)} such keys)"
    if config["peft_type"] != PeftType.LORA:
        if any(".lora_A." in name for name in tensors):
            yield f"the weights are those of LoRA, but peft_type = {config['peft_type']}"
        return
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    if not modules:
        yield "it has no weights of LoRA"
    if config["lora_alpha"] == 0:
        yield "lora_alpha = 0: the adapter changes nothing"
    for module in sorted(modules):
        yield from _module_problems(config, tensors, module)


def _module_problems(config: Mapping[str, Any], tensors: Mapping[str, Tensor], module: str) -> Iterator[str]:
    own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.lora_")}
    named = module.removeprefix("base_model.model.")
    try:
        ranks = [rank for name, rank in (config.get("rank_pattern") or {}).items() if _is_named(named, name)]
        targets = config.get("target_modules")
        if isinstance(targets, str) and targets != "all-linear" and not re.fullmatch(targets, named):
            yield f"{named} has weights, but target_modules = {targets!r} does not name it"
    except re.error as error:
        yield f"a pattern in {CONFIG_FILE} is no regular expression: {error}"
        return
    if isinstance(targets, list) and not any(named == name or named.endswith(f".{name}") for name in targets):
        yield f"{named} has weights, but target_modules = {targets} does not name it"
    A, B = own.get("lora_A.weight"), own.get("lora_B.weight")
    if (A is None) != (B is None):
        yield f"{named} has no {'lora_A' if A is None else 'lora_B'}"
    elif A is not None and B is not None:
        rank = (ranks or [config["r"]])[0]
        if A.dim() < 2 or B.dim() != A.dim() or (A.shape[0], B.shape[1]) != (rank, rank) or not A.numel() * B.numel():
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            yield f"{named} has lora_A and lora_B of the shapes {shapes}, which are not those of rank {rank}"
        has_magnitude = any("magnitude" in name for name in own)
        if has_magnitude != bool(config.get("use_dora")):
            has = "a magnitude" if has_magnitude else "no magnitude"
            yield f"{named} has {has} of DoRA, but use_dora = {config.get('use_dora', False)}"


def _is_named(module: str, pattern: str) -> bool:
    """Whether PEFT takes an entry of rank_pattern for this module."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter folder holds."""

    folder: Path
    method: str
    rank: int
    alpha: float
    base: str | None
    modules: list[str]  # the ends of the names of the changed modules
    layers: int  # number of changed modules
    parameters: int
    dtypes: list[str]
    files: list[str]
    has_chat_template: bool
    problems: list[str]  # why it should not be used; empty for a sound one
    readers: list[str]  # who can load it


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Look into an adapter folder without a model. Raises EchoCheckpointError if it is none, or corrupted."""
    folder = Path(folder)
    config, tensors = read_adapter_config(folder), read_adapter(folder)
    is_lora = config["peft_type"] == PeftType.LORA
    method = (
        config["peft_type"].lower()
        if not is_lora
        else "dora"
        if config.get("use_dora")
        else "rslora"
        if config.get("use_rslora")
        else "lora"
    )
    changed = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    lora_B = [tensor for name, tensor in tensors.items() if ".lora_B" in name]
    problems = list(adapter_problems(config, tensors))
    if lora_B and not any(tensor.any() for tensor in lora_B):
        problems.append("every lora_B is zero: the adapter changes nothing")
    if not problems:
        problems += _refused_by_peft(folder)
    readers = ["PEFT: peft.PeftModel.from_pretrained", "transformers: model.load_adapter"]
    if method == "dora":
        readers.append("servers without DoRA (such as vLLM): merge it first, with `echo-lora merge`")
    else:
        readers.append("servers that read PEFT's LoRA folders; any other after `echo-lora merge`")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return AdapterReport(
        folder=folder,
        method=method,
        rank=config.get("r", 0),
        alpha=config.get("lora_alpha", 0),
        base=config.get("base_model_name_or_path"),
        modules=sorted({name.rpartition(".")[2] for name in changed}),
        layers=len(changed),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        files=files,
        has_chat_template="chat_template.jinja" in files,
        problems=problems,
        readers=[] if problems else readers,
    )


def _refused_by_peft(folder: Path) -> list[str]:
    """What PEFT objects to in the configuration of a folder. It raises whatever its own code happens to raise."""
    try:
        PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        return [f"PEFT does not take {CONFIG_FILE}: {type(error).__name__}: {error}"]
    return []


def verify_adapter(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", *, trained: bool = True
) -> None:
    """Prove that the folder holds the adapter that the model has now.

    Compares the file's tensors (`compare_adapter`), then loads the folder with PEFT beside the trained adapter and
    compares the logits on a short probe. Neither the model's weights, nor its active adapter, nor any random state
    are changed. Raises EchoCheckpointError.
    """
    folder = Path(folder)
    compare_adapter(folder, adapter_tensors(model, adapter_name), trained=trained)
    with _plain_eval(model), torch.no_grad():
        probe = probe_ids(model)  # (1, 16)
        before = model(input_ids=probe).logits
        with _second_adapter(model, folder, adapter_name):
            after = model(input_ids=probe).logits
    if not torch.equal(before, after):
        raise EchoCheckpointError(
            f"{folder}: the adapter as PEFT loads it gives other logits than the trained one (largest difference "
            f"{(before - after).abs().max():.3g}). Check adapter_config.json; don't use this folder."
        )


def compare_adapter(folder: Path, expected: Mapping[str, Tensor], *, trained: bool = True) -> None:
    """Compare an adapter folder with `adapter_tensors`: same keys, same values, all finite, lora_B trained.

    Raises EchoCheckpointError.
    """
    saved = read_adapter(folder)
    missing, extra = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    if missing or extra:
        raise EchoCheckpointError(
            f"{folder / ADAPTER_FILE} does not hold the adapter's keys: missing {sorted(missing)[:3]}, unexpected "
            f"{sorted(extra)[:3]} ({len(missing)} and {len(extra)} in all). Don't use this folder; save again."
        )
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise EchoCheckpointError(
                f"{folder / ADAPTER_FILE}: {name} holds values that are not finite. Training diverged: go back to an "
                "earlier checkpoint and lower the learning rate."
            )
        if not torch.equal(tensor, expected[name].to(tensor.dtype)):
            raise EchoCheckpointError(f"{folder / ADAPTER_FILE}: {name} differs from the trained adapter. Save again.")
    lora_B = [tensor for name, tensor in saved.items() if "lora_B" in name]
    if trained and lora_B and not any(tensor.any() for tensor in lora_B):
        raise EchoCheckpointError(
            f"{folder / ADAPTER_FILE}: every lora_B is zero, so the adapter does nothing. It was never trained: check "
            "the learning rate and that the adapter's parameters require gradients."
        )


def save_verified(
    model: PeftModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    card: str | None = None,
    overwrite: bool = False,
    trained: bool = True,
) -> Path:
    """Save the active adapter (and tokenizer with chat template) as a plain PEFT folder, and prove it.

    card: text of the README.md, in place of PEFT's own.

    Nothing appears under `folder` unless the proof holds. Raises EchoCheckpointError if it does not, if the
    folder exists and is not empty (unless `overwrite`, which replaces an adapter and keeps other files), or if the
    disk refuses.
    """
    stale = (ADAPTER_FILE, CONFIG_FILE, "README.md", *TOKENIZER_FILES)
    with new_folder(folder, overwrite=overwrite, stale=stale) as temporary:
        adapter_name = model.active_adapters[0]
        model.save_pretrained(str(temporary), selected_adapters=[adapter_name])
        if adapter_name != "default":  # PEFT puts a named adapter one level down
            for path in list((temporary / adapter_name).iterdir()):
                path.rename(temporary / path.name)
            (temporary / adapter_name).rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        verify_adapter(model, temporary, adapter_name, trained=trained)
    return Path(folder)


def probe_ids(model: PeftModel) -> Tensor:
    """(1, 16) ids from the middle of the vocabulary: ordinary tokens in every tokenizer."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(PROBE_TOKENS, device=model.device) * 7 + vocabulary // 3)[None] % vocabulary


@contextmanager
def _plain_eval(model: PeftModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _second_adapter(model: PeftModel, folder: Path, adapter_name: str) -> Iterator[None]:
    """The folder, loaded by PEFT as another adapter and active inside the block."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.random.fork_rng():  # PEFT draws initial weights before it loads the file's
        model.load_adapter(str(folder), _PROOF)
    named = dict(model.named_parameters())
    for name, parameter in named.items():  # PEFT loads adapters in float32 even where the trained one is not
        if f".{_PROOF}" in name:
            parameter.data = parameter.data.to(named[name.replace(f".{_PROOF}", f".{adapter_name}")].dtype)
    try:
        model.set_adapter(_PROOF)
        yield
    finally:
        model.set_adapter(adapter_name)
        model.delete_adapter(_PROOF)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
