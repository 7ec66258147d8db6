"""Files and folders that appear whole or not at all, and belong to one process at a time.

Only what this package wrote is ever replaced or removed; whatever else lies in a folder stays there.
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
    """A temporary folder whose content is found under `folder` when the block ends well, and vanishes when it does not.

    A folder that exists already is filled and keeps its other files, be it a mount point or the target of a symbolic
    link. overwrite: it need not be empty; files of the same names are replaced, and those named in `stale` are
    removed. An interruption of that leaves files missing, never old files among new ones.
    """
    refuse_existing(folder, overwrite=overwrite)
    target = Path(os.path.realpath(folder))
    is_there = target.is_dir()
    temporary = (target if is_there else target.parent) / f".{target.name}.{secrets.token_hex(4)}"
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
        if is_there:
            _fill(target, temporary, stale)
        else:
            temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise EchoCheckpointError(
            f"{folder} could not be written: {error}. Free some space or choose another folder; nothing was left."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # of our own making


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file under a temporary name, then rename it: the file is complete or absent.

    A device or a pipe, such as /dev/stdout, is written to and not replaced. Raises EchoCheckpointError if the disk
    refuses.
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
            with contextlib.suppress(OSError):  # which would hide why it was not written
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EchoCheckpointError(
            f"{path} could not be written: {error}. Free some space or choose another place; nothing was left behind."
        ) from error


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of a file or folder under temporary names. To be called under its lock."""
    target = Path(os.path.realpath(target))
    for folder in (target.parent, target):
        for path in folder.glob(f".{glob.escape(target.name)}.*"):
            if re.fullmatch(r"\.[0-9a-f]{8}", path.suffix):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_existing(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raises EchoCheckpointError if the folder holds anything, unless it may be replaced."""
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise EchoCheckpointError(f"{folder} is a file. Name a folder for the output.")
        names = sorted(entry.name for entry in os.scandir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise EchoCheckpointError(f"{folder} can't be read: {error}. Choose another folder.") from error
    found = [name for name in names if not _is_lock(name)]
    if found and not overwrite:
        is_around_us = Path.cwd().is_relative_to(folder.resolve())
        advice = "Choose another folder" + ("." if is_around_us else ", or remove this one.")
        raise EchoCheckpointError(f"{folder} exists and is not empty: it holds {found[0]}. {advice}")


def use_umask(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Give files the permissions that the umask gave their folder: safetensors makes its own 0600.

    files: by default all of a folder of our own making.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*") if files is None else files:
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove these files, and the folders in which they were if nothing else is there."""
    paths = [folder / name for name in names]
    for path in paths:
        path.unlink(missing_ok=True)
    inner = {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)}
    for parent in sorted(inner, reverse=True):  # the innermost first
        remove_empty(parent)


def remove_empty(folder: Path) -> None:
    """Remove a folder of our own making if nothing is in it."""
    if folder.is_dir() and not folder.is_symlink() and not any(os.scandir(folder)):
        folder.rmdir()


def _is_special(path: str | Path) -> bool:
    """Whether there is something that is neither a file nor a folder."""
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def _fill(target: Path, temporary: Path, stale: Iterable[str]) -> None:
    """Move the files of a temporary folder, in subfolders too, into one that exists."""
    new = [str(path.relative_to(temporary)) for path in sorted(temporary.rglob("*")) if path.is_file()]
    for name in (*stale, *new):
        (target / name).unlink(missing_ok=True)
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).replace(target / name)


# ----------------------------------------------------------------------- locks


@contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """Hold an output, a file or a folder, for this process alone.

    The system frees the lock when the process ends, however it ends: a lock file that is left blocks nobody. It lies
    beside the output, which therefore is as empty as it was. Raises EchoCheckpointError, which names the other process.
    """
    if _is_special(output):  # a device or a pipe, which many may write to
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
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file; then the holder has no name
            path.write_text(holder, encoding="utf-8")
        yield
    finally:
        _release(lock, path)
        with contextlib.suppress(OSError):  # what holds something is not empty
            for folder in made:
                folder.rmdir()


def refuse_locked(output: str | Path) -> None:
    """Raises EchoCheckpointError if another process holds an output that is only to be read."""
    path = _lock_file(output)
    if path.exists():
        try:
            _release(_acquire(path, output), path)
        except OSError as error:
            raise EchoCheckpointError(
                f"{path} can't be opened: {error}. It is another user's, whose run may be going on; if it has ended, "
                "have the file removed."
            ) from error


def _lock_file(output: str | Path) -> Path:
    """Beside the output; inside one whose parent is closed to us, such as a mount point."""
    target = Path(os.path.realpath(output))
    if not target.name:
        raise EchoCheckpointError(f"{output} is the root of a file system. Name a folder in it.")
    if target.is_dir() and not os.access(target.parent, os.W_OK):
        return target / LOCK
    return target.with_name(f".{target.name}{LOCK}")


def _is_lock(name: str) -> bool:
    """Whether a file is called as the lock of the folder that it lies in, or of an output in it."""
    return name.startswith(".") and name.endswith(LOCK)


def _acquire(path: Path, output: str | Path) -> FileLock:
    try:
        holder = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # there is none yet, or the system lets nobody read a locked file
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
    if os.name != "nt":  # while it is held: who waits for this very file sees that it is gone, and makes another
        with contextlib.suppress(OSError):  # a file that can't be removed blocks nobody
            path.unlink()
    lock.release()
