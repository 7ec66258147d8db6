"""The programs that are compared, each a trainer that is ready to step, and the rows of a step.

    trl_lora    TRL's SFTTrainer as it comes
    trl_dora    the same with DoRA
    lora        EchoSFTTrainer without routed steps: a LoRA step that computes logits of answer tokens only
    three_pass  EchoSFTTrainer with the literal step, as [R]: a pass without gradient for z, then two full ones
    echo        EchoSFTTrainer, every step routed
    echo_dora   the same with DoRA

A step is the body of the trainer's own loop: `training_step` with its metrics, clipping and the optimizer.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from echo_lora.data.tokenize import TokenizedRow
from echo_lora.errors import EchoConfigError, nearest
from echo_lora.method.alignment import boundary_positions, injection_mask
from echo_lora.method.echo import apply_control, echo_representation
from echo_lora.method.injection import Injection
from echo_lora.method.losses import NAMES, loss_terms
from echo_lora.method.model import EchoModel
from echo_lora.method.routing import default_clock, distillation_weight
from echo_lora.method.step import EchoOutput, reading, router_aux_loss_coef
from echo_lora.models import load_config
from echo_lora.recipe.build import add_adapter, training_arguments
from echo_lora.recipe.rows import check_rows, prepare_split
from echo_lora.recipe.schema import Recipe
from echo_lora.training.sft import EchoSFTTrainer

MOST_TOKENS = 100_000_000  # of a step; more is a mistake

# ------------------------------------------------------------- the literal step


def three_pass(
    model: EchoModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> EchoOutput:
    """The literal step: z from its own pass, nothing shared, logits everywhere; the same losses and gradients.

    It differs from the model's step in what it runs, not in what it computes: the echo, its controls and the loss
    terms are the functions of `echo_lora.method`. input_ids, attention_mask, labels: (B, T), padded on the right.
    """
    config, base = model.echo_config, model.get_base_model()
    weight = distillation_weight(config, *(model._routing_clock or default_clock(config)))
    config = dataclasses.replace(config, distillation_weight=weight)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)  # (B, T), shifted
    supervised = targets != -100
    echo_only = model._freezing.in_echo_on_pass(model.base_model, config, model._checkpointing.is_on(base))
    model.echo_enabled = False  # the plain PEFT forward
    try:
        with (
            torch.set_grad_enabled(config.source_gradient),
            reading(
                model._source_layers,
                boundary_positions(labels),
                labels.shape[1],
                keeps_graph=config.source_gradient,
            ) as hidden,
        ):
            model(**inputs)
        z = apply_control(echo_representation(hidden, model.echo.standardize), config.echo_kind)
        deltas, echo_norm, gate_mean = model.echo(z)
        off = model(**inputs)
        injection = Injection(deltas, injection_mask(targets, config.injection_mask))
        with echo_only or nullcontext(), model._injector.injecting(injection):
            on = model(**inputs)
    finally:
        model.echo_enabled = True
    model.is_stepping = True  # as its own forward tells EchoCallback
    terms = loss_terms(off.logits[supervised], on.logits[supervised], targets[supervised], config)
    count = supervised.sum() if num_items_in_batch is None else num_items_in_batch
    loss = config.routed_loss_scale * terms["loss"] / count
    if coefficient := router_aux_loss_coef(base.config):
        loss = loss + coefficient * off.aux_loss * supervised.sum() / count
    means = {name: terms[name].detach() / count for name in NAMES if name not in ("loss", "ce_prompt")}
    return EchoOutput(loss=loss, **means, routed=torch.tensor(True), echo_norm=echo_norm, gate_mean=gate_mean)


class ThreePassTrainer(EchoSFTTrainer):
    """EchoSFTTrainer with the literal step instead of the model's own."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(partial(three_pass, model), inputs, *args, **kwargs)


# --------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Batch:
    """The rows of one step."""

    name: str
    rows: list[TokenizedRow]

    @property
    def prompt_tokens(self) -> int:
        return sum(row.answer_start for row in self.rows)

    @property
    def answer_tokens(self) -> int:
        return sum(len(row.labels) - row.answer_start for row in self.rows)

    @property
    def supervised_tokens(self) -> int:
        """Answer tokens that a loss is computed at."""
        return sum(label != -100 for row in self.rows for label in row.labels)

    @cached_property
    def sha256(self) -> str:
        """Of the rows' tokens and labels."""
        return hashlib.sha256(json.dumps(self.features()).encode()).hexdigest()

    def features(self) -> list[dict[str, list[int]]]:
        """The rows as input of a collator."""
        return [{"input_ids": row.input_ids, "labels": row.labels} for row in self.rows]


def parse_shape(text: str) -> tuple[int, int]:
    """Prompt and answer tokens of `96x8`. Raises EchoConfigError."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if match is None:
        raise EchoConfigError(
            f"--shape {text}: write prompt and answer tokens, each from 1 to 9,999,999, with an x between them, as in "
            "--shape 96x8."
        )
    return int(match[1]), int(match[2])


def random_batch(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prompt: int, answer: int, rows: int) -> Batch:
    """Rows of random tokens for the recipe's model, all of one shape."""
    if rows * (prompt + answer) > MOST_TOKENS:
        raise EchoConfigError(
            f"{rows:,} rows of {prompt + answer:,} tokens are too many for a step (at most {MOST_TOKENS:,} tokens). "
            "Use fewer --rows or a smaller --shape."
        )
    vocabulary = load_config(recipe.model, recipe.trust_remote_code).get_text_config().vocab_size
    ids = np.random.default_rng(recipe.seeds.initialisation).integers(vocabulary, size=(rows, prompt + answer))
    if tokenizer.eos_token_id is not None:
        ids[:, -1] = tokenizer.eos_token_id  # the trainer warns if answers do not end
    return Batch(f"{prompt}x{answer}", [TokenizedRow(row, [-100] * prompt + row[prompt:]) for row in ids.tolist()])


def own_batch(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str, rows: int) -> Batch:
    """The recipe's first training rows."""
    check_rows(recipe)
    own = [row for data in prepare_split(recipe, tokenizer, "train") for row in data.rows]
    return Batch(f"rows of {name}", own[:rows])


# ----------------------------------------------------------------- the programs


@dataclass(frozen=True)
class Variant:
    """One way to take a step."""

    trainer: type[SFTTrainer]
    is_dora: bool = False
    routing: float | None = None  # share of steps with an echo-on pass; None without the echo


VARIANTS = {
    "trl_lora": Variant(SFTTrainer),
    "trl_dora": Variant(SFTTrainer, is_dora=True),
    "lora": Variant(EchoSFTTrainer, routing=0.0),
    "three_pass": Variant(ThreePassTrainer, routing=1.0),
    "echo": Variant(EchoSFTTrainer, routing=1.0),
    "echo_dora": Variant(EchoSFTTrainer, is_dora=True, routing=1.0),
}


@dataclass(frozen=True)
class Case:
    """A variant, with or without gradient checkpointing."""

    variant: str
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.variant}, checkpointing {'on' if self.checkpointing else 'off'}"

    @property
    def trl(self) -> Case:
        """TRL's step of the same method."""
        return Case("trl_dora" if VARIANTS[self.variant].is_dora else "trl_lora", self.checkpointing)

    @property
    def lora(self) -> Case:
        """This package's LoRA step."""
        return Case("lora", self.checkpointing)


CASES = [Case(variant, checkpointing) for checkpointing, variant in product((False, True), VARIANTS)]
SETTINGS = {"off": (False,), "on": (True,), "both": (False, True)}  # of gradient checkpointing


def chosen_cases(recipe: Recipe, variants: Sequence[str], checkpointing: str | None) -> list[Case]:
    """The cases that the user asks for, in the order of CASES. Raises EchoConfigError for a name that is unknown.

    Without variants: TRL's step and ours of the recipe's method. checkpointing: off, on or both; None: the recipe's.
    """
    for name in variants:
        if name not in VARIANTS:
            raise EchoConfigError(f"--variant {name}: there is no such step.{nearest(name, [*VARIANTS])}")
    if checkpointing is not None and checkpointing not in SETTINGS:
        raise EchoConfigError(f"--checkpointing {checkpointing}: write {', '.join(SETTINGS)}.")
    default = ("trl_dora", "echo_dora") if recipe.method == "dora" else ("trl_lora", "lora", "echo")
    settings = (recipe.training.gradient_checkpointing,) if checkpointing is None else SETTINGS[checkpointing]
    return [case for case in CASES if case.variant in (variants or default) and case.checkpointing in settings]


class Program:
    """The trainer of one case, prepared as by its `train`."""

    def __init__(
        self,
        case: Case,
        recipe: Recipe,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: Batch,
        scratch: str,
    ) -> None:
        variant = VARIANTS[case.variant]
        recipe = recipe_of_case(case, recipe)
        # a copy with its own modules, hooks and patches, and the base's tensors
        shared = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        self.trainer = variant.trainer(
            model=add_adapter(recipe, shared),
            args=training_arguments(recipe, Path(scratch)),
            train_dataset=Dataset.from_list(batch.features()),
            processing_class=tokenizer,
        )
        if case.checkpointing:
            self.trainer.model.activation_checkpointing_enable(self.trainer.args.activation_checkpointing_kwargs)
        self.trainer.create_optimizer()
        accelerator = self.trainer.accelerator
        self.model, self.trainer.optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.current_gradient_accumulation_steps = 1

    def inputs_of(self, batch: Batch) -> tuple[dict[str, Any], Any]:
        """The rows as collated by the trainer, and its count of supervised tokens."""
        collated = self.trainer.data_collator(batch.features())
        (inputs,), count = self.trainer.get_batch_samples(iter([collated]), 1, self.trainer.args.device)
        return inputs, count

    def step(self, inputs: dict[str, Any], num_items: Any) -> None:
        """One optimizer step, as in the trainer's loop, until the device is done."""
        trainer = self.trainer
        args, state, control, callbacks = trainer.args, trainer.state, trainer.control, trainer.callback_handler
        callbacks.on_step_begin(args, state, control)
        trainer.training_step(self.model, dict(inputs), num_items)
        if args.max_grad_norm > 0:
            trainer._clip_grad_norm(self.model)
        callbacks.on_pre_optimizer_step(args, state, control)
        trainer.optimizer.step()
        callbacks.on_optimizer_step(args, state, control)
        self.model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    @property
    def routed(self) -> float:
        """Share of the steps so far that had an echo-on pass."""
        if not isinstance(self.trainer, EchoSFTTrainer):
            return 0.0
        meter = self.trainer._meter
        return meter.routed_steps / max(meter.optimizer_steps, 1)


def recipe_of_case(case: Case, recipe: Recipe) -> Recipe:
    """The recipe with this case's method, echo and checkpointing, and one batch per step."""
    variant = VARIANTS[case.variant]
    plain = "lora" if recipe.method == "dora" else recipe.method
    training = {"gradient_checkpointing": case.checkpointing, "gradient_accumulation": 1, "report_to": []}
    routing = {"routing_schedule": "constant", "routing_start": variant.routing or 0.0}
    return recipe.model_copy(
        update={
            "method": "dora" if variant.is_dora else plain,
            "echo": variant.routing is not None,
            "echo_config": recipe.echo_config.model_copy(update=routing),
            "training": recipe.training.model_copy(update=training),
        }
    )
