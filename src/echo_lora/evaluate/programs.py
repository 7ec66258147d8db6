"""Running a generated program on its test, in a process of its own with limits.

The limits stop accidents: an endless loop, memory without end, a large file, processes that stay behind. They are
**no sandbox**: a program that means harm can read and delete what its user can, and reach the network. Run programs
that you do not trust in a container or a virtual machine.

    3 s of CPU time; 10 s by the clock, after which the whole process group is killed
    2 GB of address space, 1 MB a file, 64 open files, no core dump
    no further process, no signal to another one, no connection
    a temporary folder of its own, an environment of four variables

A program passes if it reaches its end after its test: then, and only then, the process gives back a secret that it was
started with. Leaving early with status 0 is not passing.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from tempfile import TemporaryDirectory

CPU_SECONDS, CLOCK_SECONDS = 3, 10
MEMORY_BYTES, FILE_BYTES, OPEN_FILES = 2 * 10**9, 10**6, 64
REFUSED = (  # Python's audit events
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen"),
    *("os.kill", "os.killpg", "socket.connect"),
)

# Runs in the new process. What the program prints goes nowhere; the secret has a way out of its own.
_CHILD = """
import json, os, resource, sys
order = json.load(sys.stdin)
way_out = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
for name, limit in order["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
refused = set(order["refused"])
def refuse(event, args):
    if event in refused:
        raise OSError(event + " is refused to a generated program")
sys.addaudithook(refuse)
program, answer = order["program"], order["secret"]
del order
sys.argv = ["generated"]
exec(compile(program, "generated", "exec"), {"__name__": "generated"})
os.write(way_out, answer.encode())
"""


def passes(program: str, test: str, entry_point: str) -> bool:
    """Whether `program` passes `test`, which defines `check`; `check` is called with what `entry_point` names."""
    return runs_to_its_end(f"{program}\n{test}\ncheck({entry_point})\n")


def runs_to_its_end(program: str) -> bool:
    """Whether the program ends without an error, an early exit, or a limit met."""
    secret = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": CPU_SECONDS,
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # the superuser is not held by this one
    }
    order = json.dumps({"program": program, "secret": secret, "limits": limits, "refused": REFUSED})
    with TemporaryDirectory(prefix="echo-lora-program-", ignore_cleanup_errors=True) as folder:
        environment = {"HOME": folder, "PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(order.encode(), timeout=CLOCK_SECONDS)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with suppress(ProcessLookupError, PermissionError):  # none of the group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
    return said == secret.encode()
