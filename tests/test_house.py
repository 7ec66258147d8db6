"""The house: a module imports only from modules below it; what the README and the changelog say is so."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import echo_lora

SOURCE = Path(echo_lora.__file__).parent
ROOT = SOURCE.parent.parent

# From the bottom up. A module imports from the rooms before its own, and in its own from the modules before it.
ROOMS = {
    "": ["errors", "files", "environment", "progress"],
    "method": [
        *("config", "routing", "echo", "alignment", "checkpointing", "injection", "prefix", "neftune", "lm_head"),
        *("losses", "step", "sharing", "refusals", "trial", "variants", "kept_echo", "model"),
    ],
    "base": ["packaged", "models"],
    "data": ["sources", "generated", "forms", "template", "tokenize", "check", "preview", "prepared"],
    "evaluate": ["inside", "programs", "answers", "tasks", "lm", "harness"],
    "benchmarks": ["protocols", "copies", "hub", "local"],
    "adapter": ["files", "card", "export", "inspection", "merge"],
    "training": [
        *("metrics", "collator", "support", "optimizer", "checkpoint", "state", "callback", "resume", "trainer", "sft"),
    ],
    "recipe": ["schema", "yaml_file", "load", "table", "rows", "build", "record", "plan", "train", "scoring"],
    "bench": ["programs", "report", "measure"],
    "study": [
        *("statistics", "power", "looks", "design", "records", "folder"),
        *(
            "report.plots",
            "report.parts",
            "report.texts",
            "report.verdict",
            "report.outcome",
            "report.training",
            "report.page",
        ),
        *("run", "workers", "compare", "demo"),
    ],
    "command": ["terminal", "cli"],
}
TOP = ("", "base", "command")  # no folders: their modules lie beside each other


def _order() -> list[str]:
    """All modules; a folder's `__init__`, which may hand out its names, follows them."""
    order = []
    for room, names in ROOMS.items():
        order += names if room in TOP else [*(f"{room}.{name}" for name in names), room]
    order.insert(order.index("study.report.page") + 1, "study.report")
    return order


ORDER = _order()


def path_of(module: str) -> Path:
    folder = SOURCE.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports by a relative name"
            if node.module == "echo_lora" or (node.module or "").startswith("echo_lora."):
                parent = node.module.removeprefix("echo_lora").removeprefix(".")
                names = {f"{parent}.{alias.name}".removeprefix(".") for alias in node.names}
                found |= {name if name in ORDER else parent for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("echo_lora.") for alias in node.names if "echo_lora." in alias.name}
    return found & set(ORDER)


def misplaced(module: str, imported: set[str]) -> set[str]:
    """What is imported from modules above."""
    return {name for name in imported if ORDER.index(name) > ORDER.index(module)}


def test_the_list_of_modules_is_complete():
    paths = {path_of(module) for module in ORDER}
    assert paths == set(SOURCE.rglob("*.py")) - {SOURCE / "__init__.py"}
    assert len(paths) == len(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_modules_below_it(module):
    assert misplaced(module, imports_of(path_of(module))) == set()


def test_the_check_above_does_see_an_import_from_above(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(
        "from echo_lora.method.config import EchoConfig\n"
        "def f():\n    import echo_lora.training.sft\n    from echo_lora import cli\n"
    )
    assert imports_of(path) == {"method.config", "training.sft", "cli"}
    assert misplaced("method.losses", imports_of(path)) == {"training.sft", "cli"}


def test_no_private_name_is_imported_from_another_module():
    found = [
        f"{module}: {alias.name}"
        for module in ORDER
        for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("echo_lora")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert found == []


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
