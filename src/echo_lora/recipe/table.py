"""All recipe keys, made from the schema: as a table for the documentation, and as a JSON schema for editors."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from echo_lora.recipe.load import section_of
from echo_lora.recipe.schema import DataSection, Recipe, Source

TYPES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def recipe_table() -> list[tuple[str, str, str, str]]:
    """Key, type, default and help of every recipe key, for the documentation."""
    return list(_rows(Recipe, ""))


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for an editor's completion and checks."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("output")  # `load_recipe` has a default for it
    return schema


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", section_of(field.annotation)
        if key == "echo_config.routing_seed":  # a recipe sets seeds.routing
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
        item = _type(args[0])
        return f"list of {item}{'s' * (item in TYPES.values())}"
    return TYPES.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
