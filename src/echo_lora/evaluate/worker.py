"""What the two processes of a generated program run: `programs.py` starts them with this text as `python -c`.

    solution   runs prompt and answer, and then calls its function as often as it is asked
    judge      runs the test, whose `candidate` asks the solution; only the judge can say that the test was passed

The two share two pipes, on which plain values travel: None, bool, numbers, text, bytes, list, tuple, set, dict, and
iterators as their items. The judge builds what it compares from these, so that no code of the solution runs in it:
not an `__eq__` of its own, not a changed builtin. Nothing that the solution can send says "passed".

Standard library only, and nothing of this package: it can't be imported there.
"""

from __future__ import annotations

import base64
import builtins
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from types import CodeType
from typing import Any, NoReturn

LONGEST = 8 * 10**6  # bytes of one call or reply

# Python's audit events that are refused in the process. This stops accidents; what holds against malice is outside.
REFUSED = {
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"),
    *("os.kill", "os.killpg", "signal.pthread_kill"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"),
    *("os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def confine(limits: Mapping[str, int], seconds: int) -> None:
    """Set the limits, drop the standard streams, and refuse what a solution has no use for."""
    import resource

    nowhere = os.open(os.devnull, os.O_RDWR)
    for name, limit in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        own = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (own, own))
        except ValueError:
            if sys.platform == "linux" or name != "RLIMIT_AS":  # macOS takes no limit of its address space
                raise
    try:
        if os.fork() == 0:
            os._exit(0)
    except OSError:
        pass  # as it should be
    else:
        sys.exit("a program could start others here, and they could outlive it")
    signal.alarm(seconds)  # should nobody be left to kill it
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event in REFUSED or (event == "open" and args[2] & WRITING and args[0] != os.devnull):
        raise PermissionError(f"{event} is refused to a generated program")


# ------------------------------------------------------------------------------------------------ plain values


class NotPlainError(TypeError):
    """A value that can't be handed over."""


def encode(value: Any) -> Any:
    """A plain value in JSON's terms: a list there is a tag and what it holds."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, Integral):
        value = int(value)
        return value if abs(value) < 2**63 else ["int", f"{value:x}"]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (Decimal, Fraction)):
        return [type(value).__name__, str(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, Mapping):
        return ["dict", *([encode(key), encode(item)] for key, item in value.items())]
    for tag, kind in {"list": list, "tuple": tuple, "set": set, "frozenset": AbstractSet, "iterator": Iterable}.items():
        if isinstance(value, kind):
            return [tag, *map(encode, value)]
    raise NotPlainError(f"{type(value).__name__} is no plain value")


DECODERS: dict[str, Callable[[list[Any]], Any]] = {
    "int": lambda held: int(held[0], 16),
    "complex": lambda held: complex(*held),
    "Decimal": lambda held: Decimal(held[0]),
    "Fraction": lambda held: Fraction(held[0]),
    "bytes": lambda held: base64.b64decode(held[0]),
    "dict": lambda held: {decode(key): decode(item) for key, item in held},
    "list": lambda held: list(map(decode, held)),
    "tuple": lambda held: tuple(map(decode, held)),
    "set": lambda held: set(map(decode, held)),
    "frozenset": lambda held: frozenset(map(decode, held)),
    "iterator": lambda held: iter(list(map(decode, held))),
}


def decode(value: Any) -> Any:
    return DECODERS[value[0]](value[1:]) if isinstance(value, list) else value


def send(pipe: int, message: Any) -> None:
    """Raises NotPlainError if the message is too long."""
    text = json.dumps(message).encode()
    if len(text) > LONGEST:
        raise NotPlainError(f"{len(text)} bytes are more than the {LONGEST} of a message")
    rest = memoryview(len(text).to_bytes(4, "big") + text)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def receive(pipe: int) -> Any:
    """Raises ValueError or EOFError for anything that `send` does not send."""
    length = int.from_bytes(_read(pipe, 4), "big")
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(pipe, length))


def _read(pipe: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(pipe, min(length, 2**16))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


# -------------------------------------------------------------------------------------------------- the solution


def solve(order: Mapping[str, Any], calls: int, replies: int) -> None:
    send(replies, "started")
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(order["program"], "generated", "exec"), namespace)
    function = namespace[order["entry_point"]]
    send(replies, "loaded")
    while True:
        call = receive(calls)
        args, kwargs = decode(call[0]), decode(call[1])
        try:
            reply = ["returned", encode(function(*args, **kwargs)), _changed(call[0], args)]
            send(replies, reply)
        except Exception as error:
            send(replies, ["raised", type(error).__name__, _text(error)])


def _changed(before: Any, args: list[Any]) -> Any:
    """The arguments after the call if it changed them, else None."""
    try:
        after = encode(args)
    except TypeError:
        return None
    return None if after == before else after


def _text(error: Exception) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return ""


# ----------------------------------------------------------------------------------------------------- the judge


def judge(order: Mapping[str, Any], calls: int, replies: int, tell: Callable[[str], object]) -> None:
    """Tell "started", then the secret if the test was passed."""
    _hide()
    if _reply(replies) == "started":
        tell("started")
    if _reply(replies) != "loaded":
        leave()
    namespace: dict[str, Any] = {"__name__": "test"}

    def candidate(*args: Any, **kwargs: Any) -> Any:
        try:
            send(calls, [encode(list(args)), encode(kwargs)])
        except NotPlainError as error:
            tell(f"the test calls its function with what can't be handed over: {error}")
            leave()
        except OSError:  # the solution is gone
            leave()
        reply = _reply(replies)
        try:
            kind, first, second = reply
            if kind == "raised":
                raised = _exception(namespace, first, str(second))
            else:
                returned, after = decode(first), decode(second)
                for mine, theirs in zip(args, after or (), strict=False):
                    _assign(mine, theirs)
        except Exception:
            leave()
        if kind == "raised":
            raise raised
        return returned

    candidate.__name__ = order["entry_point"]
    exec(_defined(order["prompt"]), namespace)
    namespace[order["entry_point"]] = candidate
    exec(compile(order["test"], "test", "exec"), namespace)
    namespace["check"](candidate)
    tell(order["secret"])


def _hide() -> None:
    """Keep memory and pipes from other processes of the same user: without a sandbox the solution is one."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE


def _defined(prompt: str) -> CodeType:
    """What a prompt defines: its lines up to the last ones that are complete without an answer."""
    lines = prompt.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        try:
            return compile("".join(lines[:count]), "prompt", "exec")
        except SyntaxError:
            continue
    return compile("", "prompt", "exec")


def _reply(replies: int) -> Any:
    """What the solution says; without it there is nothing to go on with, whatever the test catches."""
    try:
        return receive(replies)
    except Exception:
        leave()


def _exception(namespace: Mapping[str, Any], name: str, text: str) -> Exception:
    """The prompt's or Python's own exception of that name. StopIteration would end a loop of the test early."""
    kind = namespace.get(name, getattr(builtins, name, None))
    is_one = isinstance(kind, type) and issubclass(kind, Exception)
    if is_one and not issubclass(kind, (StopIteration, StopAsyncIteration)):
        with suppress(TypeError):  # it takes other arguments
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def _assign(mine: Any, theirs: Any) -> None:
    """Let a changed argument change where the test sees it."""
    if isinstance(mine, list):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(theirs)


def leave() -> NoReturn:
    """End the process here: the test must not catch it."""
    os._exit(1)


def main() -> None:
    role, reads, writes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    order = json.load(sys.stdin)
    sys.argv = ["generated"]
    verdict = os.dup(1)
    confine(order["limits"], order["seconds"])
    if role == "judge":
        judge(order, writes, reads, lambda text: os.write(verdict, f"{text}\n".encode()))
    else:
        os.close(verdict)
        solve(order, reads, writes)


if __name__ == "__main__":
    main()
