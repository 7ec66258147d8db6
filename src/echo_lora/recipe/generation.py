"""Answers of an adapter, and of its base: one at a time as they are written, or many in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.generation import BaseStreamer

from echo_lora.data.forms import checked_messages, row_number
from echo_lora.data.sources import ROW, RowFile, expanded, where_is
from echo_lora.data.tokenize import render_prompt
from echo_lora.errors import EchoConfigError, EchoDataError, EchoInterrupt
from echo_lora.files import write_text
from echo_lora.progress import counted
from echo_lora.recipe.speaker import Decoding, Row, Speaker

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
    column = "prompt" if row.get("prompt") is not None else "messages"
    if column == "prompt" and isinstance(row["prompt"], str):
        if not speaker.uses_template:
            if system is not None:
                raise EchoConfigError(f"--system needs a chat template, and {speaker.adapter} is prompted without one.")
            return {"prompt": row["prompt"]}
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        messages = checked_messages(row[column], column, where)
    if messages[-1]["role"] == "assistant":
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
