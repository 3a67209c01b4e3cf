"""Times the backends of an operator against its baselines, in one process.

Within a case every implementation is checked, then all are timed in turns (A B C A B C ...), so that a machine that
slows down slows them all. A wrong result has no ratio.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import torch

import pruneops
from pruneops.backends import BackendUnavailable

from .machine import Clock, dtype_name

MIN_TURNS, MAX_TURNS = 3, 100  # the reference may take a single one
MIN_SECONDS = 0.1  # of turns on CUDA, however long preparing took
MAX_SHARE = 0.25  # of a case's time for one implementation: its first two calls and the fewest turns
HOST_SECONDS = 0.2  # after which no block of calls begins
SHORT = 1e-3  # seconds; the host's time matters for shorter calls only
OUT_OF_TIME = "the time given is used up"
FINAL = ("failed", "crashed", "hung", "unsupported")  # implementations with these statuses are not tried again
WEIGHTS = (1, 2, 3)  # of the time, by phase: backends alone, with baselines, with baselines that compile


class ContextLost(Exception):
    """An implementation broke the CUDA context: nothing runs in this process any more."""


@dataclass
class Implementation:
    """A backend or a baseline in a case."""

    name: str
    kind: str
    prepare: object
    seconds: float  # estimate of one run; 0 if it always runs
    precision: torch.dtype
    backend: str = "auto"  # forced while it is prepared and runs
    phase: int = 0  # 0 for a backend, 1 for a baseline, 2 for a baseline that compiles
    graph: bool = False  # a backend replayed from a CUDA graph


def implementations(operator, case, device, backends, baselines, rates):
    """Given backends and their variants, on CUDA also replayed from a graph; then the baselines of this device, those
    that compile last. The reference is of the phase of the baselines unless it is alone."""
    found = []
    for name in backends:
        fused = name != "reference"
        seconds, phase = (0.0, 0) if fused else (operator.reference_seconds(case, rates), int(len(backends) > 1))
        for label, function in {"": operator.call, **(operator.variants(case) if fused else {})}.items():
            label = f"{name} {label}".strip()
            found.append(Implementation(label, "backend", _call(function), seconds, torch.float32, name, phase))
            if device.type == "cuda" and fused:
                prepare, label = _call(function, capture), f"{label} graph"
                found.append(Implementation(label, "backend", prepare, seconds, torch.float32, name, graph=True))
    for name in baselines:
        baseline = operator.baselines[name]
        if baseline.why_not(device) is None and baseline.applies(case):
            seconds, phase = baseline.seconds(case, rates), 2 if baseline.compiles else 1
            found.append(Implementation(name, "baseline", baseline.prepare, seconds, case.dtype, phase=phase))
    return sorted(found, key=lambda implementation: implementation.phase == 2)


def _call(function, transform=lambda call: call):
    return lambda case, arguments: transform(lambda: function(arguments))


def capture(call):
    """Record a call in a CUDA graph; the function returned replays it and returns its outputs.

    A graph holds addresses, not tensors: the function keeps the call and everything that it closes over.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay():
        graph.replay()
        return outputs

    replay.call = call
    return replay


def compiled(function, **options):
    """A function under torch.compile, with nothing compiled before."""
    if pruneops.backends.interpreting():
        raise RuntimeError("torch.compile needs TRITON_INTERPRET off")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def no_progress(case=None, implementation=None):
    """Default of `progress`."""


def run_case(
    operator, case, device, found, rates, seconds, phase=2, earlier=None, prepare_s=None, progress=no_progress
):
    """Check and time the implementations of one case within about `seconds`.

    Parameters
    ----------
    found : list of Implementation
    phase : int
        Implementations of a later phase wait for a later call.
    earlier : dict, optional
        Name -> entry of an earlier call: what failed stays so, what was checked is only timed again.
    prepare_s : dict, optional
        Baseline -> seconds that it took to prepare in another case; one that compiles is skipped if too few are left.
    progress : callable (case, implementation)
        Called before anything that may end the process.

    Returns
    -------
    dict
        Case, minimum bytes and operations, roofline time, and one entry per implementation: status "ok", "WRONG",
        "failed", "crashed", "hung", "unsupported" or "skipped" with its reason, times in seconds, ratios to the
        baselines, the host's time for a short call of many in a row.

    Raises
    ------
    ContextLost
        An implementation left a CUDA context in which nothing runs.
    """
    begin = time.monotonic()
    earlier, prepare_s = earlier or {}, prepare_s or {}
    cost = operator.cost(case)
    roofline, max_seconds = rates.roofline(cost, case.dtype), MAX_SHARE * max(seconds, 0) / (2 + MIN_TURNS)

    def left():
        return seconds - (time.monotonic() - begin)

    entries = {each.name: _entry(each, earlier) for each in found}
    waiting = [each for each in found if seconds > 0 and each.phase <= phase]
    waiting = [each for each in waiting if _may_run(each, entries[each.name], max_seconds)]
    if waiting:
        arguments, expected, calls = operator.arguments(case, device), None, {}
        unchecked = "reference" not in earlier and any("check" not in entries[each.name] for each in waiting)
        if unchecked and operator.reference_seconds(case, rates) <= max_seconds:
            progress(case.name, "reference")
            with pruneops.backend("reference"):
                expected = operator.call(arguments)
        for each in waiting:
            entry = entries[each.name]
            if each.kind == "baseline" and not _has_time(each, entry, left(), prepare_s):
                continue
            progress(case.name, each.name)
            call = _prepare(operator, case, device, arguments, expected, each, entry)
            if call:
                calls[each.name] = each.backend, call
        prepared = [each for each in waiting if each.name in calls]
        _time(case, device, prepared, calls, entries, roofline, left(), progress)
        progress()
    _add_ratios(entries)
    return {
        "name": case.name,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": dtype_name(case.dtype),
        "bytes": cost.bytes,
        "operations": cost.operations,
        "roofline_s": roofline,
        "phase": phase,
        "implementations": list(entries.values()),
    }


def _entry(implementation, earlier):
    """The entry of an earlier call, or that the implementation was not reached."""
    entry = {"name": implementation.name, "kind": implementation.kind, "status": "skipped", "reason": OUT_OF_TIME}
    before = earlier.get(implementation.name, entry)
    return entry if before["status"] == "skipped" else entry | before


def _may_run(implementation, entry, max_seconds):
    """Whether an implementation has no final status and is estimated to be short enough."""
    if entry["status"] in FINAL:
        return False
    if implementation.seconds > max_seconds and entry["status"] == "skipped":
        entry["reason"] = f"would take {implementation.seconds:.3g} s a run"
    return implementation.seconds <= max_seconds


def _has_time(baseline, entry, left, prepare_s):
    """Whether time is left for a baseline; for one that compiles, as much as it took in another case."""
    needed = prepare_s.get(baseline.name, 0) if baseline.phase == 2 else 0
    if entry["status"] == "skipped" and left < needed:
        entry["reason"] = OUT_OF_TIME if left < 0 else f"takes {needed:.2g} s to prepare"
    return left >= needed


def _prepare(operator, case, device, arguments, expected, implementation, entry):
    """Prepare an implementation and check it unless that is done; fills its entry. Returns what is timed, None if it
    failed."""
    begin = time.monotonic()
    try:
        memory = _PeakMemory(device)
        with pruneops.backend(implementation.backend):
            call = implementation.prepare(case, arguments)
            call()
            result = call()
        if entry["status"] in ("ok", "WRONG"):
            return call
        entry["extra_bytes"] = memory.extra()
        checked = operator.verify(case, arguments, result, expected, implementation.precision)
    except Exception as error:
        unsupported = isinstance(error, BackendUnavailable) and "has no such kernel" in str(error)
        entry |= {"status": "unsupported" if unsupported else "failed", "reason": message(error)}
        raise_if_lost(device, error)
        return None
    finally:
        entry["prepare_s"] = round(time.monotonic() - begin, 2)
        print(f"  {case.name} {implementation.name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    entry |= {"status": "ok" if checked.right else "WRONG", "reason": checked.message, "check": checked.numbers}
    return call


def _time(case, device, prepared, calls, entries, roofline, seconds, progress):
    """Add the times of all in turns to their entries, then the host's time of a call."""

    def failed(name, error):
        entries[name] |= {"status": "failed", "reason": message(error)}
        raise_if_lost(device, error)

    seconds = max(seconds, MIN_SECONDS if device.type == "cuda" else 0)
    times = take_turns(calls, Clock(device), seconds, lambda name: progress(case.name, name), failed)
    for each in prepared:
        if each.name in times:
            entries[each.name] |= summary(times[each.name], roofline)
            progress(case.name, each.name)
            _time_host(each, calls[each.name], device, entries[each.name], failed)


def take_turns(calls, clock, seconds, progress=no_progress, failed=None):
    """Times of every (backend, call), one call of each per turn, for about `seconds`, at least MIN_TURNS.

    One that has used its share of the seconds takes no more turns, so that a slow one leaves time to the others; the
    reference takes one at least. One that fails has no times: `failed(name, error)` is called; without it the error is
    raised.
    """
    calls, times, spent = dict(calls), {name: [] for name in calls}, dict.fromkeys(calls, 0.0)
    end, share = time.monotonic() + seconds, seconds / max(len(calls), 1)

    def goes_on(name):
        turns = len(times[name])
        if turns < (1 if calls[name][0] == "reference" else MIN_TURNS):
            return True
        more = spent[name] * (turns + 1) / turns
        return turns < MAX_TURNS and more <= share and time.monotonic() + spent[name] / turns < end

    while calls:
        for name, (backend, call) in list(calls.items()):
            begin = time.monotonic()
            progress(name)
            try:
                with pruneops.backend(backend):
                    times[name].append(clock(call))
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del calls[name], times[name]
            spent[name] += time.monotonic() - begin
        calls = {name: calls[name] for name in calls if goes_on(name)}
    return times


def host_seconds(backend, call, device, blocks=15, calls=20):
    """Time of the host for one of many calls in a row, while a GPU works; on a CPU the work is included."""
    times, spent = [], 0.0
    with pruneops.backend(backend):
        while len(times) < MIN_TURNS or (len(times) < blocks and spent < HOST_SECONDS):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - begin) / calls)
            spent += times[-1] * calls
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a fault is this call's
    return statistics.median(times)


def _time_host(implementation, call, device, entry, failed):
    """Host time of short calls, and of a backend on CUDA whose call returns early though its work is long."""
    median = entry["median_s"]
    launches = device.type == "cuda" and implementation.kind == "backend" and implementation.backend != "reference"
    if not (median < SHORT or (launches and not implementation.graph)):
        return
    try:
        calls = min(20, max(5, round(0.02 / median)))
        blocks = min(15, max(MIN_TURNS, round(0.1 / (calls * median))))
        seconds = host_seconds(*call, device, blocks, calls)
    except Exception as error:
        failed(implementation.name, error)
        return
    if median < SHORT or seconds < SHORT:
        entry["host_s"] = seconds


def summary(times, roofline):
    """Median and 20-80 % of times in seconds, and roofline time over median."""
    deciles = statistics.quantiles(times * (1 + (len(times) == 1)), n=10, method="inclusive")
    median = statistics.median(times)
    return {
        "median_s": median,
        "p20_s": deciles[1],
        "p80_s": deciles[7],
        "times_s": [float(f"{seconds:.4g}") for seconds in times],
        "of_roofline": roofline / median,
    }


def message(error):
    """An error in one line."""
    if isinstance(error, BackendUnavailable):
        return str(error).partition("cannot run here: ")[2] or str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def raise_if_lost(device, error):
    """Raise ContextLost if CUDA calls fail, as they all do after a device-side assert or an illegal access."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as lost:
            raise ContextLost(message(lost)) from error


class _PeakMemory:
    """Device memory allocated since it was made, at its peak; None on CPU."""

    def __init__(self, device):
        self.device = device if device.type == "cuda" else None
        if self.device:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def extra(self):
        return torch.cuda.max_memory_allocated(self.device) - self.before if self.device else None


def _add_ratios(entries):
    """Ratio of every right implementation to every right baseline: above 1 it is faster than the baseline."""
    right = {name: entry for name, entry in entries.items() if entry["status"] == "ok" and "median_s" in entry}
    for name, entry in right.items():
        entry["ratios"] = {
            baseline: other["median_s"] / entry["median_s"]
            for baseline, other in right.items()
            if other["kind"] == "baseline" and baseline != name
        }
