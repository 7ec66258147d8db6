"""EchoModel: a PEFT model whose training forward is one step of Echo-LoRA.

In training mode with labels, one `forward` runs both passes and all losses, so that DDP and FSDP see one forward
per step. In eval mode, without labels, with `echo_enabled = False`, with another adapter active or with the
adapter disabled, it is the plain PEFT model. What `save_pretrained` writes is a plain PEFT adapter.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Cache, DynamicCache, PreTrainedModel

from echo_lora.errors import EchoDataError, EchoModelError
from echo_lora.method.alignment import AlignedRows, align_rows
from echo_lora.method.checkpointing import Freezing, JoinedContexts, checkpoint_functions
from echo_lora.method.config import EchoConfig
from echo_lora.method.echo import EchoNetworks, apply_control, echo_representation
from echo_lora.method.injection import Injection, Injector, decoder_layers, listed, target_modules, unmatched_targets
from echo_lora.method.lm_head import Head
from echo_lora.method.neftune import with_one_noise
from echo_lora.method.prefix import PrefixSharing, cache_argument
from echo_lora.method.routing import distillation_weight, is_routed
from echo_lora.method.sharing import angles_depend_on_length, why_full
from echo_lora.method.step import EchoOutput, reading, training_step
from echo_lora.method.trial import refuse_base, why_full_by_trial
from echo_lora.method.variants import SUBTRACTED, changes_base

logger = logging.getLogger(__name__)


# What decides how an adapter acts, beside the names and shapes of its tensors.
SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")

IGNORED_INPUTS = {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits"}

PROBE_COLUMNS = 2  # on which the output layer is compared with the model's own logits

# What a forward may lack: columns that need no logits are cut off afterwards, and the rest are requests, not inputs.
DISPENSABLE = {"position_ids", "logits_to_keep", "use_cache", "output_router_logits"}


def get_echo_model(
    model: PreTrainedModel,
    peft_config: LoraConfig,
    echo_config: EchoConfig | None = None,
    adapter_name: str = "default",
    **kwargs: Any,
) -> EchoModel:
    """Wrap a base model for training with the echo, as `peft.get_peft_model` wraps it without.

    The adapter's initial weights are the ones that `get_peft_model` would draw. Further keyword arguments go to
    the PEFT model. A name in target_modules that matches no module is a warning. Raises EchoModelError if the base
    model or the adapter can't carry the echo, EchoConfigError if a layer does not exist.
    """
    if not isinstance(peft_config, LoraConfig):
        raise EchoModelError(
            f"the echo enters LoRA modules, but peft_config is a {type(peft_config).__name__}. "
            "Use peft.LoraConfig (use_dora and use_rslora are supported)."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise EchoModelError(
            f"LoraConfig.task_type is {peft_config.task_type!r}, but the echo trains causal language models. "
            "Use 'CAUSAL_LM'."
        )
    if peft_config.alora_invocation_tokens:
        raise EchoModelError(
            "activated LoRA (alora_invocation_tokens) chooses its own positions; it can't be combined with the echo."
        )
    if peft_config.bias != "none":
        raise EchoModelError(
            f"LoraConfig.bias is {peft_config.bias!r}: the base's biases would be trained and saved with the adapter, "
            "and the echo's with them. Use bias='none'; lora_bias=True gives the adapter biases of its own."
        )
    if peft_config.arrow_config is not None:
        raise EchoModelError(
            "LoraConfig.arrow_config routes between adapters that are trained already; train each of them with the "
            "echo, without it."
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
            "LoraConfig.inference_mode is True, as saved adapters have it: the adapter would be frozen, and only the "
            "echo, which is not deployed, trained. Set peft_config.inference_mode = False."
        )
    if hasattr(model, "peft_config"):
        raise EchoModelError(
            f"{type(model).__name__} carries a PEFT adapter already. Pass the base model (`.unload()` removes an "
            "adapter); to go on training a saved adapter, call `load_adapter` on the model that this function returns."
        )
    refuse_base(model)
    peft_config.base_model_name_or_path = model.__dict__.get("name_or_path", None) or None  # as get_peft_model
    given = peft_config.target_modules
    wrapped = EchoModel(model, peft_config, echo_config or EchoConfig(), adapter_name, **kwargs)
    if unmatched := unmatched_targets(wrapped, given, adapter_name):
        logger.warning(
            "LoraConfig.target_modules names %s, which no module with an adapter has at the end of its name. PEFT "
            "trains the others only.",
            ", ".join(unmatched),
        )
    return wrapped


class EchoModel(PeftModelForCausalLM):
    """A PEFT LoRA model with echo networks beside it. Made by `get_echo_model`.

    echo: the echo networks; trainable, part of `parameters()` and of training checkpoints, never of an adapter.
    echo_enabled: set it to False for a plain PEFT model.
    without_echo: the LoRA modules of the target layers that the echo does not enter, by name, with the reason.
    initial_adapter: the adapter as it was drawn, where it was subtracted from the base's weights (PiSSA and its kin).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: LoraConfig,
        echo_config: EchoConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        base = self.get_base_model()
        _, layers = decoder_layers(base)
        source = echo_config.resolve_source_layers(len(layers))
        targets = echo_config.resolve_target_layers(len(layers))
        modules, self.without_echo = target_modules(base, targets, adapter_name, echo_config.injection_site)

        self.echo_config = echo_config
        self.initial_adapter = self._as_drawn(peft_config, adapter_name)
        self.echo_adapter = adapter_name
        self.echo_enabled = True
        self._keeps_echo = False
        self._reaches_all = False
        self._source_layers = [layers[index] for index in source]  # a list, so that they are not registered twice
        self._injector = Injector(modules, adapter_name, echo_config.injection_site)
        self._sharing = PrefixSharing(list(layers))
        self._freezing = Freezing()
        self._head: Head | None = None
        self._head_is_known = False
        self._tried: dict[bool, str | None] = {}  # by whether a prefix was tried: what stands against sharing it
        self._routing_clock: tuple[int, int] | None = None
        self.is_stepping = False  # whether a forward was a step of Echo-LoRA since the clock was set
        self._said: set[str] = set()

        widths = Injector.widths(modules, echo_config.injection_site)
        self.echo = EchoNetworks(base.config.get_text_config().hidden_size, widths, echo_config)
        self.echo.to(next(iter(modules.values())).lora_A[adapter_name].weight.device)
        if base.is_activation_checkpointing:
            self.gradient_checkpointing_enable()
        if self.without_echo:
            self._say_once(f"These keep their LoRA and get no echo: {listed(self.without_echo)}.")
        if (what := changes_base(peft_config)) is not None:
            self._say_once(
                f"{what} changed the base's weights, and checkpoints fit these alone. Save the adapter with "
                "save_verified, which proves it on the base as it was."
            )

    def _as_drawn(self, config: LoraConfig, adapter_name: str) -> dict[str, Tensor] | None:
        if not str(config.init_lora_weights).lower().startswith(SUBTRACTED):
            return None
        state = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

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
        """In training mode with labels: the whole step, returning an EchoOutput. Else: the plain PEFT model.

        input_ids, attention_mask, labels: (B, T) int64, rows padded on either side, labels -100 outside the
        answer. Where labels cover prompt tokens too, completion_mask (B, T) is 1 at answer tokens; prompt tokens are
        trained in the echo-off pass only, and answer_weight is the weight of the answer's losses beside theirs.
        num_items_in_batch: supervised tokens of the whole optimizer step; Trainer passes it.
        Raises EchoDataError for rows without prompt or answer and for packed rows, EchoModelError if the
        routing clock is not set or a forced `echo_step` is impossible.
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
        step, total = self._clock()
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
        """The step with the echo-on pass run or not as asked, in any mode: for validation and measurement.

        distillation_weight: in place of the configuration's. Everything else is as in `forward`.
        """
        if input_ids is None or labels is None:
            raise EchoDataError("the echo needs input_ids and labels; inputs_embeds can't be aligned at the boundary.")
        _refuse_packed(attention_mask, kwargs)
        if kwargs.get("fused_lm_head"):
            raise EchoModelError(
                "TRL's SFTTrainer computes the loss itself, from log-probabilities, and would leave out the echo. Use "
                "EchoSFTTrainer, with the same arguments."
            )
        unknown = [key for key, value in kwargs.items() if value is not None and key not in IGNORED_INPUTS]
        if unknown:
            raise EchoDataError(
                f"the echo's step takes input_ids, attention_mask and labels, but was given {', '.join(unknown)} too, "
                "which would be lost when rows are aligned. Leave them out of the batch."
            )
        base = self.get_base_model()
        is_checkpointed = self._is_checkpointed(base)
        reason = self._why_full(base, input_ids.device)
        shares_prefix = self._shares_prefix(reason)
        rows = align_rows(
            input_ids,
            attention_mask,
            labels,
            completion_mask,
            shows_length=angles_depend_on_length(base.config),
            starts_together=reason is not None,
        )
        if is_routed:
            self._injector.follow(base)
        output = training_step(
            with_one_noise(self._plain_forward, base.get_input_embeddings(), input_ids.shape[1]),
            self._source_layers,
            self.echo,
            self._injector,
            self._config_of_step(distillation_weight),
            rows,
            is_routed=is_routed,
            sharing=self._sharing if is_routed and shares_prefix else None,
            head=self._usable_head(base, rows),
            is_checkpointed=is_checkpointed,
            num_items=num_items_in_batch,
            answer_weight=answer_weight,
            echo_only=self._echo_only(is_checkpointed) if is_routed else None,
            router_aux_loss_coef=_router_aux_loss_coef(base.config),
        )
        if is_routed and not self._reaches_all:
            self._reaches_all = True
            drops_layers = bool(getattr(base.config.get_text_config(), "layerdrop", False))
            if not (_is_compiled(base) or drops_layers):
                self._injector.require_reached()
        return output

    def _config_of_step(self, distillation_weight: float | None) -> EchoConfig:
        """The configuration, with μ as it is in this step."""
        if distillation_weight is None or distillation_weight == self.echo_config.distillation_weight:
            return self.echo_config
        return dataclasses.replace(self.echo_config, distillation_weight=distillation_weight)

    def _echo_only(self, is_checkpointed: bool) -> AbstractContextManager[None] | None:
        """What freezes all but the echo in the echo-on pass, where that is to train the echo networks alone."""
        if self.echo_config.echo_on_updates == "all" or not torch.is_grad_enabled():
            return None
        trained = [parameter for parameter in self.base_model.parameters() if parameter.requires_grad]
        reason = None
        if any(isinstance(parameter, DTensor) for parameter in trained):
            reason = "with parameters that are shared out among processes, as FSDP2 does"
        elif is_checkpointed and len({parameter.device for parameter in trained}) > 1:
            reason = "with gradient checkpointing in a model that lies on several devices"
        if reason is not None:
            raise EchoModelError(
                f"echo_on_updates='echo_only' can't be combined {reason}: the adapter would not be frozen reliably in "
                "the echo-on pass. Use echo_on_updates='all'."
            )
        return self._freezing.frozen(trained)

    def set_routing_clock(self, step: int, total_steps: int) -> None:
        """Tell which optimizer step (from 0) of how many comes next; routing is a function of it.

        Another step than before ends the one under way, whose rows then count where states are standardised.
        EchoTrainer and EchoCallback do this; a training loop of one's own calls it before each step.
        """
        if self._routing_clock is None and self.echo_enabled:
            self._refuse_untrainable()
        if (step, total_steps) != self._routing_clock:
            self.end_step()
        self._routing_clock = (step, total_steps)
        self.is_stepping = False

    def end_step(self) -> None:
        """Forget the clock, as at the start of a training: what comes next belongs to no step before."""
        self._routing_clock = None
        if self.echo.standardize is not None:
            self.echo.standardize.end_step()

    def _clock(self) -> tuple[int, int]:
        self.is_stepping = True
        if self._routing_clock is not None:
            return self._routing_clock
        if self.echo_config.routing_schedule == "constant" and self.echo_config.routing_start in (0.0, 1.0):
            self.end_step()  # every forward is taken for a step
            return 0, 1  # and every step is the same
        raise EchoModelError(
            "the echo does not know which training step this is, so it can't draw the routing. Use EchoTrainer or "
            "EchoSFTTrainer, add EchoCallback() to your Trainer's callbacks, or call "
            "model.set_routing_clock(step, total_steps) before each step."
        )

    def applies(self, labels: Tensor | None) -> bool:
        """Whether a forward with these labels would be a step of Echo-LoRA, not the plain model's."""
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
        """Raises EchoModelError: a saved adapter is a plain one, and PEFT would make a plain model of it."""
        raise EchoModelError(
            "a saved adapter holds no echo, so there is no EchoModel to load. To use it: PeftModel.from_pretrained. To "
            "go on training it: get_echo_model(base, LoraConfig(…)), and on the model that this gives "
            "load_adapter(folder, 'default', is_trainable=True)."
        )

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. Into the adapter that carries the echo, to go on training it, goes only one that fits it.

        Raises EchoModelError where PEFT would keep the scale of the present adapter, or load a part of the other.
        """
        if adapter_name != self.echo_adapter or adapter_name not in self.peft_config:
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        own = self.peft_config[adapter_name]
        other = type(own).from_pretrained(model_id, **self._split_kwargs(dict(kwargs))[0])
        differences = [
            f"{name} is {getattr(other, name)!r} there and {getattr(own, name)!r} here"
            for name in SCALING
            if getattr(other, name) != getattr(own, name)
        ]
        if differences:
            raise EchoModelError(
                f"{model_id} does not fit the adapter {adapter_name!r}: {'; '.join(differences)}. Give get_echo_model "
                "the LoraConfig that the saved adapter was made with."
            )
        before = {name: t.clone() for name, t in get_peft_model_state_dict(self, adapter_name=adapter_name).items()}
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        for what, keys in (("lacks", result.missing_keys), ("holds also", result.unexpected_keys)):
            if keys:
                set_peft_model_state_dict(self, before, adapter_name=adapter_name)
                raise EchoModelError(
                    f"{model_id} does not fit the adapter {adapter_name!r}: it {what} {keys[0]} ({len(keys)} such "
                    "tensors). Give get_echo_model the LoraConfig that the saved adapter was made with."
                )
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Raises EchoModelError for the adapter that carries the echo."""
        if adapter_name == self.echo_adapter:
            raise EchoModelError(
                f"the adapter {adapter_name!r} carries the echo, so it can't be deleted. Use unload() for the base "
                "model, or load_adapter to replace the adapter's weights."
            )
        super().delete_adapter(adapter_name)

    def _refuse_untrainable(self) -> None:
        """Raises EchoModelError if steps would train something else than the adapter that carries the echo."""
        name, modules = self.echo_adapter, self._injector.modules
        reason = None
        if self.active_adapters != [name]:
            reason = (
                f"the echo belongs to the adapter {name!r}, but active is {', '.join(map(repr, self.active_adapters))}."
                f" To go on training a saved adapter, load it under that name: load_adapter(folder, {name!r}, "
                "is_trainable=True). To train the active one without the echo, set model.echo_enabled = False."
            )
        elif any(module.disable_adapters for module in modules.values()):
            reason = (
                f"the layers of the adapter {name!r} are disabled, so it would not be trained. Call "
                "model.base_model.enable_adapter_layers()."
            )
        elif any(module.merged for module in modules.values()):
            reason = f"the adapter {name!r} is merged into the base, so it can't be trained. Call unmerge_adapter()."
        elif not any(p.requires_grad for n, p in self.base_model.named_parameters() if name in n.split(".")):
            reason = (
                f"every parameter of the adapter {name!r} is frozen, so that only the echo, which is not deployed, "
                f"would be trained. Call model.set_adapter({name!r})."
            )
        if reason is not None:
            raise EchoModelError(reason)

    def echo_branches(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """Each branch of the echo with the weights of the LoRA module that it feeds: lora_A, lora_B."""
        for name, module in self._injector.modules.items():
            yield self.echo.branch(name), [part[self.echo_adapter].weight for part in (module.lora_A, module.lora_B)]

    # ------------------------------------------------------------- diagnosis

    @torch.no_grad()
    def diagnose(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> dict[str, float]:
        """What the echo does on a batch, in the model's current mode: each term a mean over the answer tokens.

        Gives ce_off, ce_on, distillation, echo_norm, gate_mean, and echo_share: how much of the output of the target
        modules' low-rank branches the echo makes up. Where ce_on is not below ce_off, distillation teaches nothing. [O]
        """
        with self._injector.measuring() as shares:
            output = self.echo_losses(input_ids, attention_mask, labels, is_routed=True)
        names = ("ce_off", "ce_on", "distillation", "echo_norm", "gate_mean")
        share = sum(share.item() for share in shares) / len(shares)
        return {name: output[name].item() for name in names} | {"echo_share": share}

    @contextmanager
    def keeping_echo(self) -> Iterator[None]:
        """Inside, `generate` keeps the echo on: what the distillation could reach, no model to deploy. [O]"""
        self._keeps_echo = True
        try:
            yield
        finally:
            self._keeps_echo = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. Inside `keeping_echo` every answer is generated with the echo of its prompt.

        Then input_ids and attention_mask, padded on the left, are given by name, and the search is greedy or sampled.
        Raises EchoModelError otherwise, and for a model that can't share a prefix.
        """
        if not self._keeps_echo:
            return super().generate(*args, **kwargs)
        if args or "input_ids" not in kwargs or kwargs.get("num_beams") not in (None, 1):
            raise EchoModelError("with the echo kept on, generate takes input_ids= by name and no beams.")
        input_ids = kwargs["input_ids"]  # (B, P)
        if (reason := self._why_full(self.get_base_model(), input_ids.device)) is not None:
            raise EchoModelError(
                f"with the echo kept on, generate runs the boundary a second time on its prefix, but {reason}."
            )
        attention_mask = kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        boundary_B = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
        base = self.get_base_model()
        cache = DynamicCache(config=base.config)
        with torch.no_grad():  # nor are these rows of a training step, for the statistics of states
            with reading(self._source_layers, boundary_B, input_ids.shape[1]) as hidden:
                self._plain_forward(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                    cache=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            z = echo_representation(hidden, self.echo.standardize)
            deltas, _, _ = self.echo(apply_control(z, self.echo_config.echo_kind))
        cache.crop(-1)  # the boundary runs again, now with the echo
        everywhere = torch.ones_like(input_ids[:, :1], dtype=torch.bool)  # every pass that follows has one column
        passes = itertools.count()

        def inject(*_: Any) -> None:
            is_boundary = next(passes) == 0
            injected = not is_boundary or self.echo_config.injection_mask == "predictive"
            self._injector.current = Injection(deltas, everywhere & injected)

        kwargs[cache_argument(base.forward) or "past_key_values"] = cache
        handle = base.register_forward_pre_hook(inject)
        try:
            with self._injector.injecting(None):
                return super().generate(**kwargs)
        finally:
            handle.remove()

    # ---------------------------------------------------------- leaving the echo

    def unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As PEFT's: the base without adapter, and without anything of the echo."""
        return self._left(self.base_model.unload(*args, **kwargs))

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As PEFT's: the base with the adapter merged, and without anything of the echo."""
        return self._left(self.base_model.merge_and_unload(*args, **kwargs))

    def _left(self, base: PreTrainedModel) -> PreTrainedModel:
        """The base as it was before the echo; the injector's hooks went with the LoRA modules."""
        self._sharing.remove()
        for function in checkpoint_functions(base):
            arguments = dict(getattr(function, "keywords", {}))
            if isinstance(context := arguments.get("context_fn"), JoinedContexts):
                del arguments["context_fn"]
                base.activation_checkpointing_enable(arguments | context.theirs)
                break
        return base

    def _plain_forward(self, *, cache: Cache | None = None, **kwargs: Any) -> Any:
        """The plain PEFT model. Raises EchoModelError if its forward does not take what the step needs."""
        base = self.get_base_model()
        if cache is not None:
            kwargs[cache_argument(base.forward) or "past_key_values"] = cache
        taken = inspect.signature(base.forward).parameters
        if "input_ids" in taken:  # else a wrapper, which passes on what it is given
            refused = kwargs.keys() - taken.keys()
            mask = kwargs.get("attention_mask")
            if "attention_mask" in refused and mask is not None and bool(mask[:, 0].all()):
                del kwargs["attention_mask"]  # on the right of a row padding changes nothing
                refused -= {"attention_mask"}
            if refused - DISPENSABLE:
                raise EchoModelError(
                    f"{type(base).__name__}.forward takes no {', '.join(sorted(refused - DISPENSABLE))}, which the "
                    "echo's step needs. Use another model, or train this one without the echo."
                )
            kwargs = {name: value for name, value in kwargs.items() if name not in refused}
        return super().forward(**kwargs)

    def _why_full(self, base: PreTrainedModel, device: torch.device) -> str | None:
        """Why the prefix can't be shared: what the model says of itself, or what it does when it is tried, once."""
        reason = why_full(base) or self._sharing.why_not
        if (reason is None) not in self._tried:
            sharing = self._sharing if reason is None else None
            self._tried[reason is None] = why_full_by_trial(self._plain_forward, base, sharing, device)
        return reason or self._tried[True]

    def _shares_prefix(self, reason: str | None) -> bool:
        if self.echo_config.echo_step == "full":
            return False
        if reason is None:
            return True
        if self.echo_config.echo_step == "shared_prefix":
            raise EchoModelError(f"echo_step='shared_prefix' is impossible: {reason}. Use echo_step='auto'.")
        self._say_once(f"The echo-on pass runs in full, not on the answer only: {reason}.")
        return False

    def _usable_head(self, base: PreTrainedModel, rows: AlignedRows) -> Head | None:
        """The output layer, if the losses may apply it themselves; asked once, on some tokens of the first row."""
        if not self._head_is_known:
            self._head_is_known = True
            reason: str | None = "the model names no output layer"
            if base.get_output_embeddings() is not None:
                head = Head(base)
                positions = None if rows.position_ids is None else rows.position_ids[:1, -PROBE_COLUMNS:]
                reason = head.why_not(self._plain_forward, rows.input_ids[:1, -PROBE_COLUMNS:], positions)
                self._head = head if reason is None else None
            if reason is not None:
                self._say_once(f"Logits of all answer tokens are made at once, which takes memory: {reason}.")
        return None if self._head is None or self._head.is_trained else self._head

    def _say_once(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            logger.warning(warning)

    # -------------------------------------------------- gradient checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the base model's, with a context that lets recomputed layers see the injection of their forward.

        Raises EchoModelError for use_reentrant=True, which has no such context.
        """
        checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if checkpointing["use_reentrant"]:
            raise EchoModelError(
                "gradient checkpointing with use_reentrant=True would recompute the echo-on pass without its echo. "
                "Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        checkpointing["context_fn"] = JoinedContexts(
            checkpointing.get("context_fn"),
            self._injector.checkpoint_contexts,
            self._sharing.checkpoint_contexts,
            self._freezing.checkpoint_contexts,
        )
        self.get_base_model().activation_checkpointing_enable(checkpointing, **kwargs)

    def _is_checkpointed(self, base: PreTrainedModel) -> bool:
        """Whether layers are recomputed; one that would forget the pass it belongs to is set right first."""
        if not base.training:
            return False
        functions = checkpoint_functions(base)
        if functions and _is_compiled(base):
            raise EchoModelError(
                "torch.compile can't trace gradient checkpointing with a context, which the echo needs. Compile no "
                "layer, or set gradient_checkpointing=False (activation_checkpointing in newer transformers)."
            )
        for function in functions:
            arguments = dict(getattr(function, "keywords", {}))
            if not isinstance(arguments.get("context_fn"), JoinedContexts):
                self.gradient_checkpointing_enable(arguments)
                break
        return bool(functions)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name that transformers 5 uses for `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)


def _refuse_packed(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Packed rows would attend across rows once they carry a cache; transformers detects them only without one."""
    position_ids = kwargs.get("position_ids")
    restarts = position_ids is not None and attention_mask is None and bool((position_ids.diff(dim=-1) < 0).any())
    packed = [
        key for key in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "seq_lengths") if kwargs.get(key) is not None
    ]
    if restarts or packed:
        what = "position_ids restart within a row" if restarts else f"the batch holds {packed[0]}"
        raise EchoDataError(
            f"the batch is packed ({what}), but each row needs a boundary of its own. Set packing=False and "
            "padding_free=False."
        )
    if attention_mask is not None and attention_mask.dim() == 2 and bool((attention_mask > 1).any()):
        raise EchoDataError(
            f"the batch is packed (attention_mask numbers the rows up to {int(attention_mask.max())}), but each row "
            "needs a boundary of its own. Set packing=False, and give a mask with 1 at tokens and 0 at padding."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise EchoDataError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; the echo aligns rows by a (rows, tokens) mask "
            "with 1 at tokens and 0 at padding. Pass that one."
        )


def _is_compiled(base: PreTrainedModel) -> bool:
    return any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in base.modules())


def _router_aux_loss_coef(config: Any) -> float:
    """Weight of a mixture-of-experts model's load-balancing loss, where it is switched on."""
    text = config.get_text_config()
    return float(text.router_aux_loss_coef) if getattr(text, "output_router_logits", False) else 0.0
