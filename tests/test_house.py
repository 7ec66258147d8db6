"""The structure of the package: a module imports only from modules below it; public names; the README's targets."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import echo_lora
from echo_lora import EchoConfig
from echo_lora.method import losses
from echo_lora.recipe.build import VARIANTS
from echo_lora.recipe.schema import Recipe

SOURCE = Path(echo_lora.__file__).parent
ROOT = SOURCE.parent.parent

# From the bottom up. A module imports from the rooms before its own, and in its own from the modules before it.
ROOMS = {
    "": ["errors", "text", "files", "environment", "progress"],
    "method": [
        *("config", "routing", "echo", "packing", "alignment", "checkpointing", "targets", "injection", "prefix"),
        *("neftune", "lm_head", "losses", "step", "sharing", "grouping", "kernels", "refusals", "trial", "variants"),
        *("kept_echo", "model", "attach"),
    ],
    "base": ["packaged", "models"],
    "data": [
        *("json_file", "loaded", "sources", "generated", "forms", "formats", "shares"),
        *("template", "tokenize", "check", "preview", "prepared", "stream"),
    ],
    "evaluate": ["worker", "programs", "answers", "tasks", "lm", "harness"],
    "benchmarks": ["protocols", "folder", "hub", "importing"],
    "adapter": ["files", "serving", "card", "export", "inspection", "merge"],
    "training": [
        *(
            "processes",
            "metrics",
            "collator",
            "support",
            "optimizer",
            "checkpoint",
            "state",
            "callback",
            "resume",
            "trainer",
            "sft",
        ),
    ],
    "recipe": [
        *("sections", "schema", "yaml_file", "load", "table", "needs", "rows", "prepare", "build", "record"),
        *("trackers", "plan", "first", "train", "scoring", "speaker", "generation"),
    ],
    "integrations": ["axolotl_trainer", "axolotl", "ms_swift"],
    "bench": ["programs", "floors", "estimate", "report", "record", "measure"],
    "study": [
        *("statistics", "power", "looks", "design", "records", "folder"),
        *(
            "report.plots",
            "report.parts",
            "report.texts",
            "report.verdict",
            "report.side_effects",
            "report.outcome",
            "report.training",
            "report.page",
        ),
        *("run", "workers", "compare", "demo"),
    ],
    "terminal": ["terminal"],
    "commands": ["recipes", "inference", "adapters", "studies", "data"],
    "entry": ["cli", "__main__"],
}
TOP = ("", "base", "terminal", "entry")  # not folders: their modules lie at the top of the package


def _order() -> list[str]:
    """All modules. A folder's `__init__`, which may re-export its names, follows them."""
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
    """The imports from modules above."""
    return {name for name in imported if ORDER.index(name) > ORDER.index(module)}


def test_the_list_of_modules_is_complete():
    paths = {path_of(module) for module in ORDER}
    assert paths == set(SOURCE.rglob("*.py")) - {SOURCE / "__init__.py"}
    assert len(paths) == len(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_modules_below_it(module):
    assert misplaced(module, imports_of(path_of(module))) == set()


def test_the_check_above_detects_an_import_from_above(tmp_path):
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


def test_no_module_is_longer_than_400_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_is_longer_than_60_lines_unless_its_docstring_says_why():
    """A function of the command line is a list of options, one to three lines each."""
    long = {
        f"{module}.{node.name}": ast.get_docstring(node) or ""
        for module in ORDER
        if not module.startswith("commands.")
        for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    }
    assert [name for name, text in long.items() if "Longer than most" not in text] == []


def test_public_names_are_few_and_resolve():
    assert 1 <= len(echo_lora.__all__) <= 12
    for name in echo_lora.__all__:
        assert getattr(echo_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Echo'"):
        echo_lora.Echo  # noqa: B018


def strings_in(path: Path) -> set[str]:
    """Every string constant of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    } - texts


def modules_with(words: Iterable[str]) -> set[str]:
    return {module for module in ORDER if strings_in(path_of(module)) & set(words)}


def test_only_the_losses_list_the_terms():
    """Sections of the report show terms that people asked for; they are figures, not lists."""
    assert modules_with(losses.ROUTED) - {"study.report.training"} == {"method.losses"}


def test_only_the_method_names_the_kinds_of_echo():
    kinds = set(get_args(get_type_hints(EchoConfig)["echo_kind"])) - {
        "real",
        "zero",
        "noise",
    }  # words for other things too
    assert len(kinds) == 2
    assert modules_with(kinds) <= {"method.config", "method.echo"}


def test_every_method_of_a_recipe_is_a_variant():
    assert set(get_args(Recipe.model_fields["method"].annotation)) == set(VARIANTS)
    named = modules_with(set(VARIANTS) - {"lora"})
    assert named - {"adapter.card", "adapter.inspection", "bench.programs"} == {"recipe.schema", "recipe.build"}


def test_the_architecture_page_shows_the_imports_as_they_are():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "scripts" / "draw_architecture.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert len(drawing.imports()) == 12
    text = drawing.PAGE.read_text(encoding="utf-8")
    assert drawing.page_with(text, drawing.diagram()) == text, "run python scripts/draw_architecture.py --write"


def test_the_functions_that_the_architecture_page_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Where")[0]
    named = re.findall(
        r"\b((?:commands|recipe|data|models|method|training|adapter)(?:\.\w+)+)", text.partition("```\ncommands")[2]
    )
    assert len(named) > 15
    for name in named:
        module, rest = name, []
        while module not in ORDER:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
        found = importlib.import_module(f"echo_lora.{module}")
        for part in rest:
            found = getattr(found, part)


def test_the_table_of_equations_names_functions_that_exist():
    """`echo_lora.method` maps each equation to the function that computes it."""
    method = importlib.import_module("echo_lora.method")
    named = re.findall(r"\b([a-z_]+)\.([A-Za-z_]+(?:\.[a-z_]+)?)", method.__doc__.partition("| what")[2])
    assert len(named) > 12
    for module, name in named:
        found = importlib.import_module(f"echo_lora.method.{module}")
        for part in name.split("."):
            found = getattr(found, part)


def test_the_make_targets_of_the_readme_exist():
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    named = {name for text in code for name in re.findall(r"\bmake ([\w-]+)", text)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named >= {"demo", "test"}
    assert named <= targets


# Folders of a single machine, spelled so that this file does not match.
MACHINE_PATH = re.compile(
    r"/(?:" + "|".join(["wor" + "k", "roo" + "t", "ho" + r"me/\w+", "Use" + r"rs/\w+"]) + r")(?:/|\b)"
)


def test_no_tracked_file_names_a_path_of_this_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout, so tracked files are unknown")
    found, read = [], 0
    for name in filter(None, listed.stdout.decode().split("\0")):
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):  # an image, or a file that was just removed
            continue
        read += 1
        found += [f"{name}:{n}" for n, line in enumerate(lines, 1) if is_machine_path(line)]
    assert read > 50
    assert found == []


def is_machine_path(line: str) -> bool:
    """Whether the line holds such an absolute path, and not a URL or a fraction."""
    return any(
        line[: match.start()][-1:] in ("", " ", '"', "'", "`", "(", "=", ":") for match in MACHINE_PATH.finditer(line)
    )


@pytest.mark.parametrize(
    ("line", "expected"), [('"/{}/main"', True), ("cd /{}", True), ("a/{}", False), ("https://x.y/{}", False)]
)
def test_the_check_above_detects_such_paths(line, expected):
    assert is_machine_path(line.format("wor" + "k")) is expected
