"""Two processes give what one does: the adapter and the metrics, with steps that are routed and steps that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "distributed_run.py"


def train(folder: Path, processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(SCRIPT), str(folder), str(4 // processes)]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), json.loads((folder / "logs.json").read_text())


@pytest.mark.slow
def test_two_processes_give_what_one_does(tmp_path):
    one, logs_of_one = train(tmp_path / "one", 1)
    two, logs_of_two = train(tmp_path / "two", 2)
    assert {log["routed"] for log in logs_of_one} == {0.0, 1.0}
    for a, b in zip(logs_of_one, logs_of_two, strict=True):
        for name in ("loss", "ce_off", "ce_on", "distillation", "routed", "echo_norm", "mean_token_accuracy"):
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), (a["step"], name)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (tmp_path / "two" / "checkpoint-6" / "echo_checkpoint.json").is_file()
