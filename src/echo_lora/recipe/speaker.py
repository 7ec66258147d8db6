"""A trained adapter on its base, ready to answer, and how to prompt it.

A prompt reaches the model as in training: through the chat template if the run trained on chats, else as it is. The
adapter's own tokenizer and template are used, and an answer ends at the tokens that training taught as its end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from echo_lora.adapter.files import CONFIG_FILE, read_adapter_config
from echo_lora.adapter.merge import load_adapter
from echo_lora.data.formats import alpaca_prompt
from echo_lora.data.sources import expanded
from echo_lora.data.tokenize import end_token_ids, render_prompt
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError
from echo_lora.method.variants import changes_base
from echo_lora.models import load_base_model, load_tokenizer, on_accelerator
from echo_lora.progress import progress_console, stage
from echo_lora.recipe.build import load_base
from echo_lora.recipe.needs import require_model
from echo_lora.recipe.record import RUN_FILE
from echo_lora.recipe.rows import prompts_are_chats
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.scoring import resolve

Row = dict[str, Any]

COLDEST = 1e-6  # below, only the likeliest token has a chance, and logits divided by it overflow


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. temperature: 0 always takes the likeliest token; seed: torch's, for every other one.

    The rest, such as a repetition penalty, is the base model's generation_config.json.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "max_length": None}
        if self.temperature < COLDEST:  # None: else transformers warns that the model's own values go unused
            return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return chosen | {"do_sample": True, "temperature": self.temperature}


@dataclass(frozen=True)
class Speaker:
    """An adapter on its base, and how to prompt it."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Path
    base: str
    uses_template: bool  # whether prompts go through the chat template
    ends: list[int]  # ids that end an answer
    is_alpaca: bool = False  # whether texts are put into Alpaca's layout

    @property
    def limit(self) -> int | None:
        """Tokens that the base can process, prompt and answer together; None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def prompt_ids(self, row: Mapping[str, Any], where: str, room: int = 1) -> list[int]:
        """Token ids of a row's prompt, as training puts them before the answer.

        room: tokens of the answer, which must fit too. Raises EchoDataError.
        """
        if self.is_alpaca and isinstance(row.get("prompt"), str):
            row = {**row, "prompt": alpaca_prompt(row["prompt"])}
        text = render_prompt(row, self.tokenizer, self.uses_template, where)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise EchoDataError(f"{where} is empty. Write a prompt.")
        embeddings = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if embeddings is not None and max(ids) >= embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise EchoDataError(
                f"{where} has the token {token!r} with id {max(ids)}, but {self.base} has embeddings for {embeddings} "
                "tokens. Use the tokenizer of the base."
            )
        if self.limit is not None and len(ids) + room > self.limit:
            raise EchoDataError(
                f"{where} has {len(ids)} tokens and the answer up to {room}, but the limit of {self.base} is "
                f"{self.limit}. Shorten it" + (", or lower --max-new-tokens." if room > 1 else ".")
            )
        return ids

    def using(self, *, base: bool) -> AbstractContextManager[Any]:
        """The model that answers inside the block: the base, or base and adapter."""
        return self.model.disable_adapter() if base else nullcontext()

    def answers(
        self, prompts: Sequence[list[int]], decoding: Decoding, streamer: BaseStreamer | None = None
    ) -> list[list[int]]:
        """Token ids of the answers, without the end; shorter prompts are padded on the left."""
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        width = max(map(len, prompts))
        ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.no_grad():
            written = self.model.generate(
                input_ids=torch.tensor(ids, device=self.model.device),  # (B, P)
                attention_mask=torch.tensor(mask, device=self.model.device),  # (B, P)
                eos_token_id=self.ends,
                pad_token_id=padding,
                streamer=streamer,
                **decoding.options(),
            )  # (B, P + A)
        return [self._cut(row) for row in written[:, width:].tolist()]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]


def load_speaker(
    target: str,
    *,
    base_model: str | None = None,
    with_base: bool = False,
    template: bool | None = None,
    trust_remote_code: bool = False,
) -> Speaker:
    """The adapter of a run, of a recipe that has been trained, or in a folder of its own, on its base.

    base_model: instead of the one that the run or the adapter names. with_base: the base will answer too. template:
    whether prompts go through the chat template; default: as in training. Raises EchoCheckpointError, EchoConfigError.
    """
    adapter, recipe = _find(target)
    config = read_adapter_config(adapter)
    if with_base and (changed_by := changes_base(config)):
        raise EchoConfigError(
            f"{adapter} changes the base's weights on loading ({changed_by}), so the base can't answer beside it. "
            "Leave --base out."
        )
    reference = base_model or (recipe.model if recipe is not None else config.get("base_model_name_or_path"))
    if not reference:
        raise EchoCheckpointError(f"{adapter} names no base model. Name it with --base-model.")
    require_model(reference)
    with stage(f"Loading {reference} and the adapter"):
        own = (adapter / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(adapter if own else reference, trust_remote_code)
        uses_template = _uses_template(tokenizer, adapter, recipe, template)
        if recipe is not None:
            changes = {"model": reference, "trust_remote_code": trust_remote_code}
            base = load_base(recipe.model_copy(update=changes))
        else:
            base = load_base_model(reference, trust_remote_code=trust_remote_code)
        own_ends = base.generation_config.eos_token_id
        model = on_accelerator(load_adapter(base, adapter, require_same_name=base_model is None and recipe is not None))
    ends = end_token_ids(tokenizer) | set(own_ends if isinstance(own_ends, list) else [own_ends]) - {None}
    is_alpaca = not uses_template and recipe is not None and _record_of(adapter).get("is_alpaca", False)
    return Speaker(model, tokenizer, adapter, reference, uses_template, sorted(ends), is_alpaca)


def _find(target: str) -> tuple[Path, Recipe | None]:
    """The adapter and its recipe, if there is one."""
    folder = expanded(target)
    if (folder / CONFIG_FILE).is_file() and not (folder.resolve().parent / RUN_FILE).is_file():
        return folder, None
    recipe, adapter = resolve(target)
    if adapter is None or not os.path.isdir(adapter):
        raise EchoCheckpointError(f"{target} has no adapter yet. Train it first: echo-lora train {target}")
    return adapter, recipe


def _uses_template(
    tokenizer: PreTrainedTokenizerBase, adapter: Path, recipe: Recipe | None, wanted: bool | None
) -> bool:
    """Whether to use the chat template: as wanted, else as in training, else if there is one."""
    has_template = tokenizer.chat_template is not None
    if wanted is None and recipe is not None:
        wanted = _trained_on_chats(adapter, recipe)
    if wanted is None:
        kind = "chats and plain strings" if recipe is not None else "an unknown kind of prompts"
        way, other = ("the chat template", "--no-template") if has_template else ("prompts as they are", "--template")
        progress_console().print(f"{adapter} was trained on {kind}: using {way} ({other} for the other way)")
        return has_template
    if wanted and not has_template:
        raise EchoConfigError(
            f"{adapter} has no chat template, and neither has its base. Use --no-template to send prompts as they are."
        )
    return wanted


def _record_of(adapter: Path) -> dict[str, Any]:
    """The run.json beside the adapter; empty if there is none."""
    record = adapter.resolve().parent / RUN_FILE
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def _trained_on_chats(adapter: Path, recipe: Recipe) -> bool | None:
    """What run.json says; the rows, if it was written before that was recorded."""
    found = _record_of(adapter)
    if "is_chat" in found:
        return bool(found["is_chat"]) if found["is_chat"] is not None else None
    try:
        return prompts_are_chats(recipe)
    except EchoDataError as error:
        raise EchoConfigError(
            f"{adapter.resolve().parent / RUN_FILE} does not say how prompts were put in training, and its rows can't "
            f"be read: {error} Add --template to use the chat template, or --no-template."
        ) from error
