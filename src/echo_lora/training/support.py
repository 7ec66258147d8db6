"""What training with the echo does not support: checks that name the setting, the reason and the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from transformers.training_args import OptimizerNames

from echo_lora.data.check import refuse_unfit_tokens
from echo_lora.data.tokenize import ANSWER
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.method.config import LARGEST_FACTOR
from echo_lora.method.model import EchoModel
from echo_lora.models import has_position_table
from echo_lora.training.collator import LENGTHS, holds_packed, rows_of_packed


def refuse_unfit_data(dataset: Any, source: str, model: Any) -> None:
    """Raises EchoDataError for an empty dataset, and for rows that the model has no embeddings for."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    dataset = rows_of_packed(dataset) if holds_packed(dataset) else dataset
    vocabulary = len(model.get_input_embeddings().weight)
    if not len(dataset):
        raise EchoDataError(f"the {source} has no row. Pass at least one.")
    if not vocabulary:  # sharded away by ZeRO-3
        return
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    refuse_unfit_tokens(
        dataset,
        source,
        vocabulary=vocabulary,
        positions=positions,
        has_table=lambda: has_position_table(model, positions or 0),
    )


def refuse_arguments(args: Any) -> None:
    """Raises EchoConfigError, which names the argument, for settings that contradict the echo."""
    reasons = {
        "label_smoothing_factor": "the step computes its own losses",
        "use_liger_kernel": "it replaces the forward that the step calls",
        "optim_target_modules": "its patterns would match the echo networks",
        "ddp_static_graph": "routed and unrouted steps have different graphs",
    }
    if getattr(args, "optim", None) in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
        raise EchoConfigError(
            f"optim={args.optim.value!r} can't be combined with the echo: it has one learning rate for all parameters, "
            "and updates them before their gradients can be checked. Use 'adamw_torch'."
        )
    for name, reason in reasons.items():
        if getattr(args, name, None):
            raise EchoConfigError(
                f"{name}={getattr(args, name)} can't be combined with the echo: {reason}. Leave it out."
            )
    _refuse_packing(args)
    is_checkpointed = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    if getattr(args, "torch_compile", None) and is_checkpointed:
        raise EchoConfigError(
            f"torch_compile={args.torch_compile} can't be combined with activation_checkpointing and the echo: torch "
            "can't trace the contexts that recomputation needs. Set one of them to False."
        )
    if (getattr(args, "loss_type", None) or "nll") != "nll":
        raise EchoConfigError(f"loss_type={args.loss_type!r} can't be combined with the echo. Use 'nll'.")


def _refuse_packing(args: Any) -> None:
    """Raises EchoConfigError for packing that cuts rows or lets them see each other. args: an SFTConfig, or others."""
    packs = [name for name in ("packing", "eval_packing") if getattr(args, name, None)]
    if packs and getattr(args, "packing_strategy", None) == "wrapped":
        raise EchoConfigError(
            "packing_strategy='wrapped' can't be combined with the echo: it cuts rows to fill up a batch, and a piece "
            "may have no prompt or no answer. Use 'bfd', which keeps rows whole."
        )
    if packs == ["eval_packing"] and not getattr(args, "padding_free", None):
        raise EchoConfigError(
            "eval_packing=True needs packing=True: otherwise TRL pads the packed rows and no longer says where each "
            "begins, so they would see each other. Set packing=True too, or leave eval_packing out."
        )


def refuse_deepspeed(deepspeed: Any, model: EchoModel) -> None:
    """Raises EchoConfigError for settings that DeepSpeed can't honour, since it clips and steps by itself."""
    config = model.echo_config
    for name, is_set in {
        "echo_lr_warmup": config.echo_lr_warmup > 0,
        "gradient_clipping": config.gradient_clipping == "apart",
    }.items():
        if deepspeed and is_set:
            raise EchoConfigError(
                f"{name}={getattr(config, name)!r} can't be combined with DeepSpeed, which clips gradients and updates "
                "weights by itself. Leave it out, or use DDP or FSDP2."
            )


def refuse_answer_weight(trainer: Any) -> None:
    """Raises EchoConfigError for a bad answer_weight, and for settings with which it would have no effect."""
    weight, args, data = trainer.answer_weight, trainer.args, trainer.train_dataset
    if not (isinstance(weight, (int, float)) and 0 < weight <= LARGEST_FACTOR):
        raise EchoConfigError(f"answer_weight = {weight!r} must be a number above 0, at most {LARGEST_FACTOR:g}.")
    if weight == 1:
        return
    if trainer._echo_model is None and not trainer._is_sft:
        raise EchoConfigError(
            f"answer_weight={weight:g} without the echo has no effect in EchoTrainer, where the model computes its own "
            "loss. Use EchoSFTTrainer, or leave the weight out."
        )
    for name, plain in {"loss_type": "nll", "label_smoothing_factor": 0, "use_liger_kernel": False}.items():
        if getattr(args, name, plain) != plain:
            raise EchoConfigError(
                f"{name}={getattr(args, name)!r} can't be combined with answer_weight={weight:g}. Leave one out."
            )
    if isinstance(data, Dataset) and ANSWER not in data.column_names:
        raise EchoConfigError(
            f"answer_weight={weight:g} weighs answers against prompts, but only answers are trained on. Set "
            "completion_only_loss=False, with prompt and completion columns, or leave the weight out."
        )


def refuse_loraplus(trainer: Any) -> None:
    """Raises EchoConfigError for a bad loraplus_lr_ratio, and where another optimizer would be used instead."""
    ratio = trainer.loraplus_lr_ratio
    if ratio is None:
        return
    if not (isinstance(ratio, (int, float)) and 0 < ratio <= LARGEST_FACTOR):
        raise EchoConfigError(f"loraplus_lr_ratio = {ratio!r} must be a number above 0, at most {LARGEST_FACTOR:g}.")
    for what, is_set in {
        "an optimizer of your own": trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        f"optim={trainer.args.optim!r}": trainer.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO),
    }.items():
        if is_set:
            raise EchoConfigError(
                f"loraplus_lr_ratio={ratio:g} can't be combined with {what}: LoRA+ makes its own groups of parameters. "
                "Leave one out."
            )


def refuse_packed_data(trainer: Any, dataset: Any, source: str) -> None:
    """Raises EchoDataError for packed rows whose batch would not say where each begins."""
    collator = trainer.data_collator.collate
    is_packing = trainer._is_sft and getattr(collator, "padding_free", False)
    if LENGTHS in (getattr(dataset, "column_names", None) or []) and not (is_packing and holds_packed(dataset)):
        raise packed_before(source)
    says_where = ("return_position_ids", "return_seq_idx", "return_flash_attn_kwargs")
    if isinstance(collator, DataCollatorWithFlattening) and not any(getattr(collator, name) for name in says_where):
        raise EchoDataError(
            "DataCollatorWithFlattening joins rows, and with return_position_ids=False the batch does not say where "
            "each begins. Leave that argument out."
        )


def packed_before(source: str) -> EchoDataError:
    """The error for rows that somebody else packed."""
    return EchoDataError(
        f"the {source} is packed already (it has a column {LENGTHS}), so its rows can't be checked. Pass the rows as "
        "they were before; EchoSFTTrainer packs them with packing=True."
    )


def refuse_parallelism(state: Any, *, has_echo: bool) -> None:
    """Raises EchoConfigError for unsupported parallelism. state: accelerate's."""
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    parallelism = getattr(state, "parallelism_config", None)
    for name in ("cp", "sp"):
        if has_echo and getattr(parallelism, f"{name}_enabled", False):
            raise EchoConfigError(
                f"parallelism_config with {name}_size={getattr(parallelism, f'{name}_size')} can't be combined with "
                "the echo: it splits rows across processes, and the echo needs whole rows. Set it to 1."
            )
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise EchoConfigError(
            f"fsdp_version={fsdp.fsdp_version} is not supported: it flattens the adapter's tensors, which then can't "
            "be saved, checked and loaded by name. Set fsdp_version: 2 in the fsdp_config."
        )
    if has_echo and fsdp is not None and fsdp.activation_checkpointing:
        raise EchoConfigError(
            "fsdp_activation_checkpointing=True can't be combined with the echo: it would recompute the echo-on pass "
            "without its echo. Set it to false, and activation_checkpointing=True in the training arguments."
        )
    if has_echo and deepspeed is not None and deepspeed.zero_stage == 3:
        raise EchoConfigError(
            "DeepSpeed's zero_optimization.stage=3 can't be combined with the echo: in an unrouted step it would apply "
            "the echo's gradients of an earlier step again. Use FSDP2, which shards the same tensors."
        )


def keep_float32(fsdp: Any) -> None:
    """Keep losses and gradient reduction in float32; under FSDP2 accelerate's bf16 would round both."""
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        fsdp.mixed_precision_policy = dataclasses.replace(
            fsdp.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def refuse_lonely_rows(trainer: Any) -> None:
    """Raises EchoConfigError if the control `shuffled` would meet a batch of one row."""
    if not trainer._echo_model.echo_config.mixes_rows:
        return
    batch = trainer.args.per_device_train_batch_size
    rows = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else 0  # unknown for a stream
    if holds_packed(trainer.train_dataset) and min(map(len, trainer.train_dataset[LENGTHS])) > 1:
        return
    if batch < 2 or (rows % batch == 1 and not trainer.args.dataloader_drop_last):
        raise EchoConfigError(
            f"echo_kind='shuffled' gives each row the echo of another row of its batch, but {rows} rows in batches of "
            f"{batch} leave a batch with one row. Change per_device_train_batch_size, or set dataloader_drop_last=True."
        )
