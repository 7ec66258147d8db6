"""Atomic writes of files and folders, and a lock that keeps an output to one process.

Only files that this package wrote are replaced or removed; other files in a folder are kept.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from echo_lora.errors import EchoCheckpointError

LOCK = ".lock"


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block succeeds, and is removed if it fails.

    An existing folder, which may be a mount point or a symbolic link, is filled instead and keeps its other files.
    overwrite: it need not be empty; files of the same names are replaced and those named in `stale` removed. If that is
    interrupted, files may be missing, but old and new files never mix. Raises EchoCheckpointError.
    """
    refuse_existing(folder, overwrite=overwrite)
    target = Path(os.path.realpath(folder))
    exists = target.is_dir()
    temporary = (target if exists else target.parent) / f".{target.name}.{secrets.token_hex(4)}"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise EchoCheckpointError(
            f"{temporary.parent} can't be written: {error}. Choose another output folder."
        ) from error
    try:
        yield temporary
        use_umask(temporary)
        if exists:
            _fill(target, temporary, stale)
        else:
            temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise EchoCheckpointError(
            f"{folder} could not be written: {error}. No partial output was left. Free some space, or choose another "
            "folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write` gets a temporary path, which is then renamed.

    A device or a pipe, such as /dev/stdout, is written to directly. Raises EchoCheckpointError if writing fails.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise EchoCheckpointError(f"{path} is a folder. Name a file for the output.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        try:
            if _is_special(path):
                write(path)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):  # it would hide why writing failed
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EchoCheckpointError(
            f"{path} could not be written: {error}. No partial output was left. Free some space, or choose another "
            "path."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `write_file`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def refuse_existing_file(path: Path) -> None:
    """Raise EchoCheckpointError if there is a file or a folder of this name; a device or a pipe may be written to."""
    if path.exists() and not _is_special(path):
        raise EchoCheckpointError(f"{path} exists. Choose another name, or remove it.")


def remove_leftovers(target: Path) -> None:
    """Remove temporary files and folders that killed processes left of an output. Call it under the output's lock."""
    target = Path(os.path.realpath(target))
    for folder in (target.parent, target):
        for path in folder.glob(f".{glob.escape(target.name)}.*"):
            if re.fullmatch(r"\.[0-9a-f]{8}", path.suffix):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_existing(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise EchoCheckpointError if the folder is not empty, unless `overwrite` is set."""
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise EchoCheckpointError(f"{folder} is a file. Name a folder for the output.")
        names = sorted(entry.name for entry in os.scandir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise EchoCheckpointError(f"{folder} can't be read: {error}. Choose another folder.") from error
    # a lock file is the folder's own, or of an output in it
    found = [name for name in names if not (name.startswith(".") and name.endswith(LOCK))]
    if found and not overwrite:
        holds_cwd = Path.cwd().is_relative_to(folder.resolve())
        advice = "Choose another folder" + ("." if holds_cwd else ", or remove this one.")
        raise EchoCheckpointError(f"{folder} exists and is not empty: it holds {found[0]}. {advice}")


def use_umask(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Give files the permissions of the umask, read from their folder: safetensors creates files with mode 0600.

    files: default: all files in the folder.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*") if files is None else files:
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove these files, and their subfolders that are then empty."""
    paths = [folder / name for name in names]
    for path in paths:
        path.unlink(missing_ok=True)
    inner = {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)}
    for parent in sorted(inner, reverse=True):  # the innermost first
        remove_empty(parent)


def remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.is_dir() and not folder.is_symlink() and not any(os.scandir(folder)):
        folder.rmdir()


def _is_special(path: str | Path) -> bool:
    """Whether the path is a device, a pipe or a socket."""
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def _fill(target: Path, temporary: Path, stale: Iterable[str]) -> None:
    """Move the files of a temporary folder, with its subfolders, into an existing one."""
    new = [str(path.relative_to(temporary)) for path in sorted(temporary.rglob("*")) if path.is_file()]
    for name in (*stale, *new):
        (target / name).unlink(missing_ok=True)
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).replace(target / name)


# ----------------------------------------------------------------------- locks


@contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """Lock an output, a file or a folder, for this process.

    The operating system releases the lock when the process ends, so a lock file left behind blocks nobody. It lies
    beside the output, so that an empty folder stays empty. Raises EchoCheckpointError, which names the other process.
    """
    if _is_special(output):  # several processes may write to it
        yield
        return
    path = _lock_file(output)
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, output)
    except OSError as error:
        raise EchoCheckpointError(f"{output} can't be locked: {error}. Choose another output.") from error
    try:
        holder = f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M}\n"
        with contextlib.suppress(OSError):  # Windows refuses writes to a locked file; then the holder stays unnamed
            path.write_text(holder, encoding="utf-8")
        yield
    finally:
        _release(lock, path)
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for folder in made:
                folder.rmdir()


def refuse_locked(output: str | Path) -> None:
    """Raise EchoCheckpointError if another process has locked an output that is about to be read."""
    path = _lock_file(output)
    if path.exists():
        try:
            _release(_acquire(path, output), path)
        except OSError as error:
            raise EchoCheckpointError(
                f"{path} can't be opened: {error}. It belongs to another user, whose run may still be active. If the "
                "run has ended, have the file removed."
            ) from error


def _lock_file(output: str | Path) -> Path:
    """The lock file beside the output, or inside it where its parent is not writable, as for a mount point."""
    target = Path(os.path.realpath(output))
    if not target.name:
        raise EchoCheckpointError(f"{output} is the root of a file system. Name a folder in it.")
    if target.is_dir() and not os.access(target.parent, os.W_OK):
        return target / LOCK
    return target.with_name(f".{target.name}{LOCK}")


def _acquire(path: Path, output: str | Path) -> FileLock:
    try:
        holder = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # there is no lock file yet, or Windows refuses to read a locked one
        holder = ""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise EchoCheckpointError(
            f"{output} is in use by {holder or 'another process'}. Wait until that has ended, or choose another output."
        ) from None
    return lock


def _release(lock: FileLock, path: Path) -> None:
    if os.name != "nt":  # removed while still locked: a process that waits for this file notices and makes a new one
        with contextlib.suppress(OSError):  # a lock file that stays blocks nobody
            path.unlink()
    lock.release()
