"""The two worker processes of a generated program. `programs.py` runs this text with `python -c`.

    solution   runs prompt and answer, then calls the function on request
    judge      runs the test, whose `candidate` sends its calls to the solution; only the judge can report a pass

They exchange plain values through two pipes: None, bool, numbers, text, bytes, list, tuple, set, dict, and iterators as
their items. The judge builds new objects from these, so no code of the solution runs in it: neither an `__eq__` nor a
patched builtin. Nothing that the solution can send means "passed".

Standard library only: this package can't be imported inside the sandbox.
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

MAX_MESSAGE_BYTES = 8 * 10**6  # of one call or reply

# Python audit events that are refused. This prevents accidents; the sandbox outside is what stops malice.
REFUSED = {
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"),
    *("os.kill", "os.killpg", "signal.pthread_kill"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"),
    *("os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def confine(limits: Mapping[str, int], seconds: int) -> None:
    """Set resource limits, close the standard streams, and refuse what a solution does not need."""
    import resource

    nowhere = os.open(os.devnull, os.O_RDWR)
    for name, limit in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        own = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (own, own))
        except ValueError:
            if sys.platform == "linux" or name != "RLIMIT_AS":  # macOS can't limit address space
                raise
    try:
        if os.fork() == 0:
            os._exit(0)
    except OSError:
        pass  # as intended
    else:
        sys.exit("a program could start others here, and they could outlive it")
    signal.alarm(seconds)  # ends it even if the parent is gone
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event in REFUSED or (event == "open" and args[2] & WRITING and args[0] != os.devnull):
        raise PermissionError(f"{event} is not allowed in a generated program")


# ------------------------------------------------------------------------------------------------ plain values


class NotPlainError(TypeError):
    """A value that can't be sent to the other process."""


def encode(value: Any) -> Any:
    """A plain value as JSON: a list holds a type tag, then the items."""
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
    raise NotPlainError(f"{type(value).__name__} is not a plain value")


DECODERS: dict[str, Callable[[list[Any]], Any]] = {
    "int": lambda items: int(items[0], 16),
    "complex": lambda items: complex(*items),
    "Decimal": lambda items: Decimal(items[0]),
    "Fraction": lambda items: Fraction(items[0]),
    "bytes": lambda items: base64.b64decode(items[0]),
    "dict": lambda items: {decode(key): decode(item) for key, item in items},
    "list": lambda items: list(map(decode, items)),
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "iterator": lambda items: iter(list(map(decode, items))),
}


def decode(value: Any) -> Any:
    return DECODERS[value[0]](value[1:]) if isinstance(value, list) else value


def send(pipe: int, message: Any) -> None:
    """Raises NotPlainError if the message is too long."""
    text = json.dumps(message).encode()
    if len(text) > MAX_MESSAGE_BYTES:
        raise NotPlainError(f"{len(text)} bytes exceed the {MAX_MESSAGE_BYTES} of a message")
    rest = memoryview(len(text).to_bytes(4, "big") + text)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def receive(pipe: int) -> Any:
    """Raises ValueError or EOFError for anything that `send` can't have sent."""
    length = int.from_bytes(_read(pipe, 4), "big")
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(pipe, length))


def _read(pipe: int, length: int) -> bytearray:
    data = bytearray()
    while len(data) < length:
        chunk = os.read(pipe, min(length - len(data), 2**16))
        if not chunk:
            raise EOFError
        data += chunk
    return data


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
    """Report "started", and the secret if the test passes."""
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
            tell(f"the test calls its function with a value that can't be sent: {error}")
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
    """Hide memory and pipes from the user's other processes: without a sandbox, the solution is one of them."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE


def _defined(prompt: str) -> CodeType:
    """The code that a prompt defines: as many of its lines as are complete without an answer."""
    lines = prompt.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        try:
            return compile("".join(lines[:count]), "prompt", "exec")
        except SyntaxError:
            continue
    return compile("", "prompt", "exec")


def _reply(replies: int) -> Any:
    """The solution's reply. Without one the judge exits, whatever the test catches."""
    try:
        return receive(replies)
    except Exception:
        leave()


def _exception(namespace: Mapping[str, Any], name: str, text: str) -> Exception:
    """The prompt's or Python's exception of that name, but not StopIteration, which would end a loop of the test."""
    kind = namespace.get(name, getattr(builtins, name, None))
    is_one = isinstance(kind, type) and issubclass(kind, Exception)
    if is_one and not issubclass(kind, (StopIteration, StopAsyncIteration)):
        with suppress(TypeError):  # its constructor takes other arguments
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def _assign(mine: Any, theirs: Any) -> None:
    """Apply the solution's change of an argument to the test's object."""
    if isinstance(mine, list):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(theirs)


def leave() -> NoReturn:
    """Exit at once, in a way that the test can't catch."""
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
