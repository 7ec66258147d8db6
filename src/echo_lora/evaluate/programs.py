"""Run a generated program on its test: in a sandbox, with limits, judged by a separate process.

Two worker processes (`worker.py`) take part. One runs the program and calls its function; the other runs the test, gets
plain values for its calls, and alone can report a pass. Each is limited to

    3 s of CPU time and 10 s of wall time, after which it is killed
    2 GB of address space, 64 open files, no writes to files, no core dump
    no further processes or threads; that none can be started is checked first
    an environment of five variables

The sandbox is bubblewrap (`bwrap`): system and Python folders, read-only; no other files, no network, no processes but
its own. A trial run decides whether it works. Where it does not, programs run only with permission, within the same
limits: they can then read the user's files and reach the network, so a malicious one can do harm. Root's programs run
as nobody, because process limits do not apply to root.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

from echo_lora.errors import EchoConfigError, EchoDataError, EchoError

CPU_SECONDS, CLOCK_SECONDS = 3, 10
START_SECONDS = 60  # until the judge has started, on a busy machine
MEMORY_BYTES, OPEN_FILES = 2 * 10**9, 64
VERDICT_BYTES = 4096  # read at most of the judge's output
NOBODY = 65534
NOT_PLAIN = "the test calls its function with"
_WORKER = Path(__file__).with_name("worker.py")

Command = tuple[str, ...]


def passes(prompt: str, answer: str, test: str, entry_point: str, *, allow_unsandboxed: bool = False) -> bool:
    """Whether prompt and answer, as one program, pass `test`.

    `test` defines `check`, which gets the function named `entry_point`; it may use what the prompt defines. Arguments
    and results are plain values (see `worker.py`); a result of any other type fails.
    Raises EchoConfigError as `sandbox_command` does, EchoDataError if the test passes other values to the function,
    EchoError if the program could not be started.
    """
    return _run(sandbox_command(allow_unsandboxed), prompt, answer, test, entry_point)


@cache
def sandbox_command(allow_unsandboxed: bool = False) -> Command:
    """The command that runs a program in a sandbox; without a working sandbox, at most a change of user.

    Raises EchoConfigError, with the reason, if no sandbox works and `allow_unsandboxed` is not set, or if the limits
    have no effect.
    """
    if sys.platform == "win32":
        raise EchoConfigError("Windows can't limit them. Score on Linux or macOS.")
    command, problem = _sandbox()
    if not problem:
        return command
    if not allow_unsandboxed:
        raise EchoConfigError(
            f"no sandbox works here: {problem} Install bubblewrap (`apt install bubblewrap`), or run echo-lora in a "
            "container and add --allow-unsandboxed (in Python: allow_unsandboxed=True). Without a sandbox time, memory "
            "and processes are limited, but a program can read your files and reach the network."
        )
    command = _as_nobody("+dac_read_search") if _is_superuser() else ()  # Python may lie in root's home folder
    if problem := _problem(command):
        raise EchoConfigError(f"their limits have no effect here: {problem} Run as an ordinary user on Linux.")
    return command


def describe_sandbox(allow_unsandboxed: bool = False) -> str:
    """How programs run here, in a few words. Raises EchoConfigError as `sandbox_command` does."""
    sandbox_command(allow_unsandboxed)
    return "without a sandbox, within limits" if _sandbox()[1] else "in a bubblewrap sandbox"


@cache
def _sandbox() -> tuple[Command, str]:
    """The sandbox's command, and why it does not work; empty if it does."""
    if not (found := shutil.which("bwrap")):
        return (), "bubblewrap (bwrap) is not installed."
    command = (found, *_bubblewrap())
    return command, _problem(command)


def _bubblewrap() -> list[str]:
    """Options of bwrap that show the system and Python folders, and nothing else."""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if _is_superuser():
        options += [text for name in ("SETUID", "SETGID", "SETPCAP") for text in ("--cap-add", f"CAP_{name}")]
    python = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)))
    shown: list[Path] = []
    for path in map(Path, ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", *python)):
        if path == Path("/") or not path.exists() or any(path.is_relative_to(other) for other in shown):
            continue
        shown.append(path)
        if path.is_symlink() and path.parent == Path("/"):
            options += ["--symlink", os.readlink(path), str(path)]
            continue
        for parent in reversed(path.parents[:-1]):  # bwrap alone would make them unreadable to nobody
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(path), str(path)]
    options += ["--perms", "0755", "--dir", "/dev", "--dev-bind", os.devnull, os.devnull]
    options += ["--remount-ro", "/", "--chdir", "/", "--"]
    return options + list(_as_nobody() if _is_superuser() else ())


def _is_superuser() -> bool:
    return os.geteuid() == 0


def _as_nobody(capabilities: str = "") -> Command:
    """The command that drops root's rights, except for the named capabilities."""
    kept = ",".join(filter(None, ("-all", capabilities)))
    rights = [f"--{kind}={kept}" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
    return ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", *rights)


def _problem(command: Command) -> str:
    """Why a program does not run with this command; empty if it does."""
    program = "def double(x):\n    import statistics, zoneinfo\n    return 2 * x\n"
    try:
        is_right = _run(command, "", program, "def check(double):\n    assert double(2) == 4\n", "double")
    except EchoError as error:
        return str(error)
    return "" if is_right else "a correct trial program failed."


def _run(command: Command, prompt: str, answer: str, test: str, entry_point: str) -> bool:
    limits = {
        "RLIMIT_CPU": CPU_SECONDS,
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
    }
    secret = secrets.token_hex(16)
    shared = {"entry_point": entry_point, "limits": limits, "seconds": CLOCK_SECONDS + 1}
    solution = shared | {"program": prompt + answer}
    judge = shared | {"prompt": prompt, "test": test, "secret": secret}
    processes: list[subprocess.Popen[bytes]] = []
    calls, calls_end, replies, replies_end, errors, errors_end = pipes = [*os.pipe(), *os.pipe(), *os.pipe()]
    with _empty_folder() as folder:
        try:
            processes.append(_start(command, "solution", solution, (calls, replies_end), folder, errors_end))
            processes.append(_start(command, "judge", judge, (replies, calls_end), folder, errors_end))
            for end in (calls, calls_end, replies, replies_end):  # so that a dead worker closes its pipes
                os.close(pipes.pop(pipes.index(end)))
            verdict = _listen(processes[-1])
            reason = "" if verdict else _last_line(errors)
        except OSError as error:
            raise EchoError(f"a program could not be started: {error}.") from error
        finally:
            for process in processes:
                process.kill()  # kills a sandbox as a whole; without one there is a single process
                process.wait()
            for end in pipes:
                os.close(end)
    if not verdict:
        raise EchoError(f"a program did not start: {reason or 'it printed nothing'}.")
    if verdict[-1].startswith(NOT_PLAIN):
        raise EchoDataError(f"{entry_point}: {verdict[-1]}. Use a test that passes plain values, or leave the row out.")
    return verdict[-1] == secret


def _start(
    command: Command, role: str, order: dict[str, Any], ends: tuple[int, int], folder: str, errors: int
) -> subprocess.Popen[bytes]:
    """Start a worker. Its order lies in a file, because writing a long one to a pipe would block."""
    with TemporaryFile() as file:
        file.write(json.dumps(order).encode())
        file.seek(0)
        return subprocess.Popen(
            [*command, sys.executable, "-I", "-c", _WORKER.read_text(encoding="utf-8"), role, *map(str, ends)],
            stdin=file,
            stdout=subprocess.PIPE if role == "judge" else subprocess.DEVNULL,
            stderr=errors,
            pass_fds=ends,
            cwd=folder,
            env={
                "HOME": folder,
                "PATH": os.defpath,
                "LANG": "C.UTF-8",
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,
        )


def _listen(judge: subprocess.Popen[bytes]) -> list[str]:
    """The lines that the judge prints before it ends or its time is up."""
    assert judge.stdout is not None
    output, deadline = b"", time.monotonic() + START_SECONDS
    with judge.stdout, selectors.DefaultSelector() as selector:
        selector.register(judge.stdout, selectors.EVENT_READ)
        while len(output) < VERDICT_BYTES and selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(judge.stdout.fileno(), VERDICT_BYTES)
            if not chunk:
                break
            if not output:
                deadline = time.monotonic() + CLOCK_SECONDS
            output += chunk
    return output.decode(errors="replace").splitlines()


def _last_line(errors: int) -> str:
    """The last line in the pipe, whose other end may still be open."""
    os.set_blocking(errors, False)
    try:
        lines = os.read(errors, VERDICT_BYTES).decode(errors="replace").splitlines()
    except BlockingIOError:
        lines = []
    return lines[-1] if lines else ""


@contextmanager
def _empty_folder() -> Iterator[str]:
    """An empty read-only working directory."""
    folder = mkdtemp(prefix="echo-lora-program-")
    try:
        os.chmod(folder, 0o555)
        yield folder
    finally:
        with suppress(OSError):  # not empty only if a program without a sandbox got around the limits
            os.rmdir(folder)
