"""Generated programs: which pass, and that hostile ones neither pass, nor survive, nor block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from echo_lora.errors import EchoConfigError, EchoDataError, EchoError
from echo_lora.evaluate import programs, worker

TEST = "def check(candidate):\n    assert candidate(2) == 4\n"
Runs = Callable[..., bool]

linux = pytest.mark.skipif(sys.platform != "linux", reason="what it attacks is Linux's")


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(programs, "_sandbox", lambda: ((), "bubblewrap (bwrap) is not installed."))
    programs.sandbox_command.cache_clear()
    yield
    programs.sandbox_command.cache_clear()


@pytest.fixture(params=["sandboxed", "bare"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runs]:
    """`programs.passes`, with and without the sandbox, in folders that identify its processes."""
    is_bare = request.param == "bare"
    if is_bare:
        request.getfixturevalue("no_bubblewrap")
    try:
        programs.sandbox_command(is_bare)
    except EchoConfigError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(body: str, test: str = TEST, prompt: str = "def double(x):\n", before: str = "") -> bool:
        answer = textwrap.indent(textwrap.dedent(body), "    ") + "\n"
        return programs.passes(before + prompt, answer, test, "double", allow_unsandboxed=is_bare)

    yield run
    for _ in range(50):
        left = processes_in(tmp_path)
        if not left:
            break
        time.sleep(0.1)
    for process in left:
        process.kill()
    assert not left
    assert list(tmp_path.iterdir()) == []


def processes_in(home: Path) -> list[psutil.Process]:
    """Running processes whose inherited HOME is below the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME", "").startswith(str(home)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CPU_SECONDS", 1)
    monkeypatch.setattr(programs, "CLOCK_SECONDS", 2)


# ------------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "body",
    [
        "return 2 * x",
        "import math, re, collections, decimal; print('x' * 100_000); return 2 * x",
        "import numpy as np; return np.int64(2) * x",
        "open('/dev/null', 'w').write('quiet'); return 2 * x",
        "class Same:\n    def __eq__(self, other): return True\nassert Same() == 5\nreturn 2 * x",
        "return 2 * x\n\nclass Later:\n    pass",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); return 2 * x",
        "try:\n    raise SystemExit\nexcept SystemExit:\n    return 2 * x",
    ],
)
def test_a_correct_program_passes(passes, body):
    assert passes(body)


@pytest.mark.parametrize("body", ["return x", "return 2 *", "return undefined", "pass", "return '4'", "return [4]"])
def test_a_wrong_program_fails(passes, body):
    assert not passes(body)


VALUES = {
    "None": "is None",
    "1 == 1": "is True",
    "2.5": "== 2.5",
    "float('inf')": "== float('inf')",
    "7 ** 9000": "== 7 ** 9000",
    "-(7 ** 9000)": "== -(7 ** 9000)",
    "1 + 2j": "== 1 + 2j",
    "'a\\ud800\\n'": "== 'a\\ud800\\n'",
    "b'\\x00\\xff'": "== b'\\x00\\xff'",
    "[1, (2, [3.0]), 'x', None]": "== [1, (2, [3.0]), 'x', None]",
    "{1, 2}": "== {2, 1}",
    "frozenset([1, (2, 3)])": "== {1, (2, 3)}",
    "{1: [2], (3, 4): {5: 6}}": "== {1: [2], (3, 4): {5: 6}}",
    "collections.Counter('aab')": "== {'a': 2, 'b': 1}",
    "{1: 2}.keys()": "== {1}",
    "fractions.Fraction(1, 3)": "== __import__('fractions').Fraction(1, 3)",
    "decimal.Decimal('0.10')": "== __import__('decimal').Decimal('0.1')",
    "numpy.int64(3)": "== 3",
    "numpy.all([True])": "is True",
    "enum.IntEnum('E', 'a b').b": "== 2",
    "map(str, [1, 2])": "!= ['1', '2']",
    "range(3)": "!= [0, 1, 2]",
}


def test_plain_values_round_trip(passes):
    lines = [f"    said = f({text!r}); assert said {expected}, said\n" for text, expected in VALUES.items()]
    body = "import collections, decimal, enum, fractions, numpy; return eval(x)"
    assert passes(body, "def check(f):\n" + "".join(lines))


def test_arguments_and_their_changes_round_trip(passes):
    test = """
    def check(candidate):
        numbers, names, pairs = [3, 1, 2], {"a": [1]}, {1}
        assert candidate(numbers, names, pairs=pairs, text="x") is None
        assert (numbers, names, pairs) == ([1, 2, 3], {"a": [1, "x"]}, {1})
        assert list(candidate([2, 1], {"a": []})) == [1, 2]
    """
    body = """
    if text is None:
        return iter(sorted(numbers))
    numbers.sort()
    names["a"].append(text)
    """
    prompt = "def double(numbers, names, pairs=None, text=None):\n"
    assert passes(body, textwrap.dedent(test), prompt)


def test_exceptions_reach_the_test_by_name(passes):
    test = """
    def check(candidate):
        for value, kind in ((1, ValueError), (2, KeyError), (3, Wrong), (4, RuntimeError)):
            try:
                candidate(value)
            except kind as error:
                assert "seen" in str(error)
            else:
                raise AssertionError(value)
    """
    body = """
    class Own(Exception): pass
    raise {1: ValueError, 2: KeyError, 3: Wrong, 4: Own}[x]("seen")
    """
    assert passes(body, textwrap.dedent(test), before="class Wrong(Exception):\n    pass\n\n")


def test_a_test_may_use_what_the_prompt_defines(passes):
    test = "def check(f):\n    assert f(2) == twice(2) == double(2) == 4\n"
    assert passes("return twice(x)", test, before="def twice(x):\n    return 2 * x\n\n")
    forged = "return 0\n\ndef twice(x):\n    return 0"
    assert not passes(
        forged, "def check(f):\n    assert f(2) == twice(2)\n", before="def twice(x):\n    return 2 * x\n\n"
    )


def test_a_test_that_passes_other_values_is_an_error(passes):
    test = "def check(f):\n    try:\n        f(lambda: 1)\n    except Exception:\n        pass\n"
    with pytest.raises(
        EchoDataError, match=r"double: the test calls its function with .*function is not a plain value"
    ):
        passes("return 1", test)


# ---------------------------------------------------------------------------------------------------- attacks

FORGERIES = {
    "leaves with status 0": "import os; os._exit(0)",
    "leaves by sys.exit": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "raises KeyboardInterrupt": "raise KeyboardInterrupt",
    "raises StopIteration": "raise StopIteration",
    "equals everything": """
        class Same:
            def __eq__(self, other): return True
        return Same()
    """,
    "an int that equals everything": """
        class Same(int):
            def __eq__(self, other): return True
        return Same(5)
    """,
    "a list that equals everything": """
        class Same(list):
            def __eq__(self, other): return True
        return Same()
    """,
    "changes the test": """
        import sys, builtins
        builtins.AssertionError = ValueError
        builtins.check = lambda candidate: None
        for module in list(sys.modules.values()):
            vars(module)["check"] = lambda candidate: None
        frame = sys._getframe()
        while frame:
            frame.f_globals["check"] = frame.f_globals["candidate"] = lambda *args: 4
            frame = frame.f_back
        return 5
    """,
    "takes over the reader of calls": """
        import sys
        main = sys._getframe(1).f_globals
        main["encode"] = lambda value: ["passed"]
        return 5
    """,
    "writes to every pipe": """
        import os
        for fd in range(64):
            for text in (b"passed", b'\\x00\\x00\\x00\\x08"passed"', b"started\\nloaded\\n", b"0" * 32):
                try: os.write(fd, text)
                except OSError: pass
        os._exit(0)
    """,
    "prints secrets": """
        import gc, os, sys
        texts = {o for o in gc.get_objects() if isinstance(o, str)} | {str(o) for o in gc.get_objects()[:2000]}
        texts |= set(sys.argv) | set(os.environ.values())
        for text in texts:
            for fd in range(3, 16):
                try: os.write(fd, text[:200].encode() + b"\\n")
                except OSError: pass
        os._exit(0)
    """,
    "replies in advance": """
        import sys
        main = sys._getframe(1)
        main.f_globals["send"](main.f_locals["replies"], "passed")
        main.f_globals["send"](main.f_locals["replies"], ["returned", 5, None])
        return 5
    """,
    "returns a message without end": """
        import os, sys
        replies = sys._getframe(1).f_locals["replies"]
        os.write(replies, b"\\xff\\xff\\xff\\xff")
        while True: os.write(replies, bytes(65536))
    """,
    "returns deep lists": """
        import os, sys
        replies = sys._getframe(1).f_locals["replies"]
        text = b"[" * 10**6
        os.write(replies, len(text).to_bytes(4, "big") + text)
    """,
    "returns a huge number": "from decimal import Decimal; return Decimal('1e999999999')",
    "returns what has no end": "import itertools; return itertools.count()",
    "returns itself": "a = []; a.append(a); return a",
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_can_not_be_forged(passes, name):
    catches_all = "def check(f):\n    try:\n        assert f(2) == 4\n    except ValueError:\n        raise\n"
    start = time.monotonic()
    assert not passes(FORGERIES[name])
    assert not passes(FORGERIES[name], catches_all)
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("body", ["import os; os._exit(0)", "raise SystemExit", "import os; os.closerange(0, 64)"])
def test_an_early_exit_fails_even_if_the_test_catches_everything(passes, body):
    assert not passes(body, "def check(f):\n    try:\n        f(2)\n    except BaseException:\n        pass\n")


def test_stop_iteration_does_not_end_a_loop_of_the_test(passes):
    assert not passes("raise StopIteration", "def check(f):\n    assert all(map(f, [1, 2]))\n")


FORK = "import ctypes, os, time; libc = ctypes.CDLL(None)\n"
STAYING = {
    "runs": "while True: pass",
    "sleeps": "import time; time.sleep(600)",
    "sleeps at its end": "import atexit, time; atexit.register(time.sleep, 600); return 5",
    "sleeps in a thread": """
        import threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        return 5
    """,
    "ignores signals": """
        import signal, time
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(0)
        while True: time.sleep(600)
    """,
    "forks": "import os; os.fork(); return 4",
    "forks below Python": FORK + "assert libc.fork() >= 0; return 4",
    "leaves its session": FORK
    + """
if libc.fork() == 0:
    libc.setsid()
    if libc.fork() == 0:
        while True: time.sleep(600)
time.sleep(600)
""",
    "forks without end": FORK + "while True: libc.fork()",
    "forks by a bare system call": FORK + "libc.syscall(57); time.sleep(600)",
    "becomes another program": "import ctypes; ctypes.CDLL(None).execl(b'/bin/sleep', b'sleep', b'600', None)",
    "starts a program": "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True); return 4",
    "starts a program in a shell": "import os; os.system('sleep 600 &'); return 4",
    "starts a pool": "import multiprocessing; multiprocessing.Pool(2); return 4",
    "stops itself": "import ctypes, os; ctypes.CDLL(None).kill(os.getpid(), 19)",
    "holds its pipes": "import os, time; [os.dup(fd) for fd in range(9)]; time.sleep(600)",
    "takes memory": "x = bytearray(3 * 10**9); return 4",
    "opens files": "fs = [open('/dev/null') for _ in range(100)]; return 4",
    "waits for input": "return input()",
    "calls itself": "return double(x)",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "prints gigabytes": "import os, sys\nwhile True: os.write(1, bytes(10**6)); os.write(2, bytes(10**6))",
    "fills a file": "open('/tmp/file', 'wb').write(bytes(2 * 10**6)); return 4",
    "fills a file below Python": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        for place in (b"/tmp/echo-lora-attack", b"/dev/shm/echo-lora-attack", b"/var/tmp/echo-lora-attack", b"attack"):
            fd = libc.open(place, 0o102, 0o600)
            if fd >= 0:
                written = libc.write(fd, bytes(10**6), 10**6)
                libc.unlink(place)
                if written > 0: return 4
        return 5
    """,
    "removes a file": "import os; os.remove('/tmp/none'); return 4",
    "removes a folder": "import shutil; shutil.rmtree('/tmp/none'); return 4",
    "connects": "import socket; socket.create_connection(('127.0.0.1', 9)); return 4",
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", STAYING)
def test_nothing_outlives_its_program_or_blocks(passes, name):
    """The fixture checks that no processes and files are left."""
    start = time.monotonic()
    assert not passes(STAYING[name])
    assert time.monotonic() - start < 20


@linux
def test_the_judge_hides_its_memory_and_pipes(passes):
    """Without a sandbox its process is visible; with one there is no /proc."""
    body = """
    import ctypes, os
    libc, seen = ctypes.CDLL(None), 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\\0")
        except OSError:
            continue  # it has ended
        if parent != os.getppid():
            continue  # the judge of a parallel test, which may still be starting
        if b"judge" in words and words[0].endswith(b"python"):
            seen += 1
            for name in ("mem", "environ", *(f"fd/{number}" for number in range(20))):
                for flags in (os.O_RDONLY, os.O_WRONLY):
                    if libc.open(f"/proc/{pid}/{name}".encode(), flags) >= 0: return 4
    return 5 if seen else 6
    """
    is_five = "def check(f):\n    assert f(2) == 5\n"
    assert not passes(body)
    assert passes(body, is_five) == (programs.describe_sandbox(True) != "in a bubblewrap sandbox")


def test_the_sandbox_hides_files_environment_and_processes(monkeypatch, tmp_path):
    try:
        programs.sandbox_command()
    except EchoConfigError as error:
        pytest.skip(str(error))
    (tmp_path / "private").write_text("key")
    monkeypatch.setenv("A_TOKEN", "secret")
    test = f"""
def check(look):
    folders, environment, found = look({str(tmp_path)!r})
    assert set(folders) <= {{"usr", "bin", "lib", "lib32", "lib64", "nix", "etc", "dev", *look("parts")}}, folders
    assert "A_TOKEN" not in environment
    assert found == []
"""
    answer = """
    import os, sys
    if where == "parts":
        return [path.split("/")[1] for path in (sys.prefix, sys.base_prefix)]
    found = [path for path in (where, "/proc/1", "/etc/passwd", "/sys/kernel") if os.path.exists(path)]
    return os.listdir("/"), dict(os.environ), found
"""
    assert programs.passes("def look(where):\n", answer, test, "look")


@linux
@pytest.mark.parametrize("place", ["sandboxed", "bare"])
def test_programs_do_not_outlive_their_parent(tmp_path, place):
    """kill -9 while a program sleeps."""
    script = (
        "import sys, tempfile; from echo_lora.evaluate import programs; tempfile.tempdir = sys.argv[1]\n"
        "programs.CLOCK_SECONDS = 3\n"
        "if sys.argv[2] == 'bare': programs._sandbox = lambda: ((), 'none')\n"
        "programs.passes('def f(x):\\n', '    import time; time.sleep(600)\\n', 'def check(f): f(1)', 'f', "
        "allow_unsandboxed=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), place])
    for _ in range(300):
        solutions = [process for process in processes_in(tmp_path) if "solution" in process.cmdline()]
        if solutions and solutions[-1].status() == psutil.STATUS_SLEEPING:
            break
        time.sleep(0.1)
    assert solutions
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not processes_in(tmp_path):
            return
        time.sleep(0.1)
    pytest.fail(str(processes_in(tmp_path)))


# ----------------------------------------------------------------------------------------------- where they run


@pytest.mark.usefixtures("no_bubblewrap")
def test_without_a_sandbox_programs_need_permission():
    with pytest.raises(EchoConfigError, match=r"bwrap\) is not installed.*--allow-unsandboxed.*read your files"):
        programs.passes("def f(x):\n", "    return 4\n", TEST, "f")


def test_a_broken_sandbox_is_not_used(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(programs.shutil, "which", lambda name: str(broken))
    command, problem = programs._sandbox.__wrapped__()
    assert command[0] == str(broken)
    assert problem == "a program did not start: bwrap: setting up uid map: Permission denied."


def test_a_program_that_does_not_start_is_an_error_not_a_wrong_answer(monkeypatch):
    for command, message in (("false", "did not start"), ("no-such-program", "could not be started: .*No such file")):
        monkeypatch.setattr(programs, "sandbox_command", lambda allow, command=command: (command,))
        with pytest.raises(EchoError, match=message):
            programs.passes("def f(x):\n", "    return 4\n", TEST, "f")


def test_programs_that_can_start_others_are_refused(monkeypatch):
    """With an empty command prefix root stays root, whom process limits do not apply to."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser's programs can start others")
    assert "could start others" in programs._problem(())


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(programs.sys, "platform", "win32")
    with pytest.raises(EchoConfigError, match="Linux or macOS"):
        programs.sandbox_command.__wrapped__(True)


def test_the_worker_needs_only_the_standard_library():
    names = {name.split(".")[0] for name in vars(worker) if not name.startswith("_")}
    assert "main" in names
    text = Path(worker.__file__).read_text(encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, "-I", "-S", "-c", text.replace("__main__", "nothing")], capture_output=True, text=True
    )
    assert (shown.returncode, shown.stderr) == (0, "")
