"""Text: checks of what users' files hold, and the templates of what is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from jinja2 import Environment


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


def template_environment(*, autoescape: bool = False) -> Environment:
    """jinja2's environment for the package's templates; an undefined name is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("echo_lora"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=autoescape,
        keep_trailing_newline=True,
    )
