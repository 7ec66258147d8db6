"""TRL's SFTTrainer with the echo: adding `echo_config=` is the only change to a script."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any, Literal

from datasets import IterableDataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from echo_lora.base_models import canonical
from echo_lora.config import EchoConfig
from echo_lora.data import check_tokenized_dataset, end_token_ids, tokenize_row
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.model import EchoModel, get_echo_model
from echo_lora.trainer import EchoTrainerMixin, numbered, refuse_arguments

logger = logging.getLogger(__name__)


class EchoSFTTrainer(EchoTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with the echo: the same datasets, arguments and callbacks, and `echo_config=`.

    Further arguments of ours: on_overlength, what to do with rows longer than `max_length` (an answer is never
    cut). Without `echo_config` it trains as SFTTrainer does. completion_only_loss=False trains on prompts too, in the
    echo-off pass, as `data.train_on_prompt` of a recipe does. Refused are packing and padding_free (a row needs a
    boundary of its own), text-only rows (no boundary), and losses other than `nll`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        *positional: Any,
        echo_config: EchoConfig | None = None,
        on_overlength: Literal["error", "drop", "truncate_prompt"] = "error",
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._on_overlength = on_overlength
        self._has_echo = echo_config is not None or isinstance(model, EchoModel)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SFTConfig(f"{Path(name).name}-Echo-SFT")  # TRL's way to name a run
        if self._has_echo:
            refuse_arguments(args)
        if echo_config is not None:
            model, peft_config = _echo_wrapped(model, args, peft_config, echo_config), None
        super().__init__(model, args, *positional, peft_config=peft_config, **kwargs)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        if not self._has_echo:
            return super()._prepare_dataset(
                numbered(dataset), processing_class, args, packing, formatting_func, dataset_name
            )
        _refuse_text(next(iter(dataset)), dataset_name, args, formatting_func)
        dataset = numbered(dataset)
        # TRL's cut at max_length takes the answer's end; ours, below, never does.
        uncut = copy.copy(args)
        uncut.max_length = None
        try:
            prepared = super()._prepare_dataset(
                dataset, processing_class, uncut, packing, formatting_func, dataset_name
            )
        except RuntimeError as error:
            if "assistant" not in str(error):
                raise
            for row in dataset:  # names the model and the first row without an assistant token
                tokenize_row(row, self._tokenizer)
            raise
        if isinstance(prepared, IterableDataset):
            if args.max_length is not None:
                raise EchoConfigError(
                    f"max_length={args.max_length} can't be kept for the {dataset_name} data, which is a stream: its "
                    "rows are not known before training, and an answer must not be cut. Set max_length=None, or load "
                    "the data whole."
                )
            logger.warning("The %s data is a stream: its rows are checked as they come, not before.", dataset_name)
            return prepared
        prepared, counts = check_tokenized_dataset(
            prepared,
            max_length=args.max_length,
            on_overlength=self._on_overlength,
            end_token_ids=end_token_ids(self._tokenizer),
            source=f"{dataset_name} data",
        )
        logger.info("%s data: %s", dataset_name, counts)
        return prepared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._has_echo and self.model.training:  # the one metric of TRL's loss that the step does not return
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _send_telemetry(self) -> None:
        """Silent, unlike TRL's, unless ECHO_LORA_TELEMETRY=1 is set."""
        if os.environ.get("ECHO_LORA_TELEMETRY") == "1":
            super()._send_telemetry()


def _echo_wrapped(
    model: str | PreTrainedModel, args: Any, peft_config: LoraConfig | None, echo_config: EchoConfig
) -> EchoModel:
    """The EchoModel that takes the place of the PEFT model SFTTrainer would make, from the same seed."""
    if isinstance(model, PeftModel):
        raise EchoConfigError(
            "echo_config was given together with a model that carries an adapter already. Pass the base model with "
            "peft_config and echo_config, or a model of get_echo_model without echo_config."
        )
    if peft_config is None:
        raise EchoConfigError(
            "echo_config needs a peft_config: the echo trains a LoRA adapter. Pass peft_config=LoraConfig(…)."
        )
    if getattr(args, "chat_template_path", None) and not str(args.chat_template_path).endswith((".jinja", ".j2")):
        raise EchoConfigError(
            f"chat_template_path={args.chat_template_path!r} would add tokens after the adapter is made. "
            "Give a .jinja file, or set the tokenizer's chat_template yourself."
        )
    set_seed(args.seed)  # PEFT draws the adapter's weights when it makes it
    if isinstance(model, str):
        model = create_model_from_path(
            canonical(model),
            **{
                "trust_remote_code": getattr(args, "trust_remote_code", False),
                **(getattr(args, "model_init_kwargs", None) or {}),
            },
        )
    return get_echo_model(model, peft_config, echo_config)


def _refuse_text(example: dict[str, Any], name: str, args: Any, formatting_func: Any) -> None:
    has_boundary = "prompt" in example or "labels" in example or "completion_mask" in example
    if formatting_func is not None or not (has_boundary or args.assistant_only_loss or "input_ids" in example):
        what = "a formatting_func turns each row into text" if formatting_func else f"its columns are {sorted(example)}"
        raise EchoDataError(
            f"the {name} data has no boundary between prompt and answer ({what}), and the echo is read there. Use "
            "prompt and completion columns, or messages with SFTConfig(assistant_only_loss=True)."
        )
