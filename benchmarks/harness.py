"""Times the backends of an operator against its peers, all in one run, turn by turn.

Within a case every contender is checked, then all are timed in turns (A B C A B C ...), so that
a machine that slows down slows them all. A result that is wrong has no ratio.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import torch

import pruneops

from .machine import Clock

LEAST_TURNS, MOST_TURNS = 3, 100
# One contender may take this share of a case's time, its two first calls and the fewest turns together.
LARGEST_SHARE = 0.25
SHORT = 1e-3  # seconds; what a longer call costs the host is of no interest


@dataclass
class Contender:
    """An implementation in a case: a backend or a peer."""

    name: str
    kind: str
    prepare: object
    seconds: float  # a guess at one run, 0 if it always runs
    precision: torch.dtype
    backend: str = "auto"  # in force while it is prepared and runs


def contenders(operator, case, device, backends, peers, ceilings):
    """Backends that can run here and their variants, on CUDA also replayed from a graph; then this device's peers."""
    found = []
    for name in backends:
        guess = operator.reference_seconds(case, ceilings) if name == "reference" else 0.0
        variants = {} if name == "reference" else operator.variants(case)
        for words, face in {"": operator.call, **variants}.items():

            def prepare(_, arguments, face=face):
                return lambda: face(arguments)

            def prepare_graph(_, arguments, face=face):
                return capture(lambda: face(arguments))

            label = f"{name} {words}".strip()
            found.append(Contender(label, "backend", prepare, guess, torch.float32, name))
            if device.type == "cuda" and name != "reference":
                found.append(Contender(f"{label} graph", "backend", prepare_graph, guess, torch.float32, name))
    for name in peers:
        peer = operator.peers[name]
        if device.type in peer.devices:
            found.append(Contender(name, "peer", peer.prepare, peer.seconds(case, ceilings), case.dtype))
    return found


def capture(call):
    """Record a call in a CUDA graph; the function returned replays it and hands back its outputs."""
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

    return replay


def compiled(function, **options):
    """A function under torch.compile, as for the first time."""
    if pruneops.backends.interpreting():
        raise RuntimeError("torch.compile needs TRITON_INTERPRET off")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def run_case(operator, case, device, found, ceilings, seconds):
    """Check and time the contenders of one case within about `seconds`.

    Returns
    -------
    dict
        Case, counted bytes and operations, floor, and one entry per contender: status "ok",
        "WRONG", "failed" or "skipped" with its reason, times in seconds, ratios to the peers,
        the host's time for a short call of many in a row.
    """
    begin = time.monotonic()
    cost, floor = operator.cost(case), ceilings.floor(operator.cost(case), case.dtype)
    entries = {c.name: {"name": c.name, "kind": c.kind, "status": "skipped", "reason": None} for c in found}
    longest = LARGEST_SHARE * max(seconds, 0) / (2 + LEAST_TURNS)
    for contender in found:
        if seconds <= 0:
            entries[contender.name]["reason"] = "the time given is used up"
        elif contender.seconds > longest:
            entries[contender.name]["reason"] = f"would take {contender.seconds:.3g} s a run"
    waiting = [c for c in found if entries[c.name]["reason"] is None]
    if waiting:
        arguments = operator.arguments(case, device)
        expected = None
        if operator.reference_seconds(case, ceilings) <= longest:
            with pruneops.backend("reference"):
                expected = operator.call(arguments)
        calls = {}
        for contender in waiting:
            entry = entries[contender.name]
            if contender.kind == "peer" and time.monotonic() - begin > seconds:  # peers before it compiled too long
                entry["reason"] = "the time given is used up"
                continue
            call = _try(operator, case, device, arguments, expected, contender, entry)
            if call:
                calls[contender.name] = contender.backend, call
        for name, times in take_turns(calls, Clock(device), seconds - (time.monotonic() - begin)).items():
            entries[name] |= summary(times, floor)
            if entries[name]["median_s"] < SHORT:
                entries[name]["host_s"] = host_seconds(*calls[name], device)
    _compare(entries)
    return {
        "name": case.name,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": cost.bytes,
        "operations": cost.operations,
        "floor_s": floor,
        "contenders": list(entries.values()),
    }


def take_turns(calls, clock, seconds):
    """Times [turns] of every (backend, call), one call of each per turn, for about `seconds`, at least 3 turns."""
    times = {name: [] for name in calls}
    end, turns, longest = time.monotonic() + seconds, 0, 0.0
    while calls and (turns < LEAST_TURNS or (turns < MOST_TURNS and time.monotonic() + longest < end)):
        begin = time.monotonic()
        for name, (backend, call) in calls.items():
            with pruneops.backend(backend):
                times[name].append(clock(call))
        longest, turns = max(longest, time.monotonic() - begin), turns + 1
    return times


def host_seconds(backend, call, device, blocks=15, calls=20):
    """Time that the host takes for one of many calls in a row, while a GPU works or, on a CPU, work included."""
    times = []
    with pruneops.backend(backend):
        for _ in range(blocks):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def summary(times, floor):
    """Median and 20-80 % of times in seconds, and how much of the time the floor is."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    return {
        "median_s": median,
        "p20_s": deciles[1],
        "p80_s": deciles[7],
        "times_s": [float(f"{seconds:.4g}") for seconds in times],
        "of_floor": floor / median,
    }


def _try(operator, case, device, arguments, expected, contender, entry):
    """Prepare and check a contender; returns what is timed, None if it failed, and fills its entry."""
    begin = time.monotonic()
    try:
        memory = _Memory(device)
        with pruneops.backend(contender.backend):
            call = contender.prepare(case, arguments)
            call()
            result = call()
        entry["extra_bytes"] = memory.peak()
        checked = operator.check(case, arguments, result, expected, contender.precision)
    except Exception as error:
        entry |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        return None
    finally:
        print(f"  {case.name} {contender.name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    entry |= {"status": "ok" if checked.right else "WRONG", "reason": checked.words, "check": checked.numbers}
    return call


class _Memory:
    """Device memory taken beyond what was there, at its peak; None on CPU."""

    def __init__(self, device):
        self.device = device if device.type == "cuda" else None
        if self.device:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def peak(self):
        return torch.cuda.max_memory_allocated(self.device) - self.before if self.device else None


def _compare(entries):
    """Ratio of every right contender to every right peer: above 1 it is faster than the peer."""
    right = {name: entry for name, entry in entries.items() if entry["status"] == "ok" and "median_s" in entry}
    for name, entry in right.items():
        entry["ratios"] = {
            peer: other["median_s"] / entry["median_s"]
            for peer, other in right.items()
            if other["kind"] == "peer" and peer != name
        }
