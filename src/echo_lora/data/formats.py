"""Formats of rows: which one a source has, and the same row in one of our forms.

| format | columns | becomes |
|---|---|---|
| `messages` | `messages` (or `conversations`) of {role, content} | `messages` |
| `prompt_completion` | `prompt`, `completion` | as it is |
| `alpaca` | `instruction`, `output`, perhaps `input` | `prompt`, `completion` |
| `sharegpt` | `conversations` (or `messages`) of {from, value} | `messages` |

A column `system` becomes the first message, or the first line of Alpaca's layout. Columns that a format does not use
stay in the row, where `check_forms` finds text that would be lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

from echo_lora.data.forms import ROW_COLUMNS, SCORED_COLUMNS, row_number
from echo_lora.data.loaded import TABLES, ending
from echo_lora.data.sources import ROW, where_is
from echo_lora.errors import EchoDataError

FormatName = Literal["messages", "prompt_completion", "alpaca", "sharegpt"]
Row = dict[str, Any]

_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?")
LOOKED_AT = 100  # rows from which `auto` decides

# Stanford Alpaca's layout; the answer starts on the line after the last.
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_SYSTEM_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)

# ShareGPT's names of who speaks, and those of the files that imitate it.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}


@dataclass(frozen=True)
class Format:
    """The format of a source's rows."""

    name: FormatName | None  # None: `auto` found none, and rows stay as they are
    reason: str  # in words, for people: `alpaca (columns instruction, input, output)`
    convert: Callable[[Mapping[str, Any], str], Row]  # a row and how errors name it → the row in one of our forms


@dataclass(frozen=True)
class FormattedRows:
    """Rows in one of our forms; each loop reads them anew."""

    rows: Iterable[Mapping[str, Any]]
    format: Format
    source: str
    keeps: Callable[[Row], bool] | None = None  # which rows of the source are meant; default: all

    def __iter__(self) -> Iterator[Row]:
        is_table = ending(self.source) in TABLES
        for index, row in enumerate(self.rows):
            number = row_number(row, index)
            converted = self.format.convert(row, where_is(self.source, number))
            if is_table:
                converted = {name: _cell(name, value) for name, value in converted.items()}
            if self.keeps is None:
                yield converted
            elif self.keeps(converted):
                yield converted | {ROW: number}

    def __len__(self) -> int:
        return sum(1 for _ in self)


def find_format(
    rows: Iterable[Mapping[str, Any]],
    wanted: str = "auto",
    *,
    chat: bool = False,
    ignore: Collection[str] = (),
    source: str = "the data",
) -> Format:
    """The format of rows, and what turns one into a form that can be trained on.

    wanted: a format, or `auto`, which decides from the columns of the first 100 rows. chat: strings will go through the
    chat template, so Alpaca's layout is left out. ignore: columns that are not used, and stay in the row. source: its
    name in errors. Reads at most 100 rows. Raises EchoDataError if the rows don't have
    the columns of the wanted format; `convert` raises one that names the row.
    """
    seen: dict[str, Any] = {}  # the first value of every column
    for row in islice(rows, LOOKED_AT):
        kept = {column: value for column, value in row.items() if column not in ignore}
        seen |= {column: value for column, value in kept.items() if seen.get(column) in (None, "", [])}
    found = _found(seen)
    name: Any = found if wanted == "auto" else wanted  # one of FormatName
    if name is None:
        columns = ", ".join(_shown(seen)) or "none"
        return Format(None, f"no known format (columns {columns})", lambda row, where: {**row})
    turns = _turns_column(seen)
    needed, optional, convert = {
        "messages": (turns, ["system"], partial(_from_messages, column=turns)),
        "prompt_completion": ("prompt", ["completion", *["system"] * chat], partial(_from_prompt, chat=chat)),
        "alpaca": ("instruction", ["input", "output", "system"], partial(_from_alpaca, chat=chat)),
        "sharegpt": (turns, ["system"], partial(_from_sharegpt, column=turns)),
    }[name]
    if seen and needed not in seen:
        is_like = f" They look like {found}: set data.format to {found} or auto." if found else ""
        raise EchoDataError(
            f"{source} is not {name}: it has no column {needed!r}. Present: {', '.join(_shown(seen))}.{is_like} "
            f"If another column holds it, map that one: data.columns: {{{needed}: its name}}."
        )
    used = [column for column in (needed, *optional) if column in seen]
    return Format(name, f"{name} (column{'s' * (len(used) > 1)} {', '.join(used)})", partial(_without, ignore, convert))


def _without(ignore: Collection[str], convert: Callable[..., Row], row: Mapping[str, Any], where: str) -> Row:
    """The converted row, whose ignored columns take no part in it."""
    aside = {column: value for column, value in row.items() if column in ignore}
    return aside | convert({column: value for column, value in row.items() if column not in ignore}, where)


def _found(seen: Mapping[str, Any]) -> FormatName | None:
    if "prompt" in seen:  # as in TRL, prompt and completion come before messages
        return "prompt_completion"
    turns = seen.get(_turns_column(seen))
    if isinstance(turns, list):
        is_sharegpt = any(isinstance(turn, Mapping) and "from" in turn and "role" not in turn for turn in turns)
        return "sharegpt" if is_sharegpt else "messages"
    return "alpaca" if {"instruction", "output"} <= seen.keys() else None


def _turns_column(seen: Mapping[str, Any]) -> str:
    return "conversations" if "conversations" in seen and "messages" not in seen else "messages"


def _shown(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if not name.startswith("_echo")]


def _from_prompt(row: Mapping[str, Any], where: str, *, chat: bool) -> Row:
    row = dict(row)
    system = _system(row, where) if isinstance(row.get("prompt"), list) or chat else None
    if system is None:
        return row
    if isinstance(row.get("prompt"), str):
        row |= _asked(row["prompt"], row.get("completion"))
    return row | {"prompt": _with_system(system, row["prompt"], where)}


def _from_alpaca(row: Mapping[str, Any], where: str, *, chat: bool) -> Row:
    row = dict(row)
    for ours in ("prompt", "completion"):
        if row.get(ours):
            raise EchoDataError(
                f"{where} has a column {ours!r} beside those of Alpaca. Set data.format to prompt_completion, or "
                "remove one of the two."
            )
    instruction = _text(row, "instruction", where, required=True)
    given, system = _text(row, "input", where), _system(row, where)
    output = row.pop("output", None)
    if output is not None and not isinstance(output, str):
        raise EchoDataError(f"{where}: output is a {type(output).__name__}. Write it as a string.")
    if output is None and "answer" not in row:  # which rows to score may have in its place
        raise EchoDataError(f"{where} has no output. Write one, or remove the row.")
    answer = {} if output is None else {"completion": output}
    if chat:
        asked = f"{instruction}\n\n{given}" if given else instruction
        if system is None:
            return row | {"prompt": asked} | answer
        row |= _asked(asked, output)
        return row | {"prompt": _with_system(system, row["prompt"], where)}
    return row | {"prompt": alpaca_prompt(instruction, given, system)} | answer


def alpaca_prompt(instruction: str, given: str = "", system: str | None = None) -> str:
    """An instruction, and perhaps its input, in Stanford Alpaca's layout."""
    system = system or (ALPACA_SYSTEM_WITH_INPUT if given else ALPACA_SYSTEM)
    parts = {"Instruction": instruction} | ({"Input": given} if given else {})
    asked = "".join(f"### {name}:\n{text}\n\n" for name, text in parts.items())
    return f"{system}\n\n{asked}### Response:\n"


def _from_messages(row: Mapping[str, Any], where: str, *, column: str) -> Row:
    row = dict(row)
    system, messages = _system(row, where), row.pop(column, None)
    return row | {"messages": messages if system is None else _with_system(system, messages, where)}


def _from_sharegpt(row: Mapping[str, Any], where: str, *, column: str) -> Row:
    row = dict(row)
    system, turns = _system(row, where), row.pop(column, None)
    if not isinstance(turns, list) or not turns:
        raise EchoDataError(
            f'{where}: {column} is not a list of turns. Write it as [{{"from": "human", "value": ...}}, '
            '{"from": "gpt", "value": ...}].'
        )
    messages = [_message(turn, f"{where}: {column}[{i}]") for i, turn in enumerate(turns)]
    return row | {"messages": messages if system is None else _with_system(system, messages, where)}


def _message(turn: Any, where: str) -> Row:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise EchoDataError(f'{where} is not a turn. Write it as {{"from": "human", "value": ...}}.')
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise EchoDataError(
            f"{where} is from {speaker!r}, which is not a known speaker. Use {', '.join(SPEAKERS)}; write calls of "
            "tools as messages with tool_calls."
        )
    for ours in ("role", "content"):
        if turn.get(ours) is not None:
            raise EchoDataError(f"{where} has both from and value and {ours}. Remove one of the two.")
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": SPEAKERS[speaker], "content": turn["value"], **others}


def _system(row: Row, where: str) -> str | None:
    """The text of the column `system`, which is removed; None if there is none."""
    return _text(row, "system", where) or None


def _text(row: Row, name: str, where: str, *, required: bool = False) -> str:
    value = row.pop(name, None)
    if isinstance(value, str) and (value.strip() or not required):
        return value if value.strip() else ""
    if value is None and not required:
        return ""
    problem = "is empty" if value is None or isinstance(value, str) else f"is a {type(value).__name__}, not a string"
    raise EchoDataError(f"{where}: {name} {problem}. Write it as a text, or remove the row.")


def _asked(prompt: str, completion: Any) -> Row:
    row: Row = {"prompt": [{"role": "user", "content": prompt}]}
    if completion is not None:
        row["completion"] = [{"role": "assistant", "content": completion}]
    return row


def _with_system(system: str, messages: Any, where: str) -> Any:
    first = messages[0] if isinstance(messages, list) and messages else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        raise EchoDataError(
            f"{where} has a system message in its column 'system' and another as its first turn. Remove one of them."
        )
    return [{"role": "system", "content": system}, *messages] if isinstance(messages, list) else messages


def _cell(name: str, value: Any) -> Any:
    """A number, if a cell of a table holds one in a column that is not read as text."""
    is_read = name in ROW_COLUMNS or (name in SCORED_COLUMNS and name != "label")
    if is_read or not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return value
    return float(value) if "." in value else int(value)
