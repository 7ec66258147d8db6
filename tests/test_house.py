"""The house: a module imports only from modules above it; what the README and the changelog say is so."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import echo_lora

SOURCE = Path(echo_lora.__file__).parent
ROOT = SOURCE.parent.parent

# In the order the data flows; each may import from those before it.
ROOMS = [
    *("errors", "config", "routing", "echo", "inject", "losses", "step", "model"),
    *("base_models", "sources", "data", "export", "checkpoint", "trainer", "sft"),
]


def imports_of(path: Path) -> set[str]:
    """Names of this package's rooms that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("echo_lora"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("echo_lora.")}
    return found
