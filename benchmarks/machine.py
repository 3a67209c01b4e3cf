"""What a run was measured on, and the peak rates of its roofline."""

import ctypes
import datetime
import functools
import importlib.metadata
import json
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
class PeakRates:
    """Rates measured in the same run: bytes/s of a large read and of a large copy (read and written bytes both count),
    operations/s of a large matmul per dtype."""

    read: float
    copy: float
    matmul: dict[torch.dtype, float]

    def roofline(self, cost, dtype):
        """Minimum seconds of this cost: written bytes and as many read ones at the rate of a copy, other read bytes at
        that of a read; or the operations, if they take longer."""
        memory = (cost.read - cost.written) / self.read + 2 * cost.written / self.copy
        return max(memory, cost.operations / self.matmul[dtype])

    def facts(self):
        matmul = {dtype_name(dtype): rate for dtype, rate in self.matmul.items()}
        return {"read_bytes_per_s": self.read, "copy_bytes_per_s": self.copy, "matmul_operations_per_s": matmul}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


class Clock:
    """Seconds of one call: device events after a flush of the L2 cache on CUDA, else perf_counter.

    On a CPU a flush would evict the interpreter too, and cost more than most calls.
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
    """Have glibc keep freed memory for the rest of the process.

    Otherwise large results are returned to the system and faulted in again now and then, and one implementation pays
    for what another freed. Page faults of a growing heap remain.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        _memory["freed"] = "kept" if glibc.mallopt(trim_threshold, -1) and glibc.mallopt(mmap_max, 0) else "as usual"


def peak_rates(device, dtypes):
    """Measure the rates; products are square, of random values.

    A CPU reads a cache line before it writes it, so a copy moves more bytes than it counts.
    """
    clock, cuda = Clock(device), device.type == "cuda"

    def seconds(call):
        call()
        return min(clock(call) for _ in range(10))

    source = torch.randn((1 << 28) if cuda else (32 << 20), device=device)
    copy = 2 * source.nbytes / seconds(functools.partial(torch.empty_like(source).copy_, source))
    read = max(copy, source.nbytes / seconds(source.sum))
    del source
    n, matmul = 8192 if cuda else 1536, {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        matmul[dtype] = 2 * n**3 / seconds(functools.partial(torch.matmul, a, b))
    return PeakRates(read, copy, matmul)


def shared_peak_rates(path, device, dtypes):
    """`peak_rates`, measured once for all processes of a run that share the file; without a path anew."""
    facts = json.loads(path.read_text()) if path and path.exists() else {"matmul_operations_per_s": {}}
    known = facts["matmul_operations_per_s"]
    missing = [dtype for dtype in dtypes if dtype_name(dtype) not in known]
    if missing or "read_bytes_per_s" not in facts:
        facts = peak_rates(device, missing).facts()
        facts["matmul_operations_per_s"] = known = known | facts["matmul_operations_per_s"]
        if path:
            path.write_text(json.dumps(facts))
    matmul = {dtype: known[dtype_name(dtype)] for dtype in dtypes}
    return PeakRates(facts["read_bytes_per_s"], facts["copy_bytes_per_s"], matmul)


class BackgroundLoad:
    """Share of the processors that other processes took since it was made; CPU timings under load mean little."""

    def __init__(self):
        self.begin = self._seconds()

    def share(self):
        """Between 0 and 1; None where the system does not report it."""
        if self.begin is None:
            return None
        wall, busy, used = (now - then for now, then in zip(self._seconds(), self.begin))
        return round(max(0.0, busy - used) / max(wall * os.cpu_count(), 1e-9), 3)

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
    """Commit and whether the tree differs from it; from PRUNEOPS_COMMIT where there is no git."""
    given = os.environ.get("PRUNEOPS_COMMIT")
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": given.removesuffix("-dirty") if given else None, "dirty": given and given.endswith("-dirty")}
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
    """Bytes of the processor's largest cache; None where the system does not report it."""
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
