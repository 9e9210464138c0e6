"""What a benchmark ran on: versions, the device, and its ceilings (matrix product, copy) measured in the same run."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .timing import FLUSH_BYTES, measure

PACKAGES = (
    "bivec",
    "torch",
    "triton",
    "transformers",
    "sentence-transformers",
    "openvino",
    "nncf",
    "llama-cpp-python",
    "peft",
    "flash-attn",
    "liger-kernel",
)
# the flags that decide which matrix instructions there are
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "bf16",
    "sve",
)


def describe_machine(device: str | torch.device = "cpu", dtypes: Sequence[str] = ("float32", "bfloat16")) -> dict:
    """The facts that stand beside every number; takes a second or two for the two ceilings."""
    device = torch.device(device)
    model, flags = _cpu()
    facts = {
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # a copy without .git cannot know it: whoever copies may say it in the environment
        "commit": _commit() or os.environ.get("BIVEC_COMMIT"),
        "source": source_digest(),
        "python": platform.python_version(),
        # torch's own name of its version tells the build, +cpu or +cu130, which the package's need not
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "platform": platform.platform(),
        "cpu": model,
        "cpu_flags": flags,
        # what holds oneDNN to fewer, torch's and OpenVINO's alike
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "matmul_tflops": {name: matmul_rate(getattr(torch, name), device) / 1e12 for name in dtypes},
        "copy_gb_per_s": copy_rate(device) / 1e9,
    }
    if device.type == "cuda":
        facts["device_name"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["gpu_state"] = gpu_state()
    return facts


def matmul_rate(dtype: torch.dtype, device: str | torch.device = "cpu", size: int | None = None) -> float:
    """Best measured FLOP/s of a square matrix product on random numbers (zeros run faster)."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b), device)


def copy_rate(device: str | torch.device = "cpu") -> float:
    """Best measured bytes/s of a large copy, bytes read plus bytes written."""
    source = torch.randn(FLUSH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * FLUSH_BYTES / _best_seconds(lambda: target.copy_(source), device)


def other_cpu_seconds() -> float:
    """Core-seconds that other processes have run since boot, NaN where unknown: its growth disturbed a measurement.

    A neighbour on one core can cost a product on all cores far more than that core: its threads wait for each other.
    """
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


class BusyElsewhere:
    """How many cores other processes keep busy from the moment this is made: what disturbs a measurement."""

    def __init__(self) -> None:
        self._clock, self._others = time.perf_counter(), other_cpu_seconds()

    def cores(self) -> float:
        return (other_cpu_seconds() - self._others) / (time.perf_counter() - self._clock)


def warn_if_disturbed(cores: float) -> None:
    """Say on stderr that a measurement during which others kept `cores` cores busy should be repeated."""
    if cores > 0.05:
        print(f"other processes kept up to {cores:.2f} cores busy meanwhile: measure again", file=sys.stderr)


def gpu_state() -> str | None:
    """Driver, clocks, temperature and power as nvidia-smi gives them: a throttled card shows."""
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv")


def _best_seconds(variant: Callable[[], object], device: str | torch.device) -> float:
    rounds = 20 if torch.device(device).type == "cuda" else 7
    timing = measure({"ceiling": variant}, rounds=rounds, device=device)["ceiling"]
    return min(timing.seconds, default=math.nan)


def _cpu() -> tuple[str, list[str]]:
    model, flags = platform.processor(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    return model, [flag for flag in CPU_FLAGS if flag in flags]


@functools.cache
def source_digest() -> str:
    """What the package's code and tables hold, in 16 digits: the same whether committed or copied."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    layers = ("kernels", "texts", "engine", "training", "benchmarks")
    files = (path for layer in layers for kind in ("*.py", "*.json") for path in (package / layer).rglob(kind))
    for path in sorted(path for path in files if "results" not in path.parts):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    here = Path(__file__).resolve()
    # an installed copy may lie in someone else's repository
    if _output("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _output("git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
