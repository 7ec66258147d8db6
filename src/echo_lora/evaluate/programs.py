"""Running a generated program on its test: in a sandbox, within limits, and judged from outside.

Two processes take part, and `worker.py` is what they run. One runs the program and calls its function; the other runs
the test, gets plain values for its calls, and alone can say that the test was passed. Each is held to

    3 s of CPU time, and 10 s by the clock, after which it is killed
    2 GB of address space, no byte in any file, 64 open files, no core dump
    no further process and no thread: that none can be started is tried first
    an environment of five variables

The sandbox is bubblewrap's (`bwrap`): the folders of the system and of Python, read-only; no other file, no network, no
other process. Whether it works is found out by running a program in it. Where it does not, programs run only by
permission, within the same limits: they can then read what their user can and reach the network, and one that means
harm can do harm. The superuser's programs run as nobody, since no limit of processes holds the superuser.
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
START_SECONDS = 60  # until the program begins, on a busy machine
MEMORY_BYTES, OPEN_FILES = 2 * 10**9, 64
MOST_SAID = 4096  # bytes that are read of a verdict
NOBODY = 65534
NOT_PLAIN = "the test calls its function with"
_WORKER = Path(__file__).with_name("worker.py")

Command = tuple[str, ...]


def passes(prompt: str, answer: str, test: str, entry_point: str, *, allow_unsandboxed: bool = False) -> bool:
    """Whether prompt and answer, as one program, pass `test`.

    `test` defines `check`, which is called with what `entry_point` names; it may use what the prompt defines. Values
    that go to and from the function are plain (`worker.py`); any other is wrong.
    Raises EchoConfigError as `confinement`, EchoDataError if the test gives the function anything else than plain
    values, EchoError if the program could not be started.
    """
    return _run(confinement(allow_unsandboxed), prompt, answer, test, entry_point)


@cache
def confinement(allow_unsandboxed: bool = False) -> Command:
    """What stands before the command of a program: the sandbox that works here; without one, at most a change of user.

    Raises EchoConfigError, which says why, if no sandbox works and one is wanted, or if limits don't hold.
    """
    if sys.platform == "win32":
        raise EchoConfigError("this system can't limit them. Score on Linux or macOS.")
    command, problem = _sandbox()
    if not problem:
        return command
    if not allow_unsandboxed:
        raise EchoConfigError(
            f"no sandbox works here: {problem} Install bubblewrap (`apt install bubblewrap`), or run echo-lora in a "
            "container and allow it with --allow-unsandboxed (in Python: allow_unsandboxed=True). Without a sandbox "
            "time, memory and processes are limited, but a program can read your files and reach the network."
        )
    command = _as_nobody("+dac_read_search") if _is_superuser() else ()  # Python may lie in a folder of the superuser's
    if problem := _problem(command):
        raise EchoConfigError(f"they can't be held to their limits here: {problem} Run as an ordinary user on Linux.")
    return command


def described(allow_unsandboxed: bool = False) -> str:
    """How programs run here, in a few words. Raises EchoConfigError as `confinement`."""
    confinement(allow_unsandboxed)
    return "without a sandbox, within limits" if _sandbox()[1] else "in a sandbox of bubblewrap"


@cache
def _sandbox() -> tuple[Command, str]:
    """The command of the sandbox, and what keeps it from working, empty if nothing does."""
    if not (found := shutil.which("bwrap")):
        return (), "bubblewrap (bwrap) is not installed."
    command = (found, *_bubblewrap())
    return command, _problem(command)


def _bubblewrap() -> list[str]:
    """Options of bwrap: the folders of the system and of Python, and nothing else."""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if _is_superuser():
        options += [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
    python = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)))
    shown: list[Path] = []
    for path in map(Path, ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", *python)):
        if path == Path("/") or not path.exists() or any(path.is_relative_to(other) for other in shown):
            continue
        shown.append(path)
        if path.is_symlink() and path.parent == Path("/"):
            options += ["--symlink", os.readlink(path), str(path)]
            continue
        for parent in reversed(path.parents[:-1]):  # made by bwrap alone, they would be closed to nobody
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(path), str(path)]
    options += ["--perms", "0755", "--dir", "/dev", "--dev-bind", os.devnull, os.devnull]
    options += ["--remount-ro", "/", "--chdir", "/", "--"]
    return options + list(_as_nobody() if _is_superuser() else ())


def _is_superuser() -> bool:
    return os.geteuid() == 0


def _as_nobody(capabilities: str = "") -> Command:
    """The command that gives up the superuser's rights but for the named capabilities."""
    kept = ",".join(filter(None, ("-all", capabilities)))
    rights = [f"--{kind}={kept}" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
    return ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", *rights)


def _problem(command: Command) -> str:
    """What keeps a program from running behind the command, or nothing."""
    program = "def double(x):\n    import statistics, zoneinfo\n    return 2 * x\n"
    try:
        is_right = _run(command, "", program, "def check(double):\n    assert double(2) == 4\n", "double")
    except EchoError as error:
        return str(error)
    return "" if is_right else "a program without a fault did not pass."


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
            for end in (calls, calls_end, replies, replies_end):  # whose holder dies, the other one hears of it
                os.close(pipes.pop(pipes.index(end)))
            said = _listen(processes[-1])
            reason = "" if said else _last_line(errors)
        except OSError as error:
            raise EchoError(f"a program could not be started: {error}.") from error
        finally:
            for process in processes:
                process.kill()  # a sandbox dies as a whole; without one there is a single process
                process.wait()
            for end in pipes:
                os.close(end)
    if not said:
        raise EchoError(f"a program did not start: {reason or 'it said nothing'}.")
    if said[-1].startswith(NOT_PLAIN):
        raise EchoDataError(f"{entry_point}: {said[-1]}. Use a test that gives it plain values, or leave the row out.")
    return said[-1] == secret


def _start(
    command: Command, role: str, order: dict[str, Any], ends: tuple[int, int], folder: str, errors: int
) -> subprocess.Popen[bytes]:
    """Start a process of `worker.py`. Its order lies in a file: a pipe may have to wait for its reader."""
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
    """The lines that the judge says until it ends or its time is up."""
    assert judge.stdout is not None
    said, deadline = b"", time.monotonic() + START_SECONDS
    with judge.stdout, selectors.DefaultSelector() as selector:
        selector.register(judge.stdout, selectors.EVENT_READ)
        while len(said) < MOST_SAID and selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(judge.stdout.fileno(), MOST_SAID)
            if not part:
                break
            if not said:
                deadline = time.monotonic() + CLOCK_SECONDS
            said += part
    return said.decode(errors="replace").splitlines()


def _last_line(errors: int) -> str:
    """Of what is in the pipe; it may be open elsewhere."""
    os.set_blocking(errors, False)
    try:
        lines = os.read(errors, MOST_SAID).decode(errors="replace").splitlines()
    except BlockingIOError:
        lines = []
    return lines[-1] if lines else ""


@contextmanager
def _empty_folder() -> Iterator[str]:
    """A folder to be in, where nothing is to be written."""
    folder = mkdtemp(prefix="echo-lora-program-")
    try:
        os.chmod(folder, 0o555)
        yield folder
    finally:
        with suppress(OSError):  # not empty: then a program without a sandbox has made its way around the limits
            os.rmdir(folder)
