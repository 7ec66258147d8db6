"""From rows to token ids and labels, with every check before the first step.

A row is one of TRL's forms: `prompt` and `completion` as strings, the same two as lists of messages, or a
conversation in `messages`. The ids and labels are those that TRL's SFTTrainer makes of it. What the echo
adds is a demand: each row has a **boundary**, the last token before its first answer token, and keeps its
whole answer. A row that can't is an error that names it, never a silent loss.

`row` is the index of a row in its source, from 0; a JSON Lines file has it on line `row + 1`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from echo_lora.config import nearest
from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
Overlength = Literal["error", "drop", "truncate_prompt"]
Segment = tuple[str, Literal["prompt", "boundary", "answer", "ignored"]]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids and labels (-100 where nothing is learned) of one row, both of length T."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    merged_tokens: int = 0  # prompt tokens that differ once the answer follows; TRL leaves them out

    @property
    def answer_start(self) -> int:
        """Column of the first answer token; T if there is none."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


# ------------------------------------------------------------------------------------------------ reading


def read_rows(
    path: str | Path, columns: Mapping[str, str] | None = None, part: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, a JSON list, or a Parquet file.

    columns: our name → the file's name, as in `{"prompt": "instruction", "completion": "output"}`; other
    columns keep their names. part: keep the rows whose column `part` has this value; they then carry their
    place in the file as `row`. Raises EchoDataError with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise EchoDataError(f"{path}: there is no such file. Correct the path, or put the file there.")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if not rows:
        raise EchoDataError(f"{path} has no row. Name a file with at least one.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise EchoDataError(
                f"{_where(str(path), index)} is a {type(row).__name__}, not an object with named columns. "
                'Write each row as {"prompt": ..., "completion": ...}.'
            )
    if part is not None:
        rows = _select_part(rows, part, str(path))
    return [_rename(row, columns, str(path), index) for index, row in enumerate(rows)] if columns else rows


def _read_json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EchoDataError(
            f"{path} is not UTF-8 text (byte {error.start}). Use JSON Lines, a JSON list or Parquet."
        ) from error
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise EchoDataError(f"{path}:{error.lineno}: not JSON: {error.msg}. Correct the list.") from error
    rows = []
    for number, line in enumerate(text.rstrip().split("\n"), start=1):  # U+2028 may stand inside a string
        if not line.strip():
            raise EchoDataError(f"{path}:{number}: the line is empty. Remove it, or write its row.")
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise EchoDataError(
                f"{path}:{number}: not JSON: {error.msg} at column {error.colno}. "
                "Write one complete JSON object on each line."
            ) from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise EchoDataError(f"{path} can't be read as Parquet: {error}. Write or fetch it again.") from error


def _select_part(rows: list[dict[str, Any]], part: str, source: str) -> list[dict[str, Any]]:
    selected = [{**row, "row": index} for index, row in enumerate(rows) if row.get("part") == part]
    if not selected:
        parts = sorted({str(row["part"]) for row in rows if "part" in row})
        known = nearest(part, parts) if parts else " The file has no column 'part': leave part out."
        raise EchoDataError(f"{source}: no row has part = {part!r}.{known}")
    return selected


def _rename(row: dict[str, Any], columns: Mapping[str, str], source: str, index: int) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise EchoDataError(
                f"{_where(source, row.get('row', index))} has no column {theirs!r}, which columns names for "
                f"{ours!r}.{nearest(theirs, list(row))} Present: {', '.join(row)}."
            )
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


# --------------------------------------------------------------------------------------------- tokenising


def tokenize_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool = False, where: str | None = None
) -> TokenizedRow:
    """Ids and labels of `row`, as TRL's SFTTrainer makes them.

    chat: put a plain prompt and completion into the chat template, as a user's and an assistant's message.
    where: how errors name the row. Raises EchoDataError for a row without a prompt or without an answer.
    """
    number = _number(row, 0)
    where = where or f"row {number}"
    row = _checked(row, where)
    if "messages" in row:
        rendered = _apply_template(
            row, row["messages"], tokenizer, where, trains=True, return_assistant_tokens_mask=True
        )
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        if 1 not in mask:
            raise EchoDataError(
                f"{where} keeps no answer token: the chat template of {tokenizer.name_or_path} marks none of its "
                "tokens as the assistant's. Put the assistant's content between {% generation %} and "
                "{% endgeneration %} in the template, or give the row as prompt and completion."
            )
        labels = [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]
        return TokenizedRow(list(ids), labels, number)

    row = _as_chat(row) if chat else row
    if isinstance(row["prompt"], str):
        if tokenizer.eos_token is None:
            raise EchoDataError(
                f"{where} can't be ended: {tokenizer.name_or_path} has no end-of-sequence token. "
                "Set tokenizer.eos_token."
            )
        completion = row["completion"].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        prompt_ids = tokenizer(text=row["prompt"])["input_ids"]
        ids = tokenizer(text=row["prompt"] + completion)["input_ids"]
    else:
        prompt_ids = _apply_template(row, row["prompt"], tokenizer, where, add_generation_prompt=True)["input_ids"]
        ids = _apply_template(row, row["prompt"] + row["completion"], tokenizer, where)["input_ids"]
    start = _common_prefix(prompt_ids, ids)
    labels = [IGNORED] * start + list(ids[start:])
    return TokenizedRow(list(ids), labels, number, merged_tokens=len(prompt_ids) - start)


def render_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> str:
    """The prompt as text, special tokens included, for generation and scoring.

    Tokenised with `add_special_tokens=False` it gives the ids before the row's first answer token. A
    conversation is rendered up to its first assistant message. Without a completion in the row, the prompt
    is rendered as it stands. Raises EchoDataError if no text gives these ids.
    """
    where = f"row {_number(row, 0)}"
    if row.get("messages") is None and row.get("completion") is None:
        return _prompt_text(_checked({**row, "completion": "?"}, where), tokenizer, chat, where)
    tokenized = tokenize_row(row, tokenizer, chat)
    ids = tokenized.input_ids[: tokenized.answer_start]
    text = _prompt_text(_checked(row, where), tokenizer, chat, where)
    for candidate in (text, tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
        if tokenizer(candidate, add_special_tokens=False)["input_ids"] == ids:
            return candidate
    raise EchoDataError(
        f"{where}: no text gives its prompt's token ids again with the tokenizer of {tokenizer.name_or_path}. "
        "End the prompt on a token boundary, for example without a blank at its end."
    )


def _prompt_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, where: str) -> str:
    row = _as_chat(row) if chat else row
    if "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        messages = row["messages"][:first]
    elif isinstance(row["prompt"], str):
        with_special, plain = (
            tokenizer(row["prompt"], add_special_tokens=special)["input_ids"] for special in (True, False)
        )
        added = with_special[: len(with_special) - len(plain)]  # a beginning-of-sequence token, if any
        return "".join(tokenizer.convert_ids_to_tokens(added)) + row["prompt"]
    else:
        messages = row["prompt"]
    return _apply_template(row, messages, tokenizer, where, add_generation_prompt=True, tokenize=False)


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row without its empty columns, if it is of a known form with a prompt and an answer."""
    row = {name: value for name, value in row.items() if value is not None}  # Arrow fills gaps with None
    names = ", ".join(row) or "none"
    if "messages" in row and "prompt" not in row:
        _check_messages(row["messages"], "messages", where)
        turns = [message for message in row["messages"] if message["role"] == "assistant"]
        if not any(_has_text(turn) for turn in turns):
            raise EchoDataError(f"{where} has no assistant message with text. Write one, or remove the row.")
        return {name: value for name, value in row.items() if name != "completion"}
    if "text" in row and "completion" not in row:
        raise EchoDataError(
            f"{where} has only text: nothing says where the prompt ends and the answer begins, and the echo is "
            "read at this boundary. Give the two as prompt and completion."
        )
    for column in ("prompt", "completion"):
        if column not in row:
            raise EchoDataError(
                f"{where} has no {column}. Present: {names}. Add it, or say with columns which one it is."
            )
    row.pop("messages", None)  # as in TRL, prompt and completion come first
    kinds = {type(row["prompt"]), type(row["completion"])}
    if kinds == {list}:
        for column in ("prompt", "completion"):
            _check_messages(row[column], column, where)
        is_empty = not any(_has_text(message) for message in row["completion"])
    elif kinds == {str}:
        if not row["prompt"]:
            raise EchoDataError(f"{where} has an empty prompt. Write one, or remove the row.")
        is_empty = not row["completion"].strip()
    else:
        raise EchoDataError(
            f"{where}: prompt is a {type(row['prompt']).__name__} and completion a "
            f"{type(row['completion']).__name__}. Give both as strings, or both as lists of messages."
        )
    if is_empty:
        raise EchoDataError(f"{where} has an empty answer. Write one, or remove the row.")
    return row


def _check_messages(messages: Any, column: str, where: str) -> None:
    is_conversation = isinstance(messages, list) and messages
    if not is_conversation or not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages):
        raise EchoDataError(
            f"{where}: {column} is not a list of messages. "
            'Write it as [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        )


def _has_text(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    return bool(content.strip() if isinstance(content, str) else content or message.get("tool_calls"))


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), str):
        return row
    return row | {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def _apply_template(
    row: Mapping[str, Any],
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    trains: bool = False,
    tokenize: bool = True,
    **options: Any,
) -> Any:
    """The conversation through the chat template, which gets what TRL gives it."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise EchoDataError(
            f"{where} needs a chat template, and {tokenizer.name_or_path} has none. "
            "Give prompt and completion as strings and leave chat off, or name a chat model."
        )
    template = _training_template(tokenizer, tokenizer.chat_template, where) if trains else None
    tools = row.get("tools")
    options |= row.get("chat_template_kwargs", {})
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=tokenize,
            return_dict=tokenize,
            **options,
        )
    except TemplateError as error:
        raise EchoDataError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses the conversation: {error}. "
            "Correct its roles."
        ) from error


@lru_cache(maxsize=4)
def _training_template(tokenizer: PreTrainedTokenizerBase, template: str, where: str) -> str | None:
    """TRL's variant of a template that doesn't mark what the assistant says; None if it does."""
