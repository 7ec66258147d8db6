"""kill -9 at any moment, then resume: the same adapter bytes as an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echo_lora.checkpoint import last_complete_checkpoint

SCRIPT = Path(__file__).parent / "killed_run.py"


def run(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-u", str(SCRIPT), str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_and_resume(folder: Path, rng: random.Random) -> tuple[bytes, bytes]:
    whole = run(folder / "whole")
    assert whole.wait(timeout=300) == 0

    # With a checkpoint at every step and one kept, the kill falls into writing, sealing or deleting one.
    step, delay = rng.randrange(2, 20), rng.random() * 0.1
    killed = run(folder / "parts")
    for line in killed.stdout:
        if line.strip() == f"step {step}":
            break
    time.sleep(delay)  # not to wait for anything: to hit another moment of the save
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert last_complete_checkpoint(folder / "parts")
    assert run(folder / "parts", "resume").wait(timeout=300) == 0
    return tuple((folder / k / "adapter" / "adapter_model.safetensors").read_bytes() for k in ("whole", "parts"))


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    whole, parts = kill_and_resume(tmp_path, random.Random(time.time_ns()))
    assert whole == parts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_many_moments(tmp_path, seed):
    whole, parts = kill_and_resume(tmp_path, random.Random(seed))
    assert whole == parts
