"""The echo for a PEFT model whose adapter exists already."""

from __future__ import annotations

import copy

from peft import PeftModel

from echo_lora.method import refusals
from echo_lora.method.config import EchoConfig
from echo_lora.method.model import EchoModel
from echo_lora.method.variants import warn_of_changed_base


def attach_echo(peft_model: PeftModel, echo_config: EchoConfig | None = None) -> EchoModel:
    """Add the echo to the active adapter of a PEFT model: the EchoModel that `get_echo_model` gives for that adapter.

    The result shares its modules and weights with `peft_model`, so an optimizer that holds the adapter stays valid; use
    the result from here on. The adapter goes on from the values it has. Raises EchoModelError if it is not a trainable
    LoRA adapter or the base does not support the echo, EchoConfigError if a layer does not exist.
    """
    refusals.refuse_attaching(peft_model, EchoModel)
    (adapter_name,) = peft_model.active_adapters
    refusals.refuse_lora_config(peft_model.peft_config[adapter_name])
    refusals.refuse_base(peft_model.get_base_model())
    model = EchoModel.__new__(EchoModel)
    for name, value in vars(peft_model).items():  # registries are copied: the echo is a module of the new model only
        model.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    # PeftModelForCausalLM has it; PeftModel, which PEFT makes without task_type, lacks it
    model.base_model_prepare_inputs_for_generation = model.base_model.prepare_inputs_for_generation
    model.create_echo(echo_config or EchoConfig(), adapter_name)
    model.refuse_untrainable()
    warn_of_changed_base(model.peft_config[adapter_name])
    return model
