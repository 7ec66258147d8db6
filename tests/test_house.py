"""The house: a module imports only from modules above it; what the README and the changelog say is so."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import echo_lora

SOURCE = Path(echo_lora.__file__).parent
ROOT = SOURCE.parent.parent

# In the order the data flows; each may import from those before it. A folder is one room.
ROOMS = [
    *("errors", "files", "config", "routing", "echo", "inject", "prefix", "neftune", "head", "losses", "step"),
    *("probe", "model", "optimizer", "base_models", "sources", "forms", "data", "evaluate", "schema", "recipe"),
    *("rows", "environment", "progress"),
    *("export", "import_data", "checkpoint", "trainer", "sft", "merge", "run"),
    *("scoring", "plan", "bench", "study", "demo", "cli"),
]


def imports_of(path: Path) -> set[str]:
    """Names of this package's rooms that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports by a relative name"
            parts = (node.module or "").split(".")
            if parts[0] == "echo_lora":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("echo_lora.")}
    return found & set(ROOMS)


def files_of(room: str) -> list[Path]:
    file = SOURCE / f"{room}.py"
    return [file] if file.is_file() else sorted((SOURCE / room).glob("*.py"))


def misplaced(room: str, imported: set[str]) -> set[str]:
    """What is imported from rooms that stand below."""
    return {name for name in imported if ROOMS.index(name) > ROOMS.index(room)}


def test_the_list_of_rooms_is_complete():
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert sorted(ROOMS) == sorted(modules)
    assert len(ROOMS) == 37
    assert sum(len(files_of(room)) for room in ROOMS) == len(list(SOURCE.rglob("*.py"))) - 1


@pytest.mark.parametrize("room", ROOMS)
def test_a_module_imports_only_from_modules_above_it(room):
    for path in files_of(room):
        assert misplaced(room, imports_of(path)) == set(), path.name


def test_the_check_above_does_see_an_import_from_below(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(
        "from echo_lora.config import EchoConfig\ndef f():\n    import echo_lora.sft\n    from echo_lora import cli\n"
    )
    assert imports_of(path) == {"config", "sft", "cli"}
    assert misplaced("losses", imports_of(path)) == {"sft", "cli"}


def test_there_are_few_public_names_and_each_resolves():
    assert 1 <= len(echo_lora.__all__) <= 12
    for name in echo_lora.__all__:
        assert getattr(echo_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Echo'"):
        echo_lora.Echo  # noqa: B018


def test_the_make_targets_of_the_readme_exist():
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    named = {name for text in code for name in re.findall(r"\bmake ([\w-]+)", text)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named >= {"demo", "test"}
    assert named <= targets


# Folders that exist on one machine only; spelled so that this file does not name them.
MACHINE_PATH = re.compile(
    r"/(?:" + "|".join(["wor" + "k", "roo" + "t", "ho" + r"me/\w+", "Use" + r"rs/\w+"]) + r")(?:/|\b)"
)


def test_no_tracked_text_names_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout: what is tracked is not known")
    found, read = [], 0
    for name in filter(None, listed.stdout.decode().split("\0")):
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or a file about to be removed
            continue
        read += 1
        found += [f"{name}:{n}" for n, line in enumerate(lines, 1) if is_machine_path(line)]
    assert read > 50
    assert found == []


def is_machine_path(line: str) -> bool:
    """Whether an absolute path is in the line; an address or a fraction is none."""
    return any(
        line[: match.start()][-1:] in ("", " ", '"', "'", "`", "(", "=", ":") for match in MACHINE_PATH.finditer(line)
    )


@pytest.mark.parametrize(
    ("line", "expected"), [('"/{}/main"', True), ("cd /{}", True), ("a/{}", False), ("https://x.y/{}", False)]
)
def test_the_check_above_does_see_such_paths(line, expected):
    assert is_machine_path(line.format("wor" + "k")) is expected
