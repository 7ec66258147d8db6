"""Every error a user can meet.

    EchoError
    ├── EchoConfigError       a field of EchoConfig or a key of a recipe is wrong
    ├── EchoDataError         a row, a file or a batch can't be trained on
    ├── EchoModelError        the base model or the adapter can't carry the echo
    ├── EchoCheckpointError   a checkpoint or a saved adapter is unusable or not what it should be
    └── EchoTrainingError     training had to stop (a loss or gradient that is not finite)

EchoInterrupt is a KeyboardInterrupt that says what was reached and how to go on.

A message says what is wrong, where (file and line, row, layer name, field), and what to do, and it
carries the values. Wrong use of the command line is reported by typer with exit status 2.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from pydantic import ValidationError

LONGEST_LINE, MOST_LINES = 1000, 12  # of a message


def shortened(text: str) -> str:
    """Text that fits a screen: long lines and many lines lose their middle, unprintable characters are escaped."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 3 : -2] = [f"... ({len(lines) - MOST_LINES + 1:,} more lines)"]
    return "\n".join(map(_shortened_line, lines))


def _shortened_line(line: str) -> str:
    if len(line) > LONGEST_LINE:
        head, tail = 2 * LONGEST_LINE // 3, LONGEST_LINE // 4
        line = f"{line[:head]} ... ({len(line) - head - tail:,} more characters) ... {line[-tail:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class EchoError(Exception):
    """Base of all errors raised on purpose by this package. Messages are shortened here, whatever values they carry."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class EchoConfigError(EchoError, ValueError):
    """A configuration value is wrong; the message names the field or the recipe key."""


class EchoDataError(EchoError, ValueError):
    """Training or evaluation data is unusable; the message names file and line, or row."""


class EchoModelError(EchoError, ValueError):
    """The base model or adapter does not fit; the message names the layer or module."""


class EchoCheckpointError(EchoError, RuntimeError):
    """A checkpoint or adapter folder is incomplete, corrupted, or from another run."""


class EchoTrainingError(EchoError, RuntimeError):
    """Training stopped; the message names the step, the rows and the term."""


class EchoInterrupt(KeyboardInterrupt):
    """The user's Ctrl-C; the message names the step, the newest checkpoint and how to go on."""


def first_problem(error: ValidationError) -> str:
    """What pydantic found first: the place, the value, and what it must be."""
    problem = error.errors()[0]
    place, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = re.sub(r"^(Input|String|List|Value|Tuple|Dictionary) should", "must", message)
    return f"{place} = {problem['input']!r} {message}" if place else message


def nearest(key: str, names: list[str]) -> str:
    """ " Did you mean …?" with the nearest of `names`, or the list of them."""
    match = get_close_matches(key, names, n=1)
    return f" Did you mean {match[0]!r}?" if match else f" Known: {', '.join(sorted(names))}."
