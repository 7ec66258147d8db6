"""Load an adapter onto its base model, and merge it into the base's weights, with checks.

PEFT at most warns if an adapter's keys don't match, and merges in whatever dtype the weights have. Here a mismatch is
an error that names the module, and a merged model's logits are compared with those of base and adapter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from echo_lora.adapter.card import CARD_FILE, merged_card
from echo_lora.adapter.export import logit_tolerance, probe_ids
from echo_lora.adapter.files import CONFIG_FILE, read_adapter, read_adapter_config
from echo_lora.adapter.inspection import adapter_problems, missing_modules
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.files import locked, new_folder, refuse_existing, remove_leftovers
from echo_lora.models import canonical, load_base_model, load_config, load_tokenizer
from echo_lora.progress import stage

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MergeResult:
    """A merged model, and the difference of its logits from those of base and adapter."""

    output: Path
    dtype: str
    max_difference: float  # of logits, on a short probe
    largest_logit: float
    tolerance: float  # of max_difference / largest_logit
    reloaded_difference: float | None  # the same for the saved model as it loads; None if not verified

    def pairs(self) -> dict[str, str]:
        """The result as names and values for a terminal."""
        allowed = f"{self.tolerance * self.largest_logit:.3g} allowed in {self.dtype}"
        difference = f"{self.max_difference:.3g} ({allowed}, largest logit {self.largest_logit:.3g})"
        pairs = {"merged model": str(self.output), "logit difference": difference}
        return pairs if self.reloaded_difference is None else pairs | {"read back": f"{self.reloaded_difference:.3g}"}


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Dtype = "auto",
    verify: bool = False,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Write the base model with the adapter merged into its weights, the tokenizer and a model card to a new folder.

    base: default: the one that the adapter names. dtype: to load, merge and save in; "auto" is that of the stored base.
    verify: load the saved model and compare it too. trust_remote_code: run code that comes with the base, or with a
    tokenizer beside the adapter. Raises EchoCheckpointError if the logits differ by more than rounding or another
    process writes the output, EchoModelError for a quantised base.
    """
    with locked(output), torch.no_grad():
        remove_leftovers(Path(output))
        refuse_existing(output)
        reference = base if base is not None else read_adapter_config(adapter).get("base_model_name_or_path")
        if not reference:
            raise EchoCheckpointError(f"{adapter} names no base model. Name it with --base.")
        _refuse_quantised(reference, load_config(reference, trust_remote_code))
        with stage(f"Loading {reference} and the adapter"):
            model = load_adapter(load_base_model(reference, dtype, trust_remote_code=trust_remote_code), adapter)
        with stage("Merging"):
            probe = probe_ids(model)
            before = model(input_ids=probe).logits.float()
            merged = _merged(model, adapter)
            difference = _compare(merged, before, probe, f"{adapter}: merging")
        result = MergeResult(
            output=Path(output),
            dtype=str(merged.dtype).removeprefix("torch."),
            max_difference=difference,
            largest_logit=before.abs().max().item(),
            tolerance=logit_tolerance(merged.dtype),
            reloaded_difference=None,
        )
        with new_folder(output) as temporary, stage("Writing" + " and verifying" * verify):
            merged.save_pretrained(temporary)
            tokenizer_folder = adapter if (Path(adapter) / "tokenizer_config.json").is_file() else reference
            tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code)
            tokenizer.save_pretrained(temporary)
            (temporary / CARD_FILE).write_text(_card(result, reference, adapter, tokenizer), encoding="utf-8")
            if verify:
                saved = AutoModelForCausalLM.from_pretrained(
                    temporary, dtype=merged.dtype, trust_remote_code=trust_remote_code, use_safetensors=True
                )
                again = _compare(saved.eval(), before, probe, f"{output}: the merged model as it loads")
                result = replace(result, reloaded_difference=again)
    return result


def _card(result: MergeResult, base: str | Path, adapter: str | Path, tokenizer: Any) -> str:
    return merged_card(
        result.output,
        canonical(base),
        adapter,
        has_chat_template=bool(tokenizer.chat_template),
        dtype=result.dtype,
        max_difference=result.max_difference,
        largest_logit=result.largest_logit,
    )


def _merged(model: PeftModel, adapter: str | Path) -> PreTrainedModel:
    config = model.peft_config["default"]
    advice = "Load it with its base in peft.PeftModel.from_pretrained."
    if getattr(config, "layer_replication", None):  # PEFT would merge into the shared weight once for each copy
        raise EchoModelError(f"{adapter} can't be merged: with layer_replication, layers share their weights. {advice}")
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # weights that are not finite
        raise EchoCheckpointError(f"{adapter} can't be merged: {error}. Don't use this adapter.") from error
    except RuntimeError as error:
        # NotImplementedError: variants that act on some tokens only
        if not isinstance(error, NotImplementedError) and not getattr(config, "lora_bias", False):
            raise
        raise EchoModelError(f"{adapter} can't be merged: {error} {advice}") from error


def load_adapter(base: PreTrainedModel, folder: str | Path, *, require_same_name: bool = False) -> PeftModel:
    """The base with a folder's adapter, in eval mode, as PEFT loads it.

    require_same_name: refuse a base whose name, without the folders above it, is not the one recorded in the adapter.
    Raises EchoCheckpointError if the adapter is corrupted, or does not fit the base: then it names the first module.
    """
    folder, name = Path(folder), base.name_or_path
    config, saved = read_adapter_config(folder), read_adapter(folder)
    made_for = config.get("base_model_name_or_path")
    advice = f"The adapter was made for {made_for or 'a base model that it does not name'}. Name its base model."
    if made_for and Path(made_for).name == Path(name).name:
        advice = f"Is {CONFIG_FILE} the one that was saved with the weights, and {name} the base it was trained on?"
    elif require_same_name and made_for:
        raise EchoCheckpointError(
            f"{folder} was made for {made_for}, not for {name}. Name that base as the recipe's model; or, if the two "
            f"are the same, correct base_model_name_or_path in {folder / CONFIG_FILE}."
        )
    for what in adapter_problems(config, saved):
        raise EchoCheckpointError(f"{folder}: {what}. Don't use this adapter; save it again, or download it again.")
    try:
        with warnings.catch_warnings():  # about keys that don't fit: the error below names the first
            for text in ("Found missing adapter keys", "Some weights of"):
                warnings.filterwarnings("ignore", text, UserWarning)
            model = PeftModel.from_pretrained(base, str(folder), ignore_mismatched_sizes=True)
    except Exception as error:  # any exception of PEFT's code, for example where no target module exists
        for what in missing_modules(config, saved):
            raise EchoCheckpointError(f"{folder}: {what}. Save the adapter again, or download it again.") from error
        raise EchoCheckpointError(f"{folder} does not fit {name}: {error}. {advice}") from error
    # else PEFT looks up the recorded base on the hub, which may be a path of another machine
    model.peft_config["default"].base_model_name_or_path = name
    expected = get_peft_model_state_dict(model)
    for key in sorted(expected.keys() | saved.keys()):
        problem = _misfit(expected.get(key), saved.get(key))
        if problem:
            module = key.removeprefix("base_model.model.").partition(".lora_")[0]
            raise EchoCheckpointError(f"{folder} does not fit {name}: {module} {problem} ({key}). {advice}")
    return model.eval()


def _misfit(expected: Tensor | None, saved: Tensor | None) -> str | None:
    if saved is None:
        return "has no weights in the adapter"
    if expected is None:
        return "is not a module of this base that the adapter could change"
    if expected.shape != saved.shape:
        return f"needs the shape {tuple(expected.shape)}, but the adapter holds {tuple(saved.shape)}"
    return None


def _refuse_quantised(reference: str | Path, config: Any) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised.quant_method
        raise EchoModelError(
            f"{reference} is quantised ({method}): merging would round the adapter's update away with the weights. "
            "Merge into the base from which it was quantised: name it with --base. Or don't merge: load the adapter "
            "beside the quantised base with peft.PeftModel.from_pretrained."
        )


def _compare(model: nn.Module, before: Tensor, probe: Tensor, what: str) -> float:
    """The largest difference of logits. Raises EchoCheckpointError if it exceeds the dtype's rounding."""
    dtype = next(model.parameters()).dtype
    after = model(input_ids=probe).logits.float()
    difference, largest = (after - before).abs().max().item(), before.abs().max().item()
    tolerance = logit_tolerance(dtype)
    if not difference <= tolerance * largest:  # also if it is NaN
        raise EchoCheckpointError(
            f"{what} changes logits by {difference:.3g}, of at most {largest:.3g}; {dtype} explains up to "
            f"{tolerance * largest:.3g}. Nothing was written. Merge in a wider dtype: --dtype float32."
        )
    return difference
