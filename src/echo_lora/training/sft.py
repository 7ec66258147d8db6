"""TRL's SFTTrainer with the echo: adding `echo_config=` is the only change to a script."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import set_seed
from trl import SFTConfig, SFTTrainer
from trl.data_utils import maybe_convert_to_chatml
from trl.trainer.utils import create_model_from_path

from echo_lora.data.check import SpecialTokens, check_tokenized_dataset
from echo_lora.data.forms import checked_row, row_number, unused_texts, without_effect
from echo_lora.data.loaded import without_nulls
from echo_lora.data.sources import KEPT_NAME, ROW, where_is
from echo_lora.data.tokenize import ANSWER, IGNORED, tokenize_row
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.method.attach import attach_echo
from echo_lora.method.config import EchoConfig
from echo_lora.method.model import EchoModel, get_echo_model
from echo_lora.models import canonical
from echo_lora.training.collator import LENGTHS, holds_packed, numbered, packed
from echo_lora.training.support import packed_before, refuse_arguments
from echo_lora.training.trainer import EchoTrainerMixin

logger = logging.getLogger(__name__)

_UNTRAINED = "_echo_untrained"  # temporary column: content of a row that is not trained on


class EchoSFTTrainer(EchoTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with the echo: the same datasets, arguments and callbacks, and `echo_config=`.

    Two more arguments: on_overlength, what to do with rows longer than `max_length` (an answer is never cut), and
    answer_weight, the weight of answer tokens in a loss on whole rows, with and without the echo. Without `echo_config`
    it trains as SFTTrainer does. A model with a LoRA adapter gets the echo by `attach_echo`. completion_only_loss=False
    trains on prompts too, in the echo-off pass, like `data.train_on_prompt` in a recipe. packing and padding_free join
    whole rows, which the step takes apart again. Not supported: text-only rows (no boundary), packing_strategy
    "wrapped" (it cuts rows), and losses other than `nll`.
    """

    _is_sft = True

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
        data = kwargs.get("train_dataset", positional[1] if len(positional) > 1 else None)
        if data is not None:
            _first(data, "train")
        if self._has_echo:
            refuse_arguments(args)
        if echo_config is not None:
            if isinstance(model, str):
                model = _load_as_trl(model, args, kwargs)
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
        first = _first(dataset, dataset_name)
        if not isinstance(dataset, Dataset) and ROW in first and "input_ids" not in first:
            raise EchoDataError(f"the {dataset_name} data has {KEPT_NAME}")
        if self._has_echo and LENGTHS in first:
            if packing and holds_packed(dataset):
                return dataset  # TRL prepares what `evaluate` gets, prepared or not
            raise packed_before(f"{dataset_name} data")
        dataset = numbered(dataset, f"{dataset_name} data")
        if not self._has_echo:
            dataset = self._tokenize_what_trl_gets_wrong(dataset, first, args, formatting_func, dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        _refuse_text(first, dataset_name, args, formatting_func)
        dataset = self._tokenize_what_trl_gets_wrong(dataset, first, args, formatting_func, dataset_name)
        # TRL cuts rows at max_length, also when it packs, and so may cut the answer; the check below never does
        uncut = copy.copy(args)
        uncut.max_length = None
        try:
            prepared = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
        except RuntimeError as error:
            if "assistant" not in str(error):
                raise
            for row in dataset:  # raises an error that names the model and the first row without an assistant token
                tokenize_row(row, self._tokenizer)
            raise
        if isinstance(prepared, IterableDataset):
            if args.max_length is not None:
                raise EchoConfigError(
                    f"max_length={args.max_length} can't be enforced on the {dataset_name} data, which is a stream: "
                    "its rows are unknown before training, and an answer must not be cut. Set max_length=None, or load "
                    "the whole dataset."
                )
            logger.warning("The %s data is a stream: its rows are checked as they come, not in advance.", dataset_name)
            if packing:
                raise EchoConfigError(
                    f"packing=True needs the whole dataset, but the {dataset_name} data is a stream. Load it, or leave "
                    "packing out."
                )
            return prepared
        prepared, counts = check_tokenized_dataset(
            prepared,
            max_length=args.max_length,
            on_overlength=self._on_overlength,
            special=SpecialTokens.of(self._tokenizer),
            source=f"{dataset_name} data",
        )
        logger.info("%s data: %s", dataset_name, counts)
        return self._packed(prepared, args) if packing else prepared

    def _packed(self, prepared: Dataset, args: Any) -> Dataset:
        """The rows packed and shuffled as TRL does, except that all of them fit."""
        if args.max_length is None:
            raise EchoConfigError("packing=True needs max_length, the number of tokens to pack rows into. Set it.")
        prepared = packed(prepared, args.max_length, args.packing_strategy, args.dataset_num_proc)
        return prepared.shuffle(seed=args.seed) if args.shuffle_dataset else prepared

    def _tokenize_what_trl_gets_wrong(
        self, dataset: Any, first: dict[str, Any], args: Any, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Check the rows as a recipe's, and tokenise them here if TRL would tokenise one of them differently.

        TRL trains on turns of weight 0 and on every turn of a completion, and passes templates the nulls that Arrow
        adds. For all other rows its ids and labels are the same as ours. Without the echo, errors become warnings.
        """
        is_conversation = args.assistant_only_loss and not {"messages", "conversations"}.isdisjoint(first)
        has_boundary = "prompt" in first or is_conversation
        if "input_ids" in first or formatting_func is not None or not has_boundary or self._is_vlm:
            return dataset
        options = {
            "tokenizer": self._tokenizer,
            "source": f"{dataset_name} data",
            "assistant_only": args.assistant_only_loss,
            "is_whole": not self.completion_only_loss,
        }
        if isinstance(dataset, IterableDataset):
            if not self._has_echo:
                return dataset
            return dataset.map(_tokenized_of_stream, with_indices=True, fn_kwargs=options)
        try:
            is_special = _check_rows(dataset, f"{dataset_name} data")
        except EchoDataError as error:
            if self._has_echo:
                raise
            logger.warning("%s Without the echo, TRL trains on it as is.", error)
            return dataset
        if not is_special:
            return dataset
        what = f"Tokenizing {dataset_name} dataset"
        dataset = dataset.map(
            _tokenized, with_indices=True, fn_kwargs=options, num_proc=args.dataset_num_proc, desc=what
        )
        _warn_of_untrained(dataset, f"{dataset_name} data")
        return dataset.remove_columns(_UNTRAINED)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        echo = self._echo_model
        if echo is not None and echo.applies(
            inputs.get("labels")
        ):  # TRL's own loss, which is not called, would count these
            mask = inputs.get("attention_mask")
            tokens = torch.ones_like(inputs["input_ids"]).sum() if mask is None else mask.sum()
            tokens = self.accelerator.gather_for_metrics(tokens).sum().item()
            self._total_train_tokens += tokens // self._tp_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        """TRL's check, which tests the collator's class: pass it the user's."""
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "collate", data_collator))

    def _send_telemetry(self) -> None:
        """Send TRL's telemetry only if ECHO_LORA_TELEMETRY=1 is set."""
        if os.environ.get("ECHO_LORA_TELEMETRY") == "1":
            super()._send_telemetry()


def _load_as_trl(name: str, args: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model that SFTTrainer would load; removes the arguments that only serve to load it."""
    given = {"trust_remote_code": getattr(args, "trust_remote_code", False)}
    given |= {"use_safetensors": True} | (getattr(args, "model_init_kwargs", None) or {})
    if (quantization := kwargs.pop("quantization_config", None)) is not None:
        if "quantization_config" in given:
            raise EchoConfigError(
                "quantization_config is passed to EchoSFTTrainer and in model_init_kwargs. Pass it to the trainer only."
            )
        given["quantization_config"] = quantization
    if os.environ.get("WORLD_SIZE", "1") != "1":
        given["device_map"] = None  # as TRL: "auto" fails in several processes
    if kwargs.get("processing_class") is None and given.get("revision") is not None:
        kwargs["processing_class"] = AutoProcessor.from_pretrained(
            name, revision=given["revision"], trust_remote_code=given["trust_remote_code"]
        )
    set_seed(args.seed)
    return create_model_from_path(canonical(name), **given)


def _echo_wrapped(
    model: PreTrainedModel, args: Any, peft_config: LoraConfig | None, echo_config: EchoConfig
) -> EchoModel:
    """The EchoModel that takes the place of the PEFT model SFTTrainer would make or was given, from the same seed."""
    has_adapter = isinstance(model, PeftModel)
    if isinstance(model, EchoModel) or (has_adapter and peft_config is not None):
        what = "that already has the echo" if isinstance(model, EchoModel) else "with an adapter, and a peft_config"
        raise EchoConfigError(
            f"echo_config was passed together with a model {what}. Pass a base model with peft_config and echo_config, "
            "a PEFT model with echo_config, or a model from get_echo_model with neither."
        )
    if not has_adapter and peft_config is None:
        raise EchoConfigError(
            "echo_config needs a peft_config: the echo trains a LoRA adapter. Pass peft_config=LoraConfig(…)."
        )
    if getattr(args, "chat_template_path", None) and not str(args.chat_template_path).endswith((".jinja", ".j2")):
        raise EchoConfigError(
            f"chat_template_path={args.chat_template_path!r} would add tokens after the adapter is created. "
            "Pass a .jinja file, or set the tokenizer's chat_template yourself."
        )
    set_seed(args.seed)  # for the adapter's initial weights, which PEFT draws here, and the echo networks'
    return attach_echo(model, echo_config) if has_adapter else get_echo_model(model, peft_config, echo_config)


def _first(dataset: Any, name: str) -> dict[str, Any]:
    first = next(iter(dataset), None)
    if first is None:
        raise EchoDataError(f"the {name} data has no row. Pass at least one.")
    return first


def _check_rows(dataset: Dataset, source: str) -> bool:
    """Check the form of each row and warn about unused columns; returns whether TRL would tokenise a row differently.

    Raises EchoDataError, which names the row.
    """
    unused: dict[str, int] = {}
    ineffective: dict[tuple[str, str], int] = {}
    is_special = False
    for index, row in enumerate(dataset.with_format(None)):
        row = maybe_convert_to_chatml(without_nulls(row))
        number = row_number(row, index)
        checked_row(row, where_is(source, number))
        is_special = is_special or _is_special(row)
        for name in unused_texts(row):
            unused.setdefault(name, number)
        for item in without_effect(row).items():
            ineffective.setdefault(item, number)
    for (name, why), number in ineffective.items():
        logger.warning("%s has %s, which has no effect: %s.", where_is(source, number), name, why)
    for name, number in unused.items():
        logger.warning("%s has text in the column %r, which is not trained on.", where_is(source, number), name)
    return is_special


def _is_special(row: Mapping[str, Any]) -> bool:
    """Whether a row holds more than plain user and assistant turns, which TRL may tokenise differently or drop."""
    lists = {name: row[name] for name in ("messages", "prompt", "completion") if isinstance(row.get(name), list)}
    turns = [turn for turns in lists.values() for turn in turns]
    return (
        bool(row.get("tools") or row.get("chat_template_kwargs"))
        or any(set(turn) != {"role", "content"} or not isinstance(turn["content"], str) for turn in turns)
        or any(turn["role"] not in ("user", "assistant") for turn in turns)
        or any("</think>" in turn["content"] for turn in turns)
        or any(turn["role"] != "assistant" for turn in lists.get("completion", []))
    )


def _tokenized(
    row: dict[str, Any], index: int, tokenizer: Any, source: str, assistant_only: bool, is_whole: bool
) -> dict[str, Any]:
    """The columns that TRL's preparation makes of a row."""
    row = maybe_convert_to_chatml(without_nulls(row))
    where = where_is(source, row_number(row, index))
    tokenized = tokenize_row(row, tokenizer, where=where, assistant_only=assistant_only)
    columns: dict[str, Any] = {"input_ids": tokenized.input_ids, "labels": tokenized.labels}
    columns[_UNTRAINED] = list(tokenized.untrained)  # a warning here would be lost if `map` uses its cache
    if is_whole and "messages" not in row:
        columns[ANSWER] = [int(label != IGNORED) for label in tokenized.labels]
        if not assistant_only:
            columns["labels"] = tokenized.input_ids
    return columns


def _tokenized_of_stream(row: dict[str, Any], index: int, **options: Any) -> dict[str, Any]:
    """`_tokenized` for a stream: it warns as the rows come."""
    columns = _tokenized(row, index, **options)
    where = where_is(options["source"], row_number(row, index))
    for what in columns.pop(_UNTRAINED):
        logger.warning("%s has %s: not trained on.", where, what)
    return columns


def _warn_of_untrained(dataset: Dataset, source: str) -> None:
    rows: dict[str, list[int]] = {}
    for index, row in enumerate(dataset.select_columns([_UNTRAINED, ROW]).with_format(None)):
        for what in row[_UNTRAINED]:
            rows.setdefault(what, []).append(row_number(row, index))
    for what, numbers in rows.items():
        logger.warning("%s has %s: not trained on (%d such rows).", where_is(source, numbers[0]), what, len(numbers))


def _refuse_text(row: dict[str, Any], name: str, args: Any, formatting_func: Any) -> None:
    has_boundary = args.assistant_only_loss or not {"prompt", "labels", ANSWER, "input_ids"}.isdisjoint(row)
    if formatting_func is not None or not has_boundary:
        what = "a formatting_func turns each row into text" if formatting_func else f"its columns are {sorted(row)}"
        raise EchoDataError(
            f"the {name} data has no boundary between prompt and answer, where the echo is read ({what}). Use prompt "
            "and completion columns, or messages with SFTConfig(assistant_only_loss=True)."
        )
