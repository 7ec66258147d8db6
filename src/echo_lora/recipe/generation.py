"""Answers of a trained adapter, and of its base: one at a time as they are written, or many in batches.

A prompt reaches the model as in training: through the chat template if the run trained on chats, else as it is. The
adapter's own tokenizer and template are used, and an answer ends at the tokens that training taught as its end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from echo_lora.adapter.files import CONFIG_FILE, read_adapter_config
from echo_lora.adapter.merge import load_adapter
from echo_lora.data.forms import row_number
from echo_lora.data.sources import ROW, RowFile, expanded, where_is
from echo_lora.data.tokenize import end_token_ids, render_prompt
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError, EchoInterrupt
from echo_lora.files import write_text
from echo_lora.method.variants import changes_base
from echo_lora.models import load_base_model, load_tokenizer, on_accelerator
from echo_lora.progress import counted, progress_console, stage
from echo_lora.recipe.build import load_base
from echo_lora.recipe.needs import require_model
from echo_lora.recipe.record import RUN_FILE
from echo_lora.recipe.rows import prompts_are_chats
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.scoring import resolve

Row = dict[str, Any]


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
        if self.temperature == 0:  # else transformers warns that the model's own values go unused
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

    @property
    def limit(self) -> int | None:
        """Tokens that the base can process, prompt and answer together; None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def prompt_ids(self, row: Mapping[str, Any], where: str, room: int = 1) -> list[int]:
        """Token ids of a row's prompt, as training puts them before the answer.

        room: tokens of the answer, which must fit too. Raises EchoDataError.
        """
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
    return Speaker(model, tokenizer, adapter, reference, uses_template, sorted(ends))


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
        wanted = _trained_on_chats(adapter.resolve().parent / RUN_FILE, recipe)
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


def _trained_on_chats(record: Path, recipe: Recipe) -> bool | None:
    """What run.json says; the rows, if it was written before that was recorded."""
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if "is_chat" in found:
        return bool(found["is_chat"]) if found["is_chat"] is not None else None
    try:
        return prompts_are_chats(recipe)
    except EchoDataError as error:
        raise EchoConfigError(
            f"{record} does not say how prompts were put in training, and its rows can't be read: {error} Add "
            "--template to use the chat template, or --no-template."
        ) from error


# ------------------------------------------------------------------- a conversation


class Stream(BaseStreamer):
    """Passes an answer on in pieces of text, each as soon as its characters are complete."""

    def __init__(self, speaker: Speaker, write: Callable[[str], Any]) -> None:
        self.ids: list[int] = []
        self.shown = ""
        self._speaker, self._write, self._is_prompt = speaker, write, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # transformers passes it on first
            self._is_prompt = False
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self._speaker.ends]
        text = self._speaker.text(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character
            self._show(text)

    def end(self) -> None:
        self._show(self._speaker.text(self.ids))

    def _show(self, text: str) -> None:
        piece, self.shown = text[len(self.shown) :], text
        self._write(piece)


@dataclass
class Conversation:
    """Questions and answers of one model. Without a chat template each question is a prompt of its own."""

    speaker: Speaker
    decoding: Decoding
    system: str | None = None
    is_base: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system is not None and not self.speaker.uses_template:
            raise EchoConfigError(
                "--system needs a chat template, and this adapter is prompted without one, as in training. Put the "
                "text into the prompt."
            )

    def ask(self, text: str, write: Callable[[str], Any]) -> str:
        """The answer, written piece by piece. If it is interrupted, what was written stays part of the conversation.

        Raises EchoDataError for a question that does not fit into the model, which is then forgotten.
        """
        question = {"role": "user", "content": text}
        ids = self._prompt([*self.messages, question])
        room = self.decoding.max_new_tokens
        if self.speaker.limit is not None:
            room = min(room, self.speaker.limit - len(ids))
        stream = Stream(self.speaker, write)
        try:
            with self.speaker.using(base=self.is_base):
                torch.manual_seed(self.decoding.seed)
                self.speaker.answers([ids], replace(self.decoding, max_new_tokens=room), stream)
        finally:
            self.messages += [question, {"role": "assistant", "content": stream.shown}]
        return stream.shown

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        row = chat_row(messages, self.system) if self.speaker.uses_template else {"prompt": messages[-1]["content"]}
        require_system(self.speaker, self.system, row)
        return self.speaker.prompt_ids(row, "the conversation")


def chat_row(messages: list[dict[str, str]], system: str | None) -> Row:
    return {"prompt": [{"role": "system", "content": system}, *messages] if system is not None else messages}


def require_system(speaker: Speaker, system: str | None, row: Row) -> None:
    """Raise EchoConfigError if the chat template drops the system message."""
    if system is not None and system.strip() not in render_prompt(row, speaker.tokenizer):
        raise EchoConfigError(f"the chat template of {speaker.adapter} leaves out the text of --system. Leave it out.")


# ------------------------------------------------------------------- many prompts


ANSWER, BASE_ANSWER = "generated", "generated_base"  # columns of the output


def answer_rows(
    speaker: Speaker,
    rows: Sequence[tuple[str, Row]],
    decoding: Decoding,
    *,
    batch_size: int,
    with_base: bool = False,
    system: str | None = None,
) -> Iterator[tuple[int, Row]]:
    """Place and answered row, batch by batch, the longest prompts first. All prompts are checked before the first.

    rows: where each is from, and its `prompt` or `messages`. Raises EchoDataError, which names the row.
    """
    prompts = [_prompt_row(speaker, row, where, system) for where, row in rows]
    ids = [
        speaker.prompt_ids(prompt, where, decoding.max_new_tokens)
        for prompt, (where, _) in zip(prompts, rows, strict=True)
    ]
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))  # running out of memory shows at once
    torch.manual_seed(decoding.seed)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found: list[dict[str, str]] = [{} for _ in places]
        for name, is_base in ((ANSWER, False), (BASE_ANSWER, True))[: 1 + with_base]:
            with speaker.using(base=is_base):
                written = speaker.answers([ids[place] for place in places], decoding)
            for answers, answer in zip(found, written, strict=True):
                answers[name] = speaker.text(answer)
        for place, answers in zip(places, found, strict=True):
            yield place, {key: value for key, value in rows[place][1].items() if key != ROW} | answers


def _prompt_row(speaker: Speaker, row: Row, where: str, system: str | None) -> Row:
    """What the model is asked: a row without its answer, if it has one."""
    if taken := {ANSWER, BASE_ANSWER} & row.keys():
        raise EchoDataError(f"{where} has a column {min(taken)!r}, where the answer goes. Rename it.")
    if row.get("prompt") is None and row.get("messages") is None:
        present = ", ".join(name for name in row if name != ROW)
        raise EchoDataError(f"{where} has neither prompt nor messages. Present: {present}. Rename a column.")
    kept = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}
    prompt = row["prompt"] if row.get("prompt") is not None else row["messages"]
    if isinstance(prompt, str) and not speaker.uses_template:
        if system is not None:
            raise EchoConfigError(f"--system needs a chat template, and {speaker.adapter} is prompted without one.")
        return {"prompt": prompt}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages.pop()  # the answer that the row was trained on
    asked = kept | chat_row(messages, system)
    require_system(speaker, system, asked)
    return asked


def prompts_of(path: str | Path) -> list[tuple[str, Row]]:
    """The prompts of a file, each with its place: lines of a text file, or rows as `RowFile` reads them.

    Raises EchoDataError.
    """
    path = expanded(path)
    if path.suffix != ".txt":
        return [(where_is(str(path), row_number(row, i)), row) for i, row in enumerate(RowFile(path))]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EchoDataError(f"{path} can't be read: {error}. Name a text file in UTF-8.") from error
    lines = [(f"{path}:{i}", {"prompt": line}) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise EchoDataError(f"{path} has no prompt. Write one per line.")
    return lines


def answer_file(
    speaker: Speaker,
    rows: Sequence[tuple[str, Row]],
    output: Path,
    decoding: Decoding,
    *,
    batch_size: int,
    with_base: bool = False,
    system: str | None = None,
) -> None:
    """Write the rows with their answers as JSON Lines, in order, once all are answered; see `answer_rows`."""
    answered: dict[int, Row] = {}
    with counted("Answering", len(rows)) as count:
        options: dict[str, Any] = {"batch_size": batch_size, "with_base": with_base, "system": system}
        try:
            for place, row in answer_rows(speaker, rows, decoding, **options):
                answered[place] = row
                count(len(answered))
        except KeyboardInterrupt as error:
            raise EchoInterrupt(
                f"Interrupted after {len(answered)} of {len(rows)} prompts. {output} was not written."
            ) from error
    lines = [json.dumps(answered[place], ensure_ascii=False) + "\n" for place in range(len(rows))]
    write_text(output, "".join(lines))
