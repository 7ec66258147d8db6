"""Chat templates: rendering a row's messages, and finding out what a template leaves out.

Templates drop content silently. To detect that, a marker word is put into each value of a row and looked for in what
the template writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from echo_lora.data.forms import CALL_KEYS, MESSAGE_KEYS, PART_KEYS, REASONING, functions_of, other_texts, texts_of
from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Template:
    """The tokenizer's chat template for the messages of one row. Its methods raise EchoDataError."""

    def __init__(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, has_marks: bool = False
    ) -> None:
        if tokenizer.chat_template is None:
            raise EchoDataError(
                f"{where} needs a chat template, but {tokenizer.name_or_path} has none. "
                "Write prompt and completion as strings and leave chat off, or use a chat model."
            )
        self.tokenizer, self.where, self.tools = tokenizer, where, row.get("tools")
        self.variables = row.get("chat_template_kwargs", {})
        self.options: dict[str, Any] = {"tools": self.tools, **self.variables}
        if has_marks:
            try:
                template = _training_template(tokenizer, str(tokenizer.chat_template))
            except ValueError as error:
                raise self._error(error) from error
            self.options["chat_template"] = template

    def fit(self, messages: list[dict[str, Any]], prompt: int) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """The form of the messages in which the template leaves out least, and what it leaves out.

        prompt: the number of messages before the answer; templates rightly drop reasoning from them.
        """
        best: tuple[list[dict[str, Any]], tuple[str, ...]] | None = None
        failure: EchoDataError | None = None
        for form in _written(messages):
            try:
                left_out = self._left_out(form, prompt)
            except EchoDataError as error:
                failure = failure or error
                continue
            if best is None or len(left_out) < len(best[1]):
                best = form, left_out
            if not left_out:
                break
        if best is None:
            assert failure is not None
            raise failure
        contents = (message["content"] for message in messages if isinstance(message.get("content"), list))
        keys = sorted({key for content in contents for part in content for key in other_texts(part, PART_KEYS)})
        return best[0], best[1] + tuple(f"text in the key {key!r} of parts of content" for key in keys)

    def _left_out(self, messages: list[dict[str, Any]], prompt: int) -> tuple[str, ...]:
        """The content of the row that the template does not write."""
        text = self.render(messages)
        mark = _Marker()
        marked = [
            mark.message(message, place < prompt and message["role"] == "assistant")
            for place, message in enumerate(messages)
        ]
        tools = self.tools and [mark.tool(tool) for tool in self.tools]
        try:
            shown = self.render(marked, tools=tools)
        except EchoDataError:  # the template rejects marked values: look for the row's own instead
            shown = "".join(word for _, _, word in mark.marks)
        found = {what for what, value, word in mark.marks if word not in shown or not _shows(text, value)}
        if _is_written_twice(messages, text):
            found.add("tool calls")
        if self.tools and not any(what == "tools" for what, _, _ in mark.marks):  # tools without names
            found |= {"tools"} if self.render(messages, tools=None) == text else set()
        found |= {f"text in the key {key!r} of messages" for key in self._unused_keys(messages, text)}
        if self.variables:
            source = self.tokenizer.get_chat_template(self.options.get("chat_template"), self.tools)
            found |= {f"{name!r} in chat_template_kwargs" for name in self.variables if name not in _names_in(source)}
        if "tools" in found:
            found -= {"parameters of tools", "descriptions of tools"}
        return tuple(f"{what} that the chat template leaves out" for what in sorted(found))

    def _unused_keys(self, messages: list[dict[str, Any]], text: str) -> set[str]:
        """Keys of messages that make no difference to what the template writes."""
        called = [function["name"] for message in messages for function in functions_of(message)]
        keys = {
            (message["role"], key)
            for message in messages
            for key in other_texts(message, MESSAGE_KEYS)
            if not (key == "name" and message["role"] == "tool" and message[key] in called)  # said by the call
        }
        unused = set()
        for role, key in keys:
            without = [
                {name: value for name, value in message.items() if (message["role"], name) != (role, key)}
                for message in messages
            ]
            try:
                unused |= {key} if self.render(without) == text else set()
            except EchoDataError:  # the template needs it
                continue
        return unused

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self._apply(messages, tokenize=False, **options)

    def tokenize(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return list(self._apply(messages, return_dict=True, **options)["input_ids"])

    def tokenize_marked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids, and a mask that is 1 at tokens the template marks as the assistant's."""
        rendered = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), list(rendered["assistant_masks"])

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, **self.options | options)
        # templates raise errors of their own, and an endless loop is an OverflowError in jinja
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> EchoDataError:
        return EchoDataError(
            f"{self.where}: the chat template of {self.tokenizer.name_or_path} fails on it: {error}\n"
            "Correct the roles of its messages, or set another chat template."
        )


def _written(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages in every form that templates expect, the usual one first.

    Content in parts as one string or as parts; missing content as missing or as an empty string; arguments of tool
    calls as given, or converted between object and JSON string.
    """
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    has = {
        "parts": any(isinstance(message.get("content"), list) for message in messages),
        "empty": any("content" not in message for message in messages),
        "arguments": any(function.get("arguments") for message in messages for function in functions_of(message)),
    }
    for picked in product(*((False, True) if present else (False,) for present in has.values())):
        parts, empty, arguments = picked
        form = []
        for message in messages:
            if not parts and isinstance(message.get("content"), list):
                message = message | {"content": "".join(texts_of(message))}
            if empty and "content" not in message:
                message = message | {"content": ""}
            if arguments and "tool_calls" in message:
                message = message | {"tool_calls": [_other_arguments(call) for call in message["tool_calls"]]}
            form.append(message)
        yield form


def _other_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _other_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return call | {"arguments": json.loads(arguments)}
    return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}


class _Mark(NamedTuple):
    """A marker word in the middle of a value; a text that holds the word shows the value."""

    what: str  # what the value belongs to
    value: str
    word: str


class _Marker:
    """Puts a unique word into each value of a row: the value itself could be in the text by chance."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []

    def __call__(self, what: str, value: Any) -> Any:
        """The value with a mark in each of its ends that holds something."""
        if isinstance(value, Mapping):
            return {key: self(what, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(what, item) for item in value]
        text = value if isinstance(value, str) else json.dumps(value)
        if not text.strip():  # templates ask whether there is something
            return value
        word = f"EchoLoraMark{len(self.marks)}x"
        # how a number is written is the template's choice: only a text can be looked for itself
        self.marks.append(_Mark(what, value if isinstance(value, str) else "", word))
        middle = len(text) // 2  # templates may ask how a text begins and ends
        return text[:middle] + word + text[middle:]

    def message(self, message: dict[str, Any], is_context: bool) -> dict[str, Any]:
        """is_context: an assistant turn in the prompt, whose reasoning templates rightly drop."""
        marked, thoughts = dict(message), {}

        def thought(text: str) -> str:  # a row may hold it twice, and templates show it once
            if text.strip() not in thoughts:
                thoughts[text.strip()] = self("reasoning", text)
            return thoughts[text.strip()]

        def text_of(content: str) -> str:
            before, tag, answer = content.rpartition("</think>")
            if tag and not is_context:
                said, opening, thoughts_in = before.rpartition("<think>")
                before = self("content", said) + opening + thought(thoughts_in)
            return before + tag + self("content", answer)

        if isinstance(message.get("content"), list):
            marked["content"] = [part | {"text": text_of(part["text"])} for part in message["content"]]
        elif message.get("content"):
            marked["content"] = text_of(message["content"])
        for key in REASONING:
            if key in message and not is_context:
                is_text = isinstance(message[key], str)
                marked[key] = thought(message[key]) if is_text else self("reasoning", message[key])
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return marked

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        call = dict(call)
        for key in other_texts(call, CALL_KEYS):
            call[key] = self(f"text in the key {key!r} of tool calls", call[key])
        if "function" in call:
            return call | {"function": self._call(call["function"])}
        call["name"] = self("tool calls", call["name"])
        if isinstance(arguments := call.get("arguments"), str):
            arguments = json.dumps(self("tool calls", json.loads(arguments)), ensure_ascii=False)
        elif arguments is not None:
            arguments = self("tool calls", arguments)
        return call | ({} if arguments is None else {"arguments": arguments})

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """The tool with its name and descriptions marked, and an added, marked parameter."""
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self.tool(tool["function"])}
        marked = self._described(tool)
        if isinstance(tool.get("name"), str):
            marked["name"] = self("tools", tool["name"])
        schema = marked.get("parameters")
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) and schema["properties"]:
            name = self("parameters of tools", next(iter(schema["properties"])))
            schema["properties"] = schema["properties"] | {name: {"type": "string"}}
        return marked

    def _described(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._described(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        return {
            key: self("descriptions of tools", item)
            if key == "description" and isinstance(item, str)
            else self._described(item)
            for key, item in value.items()
        }


def _is_written_twice(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether arguments that are already a JSON string are encoded a second time."""
    arguments = [function.get("arguments") for message in messages for function in functions_of(message)]
    return any(isinstance(a, str) and '"' in a and json.dumps(a)[1:-1] in text for a in arguments)


def _shows(text: str, value: str) -> bool:
    """Whether each line of the value is in the text, as is or JSON-encoded."""
    return value.strip() in text or all(
        line in text or json.dumps(line)[1:-1] in text or json.dumps(line, ensure_ascii=False)[1:-1] in text
        for line in map(str.strip, value.replace("<think>", "\n").splitlines())
    )


@lru_cache(maxsize=4)
def _training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """TRL's variant with assistant marks of a template that has none; None if it has them."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(template) else get_training_chat_template(tokenizer)


@lru_cache(maxsize=4)
def _names_in(template: str) -> frozenset[str]:
    """The variables, attributes and functions that a template uses."""
    from jinja2 import Environment

    return frozenset(value for _, kind, value in Environment().lex(template) if kind == "name")
