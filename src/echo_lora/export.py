"""What leaves training: a plain PEFT adapter, proved by reading it back.

`save_verified` writes to a temporary name, loads the result with PEFT's own loader onto modules of its own, compares
keys, values and logits, and only then gives the folder its name. The trained model is read, never changed.

Some adapters change the base's weights when they are made (`changes_base`): they fit no other base, until PEFT makes
the same change again as it loads them. For these the proof also takes a base that nobody has changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from echo_lora.base_models import load_base_model
from echo_lora.config import EchoConfig, first_problem
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.files import new_folder
from echo_lora.inject import decoder_layers
from echo_lora.probe import evaluating
from echo_lora.schema import LARGEST_RANK
from echo_lora.variants import SUBTRACTED, changes_base

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
PROBE_TOKENS = 16

# Largest difference of logits, relative to the largest logit, where the weights' type rounds on two ways to one result.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same for a weight, by norms: a few units in its last place.
WEIGHT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


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
    if config.get("task_type") not in (None, TaskType.CAUSAL_LM, TaskType.FEATURE_EXTRACTION):
        yield f"task_type = {config['task_type']} is not that of a language model, {TaskType.CAUSAL_LM.value}"
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


def missing_modules(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What the configuration says is trained beside LoRA and has no weights: PEFT fails on a base that has it."""
    names = config.get("modules_to_save")
    for name in names if isinstance(names, list) else []:
        if not any(f".{name}." in key for key in tensors):
            yield f"modules_to_save names {name}, but there are no weights of it"
    if config.get("trainable_token_indices") and not any("trainable_tokens" in key for key in tensors):
        yield f"trainable_token_indices = {config['trainable_token_indices']}, but there are no weights of tokens"


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
        if ("lora_B.bias" in own) != bool(config.get("lora_bias")):
            has = "a bias" if "lora_B.bias" in own else "no bias"
            yield f"{named} has {has} of lora_B, but lora_bias = {config.get('lora_bias', False)}"


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
    problems = [*adapter_problems(config, tensors), *missing_modules(config, tensors)]
    if lora_B and not any(tensor.any() for tensor in lora_B):
        problems.append("every lora_B is zero: the adapter changes nothing")
    if not problems:
        problems += _refused_by_peft(folder)
    readers = ["PEFT: peft.PeftModel.from_pretrained", "transformers: model.load_adapter"]
    if changed_by := changes_base(config):
        readers = [f"PEFT, which changes the base's weights as it loads ({changed_by}); no server: save it as_lora"]
    elif method == "dora":
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

    Compares the file's tensors (`compare_adapter`), then loads the folder with PEFT onto a copy of the model's modules,
    which shares the base's weights, and compares the logits on a short probe: on the base as it is now. Nothing of the
    model is changed, nor any random state. Raises EchoCheckpointError.
    """
    folder = Path(folder)
    compare_adapter(folder, adapter_tensors(model, adapter_name), trained=trained)
    with torch.random.fork_rng(), _only(model, adapter_name), torch.no_grad(), _as_written():
        probe = probe_ids(model)  # (1, 16)
        before = model(input_ids=probe).logits
        after = _loaded_beside(model, folder, adapter_name)(input_ids=probe).logits
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
    as_lora: bool = False,
    base: PreTrainedModel | None = None,
) -> Path:
    """Save the active adapter (and tokenizer with chat template) as a plain PEFT folder, and prove it.

    card: text of the README.md, in place of PEFT's own.
    as_lora: where the adapter took a part of its own out of the base's weights (PiSSA, OLoRA, CorDA, LoRA-GA), save a
    LoRA of twice the rank, which fits the base as it was. Without it such an adapter is one for PEFT alone, which takes
    the part out again as it loads.
    base: the base as it was, for the proof of an adapter that changed its weights. PEFT changes it: don't use it again.
    By default it is read anew from where the model came from. Other adapters need none, and are proved on it if given.

    Nothing appears under `folder` unless the proof holds. Raises EchoCheckpointError if it does not, if the
    folder exists and is not empty (unless `overwrite`, which replaces an adapter and keeps other files), or if the
    disk refuses.
    """
    if len(model.active_adapters) != 1:
        raise EchoCheckpointError(
            f"the adapters {', '.join(model.active_adapters)} are active, and a folder holds one. Choose it with "
            "model.set_adapter(name)."
        )
    (adapter_name,) = model.active_adapters
    config = model.peft_config[adapter_name]
    stale = (ADAPTER_FILE, CONFIG_FILE, "README.md", *TOKENIZER_FILES)
    with new_folder(folder, overwrite=overwrite, stale=stale) as temporary:
        inference_mode = config.inference_mode
        try:
            model.save_pretrained(str(temporary), selected_adapters=[adapter_name])
        finally:
            config.inference_mode = inference_mode  # PEFT leaves it at True if the disk refuses
        if adapter_name != "default":  # PEFT puts a named adapter one level down
            for path in list((temporary / adapter_name).iterdir()):
                path.rename(temporary / path.name)
            (temporary / adapter_name).rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        verify_adapter(model, temporary, adapter_name, trained=trained)
        is_changed = changes_base(config)
        if is_changed and as_lora:
            _convert_to_lora(model, temporary, adapter_name)
        if is_changed or base is not None:
            _prove_on(_fresh_base(model) if base is None else base, model, temporary, adapter_name)
    return Path(folder)


def probe_ids(model: PeftModel) -> Tensor:
    """(1, 16) ids from the middle of the vocabulary: ordinary tokens in every tokenizer."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(PROBE_TOKENS, device=model.device) * 7 + vocabulary // 3)[None] % vocabulary


def _as_written() -> AbstractContextManager[None]:
    """Compiled layers run as they are written: a copy is not compiled, and the compiler rounds in another way."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _only(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """The model in eval mode, with this adapter active; afterwards each module and parameter is as it was."""
    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = list(model.active_adapters)
    try:
        if active != [adapter_name]:
            model.base_model.set_adapter(adapter_name)
        with evaluating(model):
            yield
    finally:
        if active != [adapter_name]:
            model.base_model.set_adapter(active)
        for parameter, requires_grad in was_trainable:
            parameter.requires_grad_(requires_grad)


def _loaded_beside(model: PeftModel, folder: Path, adapter_name: str) -> PeftModel:
    """The folder as PEFT loads it, in eval mode, on a base of its own that shares the weights of the model's."""
    config = PeftConfig.from_pretrained(str(folder))
    if changes_base(config):
        config.init_lora_weights = True  # the weights have been changed already
    base = _shared_base(model, adapter_name)
    # on the meta device KaSA puts its change of the weights off until the first forward, and that is prevented
    is_kasa = bool(getattr(config, "kasa_config", None))
    proof = PeftModel.from_pretrained(
        base, str(folder), adapter_name, config=config, torch_device="cpu", low_cpu_mem_usage=is_kasa
    )
    if is_kasa:
        for layer in proof.modules():
            getattr(layer, "_lora_kasa_truncation_deferred", set()).clear()
    live = dict(model.named_parameters())
    for name, parameter in proof.named_parameters():  # PEFT loads in float32 even where the trained adapter is not
        if name in live:
            parameter.data = parameter.data.to(live[name].device, live[name].dtype)
    return proof.eval()


def _shared_base(model: PeftModel, adapter_name: str) -> PreTrainedModel:
    """The base without adapters: other modules with other parameters, whose numbers are the model's own, not copies."""
    tuner = model.base_model
    memo: dict[int, Any] = {}  # what deepcopy takes as copied already
    for parameter in tuner.parameters():
        # a quantised one carries more than its data, and PEFT leaves it alone
        is_plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if is_plain else parameter
    for module in tuner.modules():
        for key, value in vars(module).items():
            held = list(value.values()) if key in ("_buffers", "_forward_hooks", "_forward_pre_hooks") else [value]
            memo |= {id(item): item for item in held if key.startswith("_forward") or _holds_tensors(item)}
    try:
        base = copy.deepcopy(tuner, memo).unload()
    except (RuntimeError, TypeError) as error:
        raise EchoCheckpointError(
            f"{type(model.get_base_model()).__name__} can't be copied for the proof of its adapter: {error}. Save it "
            "with model.save_pretrained, and compare it in a process of its own."
        ) from error
    replication = getattr(model.peft_config[adapter_name], "layer_replication", None)
    if replication:
        _undo_replication(base, replication)
    return base


def _holds_tensors(value: Any) -> bool:
    """A tensor, or a record of some, such as the state of a quantised weight."""
    if isinstance(value, Tensor):
        return True
    return not isinstance(value, nn.Module) and any(
        isinstance(v, Tensor) for v in getattr(value, "__dict__", {}).values()
    )


def _undo_replication(base: PreTrainedModel, replication: list[tuple[int, int]]) -> None:
    """The layers before LoraConfig.layer_replication; one that it left out is any other, for it is never asked for."""
    name, layers = decoder_layers(base)
    copies = [index for start, end in replication for index in range(start, end)]
    originals = [copies.index(index) if index in copies else 0 for index in range(max(copies) + 1)]
    parent, _, attribute = name.rpartition(".")
    setattr(base.get_submodule(parent), attribute, nn.ModuleList(layers[index] for index in originals))
    base.config.get_text_config().num_hidden_layers = len(originals)


# ------------------------------------------------------------------------- adapters that changed the base's weights


def _convert_to_lora(model: PeftModel, folder: Path, adapter_name: str) -> None:
    """Turn the folder's adapter into one for the base as it was: W - s·B0 A0 + s·B A = W + s·[B, -B0] [A; A0]."""
    config = LoraConfig.from_pretrained(str(folder))
    tensors = read_adapter(folder)
    initial = getattr(model, "initial_adapter", None)
    is_factor = {name: ".lora_A." in name or ".lora_B." in name for name in tensors}
    others = [name for name, is_one in is_factor.items() if ".lora_" in name and not is_one]
    if not str(config.init_lora_weights).lower().startswith(SUBTRACTED) or others or initial is None:
        reason = f"{changes_base(config)} can't be written as a LoRA of the base as it was"
        if others:
            reason = f"{others[0]} is no part of a LoRA"
        elif initial is None:
            reason = "the model does not keep the adapter's initial values; one of get_echo_model does"
        raise EchoCheckpointError(f"as_lora=True is impossible: {reason}. Save without as_lora.")
    for name in [name for name, is_one in is_factor.items() if is_one]:
        first = initial[name].to(tensors[name].dtype)
        is_A = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], first if is_A else -first], dim=0 if is_A else 1).contiguous()
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    more_alpha = 2**0.5 if config.use_rslora else 2  # s stays what it is
    config.r *= 2
    config.lora_alpha *= more_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: more_alpha * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
    config.save_pretrained(str(folder))


def _fresh_base(model: PeftModel) -> PreTrainedModel:
    """The base as it was, read from where it came from, on the CPU. Raises EchoCheckpointError if it can't be."""
    live = model.get_base_model()
    what = changes_base(model.peft_config[model.active_adapters[0]])
    advice = (
        f"{what} changed the base's weights, so that the proof needs them as they were: pass save_verified(base=…)."
    )
    if not live.name_or_path or getattr(live.config, "quantization_config", None) is not None:
        reason = "is quantised" if live.name_or_path else "came from no folder"
        raise EchoCheckpointError(f"{type(live).__name__} {reason} and can't be read anew. {advice}")
    dtype = str(live.dtype).removeprefix("torch.")
    attention = live.config._attn_implementation
    try:
        return load_base_model(live.name_or_path, dtype, attention)  # type: ignore[arg-type]
    except EchoModelError as error:
        raise EchoCheckpointError(f"{error} {advice}") from error


def _prove_on(base: PreTrainedModel, model: PeftModel, folder: Path, adapter_name: str) -> None:
    """Load the folder onto this base with PEFT and compare weights and logits with the model's.

    Raises EchoCheckpointError if they differ by more than the weights' type explains.
    """
    if base is model.get_base_model() or hasattr(base, "peft_config"):
        raise EchoCheckpointError(
            "save_verified(base=…) is a base with an adapter, and the proof needs one without. Load the base once more."
        )
    advice = "Don't use this folder. Check that base is the model's own"
    if changes_base(model.peft_config[adapter_name]) and changes_base(read_adapter_config(folder)):
        advice += "; or, where PEFT does not make the same change of its weights again, save with as_lora=True"
    with torch.random.fork_rng(), _only(model, adapter_name), torch.no_grad(), _as_written():
        probe = probe_ids(model)  # (1, 16)
        before = model(input_ids=probe).logits.float().cpu()
        torch.manual_seed(2605)  # whoever loads it draws other numbers than training did
        try:
            proof = PeftModel.from_pretrained(base, str(folder), adapter_name, torch_device="cpu").eval()
        except (ValueError, RuntimeError) as error:
            raise EchoCheckpointError(f"{folder}: PEFT can't load it onto a fresh base: {error} {advice}.") from error
        after = proof(input_ids=probe.to(proof.device)).logits.float().cpu()
        for name, layer in model.named_modules():
            if (
                isinstance(layer, LoraLayer)
                and adapter_name in layer.lora_A
                and hasattr(layer.get_base_layer(), "weight")
            ):
                expected, dtype = _weight(layer, adapter_name)
                difference = (_weight(proof.get_submodule(name), adapter_name)[0] - expected).norm() / expected.norm()
                if not difference <= WEIGHT_TOLERANCE.get(dtype, WEIGHT_TOLERANCE[torch.bfloat16]):
                    raise EchoCheckpointError(
                        f"{folder}: on a fresh base the weight of {name} differs by {difference:.3g} of its norm from "
                        f"that of the trained model. {advice}."
                    )
    tolerance = TOLERANCE.get(model.get_base_model().dtype, TOLERANCE[torch.bfloat16]) * before.abs().max()
    difference = (after - before).abs().max()
    if not difference <= tolerance:
        raise EchoCheckpointError(
            f"{folder}: on a fresh base logits differ by {difference:.3g} from the trained model's; rounding explains "
            f"up to {tolerance:.3g}. {advice}."
        )


def _weight(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, torch.dtype]:
    """The weight with the adapter in it, on the CPU in float32, and the type of the base's."""
    base_layer = layer.get_base_layer()
    weight = dequantize_module_weight(base_layer)
    if adapter_name not in layer.lora_variant:  # a variant's update is no matrix; the weight alone tells
        weight = weight + layer.get_delta_weight(adapter_name).to(weight.dtype)
    return weight.detach().float().cpu(), base_layer.weight.dtype
