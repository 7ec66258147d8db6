"""kill -9 at any moment, then resume: the same bytes as an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import pytest

import killed_run
from echo_lora.adapter.files import ADAPTER_FILE
from killed_run import STEPS
from test_files import names
from tiny_recipe import tiny_recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no fork")

# a process that has imported everything, and forks one for each run
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["killed_run"])


def begin(recipe: Path, output: Path):
    """A process that trains, and what it prints."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=killed_run.train, args=(recipe, output, sender))
    process.start()
    sender.close()
    return process, receiver


def complete(recipe: Path, output: Path) -> bytes:
    """Train to the end; the bytes of the adapter."""
    process, receiver = begin(recipe, output)
    printed = open(receiver.fileno(), closefd=False).read()  # noqa: SIM115
    process.join(60)
    assert process.exitcode == 0, printed
    receiver.close()
    return (output / "adapter" / ADAPTER_FILE).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, bytes]:
    """A recipe with dropout and a checkpoint at every step, and the adapter of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("kill")
    training = {"steps": STEPS, "batch_size": 3, "learning_rate": 1e-2}
    training |= {"log_every": 1, "save_every": 1, "keep_checkpoints": 1}
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    recipe = tiny_recipe(folder, training=training, lora=lora)
    return recipe, complete(recipe, folder / "whole")


def kill_and_resume(recipe: Path, output: Path, rng: random.Random) -> bytes:
    """With a checkpoint at every step and one kept, the kill falls into writing, sealing or deleting one.

    It may also fall into loading (before the first step), or saving the adapter (after the last).
    """
    step, delay = rng.randrange(STEPS + 1), 0.15 * rng.random()
    process, receiver = begin(recipe, output)
    for line in open(receiver.fileno(), closefd=False):  # noqa: SIM115
        if line.startswith(f"step {step}/" if step else "Loading"):
            break
    time.sleep(delay)  # not to wait for anything: to hit another moment
    process.kill()
    process.join(60)
    receiver.close()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    adapter = complete(recipe, output)
    assert names(output) == names(recipe.parent / "whole")  # nothing is left
    assert not list(output.parent.glob(f".{output.name}*"))
    return adapter


def test_killed_and_resumed_gives_the_same_bytes(whole, tmp_path):
    recipe, expected = whole
    assert kill_and_resume(recipe, tmp_path / "run", random.Random(time.time_ns())) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_many_moments(whole, tmp_path, seed):
    recipe, expected = whole
    assert kill_and_resume(recipe, tmp_path / "run", random.Random(seed)) == expected
