"""Print the lowest release of each direct dependency that pyproject.toml admits, as constraints for pip.

    python scripts/oldest_releases.py > oldest.txt && pip install -c oldest.txt -e '.[dev]'

What these need in turn is left to pip.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"].values()
for requirement in sorted({*project["dependencies"], *(line for extra in extras for line in extra)}):
    if match := re.match(r"([\w.-]+)>=([\d.]+)", requirement):
        print(f"{match[1]}=={match[2]}")
