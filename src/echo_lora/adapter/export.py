"""Save a trained adapter as a plain PEFT folder, verified by loading it back.

`save_verified` writes to a temporary folder, loads it with PEFT onto separate modules, compares keys, values and
logits, and only then gives the folder its name. The trained model is read, never changed.

Some adapters change the base's weights when they are created (`changes_base`). They only work if PEFT repeats the
change when it loads them, so these are also verified on an unchanged base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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
from echo_lora.method.targets import decoder_layers
from echo_lora.method.trial import in_mode
from echo_lora.method.variants import SUBTRACTED, changes_base
from echo_lora.models import load_base_model

PROBE_TOKENS = 16

# Largest difference of logits, relative to the largest logit, that the rounding of each dtype explains.
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# The same for a weight, by norms: a few units in the last place.
_WEIGHT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def logit_tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits, relative to the largest logit, that a dtype's rounding explains."""
    return _LOGIT_TOLERANCE.get(dtype, _LOGIT_TOLERANCE[torch.bfloat16])


def verify_adapter(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", *, trained: bool = True
) -> None:
    """Verify that a folder holds the model's adapter. Raises EchoCheckpointError if it does not.

    Compares the tensors (`compare_adapter`), then loads the folder with PEFT onto a copy of the model's modules that
    shares the current base weights, and compares the logits of a short probe. Neither the model nor a random state
    changes.
    """
    folder = Path(folder)
    compare_adapter(folder, adapter_tensors(model, adapter_name), trained=trained)
    with _probing(model, adapter_name) as probe:
        before = _logits(model, probe)
        after = _logits(_loaded_beside(model, folder, adapter_name), probe)
    if not torch.equal(before, after):
        raise EchoCheckpointError(
            f"{folder}: the adapter as PEFT loads it gives other logits than the trained one (largest difference "
            f"{(before - after).abs().max():.3g}). Don't use this folder; check its adapter_config.json."
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
    """Save the active adapter, and the tokenizer with its chat template, as a plain PEFT folder, and verify it.

    card: text of README.md, instead of PEFT's.
    as_lora: save an adapter whose creation subtracted from the base's weights (PiSSA, OLoRA, CorDA, LoRA-GA) as a LoRA
    of twice the rank, which fits the original base. Otherwise only PEFT can load it, repeating the subtraction.
    base: the original base, to verify an adapter that changed its weights; default: loaded again from the model's
    source. PEFT changes it, so don't use it afterwards. Other adapters don't need it, but are verified on it if given.

    The folder appears only if verification succeeds. Raises EchoCheckpointError if it fails, if the folder exists and
    is not empty (unless `overwrite`, which replaces an adapter and keeps other files), or if writing fails.
    """
    if len(model.active_adapters) != 1:
        raise EchoCheckpointError(
            f"the adapters {', '.join(model.active_adapters)} are active, but a folder holds one. Choose it with "
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
            config.inference_mode = inference_mode  # PEFT leaves it at True if writing fails
        if adapter_name != "default":  # PEFT saves a named adapter in a subfolder
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
            _convert_to_lora(model, temporary)
        if is_changed or base is not None:
            _verify_on(_fresh_base(model) if base is None else base, model, temporary, adapter_name)
    return Path(folder)


def _logits(model: PeftModel, probe: Tensor) -> Tensor:
    """Of the adapted base itself: accelerate wraps the model in autocast (`bf16`, `fp16`), as no loaded adapter is."""
    return model.get_base_model()(input_ids=probe).logits


def probe_ids(model: PeftModel) -> Tensor:
    """(1, 16) int64, from the middle of the vocabulary: ordinary tokens in every tokenizer."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(PROBE_TOKENS, device=model.device) * 7 + vocabulary // 3)[None] % vocabulary


@contextmanager
def _probing(model: PeftModel, adapter_name: str) -> Iterator[Tensor]:
    """`probe_ids`, and the model in eval mode with only this adapter active; modes and random state are restored.

    Compiled layers run eagerly: the copy to compare with is not compiled, and the compiler rounds differently.
    """
    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = list(model.active_adapters)
    try:
        if active != [adapter_name]:
            model.base_model.set_adapter(adapter_name)
        eager = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(), torch.no_grad(), eager, in_mode(model, training=False):
            yield probe_ids(model)
    finally:
        if active != [adapter_name]:
            model.base_model.set_adapter(active)
        for parameter, requires_grad in was_trainable:
            parameter.requires_grad_(requires_grad)


def _loaded_beside(model: PeftModel, folder: Path, adapter_name: str) -> PeftModel:
    """The folder as PEFT loads it, in eval mode, on separate modules that share the base's weights."""
    config = PeftConfig.from_pretrained(str(folder))
    if changes_base(config):
        config.init_lora_weights = True  # the shared weights are changed already
    base = _shared_base(model, adapter_name)
    # on the meta device KaSA defers its change of the weights to the first forward, which is then cancelled
    is_kasa = bool(getattr(config, "kasa_config", None))
    loaded = PeftModel.from_pretrained(
        base, str(folder), adapter_name, config=config, torch_device="cpu", low_cpu_mem_usage=is_kasa
    )
    if is_kasa:
        for layer in loaded.modules():
            getattr(layer, "_lora_kasa_truncation_deferred", set()).clear()
    live = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():  # PEFT loads float32 even if the trained adapter is not
        if name in live:
            parameter.data = parameter.data.to(live[name].device, live[name].dtype)
    return loaded.eval()


def _shared_base(model: PeftModel, adapter_name: str) -> PreTrainedModel:
    """A copy of the base without adapters: new modules and parameters that share the model's storage."""
    tuner = model.base_model
    memo: dict[int, Any] = {}  # objects that deepcopy regards as copied
    for parameter in tuner.parameters():
        # a quantised parameter holds more than its data, and PEFT does not change it
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
            f"{type(model.get_base_model()).__name__} can't be copied to verify its adapter: {error}. Save it with "
            "model.save_pretrained, and compare it in another process."
        ) from error
    replication = getattr(model.peft_config[adapter_name], "layer_replication", None)
    if replication:
        _undo_replication(base, replication)
    return base


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or an object with tensors such as the state of a quantised weight."""
    if isinstance(value, Tensor):
        return True
    return not isinstance(value, nn.Module) and any(
        isinstance(v, Tensor) for v in getattr(value, "__dict__", {}).values()
    )


def _undo_replication(base: PreTrainedModel, replication: list[tuple[int, int]]) -> None:
    """Restore the layers as before LoraConfig.layer_replication. A dropped one is replaced by any: it is never used."""
    name, layers = decoder_layers(base)
    copies = [index for start, end in replication for index in range(start, end)]
    originals = [copies.index(index) if index in copies else 0 for index in range(max(copies) + 1)]
    parent, _, attribute = name.rpartition(".")
    setattr(base.get_submodule(parent), attribute, nn.ModuleList(layers[index] for index in originals))
    base.config.get_text_config().num_hidden_layers = len(originals)


# ------------------------------------------------------------------------- adapters that changed the base's weights


def _convert_to_lora(model: PeftModel, folder: Path) -> None:
    """Rewrite the folder's adapter for the original base: W - s·B0 A0 + s·B A = W + s·[B, -B0] [A; A0]."""
    config = LoraConfig.from_pretrained(str(folder))
    tensors = read_adapter(folder)
    initial = getattr(model, "initial_adapter", None)
    factors = [name for name in tensors if ".lora_A." in name or ".lora_B." in name]
    others = [name for name in tensors if ".lora_" in name and name not in factors]
    if not str(config.init_lora_weights).lower().startswith(SUBTRACTED) or others or initial is None:
        reason = f"{changes_base(config)} can't be written as a LoRA of the original base"
        if others:
            reason = f"{others[0]} does not belong to a plain LoRA"
        elif initial is None:
            reason = "the model does not hold the adapter's initial values, which get_echo_model keeps"
        raise EchoCheckpointError(f"as_lora=True is impossible: {reason}. Save without as_lora.")
    for name in factors:
        first = initial[name].to(tensors[name].dtype)
        is_A = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], first if is_A else -first], dim=0 if is_A else 1).contiguous()
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    alpha_factor = 2**0.5 if config.use_rslora else 2  # keeps the scale s
    config.r *= 2
    config.lora_alpha *= alpha_factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha_factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
    config.save_pretrained(str(folder))


def _fresh_base(model: PeftModel) -> PreTrainedModel:
    """The original base on the CPU, loaded from the model's source. Raises EchoCheckpointError if it can't be."""
    live = model.get_base_model()
    what = changes_base(model.peft_config[model.active_adapters[0]])
    advice = f"{what} changed the base's weights, and verification needs the original ones: pass save_verified(base=…)."
    if not live.name_or_path or getattr(live.config, "quantization_config", None) is not None:
        reason = "is quantised" if live.name_or_path else "was not loaded from a folder"
        raise EchoCheckpointError(f"{type(live).__name__} {reason} and can't be loaded again. {advice}")
    dtype = str(live.dtype).removeprefix("torch.")
    attention = live.config._attn_implementation
    try:
        return load_base_model(live.name_or_path, dtype, attention)  # type: ignore[arg-type]
    except EchoModelError as error:
        raise EchoCheckpointError(f"{error} {advice}") from error


def _verify_on(base: PreTrainedModel, model: PeftModel, folder: Path, adapter_name: str) -> None:
    """Load the folder onto this base with PEFT and compare weights and logits with the model's.

    Raises EchoCheckpointError if they differ by more than rounding explains.
    """
    if base is model.get_base_model() or hasattr(base, "peft_config"):
        raise EchoCheckpointError(
            "save_verified(base=…) got a base with an adapter, but needs one without. Load the base again."
        )
    advice = "Don't use this folder. Check that base is the model's own"
    if changes_base(model.peft_config[adapter_name]) and changes_base(read_adapter_config(folder)):
        advice += "; if PEFT can't repeat the change of its weights, save with as_lora=True"
    with _probing(model, adapter_name) as probe:
        before = _logits(model, probe).float().cpu()
        torch.manual_seed(2605)  # users load it with another random state than training had
        try:
            loaded = PeftModel.from_pretrained(base, str(folder), adapter_name, torch_device="cpu").eval()
        except (ValueError, RuntimeError) as error:
            raise EchoCheckpointError(f"{folder}: PEFT can't load it onto a fresh base: {error} {advice}.") from error
        after = _logits(loaded, probe.to(loaded.device)).float().cpu()
        for name, layer in model.named_modules():
            if (
                isinstance(layer, LoraLayer)
                and adapter_name in layer.lora_A
                and hasattr(layer.get_base_layer(), "weight")
            ):
                expected, dtype = _weight(layer, adapter_name)
                difference = (_weight(loaded.get_submodule(name), adapter_name)[0] - expected).norm() / expected.norm()
                if not difference <= _WEIGHT_TOLERANCE.get(dtype, _WEIGHT_TOLERANCE[torch.bfloat16]):
                    raise EchoCheckpointError(
                        f"{folder}: on a fresh base the weight of {name} differs by {difference:.3g} of its norm from "
                        f"that of the trained model. {advice}."
                    )
    tolerance = logit_tolerance(model.get_base_model().dtype) * before.abs().max()
    difference = (after - before).abs().max()
    if not difference <= tolerance:
        raise EchoCheckpointError(
            f"{folder}: on a fresh base logits differ by {difference:.3g} from the trained model's; rounding explains "
            f"up to {tolerance:.3g}. {advice}."
        )


def _weight(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, torch.dtype]:
    """The weight with the adapter merged, on the CPU in float32, and the dtype of the base weight."""
    base_layer = layer.get_base_layer()
    weight = dequantize_module_weight(base_layer)
    if adapter_name not in layer.lora_variant:  # a variant's update is not a matrix: compare only the base weight
        weight = weight + layer.get_delta_weight(adapter_name).to(weight.dtype)
    return weight.detach().float().cpu(), base_layer.weight.dtype
