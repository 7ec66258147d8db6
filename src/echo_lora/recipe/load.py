"""Reading a recipe: one YAML file that shows a whole run.

The keys and their defaults are in `schema.py`; an unknown key is an error that names file, line and key.

Paths of rows in a recipe are relative to the recipe's folder; those of a shipped recipe or of `--set`, and `output`,
are relative to the working directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from echo_lora.data.sources import expanded
from echo_lora.errors import EchoConfigError, nearest
from echo_lora.recipe.schema import SPLITS, Recipe, source_of
from echo_lora.recipe.sections import Section
from echo_lora.recipe.yaml_file import DEEPEST, find_yaml, is_in, names_in, parse_yaml, parsed_yaml

SHIPPED = Path(__file__).parent.parent / "recipes"
SCHEMA = Path(__file__).parent.parent / "templates" / "recipe.schema.json"  # what editors complete keys from

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in a YAML file, or a shipped one by its name.

    overrides: `key.path=value` with the value in YAML, as in `training.steps=20`. Raises EchoConfigError, which names
    file, line and key.
    """
    path = find_yaml(str(source), SHIPPED, "recipe")
    tree, document = parse_yaml(path)
    if not is_in(path, SHIPPED):
        rebase(document, path.parent)
    document.setdefault("output", f"runs/{path.stem}")
    return validated(Recipe, document, str(source), tree, overrides)


def recipe_of_run(record: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the `run.json` of a finished run. Raises EchoConfigError.

    The file may come from somebody else, so its trust_remote_code is ignored; only `overrides` can set it.
    """
    try:
        document = json.loads(Path(record).read_text(encoding="utf-8"))["recipe"]
        if not isinstance(document, dict):
            raise TypeError(f"its recipe is a {type(document).__name__}, not an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EchoConfigError(f"{record} holds no recipe: {error!r}. Pass a recipe instead.") from error
    document.pop("trust_remote_code", None)
    return validated(Recipe, document, str(record), None, overrides)


def validated(
    kind: type[AnySection], document: dict[str, Any], source: str, tree: yaml.Node | None, overrides: Sequence[str] = ()
) -> AnySection:
    """Validate the document, after applying the overrides. Raises EchoConfigError with file, line and key."""
    changed = override(document, overrides)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise EchoConfigError(_explain(kind, error, document, source, tree, changed)) from None


def override(document: dict[str, Any], overrides: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Set the keys that the overrides name; returns the override of each key. Raises EchoConfigError."""
    changed = {}
    for text in overrides:
        keys, value = _override(text)
        _set(document, keys, value, text)
        changed[tuple(keys)] = text
    return changed


def recipe_text(recipe: Recipe) -> str:
    """The recipe as a YAML file that `load_recipe` reads from any folder, with every value and absolute paths.

    trust_remote_code is left out: whoever runs the file allows it in that call.
    """
    document = recipe.to_dict()
    document.pop("trust_remote_code")
    rebase(document, Path.cwd())
    document["output"] = str(Path(recipe.output).absolute())
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, for `load_recipe`."""
    return names_in(SHIPPED)


def rebase(document: dict[str, Any], folder: Path) -> None:
    """Make the document's relative paths of rows and of the model relative to the file's folder."""

    def rebased(value: Any) -> Any:
        if isinstance(value, list):
            return [rebased(item) for item in value]
        if isinstance(value, dict):
            file = value.get("file")
            return value | {"file": str(folder / expanded(file))} if isinstance(file, str) and file.strip() else value
        if not isinstance(value, str) or not value.strip():
            return value
        source = source_of(value, folder)
        return source if "hub" in source else str(folder / expanded(value))

    model, data, evaluation = (document.get(key) for key in ("model", "data", "evaluation"))
    if isinstance(model, str) and model.startswith("."):
        document["model"] = str((folder / model).absolute())  # Path would turn "./base" into "base", a hub id
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    for holder, keys in ((data, SPLITS), *((task, ("data",)) for task in (tasks if isinstance(tasks, list) else []))):
        for key in keys:
            if isinstance(holder, dict) and key in holder:
                holder[key] = rebased(holder[key])


def _override(text: str) -> tuple[list[str], Any]:
    key, is_given, value = text.partition("=")
    keys = key.strip().split(".")
    if not is_given or not all(key.isprintable() and key for key in keys) or len(keys) > DEEPEST:
        raise EchoConfigError(f"--set {text}: write it as key=value, for example --set training.steps=20.")
    try:
        return keys, parsed_yaml(value)[1]
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise EchoConfigError(f"--set {text}: the value is not valid YAML: {problem}. Correct or quote it.") from error


def _set(document: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        section = document.get(key) or {}
        if not isinstance(section, dict):
            raise EchoConfigError(f"--set {text}: {'.'.join(keys[: depth + 1])} is not a section. Set it as a whole.")
        document[key] = dict(section)  # a copy: a YAML anchor may share one section between two keys
        document = document[key]
    document[keys[-1]] = value


def _explain(
    kind: type[Section],
    error: ValidationError,
    document: Any,
    source: str,
    tree: yaml.Node | None,
    changed: dict[tuple[str, ...], str],
) -> str:
    """One line per wrong key: file and line, key, what is wrong, what is allowed."""
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
                message += ' YAML reads ~ and an empty value as null: to mean the string, quote it, as in "~".'
        problems.setdefault(path, []).append(message)
    lines = []
    for path, messages in problems.items():
        lines.append(f"{_where(path, source, tree, changed)}: {' '.join(dict.fromkeys(messages))}")
    return "\n".join(lines)


def _written_path(loc: tuple[Any, ...], document: Any) -> tuple[Any, ...]:
    """The location as the user wrote it, without the type names and list indices that pydantic adds."""
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
            if not found:  # the whole section came from --set
                return below.removeprefix(", ") or source
            line, tree = found[0][0].start_mark.line, found[0][1]
        elif isinstance(tree, yaml.SequenceNode) and part < len(tree.value):
            tree = tree.value[part]
            line = tree.start_mark.line
    return f"{source}:{line + 1}{below}" if path else source


def _keys(kind: type[Section], loc: tuple[Any, ...]) -> list[str]:
    """The valid keys at a location."""
    model: Any = kind
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = section_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def section_of(annotation: Any) -> Any:
    """The section inside an annotation such as `list[Source] | None`; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)
