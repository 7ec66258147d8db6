"""Gathers the pages of the docs site: docs/, and what its pages link to elsewhere, such as changelog, results and code.

A file keeps its path in the repository: results/bench/README.md is a page, bench.png a file. Code becomes a page that
shows it, a notebook a page with its cells. The README opens the repository and docs/index.md the site, so a link to the
README leads there. The generator of the site sees only what is written here, and needs no plug-in.

    python scripts/docs_site.py build/docs && mkdocs build --strict
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml"}
CODE_PAGE = """---
search: {{exclude: true}}
hide: [navigation, toc]
---

# {name}

````{language}
{code}````
"""


def site_files() -> dict[str, bytes]:
    """The content of every file of the site, by its place."""
    files = {}
    paths = sorted(path for path in DOCS.rglob("*") if path.is_file())
    for path in paths:  # grows as links are found
        place = site_place(path)
        if place in files:
            continue
        if place.endswith(".md"):
            page = page_text(path)
            paths += linked_files(page, path.parent)
            files[place] = moved_links(page, path.parent, place).encode()
        if path.suffix == ".ipynb" or not place.endswith(".md"):
            files[path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()] = path.read_bytes()
    return files


def site_place(path: Path) -> str:
    """Where the site has a file of the repository."""
    place = path.relative_to(ROOT).as_posix().removeprefix("docs/")
    if place == "README.md":
        return "index.md"
    if path.suffix == ".ipynb":
        return f"{place.removesuffix('.ipynb')}.md"
    return f"{place}.md" if path.suffix in LANGUAGES else place


def page_text(path: Path) -> str:
    """A file of the repository as a page of Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in LANGUAGES:
        name = path.relative_to(ROOT).as_posix()
        return CODE_PAGE.format(name=name, language=LANGUAGES[path.suffix], code=text)
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        page = [source if kind == "markdown" else fenced(source) for kind, source in cells]
        # HTML, because a link of Markdown would lead to this page
        return "\n\n".join([*page, f'<a href="../{path.name}" download>Download this notebook</a>\n'])
    return text


def fenced(source: str) -> str:
    """A cell of code as a block; one that starts with a magic, such as %%writefile, is not Python."""
    return f"```{'text' if source.startswith('%%') else 'python'}\n{source}\n```"


def linked_files(page: str, folder: Path) -> list[Path]:
    """The files of the repository that a page links to."""
    targets = [(folder / link[3]).resolve() for link in LINK.finditer(page)]
    return [target for target in targets if target.is_file() and target.is_relative_to(ROOT)]


def moved_links(page: str, folder: Path, place: str) -> str:
    """The page with its links to files pointed at their places in the site. A link to a folder becomes plain text."""

    def moved(link: re.Match[str]) -> str:
        target = (folder / link[3]).resolve()
        if target.is_dir():
            return link[2]
        if not target.is_file():
            return link[0]  # an address, or a broken link, which the generator reports
        path = os.path.relpath(site_place(target), os.path.dirname(place) or ".").replace(os.sep, "/")
        return f"{link[1]}[{link[2]}]({path}{link[4] or ''})"

    return LINK.sub(moved, page)


def main() -> None:
    output = Path(sys.argv[1])
    shutil.rmtree(output, ignore_errors=True)
    for place, content in site_files().items():
        path = output / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
