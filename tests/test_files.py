"""Atomic writes, which keep other files, and locks that keep an output to one process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from echo_lora.errors import EchoCheckpointError
from echo_lora.files import locked, new_folder, refuse_existing, refuse_locked, use_umask, write_file

HOLD = """
import sys
from echo_lora.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(output: Path) -> Iterator[subprocess.Popen]:
    """A process that locks an output, and is killed at the end without cleaning up."""
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdin=pipe, stdout=pipe, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ----------------------------------------------------------------------- locks


def test_a_lock_keeps_an_output_to_one_process(tmp_path):
    output = tmp_path / "run"
    with held_by_another(output) as holder:
        with (
            pytest.raises(EchoCheckpointError, match=rf"run is in use by process {holder.pid} on ") as caught,
            locked(output),
        ):
            pass
        with pytest.raises(EchoCheckpointError, match="in use by process"):
            refuse_locked(output)
    assert "choose another output" in str(caught.value)
    with locked(output):  # the killed process left its lock file, which blocks nobody
        pass
    refuse_locked(output)
    assert names(tmp_path) == set()


def test_a_locked_empty_folder_is_still_empty(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        refuse_existing(tmp_path / "run")
        assert names(tmp_path / "run") == set()


def test_lock_files_do_not_count_as_content(tmp_path):
    with locked(tmp_path / "runs" / "first"):
        assert names(tmp_path / "runs") == {".first.lock"}
        refuse_existing(tmp_path / "runs")
        (tmp_path / "runs" / "first").mkdir()
        with pytest.raises(EchoCheckpointError, match="it holds first"):
            refuse_existing(tmp_path / "runs")


def test_a_link_and_its_target_share_a_lock(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with (
        held_by_another(tmp_path / "disk"),
        pytest.raises(EchoCheckpointError, match="in use"),
        locked(tmp_path / "run"),
    ):
        pass


def test_the_lock_lies_inside_if_the_parent_is_not_writable(tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with locked(mount):
        assert names(tmp_path) == {"mount", "mount/.lock"}
        refuse_existing(mount)
        with pytest.raises(EchoCheckpointError, match="in use by process"):
            refuse_locked(mount)
    assert names(tmp_path) == {"mount"}


def test_folders_made_for_a_lock_are_removed_with_it(tmp_path):
    with locked(tmp_path / "a" / "b" / "run"):
        pass
    assert names(tmp_path) == set()
    with locked(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "mine").touch()
    assert names(tmp_path) == {"a", "a/mine"}


@pytest.mark.parametrize("output", [Path.cwd().anchor, f"{Path.cwd().anchor}.."])
def test_the_root_folder_is_refused_as_output(output):
    with pytest.raises(EchoCheckpointError, match=r"is the root of a file system\. Name a folder"), locked(output):
        pass
    with pytest.raises(EchoCheckpointError, match="is the root of a file system"):
        refuse_locked(output)


def test_no_message_suggests_removing_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for folder in ("..", tmp_path):
        with pytest.raises(EchoCheckpointError, match=r"it holds inner\. Choose another folder\.$"):
            refuse_existing(folder)
    (tmp_path / "inner" / "file").touch()
    with pytest.raises(EchoCheckpointError, match=r"it holds file\. Choose another folder\.$"):
        refuse_existing(".")


# ---------------------------------------------------------------- whole folders


def test_files_have_the_permissions_of_the_umask(tmp_path):
    with umask(0o027):
        with new_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir()
            save_file({"x": torch.zeros(2)}, folder / "inner" / "x.safetensors")
        write_file(tmp_path / "file.json", lambda path: path.write_text("{}"))
    assert mode(tmp_path / "out") == mode(tmp_path / "out" / "inner") == 0o750
    assert mode(tmp_path / "out" / "inner" / "x.safetensors") == mode(tmp_path / "file.json") == 0o640


def test_only_the_given_files_get_these_permissions(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).touch(mode=0o600)
    with umask(0o027):
        use_umask(tmp_path, [tmp_path / "ours"])
    assert (mode(tmp_path / "ours"), mode(tmp_path / "theirs")) == (mode(tmp_path) & 0o666, 0o600)


@pytest.mark.parametrize("is_link", [False, True])
def test_an_existing_folder_is_filled_not_replaced(tmp_path, is_link):
    """A mount point can't be replaced."""
    real = tmp_path / "real"
    real.mkdir()
    output = tmp_path / "link" if is_link else real
    if is_link:
        output.symlink_to(real)
    before = real.stat().st_ino
    with new_folder(output) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_text("new")
    assert real.stat().st_ino == before
    assert output.is_symlink() == is_link
    assert names(real) == {"inner", "inner/x"}


def test_overwriting_keeps_other_files(tmp_path):
    write = {"adapter": "old", "template": "old", "notes.txt": "mine", "more/notes.txt": "mine"}
    for name, text in write.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with new_folder(tmp_path, overwrite=True, stale=["template"]) as folder:
        (folder / "adapter").write_text("new")
    assert names(tmp_path) == {"adapter", "notes.txt", "more", "more/notes.txt"}
    assert (tmp_path / "adapter").read_text() == "new"


def test_overwriting_never_mixes_old_and_new(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text("old")
    original = Path.replace

    def replace(self, target):
        if self.name == "b":
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)

    def overwrite():
        with new_folder(tmp_path, overwrite=True) as folder:
            for name in "ab":
                (folder / name).write_text("new")

    with pytest.raises(EchoCheckpointError, match="Input/output error"):
        overwrite()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


def test_cleaning_up_does_not_hide_an_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "rmdir", refuse)
    monkeypatch.setattr(os, "rmdir", refuse)

    def write(path):
        path.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "file", write)
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "run"):
        raise ZeroDivisionError


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_is_written_to_not_replaced(tmp_path):
    """So are /dev/stdout and /dev/null, which root could otherwise replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    with locked(pipe):
        write_file(pipe, lambda path: path.write_text("scores"))
    assert reader.communicate(timeout=60)[0] == "scores"
    assert pipe.is_fifo()
    assert names(tmp_path) == {"pipe"}
    with pytest.raises(EchoCheckpointError, match=r"pipe is a file\. Name a folder"):
        refuse_existing(pipe)
    with pytest.raises(EchoCheckpointError, match=rf"{tmp_path.name} is a folder\. Name a file"):
        write_file(tmp_path, lambda path: path.write_text("scores"))


def test_the_message_names_the_first_existing_file(tmp_path):
    (tmp_path / ".hidden").touch()
    with pytest.raises(EchoCheckpointError, match=r"exists and is not empty: it holds \.hidden"):
        refuse_existing(tmp_path)
