"""Bad input for every command, in a fixed order: nothing may end in a traceback, hang, leave a part, or be believed.

    python tests/fuzz.py --seed 0 --cases 1500     a sample of this size, the same for the same seed
    python tests/fuzz.py --cases 0                 all of them
    python tests/fuzz.py --only TEXT --show        those whose name holds this text, with what they print

Each case says whether its input is sound. Most run in a fork of one process that has imported everything, and a few as
a user's command does. What a case may come to:

    accepted            sound input, exit status 0
    clear error         unsound input, exit status 1 or 2, a message of some lines that names what is wrong
    traceback           an exception that is no EchoError, or a crash
    too slow            no end within the time limit
    partial output      a refused command left or changed something, or an accepted one left something temporary
    nonsense accepted   unsound input, exit status 0
    sound refused       sound input, exit status 1 or 2
    unclear error       a message that is long, empty, or does not name the place
    broken case         a fault of this harness

The first two are what is wanted. The cases are in `fuzz_cases.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).parent
GOOD = ("accepted", "clear error")
OUTCOMES = (
    *GOOD,
    *("traceback", "too slow", "partial output", "nonsense accepted", "sound refused", "unclear error", "broken case"),
)
SECONDS = 60  # of a case at most
LONGEST = 3000  # characters of a clear message
MEMORY = 24 << 30  # bytes of address space: what is tried against arithmetic fails before the machine does
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "120",
}


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    case: str
    command: str
    outcome: str
    status: int | None
    seconds: float
    detail: str  # what was left, or the end of what was printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1500, help="how many; 0: all")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--without", default="", help="no case of these families, separated by commas")
    parser.add_argument("--show", action="store_true", help="print what each case prints")
    parser.add_argument("--json", type=Path, help="write counts and failures to this file")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]
    _import_everything()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        from fuzz_cases import all_cases

        os.chmod(scratch, 0o755)
        template = _template(Path(scratch) / "template")
        families = all_cases(template, random.Random(options.seed))
        for name in filter(None, options.without.split(",")):
            del families[name]
        cases = _sample(families, options.cases, random.Random(options.seed))
        cases = [case for case in cases if options.only in case.name]
        before = _contents(template)
        outcomes = []
        for number, case in enumerate(cases):
            outcome = run_case(case, template, Path(scratch) / f"case-{number}", show=options.show)
            outcomes.append(outcome)
            if options.show or outcome.outcome not in GOOD:
                print(f"{outcome.outcome:18} {outcome.case}\n    {outcome.command}\n    {outcome.detail}", flush=True)
        touched = _changes(before, _contents(template))
    counts = Counter(outcome.outcome for outcome in outcomes)
    print(f"\n{len(outcomes)} cases, seed {options.seed}, {sum(outcome.seconds for outcome in outcomes):.0f} s")
    for outcome in OUTCOMES:
        print(f"{counts[outcome]:6} {outcome}")
    for name in families:
        own = [outcome for outcome in outcomes if outcome.case.startswith(f"{name}: ")]
        bad = sum(outcome.outcome not in GOOD for outcome in own)
        print(f"       {name}: {len(own)} cases" + (f", {bad} bad" if bad else ""))
    if touched:
        print(f"       what all cases share was changed: {touched[:5]}")
    if options.json:
        bad = [asdict(outcome) for outcome in outcomes if outcome.outcome not in GOOD]
        options.json.write_text(json.dumps({"cases": len(outcomes), "counts": counts, "bad": bad, "touched": touched}))
    return int(bool(touched) or sum(counts[name] for name in GOOD) < len(outcomes))


def _sample(families: dict[str, list], count: int, rng: random.Random) -> list:
    """The same share of every family, so that a small sample has something of each."""
    total = sum(map(len, families.values()))
    chosen = []
    for cases in families.values():
        rng.shuffle(cases)
        share = len(cases) if not count else max(1, round(len(cases) * min(1, count / total)))
        chosen += cases[:share]
    return chosen


# ------------------------------------------------------------------------------------------------- what is shared


def _import_everything() -> None:
    """Once, so that a case is a fork and takes no seconds to start."""
    import datasets
    import lm_eval.evaluator
    import lm_eval.tasks
    import matplotlib.figure
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch
    import submitit
    import trl  # noqa: F401

    import echo_lora.adapter.merge
    import echo_lora.bench
    import echo_lora.benchmarks.importing
    import echo_lora.cli
    import echo_lora.recipe.first
    import echo_lora.recipe.generation
    import echo_lora.recipe.plan
    import echo_lora.recipe.scoring
    import echo_lora.recipe.train
    import echo_lora.study.compare
    import echo_lora.study.demo
    import echo_lora.study.report.page  # noqa: F401

    del datasets, lm_eval, matplotlib, safetensors, submitit


def _template(folder: Path) -> Path:
    """What cases start from, read only: a base, rows, a recipe, a finished run, an interrupted one, a study."""
    folder.mkdir()
    code = _forked(lambda: _make_template(folder), folder, folder.parent / "template.txt")
    if code != 0:
        raise SystemExit((folder.parent / "template.txt").read_text())
    return folder


def _make_template(folder: Path) -> None:
    from unittest.mock import patch

    import yaml

    from echo_lora.errors import EchoTrainingError
    from echo_lora.recipe.load import load_recipe
    from echo_lora.recipe.train import run
    from echo_lora.training.sft import EchoSFTTrainer
    from study_records import write_study
    from tiny_recipe import ROWS, tiny_document, tiny_folder, write_rows

    tiny_folder(folder / "base")
    for name, rows in {"train": ROWS, "validation": ROWS[4:8], "test": ROWS[:4]}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "general.txt").write_text("The capital of France is Paris. " * 20)
    document = tiny_document(folder / "base") | {"output": "run"}
    document["data"] |= {"validation": "validation.jsonl"}
    document["evaluation"] = {"tasks": [{"name": "words", "max_new_tokens": 2}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (folder / "study.yaml").write_text(
        yaml.safe_dump(
            {
                "title": "Tiny",
                "recipe": "recipe.yaml",
                "arms": {"lora": {"set": {"echo": False}}, "echo": {}},
                "baseline": "lora",
                "learning_rates": [1e-2, 3e-2],
                "seeds": [1, 2],
                "smallest_effect": 0.05,
                "general": {"file": "general.txt", "tokens": 20},
                "output": "study-out",
            },
            sort_keys=False,
        )
    )
    write_study(folder / "study", seeds=(1, 2), questions=20, tasks=("sums",), rates=(0.001, 0.002))
    run(load_recipe("recipe.yaml"))
    compute_loss = EchoSFTTrainer.compute_loss

    def dying(self, *args, **kwargs):
        if self.state.global_step + 1 == 4:
            raise EchoTrainingError("stopped")
        return compute_loss(self, *args, **kwargs)

    with patch.object(EchoSFTTrainer, "compute_loss", dying):
        try:
            run(load_recipe("recipe.yaml", ["output=stopped", "training.save_every=1"]))
        except EchoTrainingError:
            return
    raise AssertionError("the run that is to be resumed was not interrupted")


# --------------------------------------------------------------------------------------------------------- a case


def run_case(case, template: Path, folder: Path, *, show: bool = False) -> Outcome:
    """Arrange the case in a new folder, run its command there, and look at what it said and left."""
    work, scratch = folder / "work", folder / "tmp"
    work.mkdir(parents=True)
    scratch.mkdir()
    for name in case.needs:
        copy = shutil.copytree if (template / name).is_dir() else shutil.copy2
        copy(template / name, work / name)
    try:
        case.arrange(work)
    except Exception as error:
        return Outcome(case.name, " ".join(case.args), "broken case", None, 0.0, repr(error))
    before, printed = _contents(work), folder / "printed.txt"
    started = time.monotonic()
    call = _subprocess if case.is_real else _forked_command
    status = call(case, work, scratch, printed)
    seconds = time.monotonic() - started
    text = printed.read_text(encoding="utf-8", errors="replace")
    left = _changes(before, _contents(work))
    # what multiprocessing removes at the end of a process, which a fork of this one leaves without ceremony
    left += [f"tmp/{name}" for name in _contents(scratch) if not name.startswith("pymp-")]
    outcome, detail = judge(case, status, text, left)
    if show:
        print(text)
    _writable(folder)
    shutil.rmtree(folder)
    return Outcome(
        case.name, "echo-lora " + " ".join(_short(arg) for arg in case.args), outcome, status, seconds, detail
    )


def judge(case, status: int | None, text: str, left: list[str]) -> tuple[str, str]:
    end = text[-600:].strip()
    if status is None:
        return "too slow", f"no end within {SECONDS} s"
    if "Traceback (most recent call last)" in text or status not in (0, 1, 2):
        return "traceback", f"status {status}: {end}"
    if status == 0:
        if case.is_sound is False:
            return "nonsense accepted", end
        temporary = [
            name for name in left if not any(name == made or name.startswith(f"{made}/") for made in case.makes)
        ]
        if temporary:
            return "partial output", f"accepted, but left {temporary[:5]}"
        return "accepted", ""
    if left:
        return "partial output", f"status {status}, left or changed {left[:5]}; {end[-300:]}"
    if case.is_sound:
        return "sound refused", end
    message = text[text.find("Error: ") :] if "Error: " in text else ""
    if not message or len(message) > LONGEST or (case.says and case.says not in text):
        return (
            "unclear error",
            f"{len(text)} characters{f', without {case.says!r}' if case.says not in text else ''}: {text[:600]!r}",
        )
    return "clear error", ""


def _forked_command(case, work: Path, scratch: Path, printed: Path) -> int | None:
    def command() -> None:
        import resource

        from echo_lora.cli import main

        if case.is_unprivileged and os.geteuid() == 0:
            _keep_no_capability()
        os.environ["TMPDIR"] = str(scratch)
        tempfile.tempdir = None
        for name, value in case.env.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        sys.argv = ["echo-lora", *case.args]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        main()

    return _forked(command, work, printed)


def _keep_no_capability() -> None:
    """Let the superuser of this process be held by the modes of files, as others are."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capset(2), version 3
    if ctypes.CDLL(None).capset(header, none):
        raise OSError("the capabilities can't be dropped")


def _forked(function, folder: Path, printed: Path) -> int | None:
    """Exit status of the function in a process of its own; 70 after an exception, None after the time limit."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(folder)
            function()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    status = status or 70
            os._exit(status)
    return _wait(pid)


def _wait(pid: int) -> int | None:
    ends = time.monotonic() + SECONDS
    pause = 0.002
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.05, 1.5 * pause)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _subprocess(case, work: Path, scratch: Path, printed: Path) -> int | None:
    """As a user's shell does it: a new interpreter, so that what is read at its start counts too."""
    environment = {name: value for name, value in {**os.environ, **case.env}.items() if value is not None}
    environment |= {"TMPDIR": case.env.get("TMPDIR", str(scratch)), "PYTHONPATH": str(TESTS.parent / "src")}
    command = [sys.executable, "-m", "echo_lora.cli", *case.args]
    with printed.open("wb") as file:
        out = case.stdout.open("wb") if case.stdout else file
        child = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=file,
            start_new_session=True,
        )
        try:
            return child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return None


def _contents(folder: Path) -> dict[str, str]:
    """Every name in a folder with what it is: a digest of a file, the target of a link."""
    found = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in sorted(folders + files):
            path = os.path.join(place, name)
            shown = os.fsdecode(os.path.relpath(path, os.fsencode(folder)))
            if os.path.islink(path):
                found[shown] = f"link {os.readlink(path)!r}"
            elif os.path.isdir(path):
                found[shown] = "folder"
            elif not os.path.isfile(path):
                found[shown] = "special"
            elif os.path.getsize(path) > 50_000_000:
                found[shown] = f"{os.path.getsize(path)} bytes"
            else:
                with open(path, "rb") as file:
                    found[shown] = hashlib.sha1(file.read()).hexdigest()
    return found


def _changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _writable(folder: Path) -> None:
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755)


def _short(text: str) -> str:
    shown = ascii(text) if not text.isprintable() or " " in text else text
    return shown if len(shown) <= 120 else f"{shown[:100]}… ({len(shown)} characters)"


if __name__ == "__main__":
    sys.exit(main())
