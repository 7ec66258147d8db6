"""Recipe → objects: LoRA configuration, model with adapter, training arguments."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed
from trl import SFTConfig

from echo_lora.errors import EchoError, EchoModelError, nearest
from echo_lora.method.checkpointing import is_sharded
from echo_lora.method.model import EchoModel
from echo_lora.method.refusals import refuse_repacked_weights
from echo_lora.method.targets import unmatched_targets
from echo_lora.method.variants import as_drawn, changes_base
from echo_lora.models import load_base_model
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.sections import PROJECT
from echo_lora.training.checkpoint import fill

# The recipe's names of the trainer's configuration keys that decide a run's result.
RECIPE_KEYS = {
    "adapter.init_lora_weights": "lora.init",
    "adapter.lora_alpha": "lora.alpha",
    "adapter.lora_dropout": "lora.dropout",
    "adapter.r": "lora.r",
    "adapter.target_modules": "lora.target_modules",
    "adapter.use_dora": "method",
    "adapter.use_rslora": "method",
    "base.attn_implementation": "attn_implementation",
    "base.dtype": "dtype",
    "base.quantization": "quantization",
    "base.sha256": "model",
    "data.sha256": "data",
    "echo.routing_seed": "seeds.routing",
    "training.batches": "training.batch_size, training.gradient_accumulation",
    "training.data_seed": "seeds.data_order",
    "training.lr_scheduler_type": "training.schedule",
    "training.max_steps": "training.steps",
    "training.num_train_epochs": "training.epochs",
    "training.optim": "training.optimizer",
    "training.seed": "seeds.initialisation",
}

VARIANTS: dict[str, dict[str, bool]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def load_base(recipe: Recipe) -> PreTrainedModel:
    """The recipe's base model. Raises EchoModelError."""
    return load_base_model(
        recipe.model, recipe.dtype, recipe.attn_implementation, recipe.quantization, recipe.trust_remote_code
    )


def lora_config(recipe: Recipe) -> LoraConfig:
    """The PEFT configuration of the recipe's adapter."""
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        init_lora_weights=True if recipe.lora.init == "default" else recipe.lora.init,
        target_modules=recipe.lora.target_modules,
        **VARIANTS[recipe.method],
        task_type="CAUSAL_LM",
    )


def add_adapter(recipe: Recipe, base: PreTrainedModel) -> PeftModel:
    """The base with a freshly initialised adapter, and with the echo if the recipe has it on.

    Raises EchoModelError if the base does not support it.
    """
    set_seed(recipe.seeds.initialisation)
    width = getattr(base.config.get_text_config(), "hidden_size", None)
    if width is not None and recipe.lora.r > width:
        raise EchoModelError(
            f"lora.r = {recipe.lora.r} is larger than the width of {recipe.model}, {width}, which limits the rank of "
            "an update. Lower it."
        )
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = lora_config(recipe)
    try:
        if recipe.echo:
            model: PeftModel = EchoModel(base, config, recipe.build_echo_config())
        else:
            refuse_repacked_weights(base)
            model = get_peft_model(base, config)
            model.initial_adapter = as_drawn(model, "default")  # as an EchoModel has it; `save_verified` needs it
    except (ValueError, re.error) as error:  # PEFT's, for modules that are missing or can't be adapted
        if isinstance(error, EchoError):
            raise
        raise EchoModelError(
            f"lora.target_modules = {recipe.lora.target_modules} does not fit {recipe.model}: {error} "
            "Name linear modules of this model, or use all-linear."
        ) from error
    _refuse_narrow(recipe, model)
    if unmatched := unmatched_targets(model, recipe.lora.target_modules, "default"):
        ends = {name.rpartition(".")[2] for name in (*linear, *model.base_model.targeted_module_names)}
        raise EchoModelError(
            f"lora.target_modules names {unmatched[0]!r}, but the name of no adapted module of {recipe.model} ends "
            f"that way.{nearest(unmatched[0], sorted(ends))} Correct it, or leave it out."
        )
    return model


def _refuse_narrow(recipe: Recipe, model: PeftModel) -> None:
    """Raises EchoModelError if lora.init takes the adapter from a matrix that has fewer dimensions than lora.r."""
    for name, module in model.named_modules():
        if name.endswith(".lora_A.default") and len(module.weight) < recipe.lora.r:
            raise EchoModelError(
                f"lora.init = {recipe.lora.init} takes the adapter from the base's matrices, and that of "
                f"{name.removesuffix('.lora_A.default')} has only {len(module.weight)} dimensions, fewer than lora.r = "
                f"{recipe.lora.r}. Lower lora.r, or name other lora.target_modules."
            )


def whole_model(recipe: Recipe, model: PeftModel, tensors: dict[str, Tensor]) -> PeftModel:
    """The model itself, or, if FSDP has sharded it, the base loaded again with the adapter's tensors.

    tensors: those of the adapter, whole. One process alone can't run a sharded model, as saving it verified needs.
    """
    if not is_sharded(model.parameters()):
        return model
    whole = add_adapter(recipe.model_copy(update={"echo": False}), load_base(recipe))
    fill(get_peft_model_state_dict(whole), tensors)
    return whole


def parameter_counts(model: PeftModel) -> tuple[int, int]:
    """Number of parameters of the adapter as it is saved, and of the echo."""
    echo = sum(p.numel() for p in model.echo.parameters()) if isinstance(model, EchoModel) else 0
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) - echo
    return adapter * (2 if is_saved_as_lora(model) else 1), echo


def is_saved_as_lora(model: PeftModel) -> bool:
    """Whether the adapter is saved as a LoRA of twice the rank, since its creation changed the base's weights."""
    return changes_base(model.peft_config[model.active_adapters[0]]) is not None


def training_arguments(recipe: Recipe, checkpoints: Path) -> SFTConfig:
    """The recipe's `training` as arguments of transformers and TRL, whose defaults differ."""
    training = recipe.training
    # the only constant schedule that takes a warm-up, which may have 0 steps
    schedule = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    return SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=training.epochs if training.epochs is not None else 1.0,
        max_steps=training.steps if training.steps is not None else -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_noise_alpha,
        optim=training.optimizer,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=training.bf16,
        save_steps=training.save_every,
        save_total_limit=training.keep_checkpoints,
        logging_steps=training.log_every,
        logging_first_step=True,
        eval_strategy="no" if training.evaluate_every is None else "steps",
        eval_steps=training.evaluate_every,
        report_to=training.report_to or "none",
        run_name=training.run_name or Path(recipe.output).name,
        project=training.project or PROJECT,  # for trackio; `tracking` tells the others
        seed=recipe.seeds.initialisation,
        data_seed=recipe.seeds.data_order,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # `prepare` has tokenised and checked the rows
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # bf16 on a CPU is only allowed with this set
        disable_tqdm=True,  # recipe.train shows its own progress
    )


def recipe_key(key: str) -> str:
    """The recipe's name for a trainer's configuration key, followed by the trainer's, whose values messages show."""
    section, _, name = key.partition(".")
    own = RECIPE_KEYS.get(key, f"echo_config.{name}" if section == "echo" else key)
    return key if own == key else f"{own} ({key})"
