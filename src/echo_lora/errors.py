"""The errors that this package raises on purpose.

    EchoError
    ├── EchoConfigError       a field of EchoConfig or a recipe key is wrong
    ├── EchoDataError         a row, a file or a batch can't be used
    ├── EchoModelError        the base model or the adapter does not fit
    ├── EchoCheckpointError   a checkpoint or a saved adapter is unusable, or an output can't be written
    └── EchoTrainingError     training had to stop: a loss or gradient is not finite

EchoInterrupt is a KeyboardInterrupt that says where training stopped and how to resume.

A message says what is wrong (with the value), where (file and line, row, layer, field) and what to do. Wrong use of
the command line is reported by typer, with exit status 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

MAX_LINE_LENGTH, MAX_LINES = 1000, 12  # of a message


def shortened(text: str) -> str:
    """Text cut to fit a screen: long lines and long texts lose their middle, unprintable characters are escaped."""
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 3 : -2] = [f"... ({len(lines) - MAX_LINES + 1:,} more lines)"]
    return "\n".join(map(_shortened_line, lines))


def _shortened_line(line: str) -> str:
    if len(line) > MAX_LINE_LENGTH:
        head, tail = 2 * MAX_LINE_LENGTH // 3, MAX_LINE_LENGTH // 4
        line = f"{line[:head]} ... ({len(line) - head - tail:,} more characters) ... {line[-tail:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class EchoError(Exception):
    """Base class of this package's errors. Shortens its message, which may carry values of any size."""

    is_repeated = False  # raised here because of another process of the run, which reports it

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class EchoConfigError(EchoError, ValueError):
    """A configuration value is wrong; the message names the field or the recipe key."""


class EchoDataError(EchoError, ValueError):
    """Training or evaluation data is unusable; the message names file and line, or row."""


class EchoModelError(EchoError, ValueError):
    """The base model or adapter does not fit; the message names the layer or module."""


class EchoCheckpointError(EchoError, RuntimeError):
    """A checkpoint or adapter folder is incomplete, corrupted or from another run, or an output can't be written."""


class EchoTrainingError(EchoError, RuntimeError):
    """Training stopped; the message names the step, the rows and the loss term."""


class EchoInterrupt(KeyboardInterrupt):
    """The user pressed Ctrl-C; the message names the step, the newest checkpoint and how to resume."""


def problem_text(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems as a phrase: the field, its value, and what it must be."""
    field, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{field} is missing"
    message = re.sub(r"^(Input|String|List|Value|Tuple|Dictionary) should", "must", message)
    return f"{field} = {problem['input']!r} {message}" if field else message


def first_problem(error: ValidationError) -> str:
    return problem_text(error.errors()[0])


def nearest(key: str, names: list[str]) -> str:
    """ " Did you mean …?" with the nearest of `names`, or " Known: …" with all of them."""
    match = get_close_matches(key, names, n=1)
    return f" Did you mean {match[0]!r}?" if match else f" Known: {', '.join(sorted(names))}."
