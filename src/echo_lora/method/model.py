"""EchoModel: a PEFT model whose training forward is one step of Echo-LoRA.

In training mode with labels, one `forward` runs both passes and all losses, so that DDP and FSDP see one forward per
step. In eval mode, without labels, with `echo_enabled = False`, with another adapter active or with the adapter
disabled, it is the plain PEFT model. `save_pretrained` writes a plain PEFT adapter (equation 8).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from echo_lora.errors import EchoDataError, EchoModelError
from echo_lora.method import losses, refusals
from echo_lora.method.alignment import AlignedRows
from echo_lora.method.checkpointing import Checkpointing, Freezing
from echo_lora.method.config import EchoConfig
from echo_lora.method.echo import EchoNetworks
from echo_lora.method.grouping import aligned_groups, in_groups, price_of_group
from echo_lora.method.injection import Injector
from echo_lora.method.kept_echo import KeptEchoMixin
from echo_lora.method.lm_head import Head
from echo_lora.method.neftune import with_one_noise
from echo_lora.method.packing import unpacked
from echo_lora.method.prefix import PrefixSharing, fitting
from echo_lora.method.routing import default_clock, distillation_weight, is_routed
from echo_lora.method.sharing import angles_depend_on_length
from echo_lora.method.step import EchoOutput, router_aux_loss_coef, training_step
from echo_lora.method.targets import decoder_layers, listed, target_modules, unmatched_targets
from echo_lora.method.trial import Abilities
from echo_lora.method.variants import as_drawn, warn_of_changed_base

logger = logging.getLogger(__name__)


def get_echo_model(
    model: PreTrainedModel,
    peft_config: LoraConfig,
    echo_config: EchoConfig | None = None,
    adapter_name: str = "default",
    **kwargs: Any,
) -> EchoModel:
    """Wrap a base model for training with the echo, as `peft.get_peft_model` wraps it without.

    The adapter's initial weights are those that `get_peft_model` would draw. Further keyword arguments are passed to
    the PEFT model. Warns about a name in target_modules that matches no module, and about a variant that changes the
    base's weights. Raises EchoModelError if the base model or the adapter does not support the echo, EchoConfigError if
    a layer does not exist.
    """
    given = peft_config.target_modules
    wrapped = EchoModel(model, peft_config, echo_config or EchoConfig(), adapter_name, **kwargs)
    if unmatched := unmatched_targets(wrapped, given, adapter_name):
        logger.warning(
            f"LoraConfig.target_modules names {', '.join(unmatched)}, but the name of no adapted module ends that way: "
            "PEFT ignores it. Correct the name, or leave it out."
        )
    warn_of_changed_base(peft_config)
    return wrapped


class EchoModel(KeptEchoMixin, PeftModelForCausalLM):
    """A PEFT LoRA model with echo networks beside it. Made by `get_echo_model` or `attach_echo`, which also warn.

    echo: the echo networks; trainable, part of `parameters()` and of training checkpoints, never of an adapter.
    echo_enabled: False makes it a plain PEFT model.
    without_echo: the LoRA modules of the target layers that receive no echo, by name, with the reason.
    initial_adapter: if the base lost it (PiSSA and the like) and it is known, the initial adapter; otherwise None.
    """

    initial_adapter: dict[str, Tensor] | None

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: LoraConfig,
        echo_config: EchoConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        refusals.refuse_lora_config(peft_config)
        refusals.refuse_adapted(model)
        refusals.refuse_base(model)
        peft_config.base_model_name_or_path = model.__dict__.get("name_or_path", None) or None  # as get_peft_model
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.create_echo(echo_config, adapter_name)
        self.initial_adapter = as_drawn(self, adapter_name)

    def create_echo(self, echo_config: EchoConfig, adapter_name: str) -> None:
        """Create the echo beside the adapter, and hook it to the target modules."""
        base = self.get_base_model()
        _, layers = decoder_layers(base)
        source = echo_config.resolve_source_layers(len(layers))
        targets = echo_config.resolve_target_layers(len(layers))
        modules, self.without_echo = target_modules(base, targets, adapter_name, echo_config.injection_site)
        self.echo_config = echo_config
        self.initial_adapter = None  # unknown unless the adapter was drawn here
        self.echo_adapter = adapter_name
        self.echo_enabled = True
        self._source_layers = [layers[index] for index in source]  # a list, so that they are not registered twice
        self._injector = Injector(modules, adapter_name, echo_config.injection_site)
        self._sharing = PrefixSharing(list(layers))
        self._freezing = Freezing()
        self._checkpointing = Checkpointing(
            self._injector.checkpoint_contexts, self._sharing.checkpoint_contexts, self._freezing.checkpoint_contexts
        )
        self._abilities = Abilities(self._sharing, self._injector.entries)
        self._routing_clock: tuple[int, int] | None = None
        self.is_stepping = False  # whether a forward was a step of Echo-LoRA since the clock was set
        self._warned: set[str] = set()

        widths = Injector.widths(modules, echo_config.injection_site)
        # discarded at the end: PEFT saves tensors whose names have `lora_`, and these are `echo.…`      (equation 8)
        self.echo = EchoNetworks(base.config.get_text_config().hidden_size, widths, echo_config)
        self.echo.to(next(iter(modules.values())).lora_A[adapter_name].weight.device)
        if self._checkpointing.is_enabled(base):
            self.gradient_checkpointing_enable()
        if self.without_echo:
            self._warn_once(f"These modules keep their LoRA but receive no echo: {listed(self.without_echo)}.")

    # -------------------------------------------------------------- the step

    def forward(  # the parameters of PeftModelForCausalLM, so that what is given by position arrives
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """In training mode with labels: one step of Echo-LoRA, returning an EchoOutput. Otherwise the plain PEFT model.

        input_ids, attention_mask, labels: (B, T) int64, padded on either side, labels -100 outside the answer. If the
        labels cover prompt tokens too, completion_mask (B, T) is 1 at answer tokens; prompt tokens are trained in the
        echo-off pass only, and answer_weight weighs the answer losses against theirs. Rows may be packed, with
        position_ids instead of the attention_mask (`packing.unpacked`). num_items_in_batch: supervised tokens of the
        whole optimizer step; Trainer passes it.
        Raises EchoDataError for rows without prompt or answer, EchoModelError if the routing clock is not set or a
        forced `echo_step` is impossible.
        """
        kwargs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        if not self.applies(labels):
            for name in ("completion_mask", "answer_weight"):
                kwargs.pop(name, None)
            return super().forward(**kwargs)
        self.is_stepping = True
        step, total = default_clock(self.echo_config) if self._routing_clock is None else self._routing_clock
        if self._routing_clock is None:
            self.end_step()  # without a clock each forward counts as a step
        return self.echo_losses(
            is_routed=is_routed(self.echo_config, step, total),
            distillation_weight=distillation_weight(self.echo_config, step, total),
            **kwargs,
        )

    def echo_losses(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        completion_mask: Tensor | None = None,
        is_routed: bool,
        num_items_in_batch: Tensor | int | None = None,
        distillation_weight: float | None = None,
        answer_weight: float = 1.0,
        **kwargs: Any,
    ) -> EchoOutput:
        """The step with or without the echo-on pass, as `is_routed` says, in any mode: for validation and measurement.

        distillation_weight: overrides the configuration's. Everything else is as in `forward`.
        """
        if input_ids is None or labels is None:
            raise EchoDataError(
                "a step with the echo needs input_ids and labels, but one of them is missing; inputs_embeds can't be "
                "aligned at the boundary. Pass both, or set model.echo_enabled = False."
            )
        columns = input_ids.shape[1]
        rows_of_batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch = unpacked(kwargs | rows_of_batch | {"completion_mask": completion_mask})
        refusals.refuse_batch(batch)
        config = self.echo_config
        if distillation_weight is not None:
            config = dataclasses.replace(config, distillation_weight=distillation_weight)
        base = self.get_base_model()
        is_checkpointed = self._checkpointing.is_on(base)
        sharing, groups = self._arranged(batch, is_routed)
        if sharing is not None and self._abilities.why_full_on(self._plain_forward, base, groups[0]) is not None:
            sharing, groups = self._arranged(batch, is_routed)  # in full

        def step(rows: AlignedRows, num_items: Tensor | int | None) -> EchoOutput:
            return training_step(
                with_one_noise(self._plain_forward, base.get_input_embeddings(), columns),
                *(self._source_layers, self.echo, self._injector, config, rows),
                is_routed=is_routed,
                sharing=sharing,
                head=self._usable_head(base, rows),
                is_checkpointed=is_checkpointed,
                num_items=num_items,
                answer_weight=answer_weight,
                echo_only=self._freezing.in_echo_on_pass(self.base_model, config, is_checkpointed)
                if is_routed
                else None,
                router_aux_loss_coef=router_aux_loss_coef(base.config),
            )

        return in_groups(step, groups, num_items_in_batch)

    def _arranged(self, batch: dict[str, Any], is_routed: bool) -> tuple[PrefixSharing | None, list[AlignedRows]]:
        """What the echo-on pass shares the prefix by, None if it runs in full; and the rows, aligned for that."""
        base = self.get_base_model()
        reason = self.why_full(batch["input_ids"].device)
        sharing = self._sharing if self._shares_prefix(reason) and is_routed else None
        return sharing, aligned_groups(
            batch,
            price=price_of_group(base, self._source_layers[0], self.echo_config, starts_together=reason is not None),
            passes=(1 + is_routed, 0) if sharing is None else (1, 1),
            shows_length=angles_depend_on_length(base.config),
            starts_together=reason is not None,
        )

    def set_routing_clock(self, step: int, total_steps: int) -> None:
        """Set which optimizer step (from 0) of how many comes next; the routing is a function of it.

        A new step ends the current one, whose rows then enter the statistics of `standardize`. EchoTrainer and
        EchoCallback call this; your own training loop must call it before each step.
        """
        if self._routing_clock is None and self.echo_enabled:
            self.refuse_untrainable()
        if (step, total_steps) != self._routing_clock:
            self.end_step()
        self._routing_clock = (step, total_steps)
        self.is_stepping = False

    def refuse_untrainable(self) -> None:
        """Raises EchoModelError if training would not update the adapter that carries the echo."""
        refusals.refuse_untrainable(self, self.echo_adapter, list(self._injector.modules.values()))

    def end_step(self) -> None:
        """End the current step and clear the clock, as at the start of a training."""
        self._routing_clock = None
        if self.echo.standardize is not None:
            self.echo.standardize.end_step()

    def applies(self, labels: Tensor | None) -> bool:
        """Whether a forward with these labels is a step of Echo-LoRA rather than the plain model's forward."""
        return (
            self.training
            and self.echo_enabled
            and labels is not None
            and not self._adapters_disabled
            and self.active_adapters == [self.echo_adapter]
        )

    # -------------------------------------------------------------- adapters

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Raises EchoModelError: a saved adapter holds no echo, and PEFT would load it as a plain model."""
        raise EchoModelError(
            "a saved adapter holds no echo, so there is no EchoModel to load. To use it, call "
            "PeftModel.from_pretrained. To continue training it, call "
            "attach_echo(PeftModel.from_pretrained(base, folder, is_trainable=True))."
        )

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. The adapter that carries the echo accepts only a saved adapter of the same configuration.

        Raises EchoModelError where PEFT would keep the present adapter's scale, or load only a part of the other.
        """
        if adapter_name != self.echo_adapter or adapter_name not in self.peft_config:
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        other = LoraConfig.from_pretrained(model_id, **self._split_kwargs(dict(kwargs))[0])
        misfit = f"the saved adapter {model_id} does not fit the adapter {adapter_name!r}"
        refusals.refuse_other_scaling(other, self.peft_config[adapter_name], misfit)
        before = {name: t.clone() for name, t in get_peft_model_state_dict(self, adapter_name=adapter_name).items()}
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        for what, keys in (("lacks", result.missing_keys), ("also holds", result.unexpected_keys)):
            if keys:
                set_peft_model_state_dict(self, before, adapter_name=adapter_name)
                raise EchoModelError(
                    f"{misfit}: it {what} {keys[0]} ({len(keys)} such tensors). Pass get_echo_model the LoraConfig "
                    "that the saved adapter was made with."
                )
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Raises EchoModelError for the adapter that carries the echo."""
        if adapter_name == self.echo_adapter:
            raise EchoModelError(
                f"the adapter {adapter_name!r} carries the echo, so it can't be deleted. Use unload() to get the base "
                "model, or load_adapter to replace the adapter's weights."
            )
        super().delete_adapter(adapter_name)

    def echo_branches(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """Each branch of the echo with the weights of the LoRA module that it feeds: lora_A, lora_B."""
        for name, module in self._injector.modules.items():
            yield self.echo.branch(name), [part[self.echo_adapter].weight for part in (module.lora_A, module.lora_B)]

    # ------------------------------------------------------------- diagnosis

    @torch.no_grad()
    def diagnose(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> dict[str, float]:
        """What the echo does on a batch, in the model's current mode; each term is a mean over the answer tokens. [O]

        Returns ce_off, ce_on, distillation, echo_norm, gate_mean, and echo_share: the echo's share of the output of the
        target modules' low-rank branches. Unless ce_on is below ce_off, the distillation has nothing to teach.
        """
        with self._injector.measuring() as shares:
            output = self.echo_losses(input_ids, attention_mask, labels, is_routed=True)
        names = ("ce_off", *losses.ROUTED, "echo_norm", "gate_mean")
        share = sum(share.item() for share in shares) / len(shares)
        return {name: output[name].item() for name in names} | {"echo_share": share}

    # ---------------------------------------------------------- leaving the echo

    def unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As PEFT's: the base without adapter, and without anything of the echo."""
        return self._left(self.base_model.unload(*args, **kwargs))

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As PEFT's: the base with the adapter merged, and without anything of the echo."""
        return self._left(self.base_model.merge_and_unload(*args, **kwargs))

    def _left(self, base: PreTrainedModel) -> PreTrainedModel:
        """The base without the echo's hooks and contexts; the injector's hooks went with the LoRA modules."""
        self._sharing.remove()
        self._checkpointing.leave(base)
        return base

    def _plain_forward(self, *, cache: Cache | None = None, **kwargs: Any) -> Any:
        """The plain PEFT model. Raises EchoModelError if its forward lacks an argument that the step needs."""
        return super().forward(**fitting(self.get_base_model(), cache, kwargs))

    def why_full(self, device: torch.device | None = None) -> str | None:
        """Why the echo-on pass can't share the prefix; None if it can.

        device: where to try the model on a few tokens, once; None reads its configuration only. The trial raises
        EchoModelError if the echo would not enter every target module.
        """
        if device is not None:
            self._injector.follow(self.get_base_model())
        return self._abilities.why_full(self._plain_forward, self.get_base_model(), device)

    def _shares_prefix(self, reason: str | None) -> bool:
        if self.echo_config.echo_step == "full":
            return False
        if reason is not None and self.echo_config.echo_step == "shared_prefix":
            raise EchoModelError(f"echo_step='shared_prefix' is impossible: {reason}. Use echo_step='auto'.")
        if reason is not None:
            self._warn_once(f"The echo-on pass runs on whole rows, not just on the answers: {reason}.")
        return reason is None

    def _usable_head(self, base: PreTrainedModel, rows: AlignedRows) -> Head | None:
        head, reason = self._abilities.head(self._plain_forward, base, rows)
        if reason is not None:
            self._warn_once(f"The logits of all answer tokens are computed at once, which takes memory: {reason}.")
        return head

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            logger.warning(warning)

    # -------------------------------------------------- gradient checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the base model's, but recomputed layers see the injection of their forward.

        Raises EchoModelError for use_reentrant=True, with which they can't.
        """
        self._checkpointing.enable(self.get_base_model(), gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name that transformers 5 uses for `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
