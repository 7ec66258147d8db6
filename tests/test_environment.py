"""The package imports on Windows and macOS, which lack some of Linux's modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import echo_lora
from echo_lora.environment import peak_memory

SOURCE = Path(echo_lora.__file__).parent
MODULES = sorted(
    ".".join(["echo_lora", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.name != "__main__.py" and "lm_eval_tasks" not in path.parts
)
# Plug-ins import the program that they are for, which is not installed beside them.
PLUGINS = {
    "echo_lora.integrations.axolotl",
    "echo_lora.integrations.axolotl_trainer",
    "echo_lora.integrations.ms_swift",
}
# Modules that only some systems have. Other packages check the system before importing them, so only ours are watched.
PROGRAM = """
import builtins, importlib, sys
SOME = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "msvcrt", "winreg", "winsound"}
original = builtins.__import__

def watched(name, globals=None, *args, **kwargs):
    if name in SOME and (globals or {}).get("__name__", "").startswith(("echo_lora", "probe")):
        raise ImportError(f"{globals['__name__']} imports {name}")
    return original(name, globals, *args, **kwargs)

builtins.__import__ = watched
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def import_without(*modules: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, *modules]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


def test_every_module_imports_without_platform_specific_modules():
    assert len(MODULES) > 50
    assert set(MODULES) > PLUGINS
    done = import_without(*(name for name in MODULES if name not in PLUGINS))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["fcntl", "resource"])
def test_the_check_above_detects_such_an_import(tmp_path, name):
    (tmp_path / "probe.py").write_text(f"import {name}\n")
    assert f"probe imports {name}" in import_without("probe", folder=tmp_path).stderr


def test_peak_memory_works_without_proc(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert 5e7 < peak_memory() < 1e11
