"""The model card of an adapter: its code refers to names that exist."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import pytest

from echo_lora.adapter.card import model_card
from echo_lora.recipe.load import load_recipe


def card(*overrides: str) -> str:
    recipe = load_recipe("tiny", overrides)
    run = dict.fromkeys(("steps", "seconds", "peak_memory", "deployed_parameters", "echo_parameters"), 1)
    run |= {"recipe": recipe.to_dict(), "device": "cpu", "rows": [], "final": {"loss": 1.0}, "versions": {}}
    run |= {"initial_adapter_sha256": "a", "adapter_sha256": "b"}
    return model_card(run, recipe.build_echo_config() if recipe.echo else None)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [((), 4), (("model=owner/name",), 3), (("echo=false",), 4)],
    ids=["packaged", "hub", "without echo"],
)
def test_the_names_that_the_card_imports_exist(overrides, count):
    [code] = re.findall(r"```python\n(.*?)```", card(*overrides), re.DOTALL)
    imported = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert len(imported) == count
    for module, name in imported:
        assert hasattr(import_module(module), name), f"from {module} import {name}"
