"""What leaves training: a plain PEFT adapter, proved by reading it back.

`save_verified` writes to a temporary name, loads the result with PEFT's own loader onto modules of its own, compares
keys, values and logits, and only then gives the folder its name. The trained model is read, never changed.

Some adapters change the base's weights when they are made (`changes_base`): they fit no other base, until PEFT makes
the same change again as it loads them. For these the proof also takes a base that nobody has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from echo_lora.adapter.files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    TOKENIZER_FILES,
    adapter_tensors,
    compare_adapter,
    read_adapter,
    read_adapter_config,
)
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.files import new_folder
from echo_lora.method.injection import decoder_layers
from echo_lora.method.trial import evaluating
from echo_lora.method.variants import SUBTRACTED, changes_base
from echo_lora.models import load_base_model

PROBE_TOKENS = 16

# Largest difference of logits, relative to the largest logit, where the weights' type rounds on two ways to one result.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# The same for a weight, by norms: a few units in its last place.
WEIGHT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


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
        before = _logits(model, probe)
        after = _logits(_loaded_beside(model, folder, adapter_name), probe)
    if not torch.equal(before, after):
        raise EchoCheckpointError(
            f"{folder}: the adapter as PEFT loads it gives other logits than the trained one (largest difference "
            f"{(before - after).abs().max():.3g}). Check adapter_config.json; don't use this folder."
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


def _logits(model: PeftModel, probe: Tensor) -> Tensor:
    """Of the adapted base itself: accelerate wraps the model in autocast (`bf16`, `fp16`), as no loaded adapter is."""
    return model.get_base_model()(input_ids=probe).logits


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
        before = _logits(model, probe).float().cpu()
        torch.manual_seed(2605)  # whoever loads it draws other numbers than training did
        try:
            proof = PeftModel.from_pretrained(base, str(folder), adapter_name, torch_device="cpu").eval()
        except (ValueError, RuntimeError) as error:
            raise EchoCheckpointError(f"{folder}: PEFT can't load it onto a fresh base: {error} {advice}.") from error
        after = _logits(proof, probe.to(proof.device)).float().cpu()
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
