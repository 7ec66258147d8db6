"""Checks of text that users' files hold."""

from __future__ import annotations

from typing import Any

from echo_lora.errors import EchoDataError


def lone_surrogate(text: str) -> int | None:
    """Position of the first half of a surrogate pair, which no tokenizer takes; None for valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def is_text(value: Any) -> bool:
    """Whether a value is valid Unicode text that is not blank."""
    return isinstance(value, str) and bool(value.strip()) and lone_surrogate(value) is None


def check_unicode(text: str, name: str, where: str) -> None:
    """Raise EchoDataError if the text holds a lone surrogate."""
    position = lone_surrogate(text)
    if position is not None:
        raise EchoDataError(
            f"{where}: {name} holds half of a character, {text[position]!r} at position {position}, which is not valid "
            "Unicode. Write the whole character, or remove it."
        )
