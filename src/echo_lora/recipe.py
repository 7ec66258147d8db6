"""Reading a recipe: one YAML file that shows a whole run.

`load_recipe` reads it, `recipe_table` lists its keys (of `schema.py`) for the documentation. What a recipe does not
say keeps its default; a key it should not say is an error that names file, line and key.

Paths of rows in a recipe start at the recipe's folder; those of a shipped recipe, of `--set`, and `output`, at the
working directory.
"""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from echo_lora.config import nearest
from echo_lora.errors import EchoConfigError
from echo_lora.schema import PARTS, DataSection, Recipe, Section, Source
from echo_lora.sources import expanded

__all__ = ["Recipe", "load_recipe", "recipe_of_run", "recipe_table", "shipped_recipes"]

SHIPPED = Path(__file__).parent / "recipes"
LARGEST_FILE = 1_000_000  # bytes; a recipe has some hundred
MOST_VALUES, DEEPEST = 100_000, 50
AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, or of the name of one that is shipped with the package.

    overrides: `key.path=value`, the value in YAML, as in `training.steps=20`. Raises EchoConfigError, which
    names file, line and key.
    """
    path = find_yaml(str(source), SHIPPED, "recipe")
    tree, document = parse_yaml(path)
    if not is_in(path, SHIPPED):  # the user's rows are not in the package
        _rebase(document, path.parent)
    document.setdefault("output", f"runs/{path.stem}")
    return validated(Recipe, document, str(source), tree, overrides)


def recipe_of_run(record: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that the `run.json` of a finished run holds, as it was then. Raises EchoConfigError.

    It may be somebody else's, so it does not decide whether code of the model is run: only `overrides` do.
    """
    try:
        document = json.loads(Path(record).read_text(encoding="utf-8"))["recipe"]
        if not isinstance(document, dict):
            raise TypeError(f"its recipe is a {type(document).__name__}, not an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EchoConfigError(f"{record} holds no recipe: {error!r}. Name a recipe instead.") from error
    document.pop("trust_remote_code", None)
    return validated(Recipe, document, str(record), None, overrides)


def validated(
    kind: type[AnySection], document: dict[str, Any], source: str, tree: yaml.Node | None, overrides: Sequence[str] = ()
) -> AnySection:
    """The document as a section of this kind, some keys overridden. Raises EchoConfigError with file, line and key."""
    changed = {}
    for text in overrides:
        keys, value = _override(text)
        _set(document, keys, value, text)
        changed[tuple(keys)] = text
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise EchoConfigError(_explain(kind, error, document, source, tree, changed)) from None


def shipped_recipes() -> list[str]:
    """Names that `load_recipe` takes without a file."""
    return names_in(SHIPPED)


def names_in(shipped: Path) -> list[str]:
    """What `find_yaml` finds in a folder of the package by name."""
    return sorted(path.stem for path in shipped.glob("*.yaml"))


def is_in(path: Path, shipped: Path) -> bool:
    """Whether a file is one of a folder of the package: its paths then start at the working directory."""
    return path.resolve().parent == shipped.resolve()


def find_yaml(source: str, shipped: Path, kind: str) -> Path:
    """The file of this path or, in the folder `shipped`, of this name. Raises EchoConfigError if there is neither."""
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):  # False also for a name that no file can have
        return path
    names = names_in(shipped)
    if source in names:
        return shipped / f"{source}.yaml"
    raise EchoConfigError(
        f"{source}: there is no such file, and no shipped {kind} of this name.{nearest(source, names)}"
    )


class _Loader(yaml.SafeLoader):
    """YAML in which every reader sees the same values.

    Numbers, booleans and null are those of JSON; what only YAML 1.1 takes for one (1:30, 1_000, 010, on, 2024-01-01)
    is the text that it looks like. Keys are texts, each given once. Tags are refused.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- as the base class has it

    def get_event(self) -> Any:
        event = super().get_event()
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise yaml.MarkedYAMLError(problem=f"the tag {tag} has no meaning here", problem_mark=event.start_mark)
        return event

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                what = repr(key.value) if isinstance(key, yaml.ScalarNode) else "here"
                raise yaml.MarkedYAMLError(problem=f"the key {what} is not text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_INTEGER = r"[-+]?(0|[1-9][0-9]{0,99})"
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INTEGER, list("-+0123456789")),
    (
        "float",
        rf"({_INTEGER}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(path: Path) -> tuple[yaml.Node | None, dict[str, Any]]:
    """The tree, which knows lines, and the document. Raises EchoConfigError with file and line."""
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise EchoConfigError(
                f"{path} has {size:,} bytes, more than any recipe or study ({LARGEST_FILE:,}). Name another file."
            )
        tree, document = _parsed(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise EchoConfigError(
            f"{path} can't be read: {error}. Correct its permissions, or name another file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise EchoConfigError(f"{where}: not a YAML recipe: {problem}. Correct this line.") from error
    if not isinstance(document, dict):
        raise EchoConfigError(
            f"{path}: a recipe is a list of `key: value` lines, as in `model: packaged:smollm2-135m`."
        )
    return tree, document


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """The tree and the value of a YAML text. Raises yaml.YAMLError."""
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        _check_size(tree, {}, set())
        return tree, loader.construct_document(tree)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep") from None


def _check_size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Number of values in a node, those that an alias repeats included. Raises yaml.YAMLError if there are too many."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="the value holds itself, by an alias", problem_mark=node.start_mark)
    if len(above) > DEEPEST:
        raise yaml.MarkedYAMLError(
            problem=f"it is nested more than {DEEPEST} levels deep", problem_mark=node.start_mark
        )
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_check_size(part, known, above | {id(node)}) for part in inner)
        if known[id(node)] > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"it has more than {MOST_VALUES:,} values, aliases counted as what they repeat",
                problem_mark=node.start_mark,
            )
    return known[id(node)]


def _rebase(document: dict[str, Any], folder: Path) -> None:
    """Let the file's relative paths of rows and of the model start at the file's folder."""

    def rebased(value: Any) -> Any:
        if isinstance(value, list):
            return [rebased(item) for item in value]
        if isinstance(value, dict):
            return value | {"file": rebased(value["file"])} if isinstance(value.get("file"), str) else value
        return str(folder / expanded(value)) if isinstance(value, str) and value.strip() else value

    model, data, evaluation = (document.get(key) for key in ("model", "data", "evaluation"))
    if isinstance(model, str) and model.startswith("."):
        document["model"] = str((folder / model).absolute())  # "./base" must not become the hub id "base"
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    for holder, keys in ((data, PARTS), *((task, ("data",)) for task in (tasks if isinstance(tasks, list) else []))):
        for key in keys:
            if isinstance(holder, dict) and key in holder:
                holder[key] = rebased(holder[key])


def _override(text: str) -> tuple[list[str], Any]:
    key, is_given, value = text.partition("=")
    keys = key.strip().split(".")
    if not is_given or not all(key.isprintable() and key for key in keys) or len(keys) > DEEPEST:
        raise EchoConfigError(f"--set {text}: write it as key=value, for example --set training.steps=20.")
    try:
        return keys, _parsed(value)[1]
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise EchoConfigError(f"--set {text}: the value is not YAML: {problem}. Correct it, or quote it.") from error


def _set(document: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        section = document.get(key) or {}
        if not isinstance(section, dict):
            raise EchoConfigError(f"--set {text}: {'.'.join(keys[: depth + 1])} is not a section. Set it as a whole.")
        document[key] = dict(section)  # a copy: YAML's anchors make one section stand in two places
        document = document[key]
    document[keys[-1]] = value


# ---------------------------------------------------------------------- errors


def _explain(
    kind: type[Section],
    error: ValidationError,
    document: Any,
    source: str,
    tree: yaml.Node | None,
    changed: dict[tuple[str, ...], str],
) -> str:
    """One line per wrong key: where it stands, which it is, what is wrong, what is allowed."""
    problems: dict[tuple[Any, ...], list[str]] = {}
    for problem in error.errors():
        path = _written_path(problem["loc"], document)
        shown = ".".join(map(str, path))
        value = "null" if problem["input"] is None else repr(problem["input"])
        message = re.sub(r"^(Input|String|List) should", "must", problem["msg"].removeprefix("Value error, "))
        if problem["type"] == "extra_forbidden":
            message = f"unknown key {shown}.{nearest(str(path[-1]), _keys(kind, problem['loc'][:-1]))}"
        elif problem["type"] == "missing":
            message = f"the key {'.'.join([shown, str(problem['loc'][-1])]).lstrip('.')} is missing. Add it."
        elif problem["type"] == "bool_type":
            message = f"{shown} = {value} must be true or false."
        elif problem["type"] == "value_error":
            message = f"{shown + ': ' if shown else ''}{message.rstrip('.')}."
        else:
            message = f"{shown} = {value} {message}."
            if value == "null" and problem["type"] == "string_type":
                message += ' YAML reads ~ and an empty value as null: quote it, as in "~", to mean the text.'
        problems.setdefault(path, []).append(message)
    lines = []
    for path, messages in problems.items():
        lines.append(f"{_where(path, source, tree, changed)}: {' '.join(dict.fromkeys(messages))}")
    return "\n".join(lines)


def _written_path(loc: tuple[Any, ...], document: Any) -> tuple[Any, ...]:
    """The location as the user wrote it: without pydantic's names of types, and of lists that we made."""
    path = []
    for part in loc:
        is_there = isinstance(document, dict) and part in document
        is_item = isinstance(document, list) and isinstance(part, int) and part < len(document)
        if is_there or is_item:
            path.append(part)
            document = document[part]
    return tuple(path)


def _where(path: tuple[Any, ...], source: str, tree: yaml.Node | None, changed: dict[tuple[str, ...], str]) -> str:
    for keys, text in changed.items():
        if keys == path[: len(keys)]:
            return f"--set {text}"
    below = "".join(f", --set {text}" for keys, text in changed.items() if keys[: len(path)] == path)
    if tree is None:
        return source + below
    line = tree.start_mark.line
    for part in path:
        if isinstance(tree, yaml.MappingNode):
            found = [(key, value) for key, value in tree.value if key.value == part]
            if not found:  # then the section consists of what --set gave
                return below.removeprefix(", ") or source
            line, tree = found[0][0].start_mark.line, found[0][1]
        elif isinstance(tree, yaml.SequenceNode) and part < len(tree.value):
            tree = tree.value[part]
            line = tree.start_mark.line
    return f"{source}:{line + 1}{below}" if path else source


def _keys(kind: type[Section], loc: tuple[Any, ...]) -> list[str]:
    """The keys that are known at a location."""
    model: Any = kind
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """The section inside an annotation such as `list[Source] | None`; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


# --------------------------------------------------------------- documentation


def recipe_table() -> list[tuple[str, str, str, str]]:
    """Key, type, default and help of every key, for the documentation."""
    return list(_rows(Recipe, ""))


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", _section(field.annotation)
        if key == "echo_config.routing_seed":  # it is seeds.routing
            continue
        is_list = get_origin(field.annotation) is list
        if inner is Source:
            yield key, "source or list of sources", _default(field), str(field.description)
        elif inner is None:
            yield key, _type(field.annotation), _default(field), str(field.description)
        else:
            yield key, "list of sections" if is_list else "section", "", str(field.description)
            yield from _rows(inner, f"{key}[]." if is_list else f"{key}.")
    if section is DataSection:
        yield from _rows(Source, "<source>.")


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args if arg is not type(None))
    if origin is list:
        return f"list of {_type(args[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
