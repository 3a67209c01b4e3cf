"""What a run was measured on, and the rates that floors are made of."""

import ctypes
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pruneops import backends

from . import ROOT


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in the same run: bytes/s of a large read and of a large copy, which counts what it reads and what
    it writes; operations/s of a large matmul per dtype."""

    read: float
    copy: float
    matmul: dict[torch.dtype, float]

    def floor(self, cost, dtype):
        """Seconds below which no implementation of this cost can go: written bytes and as many read ones pass at the
        rate of a copy, the rest at that of a read."""
        memory = (cost.read - cost.written) / self.read + 2 * cost.written / self.copy
        return max(memory, cost.operations / self.matmul[dtype])

    def facts(self):
        matmul = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.matmul.items()}
        return {"read_bytes_per_s": self.read, "copy_bytes_per_s": self.copy, "matmul_operations_per_s": matmul}


class Clock:
    """Seconds that one call takes: device events after a flush of the L2 cache on CUDA, else perf_counter.

    On a CPU a flush would take the interpreter out of the caches too, and cost more than most calls.
    """

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call):
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


_memory = {"freed": "as usual"}


def keep_freed_memory():
    """Have glibc keep what is freed, for the rest of the process.

    Large results are else given back and faulted in anew now and then, and one contender pays what another freed. Page
    faults of a heap that grows remain.
    """
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        _memory["freed"] = "kept" if glibc.mallopt(trim_threshold, -1) and glibc.mallopt(mmap_max, 0) else "as usual"


def ceilings(device, dtypes):
    """Measure the rates; products are square, of random values.

    A CPU reads a line before it writes it, so a copy moves more than it counts and a pass that only reads is faster.
    """
    clock, cuda = Clock(device), device.type == "cuda"

    def seconds(call):
        call()
        return min(clock(call) for _ in range(10))  # a ceiling is the best that is seen

    source = torch.randn((1 << 28) if cuda else (32 << 20), device=device)
    copy = 2 * source.nbytes / seconds(functools.partial(torch.empty_like(source).copy_, source))
    read = max(copy, source.nbytes / seconds(source.sum))
    del source
    n, matmul = 8192 if cuda else 1536, {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        matmul[dtype] = 2 * n**3 / seconds(functools.partial(torch.matmul, a, b))
    return Ceilings(read, copy, matmul)


class Company:
    """How much of the processors other processes took since it was made; with it, CPU timings mean little."""

    def __init__(self):
        self.begin = self._seconds()

    def share(self):
        """Between 0 and 1; None where the system does not tell."""
        if self.begin is None:
            return None
        wall, busy, own = (now - then for now, then in zip(self._seconds(), self.begin))
        return round(max(0.0, busy - own) / max(wall * os.cpu_count(), 1e-9), 3)

    def _seconds(self):
        """Wall time, busy time of all processors, time of this process and its children."""
        try:
            fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, *interrupts_and_steal = map(int, fields)
        busy = (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def facts(device):
    """Machine, versions, commit, date and command, for the JSON."""
    return {
        "device": device_name(device),
        "machine": {
            "cpu": _cpu_model(),
            "threads": torch.get_num_threads(),
            "cache_bytes": _largest_cache(),
            "platform": platform.platform(),
            "freed_memory": _memory["freed"],
        }
        | (_gpu(device) if device.type == "cuda" else {}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "pruneops": _version("pruneops") or "from a source tree",
        },
        "build": backends.build_record(),
        **revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
    }


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def revision():
    """Commit and whether the tree differs from it; PRUNEOPS_COMMIT speaks where there is no git."""
    told = os.environ.get("PRUNEOPS_COMMIT")
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": told.removesuffix("-dirty") if told else None, "dirty": told and told.endswith("-dirty")}
    return {"commit": commit, "dirty": bool(changes.strip())}


def _command():
    module = sys.modules["__main__"].__spec__  # None for a script
    program = ["-m", module.name.removesuffix(".__main__")] if module else [sys.argv[0]]
    return " ".join(["python", *program, *sys.argv[1:]])


def _git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _largest_cache():
    """Bytes of the processor's last cache; None where the system does not tell."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().removesuffix("K")) << 10 for file in files), default=None)


def _gpu(device):
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
