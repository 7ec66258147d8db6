"""What the echo does not support: checks that name the base model, LoRA setting, adapter or batch, and the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig, PeftModel, PeftModelForCausalLM, TaskType
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from echo_lora.errors import EchoDataError, EchoModelError
from echo_lora.method.kernels import fused_kernels
from echo_lora.method.packing import BOUNDARIES
from echo_lora.method.targets import outermost_lists

WORKING = "docs/architectures.md lists the models that work."

# Inputs of the step, and inputs that request outputs without changing any; a batch may hold them.
INPUTS = {"input_ids", "attention_mask", "labels", "completion_mask"}
IGNORED_INPUTS = {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits"}

# Settings that change what an adapter computes without changing the names and shapes of its tensors.
SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def refuse_lora_config(peft_config: LoraConfig) -> None:
    """Raises EchoModelError for a configuration whose adapter can't receive the echo or would not be trained alone."""
    if not isinstance(peft_config, LoraConfig):
        raise EchoModelError(
            f"the echo is injected into LoRA modules, but peft_config is a {type(peft_config).__name__}. "
            "Use peft.LoraConfig (use_dora and use_rslora are supported)."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise EchoModelError(
            f"LoraConfig.task_type is {peft_config.task_type!r}, but the echo trains causal language models. "
            "Use 'CAUSAL_LM'."
        )
    if peft_config.alora_invocation_tokens:
        raise EchoModelError(
            "activated LoRA (alora_invocation_tokens) chooses its own positions, so it can't be combined with the "
            "echo. Leave alora_invocation_tokens out."
        )
    if peft_config.bias != "none":
        raise EchoModelError(
            f"LoraConfig.bias is {peft_config.bias!r}: biases of the base, and of the echo with them, would be trained "
            "and saved with the adapter. Use bias='none'; lora_bias=True gives the adapter biases of its own."
        )
    if peft_config.arrow_config is not None:
        raise EchoModelError(
            "LoraConfig.arrow_config routes between adapters that are already trained. Train each of them with the "
            "echo first, without arrow_config."
        )
    initialisation = str(peft_config.init_lora_weights)
    if not initialisation.islower() and initialisation.lower().startswith(
        ("pissa", "corda", "loftq", "eva", "lora_ga")
    ):
        raise EchoModelError(
            f"LoraConfig.init_lora_weights is {initialisation!r}, which PEFT does not know. Write "
            f"{initialisation.lower()!r}."
        )
    if peft_config.inference_mode:
        raise EchoModelError(
            "LoraConfig.inference_mode is True, as in saved adapters: the adapter would be frozen, and only the echo, "
            "which is not deployed, would be trained. Set peft_config.inference_mode = False."
        )


def refuse_adapted(model: PreTrainedModel) -> None:
    """Raises EchoModelError for a model that is no bare base."""
    if hasattr(model, "peft_config"):
        raise EchoModelError(
            f"{type(model).__name__} already carries a PEFT adapter. To train that adapter with the echo, call "
            "attach_echo(peft_model, echo_config). To start a new one, pass the base model (`.unload()` removes an "
            "adapter)."
        )


def refuse_attaching(peft_model: PeftModel, with_echo: type[PeftModel]) -> None:
    """Raises EchoModelError for a model whose adapter can't be given the echo. with_echo: the class that has it."""
    kind = type(peft_model).__name__
    if isinstance(peft_model, with_echo):
        raise EchoModelError(f"the {kind} already has the echo. Train it as it is, or attach to a plain PEFT model.")
    if type(peft_model) not in (PeftModel, PeftModelForCausalLM):
        raise EchoModelError(
            f"attach_echo needs a causal language model with a LoRA adapter, as peft.get_peft_model returns it, but "
            f"got a {kind}. For a model without an adapter, call get_echo_model(base, LoraConfig(…), echo_config)."
        )
    name, *others = peft_model.active_adapters
    if others:
        raise EchoModelError(
            f"the echo belongs to one adapter, but the active ones are {', '.join(map(repr, [name, *others]))}. Call "
            "peft_model.set_adapter(name)."
        )
    if getattr(peft_model.peft_config[name], "inference_mode", False):
        raise EchoModelError(
            f"the adapter {name!r} was loaded for inference, so its parameters are frozen. Load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )


def refuse_base(base_model: PreTrainedModel) -> None:
    """Raises EchoModelError for a model whose class or configuration shows that the step would be wrong on it."""
    for problem in _problems_of_base(base_model, type(base_model).__name__):
        raise EchoModelError(f"{problem}. {WORKING}")
    if (kernels := fused_kernels(base_model)) is not None:
        raise EchoModelError(kernels)
    refuse_repacked_weights(base_model)


def refuse_repacked_weights(base_model: PreTrainedModel) -> None:
    """Raises EchoModelError for 4-bit weights that bitsandbytes repacks in the first pass in eval mode.

    It does so on CPUs with AVX512-BF16. Repacked weights let no gradient through, so any evaluation before or during a
    training would end it silently.
    """
    for name, module in base_model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.weight.device.type == "cpu":
            raise EchoModelError(
                f"{name.removesuffix('.base_layer')} has 4-bit weights, which bitsandbytes repacks on this CPU in the "
                "first pass in eval mode, and then they let no gradient through. Train on a GPU, in 8 bits, or without "
                "quantization."
            )


def _problems_of_base(base_model: PreTrainedModel, name: str) -> Iterator[str]:
    config = base_model.config.get_text_config()
    if getattr(base_model.config, "is_encoder_decoder", False):
        yield f"{name} is an encoder-decoder; the echo needs a decoder-only model"
    if getattr(config, "num_hidden_layers", None) is None:
        yield f"the configuration of {name} has no num_hidden_layers, needed to find its decoder layers"
    lists = [path for path, _ in outermost_lists(base_model)]
    if len(lists) > 1:
        yield (
            f"{name} keeps the parts of its layers in several lists ({', '.join(lists)}), so no module returns the "
            "state of a whole layer"
        )
    if (length := getattr(config, "local_attn_chunk_length", None)) is not None:
        yield (
            f"{name} only trains on rows whose length is a multiple of {length} tokens (local_attn_chunk_length), "
            "which a step with the echo does not preserve"
        )
    if getattr(config, "prompt_length", None) and getattr(config, "use_prompt", True):
        yield (
            f"{name} puts {config.prompt_length} tokens of its own before each row (prompt_length), so the boundary is "
            "not where the labels say"
        )
    layers_say = any(getattr(module, "is_decoder", None) is False for module in base_model.modules())
    for flag, is_set in {
        "is_decoder": layers_say and getattr(config, "is_decoder", None) is False,
        "is_causal": getattr(config, "is_causal", None) is False,
        "causal": getattr(config, "causal", None) is False,
        "use_bidirectional_attention": getattr(config, "use_bidirectional_attention", None) in (True, "all"),
        "attn_type": getattr(config, "attn_type", None) == "bi",
    }.items():
        if is_set:
            yield (
                f"the tokens of {name} see later ones (its configuration has {flag}={getattr(config, flag)!r}), so the "
                "state at the boundary would leak the answer. The echo needs a causal language model"
            )
    if (loops := getattr(config, "n_recurrent_loops", None) or 1) > 1:
        yield (
            f"{name} runs its layers {loops} times in a pass (n_recurrent_loops), but the echo reads one state of each "
            "layer"
        )
    for streams in ("altup_num_inputs", "hc_mult", "hc_count"):
        if (count := getattr(config, streams, None) or 1) > 1:
            yield (
                f"the layers of {name} pass on {count} streams of hidden states ({streams}), but the echo reads one "
                "state of each token"
            )


def refuse_untrainable(model: PeftModel, name: str, modules: list[LoraLayer]) -> None:
    """Raises EchoModelError if training would not update the adapter that carries the echo."""
    reason = None
    if model.active_adapters != [name]:
        reason = (
            f"the echo belongs to the adapter {name!r}, but the active one is "
            f"{', '.join(map(repr, model.active_adapters))}. To continue training a saved adapter, load it under that "
            f"name: load_adapter(folder, {name!r}, is_trainable=True). To train the active one without the echo, set "
            "model.echo_enabled = False."
        )
    elif any(module.disable_adapters for module in modules):
        reason = (
            f"the layers of the adapter {name!r} are disabled, so it would not be trained. Call "
            "model.base_model.enable_adapter_layers()."
        )
    elif any(module.merged for module in modules):
        reason = f"the adapter {name!r} is merged into the base, so it can't be trained. Call unmerge_adapter()."
    elif not any(p.requires_grad for n, p in model.base_model.named_parameters() if name in n.split(".")):
        reason = (
            f"every parameter of the adapter {name!r} is frozen, so only the echo, which is not deployed, would be "
            f"trained. Call model.set_adapter({name!r})."
        )
    if reason is not None:
        raise EchoModelError(reason)


def refuse_other_scaling(other: LoraConfig, own: LoraConfig, problem: str) -> None:
    """Raises EchoModelError where PEFT would load the tensors but keep the scale of the adapter they replace."""
    differences = [
        f"{name} is {getattr(other, name)!r} there and {getattr(own, name)!r} here"
        for name in SCALING
        if getattr(other, name) != getattr(own, name)
    ]
    if differences:
        raise EchoModelError(
            f"{problem}: {'; '.join(differences)}. Pass get_echo_model the LoraConfig that the saved adapter was made "
            "with."
        )


def refuse_batch(batch: Mapping[str, Any]) -> None:
    """Raises EchoDataError for rows that can't be aligned, EchoModelError for a loss that TRL computes."""
    _refuse_packed(batch.get("attention_mask"), batch)
    if batch.get("fused_lm_head"):
        raise EchoModelError(
            "TRL's SFTTrainer computes the loss itself, from log-probabilities, so the echo would have no effect. Use "
            "EchoSFTTrainer with the same arguments."
        )
    unknown = [key for key, value in batch.items() if value is not None and key not in INPUTS | IGNORED_INPUTS]
    if unknown:
        raise EchoDataError(
            f"a step with the echo takes input_ids, attention_mask and labels, but the batch also holds "
            f"{', '.join(unknown)}, which would be lost when rows are aligned. Leave them out of the batch."
        )


def _refuse_packed(attention_mask: Tensor | None, batch: Mapping[str, Any]) -> None:
    """What `packing.unpacked` can't unpack: packed rows would attend across rows once they carry a cache."""
    packed = [key for key in (*BOUNDARIES, "seq_lengths") if batch.get(key) is not None]
    if packed:
        raise EchoDataError(
            f"the batch holds {packed[0]} beside an attention_mask, so it is unknown which of them separates the rows. "
            "Pass packed rows without an attention_mask, or padded rows without position_ids."
        )
    if attention_mask is not None and attention_mask.dim() == 2 and bool((attention_mask > 1).any()):
        raise EchoDataError(
            f"attention_mask numbers packed rows up to {int(attention_mask.max())}, but a step with the echo finds "
            "them by position_ids. Leave the attention_mask out, or give one with 1 at tokens and 0 at padding."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise EchoDataError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the echo needs a (rows, tokens) mask to "
            "align rows. Pass one with 1 at tokens and 0 at padding."
        )
