"""YAML files: strict parsing with line numbers, and finding a file or a shipped name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from echo_lora.errors import EchoConfigError, nearest

LARGEST_FILE = 1_000_000  # bytes; a recipe has a few hundred

MOST_VALUES, DEEPEST = 100_000, 50


def names_in(shipped: Path) -> list[str]:
    """The names that `find_yaml` accepts for a folder of the package."""
    return sorted(path.stem for path in shipped.glob("*.yaml"))


def is_in(path: Path, shipped: Path) -> bool:
    """Whether a file is shipped with the package: its paths are then relative to the working directory."""
    return path.resolve().parent == shipped.resolve()


def find_yaml(source: str, shipped: Path, kind: str) -> Path:
    """The file with this path, or with this name in the folder `shipped`. Raises EchoConfigError if neither exists."""
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):  # unlike Path.is_file, False for an invalid name
        return path
    names = names_in(shipped)
    if source in names:
        return shipped / f"{source}.yaml"
    if Path(source).name != source or path.suffix:  # nobody's idea of a name
        raise EchoConfigError(f"{source}: there is no such file. Correct the path.")
    raise EchoConfigError(
        f"{source}: there is no such file, and no shipped {kind} of that name.{nearest(source, names)}"
    )


class _Loader(yaml.SafeLoader):
    """A YAML subset without surprises.

    Numbers, booleans and null are JSON's; what only YAML 1.1 reads as one (1:30, 1_000, 010, on, 2024-01-01) is a
    string. Keys are unique strings. Tags are errors.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- as the base class has it

    def get_event(self) -> Any:
        event = super().get_event()
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise yaml.MarkedYAMLError(problem=f"the tag {tag} is not supported", problem_mark=event.start_mark)
        return event

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                what = f"the key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "this key"
                raise yaml.MarkedYAMLError(problem=f"{what} is not a string", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"

_INTEGER = r"[-+]?(0|[1-9][0-9]{0,99})"

for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INTEGER, list("-+0123456789")),
    (
        "float",
        rf"({_INTEGER}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(path: Path) -> tuple[yaml.Node | None, dict[str, Any]]:
    """The node tree, which has line numbers, and the document. Raises EchoConfigError with file and line."""
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise EchoConfigError(
                f"{path} has {size:,} bytes, more than any recipe or study ({LARGEST_FILE:,}). Pass another file."
            )
        tree, document = parsed_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise EchoConfigError(
            f"{path} can't be read: {error}. Correct its permissions, or pass another file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise EchoConfigError(f"{where}: not a YAML recipe: {problem}. Correct this line.") from error
    if not isinstance(document, dict):
        raise EchoConfigError(
            f"{path} is not a YAML mapping. Write `key: value` lines, as in `model: packaged:smollm2-135m`."
        )
    return tree, document


def parsed_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The node tree and the value of a YAML text. Raises yaml.YAMLError."""
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        _check_size(tree, {}, set())
        return tree, loader.construct_document(tree)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep") from None


def _check_size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Number of values in a node with all aliases expanded. Raises yaml.YAMLError if there are too many."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="the value contains itself through an alias", problem_mark=node.start_mark)
    if len(above) > DEEPEST:
        raise yaml.MarkedYAMLError(
            problem=f"it is nested more than {DEEPEST} levels deep", problem_mark=node.start_mark
        )
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_check_size(part, known, above | {id(node)}) for part in inner)
        if known[id(node)] > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"it has more than {MOST_VALUES:,} values, with aliases expanded",
                problem_mark=node.start_mark,
            )
    return known[id(node)]
