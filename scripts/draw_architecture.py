"""Draw the rooms of the package and what they import from each other, from the imports themselves.

python scripts/draw_architecture.py           prints the diagram of docs/architecture.md (Mermaid)
python scripts/draw_architecture.py --write   writes it there, between the markers
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "echo_lora"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- diagram -->\n", "<!-- end of diagram -->"
BASIS = {"errors", "text", "files", "environment", "progress"}  # imported by nearly all: one box, no arrows
TOGETHER = {"terminal": "commands", "cli": "commands", "__main__": "commands", "packaged": "models"}


def room_of(module: str) -> str:
    top = module.split(".")[0]
    return TOGETHER.get(top, top)


def imports(source: Path = SOURCE) -> dict[str, set[str]]:
    """The rooms that each room imports from, directly."""
    names = {path.stem for path in source.glob("*.py")} | {path.parent.name for path in source.glob("*/__init__.py")}
    found: dict[str, set[str]] = {}
    for path in source.rglob("*.py"):
        room = room_of(".".join(path.relative_to(source).with_suffix("").parts))
        if room == "__init__" or room in BASIS:
            continue
        others = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "echo_lora":
                module = node.module.partition(".")[2]
                others |= {room_of(module)} if module else {room_of(a.name) for a in node.names if a.name in names}
        others -= {room, *BASIS}
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a chain of others implies."""

    def below(room: str) -> set[str]:
        return graph[room].union(*(below(other) for other in graph[room]))

    return {
        room: {other for other in others if not any(other in below(third) for third in others - {other})}
        for room, others in graph.items()
    }


def diagram() -> str:
    graph = reduced(imports())
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {room} --> {other}" for room in sorted(graph) for other in sorted(graph[room])]
    lines += [f'    method --> basis["{", ".join(sorted(BASIS))}"]', "```"]
    return "\n".join(lines) + "\n"


def page_with(text: str, drawing: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + drawing + END + rest.split(END)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write it into {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), diagram()), encoding="utf-8")
    else:
        print(diagram(), end="")
