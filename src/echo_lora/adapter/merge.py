"""Loading an adapter onto its base, and merging it into the base's weights, each with its proof.

PEFT loads an adapter whose keys don't match with a warning at most, and scales a merge in whatever the weights'
type is. Here a key that does not match is an error that names the module, and a merge is compared, logit by logit,
with the model that it stands for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from echo_lora.adapter.export import TOLERANCE, probe_ids
from echo_lora.adapter.files import CONFIG_FILE, read_adapter, read_adapter_config
from echo_lora.adapter.inspection import adapter_problems, missing_modules
from echo_lora.errors import EchoCheckpointError, EchoModelError
from echo_lora.files import locked, new_folder, refuse_existing, remove_leftovers
from echo_lora.models import load_base_model, load_config, load_tokenizer
from echo_lora.progress import stage

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MergeResult:
    """A merged model and how far its logits are from those of base and adapter."""

    output: Path
    dtype: str
    max_difference: float  # of logits, on a short probe
    largest_logit: float
    tolerance: float  # of max_difference / largest_logit
    reloaded_difference: float | None  # the same, of the folder as it reads back; None if not verified

    def pairs(self) -> dict[str, str]:
        """What a terminal shows of it."""
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
    """Write the base with the adapter merged into its weights, and its tokenizer, as a model of its own.

    base: by default the one that the adapter names. dtype: type in which to load, merge and write; "auto" is the
    type in which the base is stored. verify: read the written folder back and compare it too. trust_remote_code: run
    code that comes with the base, or with a tokenizer beside the adapter. Raises EchoCheckpointError if the logits
    differ by more than the type's rounding or another process writes the output, EchoModelError for a quantised base.
    """
    with locked(output):
        remove_leftovers(Path(output))
        refuse_existing(output)
        return _merge(adapter, output, base, dtype, verify, trust_remote_code)


def _merge(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None,
    dtype: Dtype,
    verify: bool,
    trust_remote_code: bool,
) -> MergeResult:
    config = read_adapter_config(adapter)
    reference = base if base is not None else config.get("base_model_name_or_path")
    if not reference:
        raise EchoCheckpointError(f"{adapter} names no base model. Name it with --base.")
    _refuse_quantised(reference, load_config(reference, trust_remote_code))
    with stage(f"Loading {reference} and the adapter"):
        model = load_adapter(load_base_model(reference, dtype, trust_remote_code=trust_remote_code), adapter)
    probe = probe_ids(model)
    with torch.no_grad():
        before = model(input_ids=probe).logits.float()
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # weights that are not finite
            raise EchoCheckpointError(f"{adapter} can't be merged: {error}. Don't use this adapter.") from error
        except NotImplementedError as error:  # variants that act on some tokens only
            raise EchoModelError(
                f"{adapter} can't be merged: {error} Load it beside its base with peft.PeftModel.from_pretrained."
            ) from error
        difference = _compare(merged, before, probe, f"{adapter}: merging")
        reread = None
        with new_folder(output) as temporary, stage("Writing" + " and reading back" * verify):
            merged.save_pretrained(temporary)
            tokenizer_folder = adapter if (Path(adapter) / "tokenizer_config.json").is_file() else reference
            load_tokenizer(tokenizer_folder, trust_remote_code).save_pretrained(temporary)
            if verify:
                again = AutoModelForCausalLM.from_pretrained(
                    temporary, dtype=merged.dtype, trust_remote_code=trust_remote_code, use_safetensors=True
                )
                reread = _compare(again.eval(), before, probe, f"{output}: the merged model as it reads back")
    return MergeResult(
        output=Path(output),
        dtype=str(merged.dtype).removeprefix("torch."),
        max_difference=difference,
        largest_logit=before.abs().max().item(),
        tolerance=TOLERANCE.get(merged.dtype, TOLERANCE[torch.bfloat16]),
        reloaded_difference=reread,
    )


def load_adapter(base: PreTrainedModel, folder: str | Path, *, is_named_alike: bool = False) -> PeftModel:
    """The base with the adapter of a folder, in eval mode, as stock PEFT loads it.

    is_named_alike: demand that the base is called as the adapter says, but for the folders above it. Raises
    EchoCheckpointError if the adapter is corrupted or does not fit the base, naming the first module where it doesn't.
    """
    folder, name = Path(folder), base.name_or_path
    config, saved = read_adapter_config(folder), read_adapter(folder)
    made_for = config.get("base_model_name_or_path")
    advice = f"The adapter was made for {made_for or 'a base that it does not name'}. Name its own base."
    if made_for and Path(made_for).name == Path(name).name:
        advice = f"Is {CONFIG_FILE} the one that was saved with the weights, and {name} the base that was trained on?"
    if is_named_alike and made_for and Path(made_for).name != Path(name).name:
        raise EchoCheckpointError(
            f"{folder} was made for {made_for}, not for {name}. Name that base as the recipe's model; or, if the two "
            f"are the same, correct base_model_name_or_path in {folder / CONFIG_FILE}."
        )
    for what in adapter_problems(config, saved):
        raise EchoCheckpointError(f"{folder}: {what}. Don't use this adapter; save it again, or fetch it again.")
    try:
        with warnings.catch_warnings():  # of every key that does not fit: the first one is named below
            for text in ("Found missing adapter keys", "Some weights of"):
                warnings.filterwarnings("ignore", text, UserWarning)
            model = PeftModel.from_pretrained(base, str(folder), ignore_mismatched_sizes=True)
    except Exception as error:  # whatever PEFT's own code meets where none of the target modules is there, for example
        for what in missing_modules(config, saved):
            raise EchoCheckpointError(f"{folder}: {what}. Save the adapter again, or fetch it again.") from error
        raise EchoCheckpointError(f"{folder} does not fit {name}: {error}. {advice}") from error
    # PEFT asks the hub for the base that it names, which may be a path of another machine
    model.peft_config["default"].base_model_name_or_path = name
    expected = get_peft_model_state_dict(model)
    for key in sorted(expected.keys() | saved.keys()):
        problem = _misfit(key, expected.get(key), saved.get(key))
        if problem:
            raise EchoCheckpointError(f"{folder} does not fit {name}: {_module(key)} {problem} ({key}). {advice}")
    return model.eval()


def _misfit(key: str, expected: Tensor | None, saved: Tensor | None) -> str | None:
    if saved is None:
        return "has no weights in the adapter"
    if expected is None:
        return "is not a module of this base that the adapter could change"
    if expected.shape != saved.shape:
        return f"needs the shape {tuple(expected.shape)}, but the adapter holds {tuple(saved.shape)}"
    return None


def _module(key: str) -> str:
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


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
    """The largest difference of logits. Raises EchoCheckpointError if the weights' type does not explain it."""
    dtype = next(model.parameters()).dtype
    after = model(input_ids=probe).logits.float()
    difference, largest = (after - before).abs().max().item(), before.abs().max().item()
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if not difference <= tolerance * largest:  # also where it is not a number
        raise EchoCheckpointError(
            f"{what} changes logits by {difference:.3g}, of at most {largest:.3g}; {dtype} explains up to "
            f"{tolerance * largest:.3g}. Nothing was written. Merge in a wider type: --dtype float32."
        )
    return difference
