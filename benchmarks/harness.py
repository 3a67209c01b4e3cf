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
from pruneops.backends import BackendUnavailable

from .machine import Clock

LEAST_TURNS, MOST_TURNS = 3, 100
LEAST_SECONDS = 0.1  # that contenders on a card take turns for, however long it took to prepare them
# One contender may take this share of a case's time, its two first calls and the fewest turns together.
LARGEST_SHARE = 0.25
HOST_SECONDS = 0.2  # after which no block of calls begins
SHORT = 1e-3  # seconds; what a longer call costs the host is of no interest
USED_UP = "the time given is used up"
SETTLED = ("failed", "crashed", "hung", "not there")  # a contender that ended so is not tried again
WEIGHTS = (1, 2, 3)  # of the time: backends alone, with peers, with peers that compile


class ContextLost(Exception):
    """A contender broke the CUDA context: nothing runs in this process any more."""


@dataclass
class Contender:
    """An implementation in a case: a backend or a peer."""

    name: str
    kind: str
    prepare: object
    seconds: float  # a guess at one run, 0 if it always runs
    precision: torch.dtype
    backend: str = "auto"  # in force while it is prepared and runs
    rank: int = 0  # 0 for a backend, 1 for a peer, 2 for a peer that compiles
    graph: bool = False  # a backend replayed from a CUDA graph


def contenders(operator, case, device, backends, peers, ceilings):
    """Backends that can run here and their variants, on CUDA also replayed from a graph; then this device's peers,
    those that compile last."""
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
                options = {"graph": True}
                found.append(
                    Contender(f"{label} graph", "backend", prepare_graph, guess, torch.float32, name, **options)
                )
    for name in peers:
        peer = operator.peers[name]
        if device.type in peer.devices:
            guess, rank = peer.seconds(case, ceilings), 2 if peer.compiles else 1
            found.append(Contender(name, "peer", peer.prepare, guess, case.dtype, rank=rank))
    return sorted(found, key=lambda contender: contender.rank == 2)


def capture(call):
    """Record a call in a CUDA graph; the function returned replays it and hands back its outputs.

    A graph holds addresses, not tensors: the function keeps the call and all that it closes over.
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
    """A function under torch.compile, as for the first time."""
    if pruneops.backends.interpreting():
        raise RuntimeError("torch.compile needs TRITON_INTERPRET off")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def quiet(case=None, contender=None):
    """Stands for a function that is told which contender of which case is next, and nothing when it is done."""


def run_case(operator, case, device, found, ceilings, seconds, rank=2, known=None, prepare_s=None, doing=quiet):
    """Check and time the contenders of one case within about `seconds`.

    Parameters
    ----------
    found : list of Contender
    rank : int
        Contenders of a greater rank wait for a later call.
    known : dict, optional
        Name -> entry of an earlier call: what failed stays so, what was checked is only timed again.
    prepare_s : dict, optional
        Peer -> seconds that it took to prepare in another case; one that compiles and would not fit is left out.
    doing : callable (case, contender)
        Told what comes next, so that a process that dies leaves a name.

    Returns
    -------
    dict
        Case, counted bytes and operations, floor, and one entry per contender: status "ok",
        "WRONG", "failed", "crashed", "hung", "not there" or "skipped" with its reason, times in seconds,
        ratios to the peers, the host's time for a short call of many in a row.

    Raises
    ------
    ContextLost
        A contender left a CUDA context in which nothing runs.
    """
    begin = time.monotonic()
    known, prepare_s = known or {}, prepare_s or {}
    cost, floor = operator.cost(case), ceilings.floor(operator.cost(case), case.dtype)
    longest = LARGEST_SHARE * max(seconds, 0) / (2 + LEAST_TURNS)

    def left():
        return seconds - (time.monotonic() - begin)

    entries = {contender.name: _entry(contender, known) for contender in found}
    waiting = [c for c in found if seconds > 0 and c.rank <= rank and _runs(c, entries[c.name], longest)]
    if waiting:
        arguments, expected, calls = operator.arguments(case, device), None, {}
        helps = any("check" not in entries[c.name] for c in waiting) and "reference" not in known
        if helps and operator.reference_seconds(case, ceilings) <= longest:
            doing(case.name, "reference")
            with pruneops.backend("reference"):
                expected = operator.call(arguments)
        for contender in waiting:
            entry = entries[contender.name]
            if contender.kind == "peer" and not _fits(contender, entry, left(), prepare_s):
                continue
            doing(case.name, contender.name)
            call = _try(operator, case, device, arguments, expected, contender, entry)
            if call:
                calls[contender.name] = contender.backend, call
        _time(case, device, waiting, calls, entries, floor, left(), doing)
        doing()
    _compare(entries)
    return {
        "name": case.name,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": cost.bytes,
        "operations": cost.operations,
        "floor_s": floor,
        "rank": rank,
        "contenders": list(entries.values()),
    }


def _entry(contender, known):
    """What is known of a contender, or that it was not reached."""
    entry = {"name": contender.name, "kind": contender.kind, "status": "skipped", "reason": USED_UP}
    before = known.get(contender.name, entry)
    return entry if before["status"] == "skipped" else entry | before


def _runs(contender, entry, longest):
    """Whether a contender did not end for good and is no longer than it may be."""
    if entry["status"] in SETTLED:
        return False
    if contender.seconds > longest and entry["status"] == "skipped":
        entry["reason"] = f"would take {contender.seconds:.3g} s a run"
    return contender.seconds <= longest


def _fits(peer, entry, left, prepare_s):
    """Whether time is left for a peer, and for one that compiles as much as it took elsewhere."""
    needed = prepare_s.get(peer.name, 0) if peer.rank == 2 else 0
    if entry["status"] == "skipped" and left < needed:
        entry["reason"] = USED_UP if left < 0 else f"takes {needed:.2g} s to prepare"
    return left >= needed


def _time(case, device, waiting, calls, entries, floor, seconds, doing):
    """Times of all in turns, then what a call costs the host, into their entries."""

    def failed(name, error):
        entries[name] |= {"status": "failed", "reason": words_of(error)}
        raise_if_lost(device, error)

    def next_turn(name):
        doing(case.name, name)

    seconds = max(seconds, LEAST_SECONDS if device.type == "cuda" else 0)
    for name, times in take_turns(calls, Clock(device), seconds, next_turn, failed).items():
        entries[name] |= summary(times, floor)
    for contender in waiting:
        if contender.name in calls and entries[contender.name]["status"] != "failed":
            doing(case.name, contender.name)
            _time_host(contender, calls[contender.name], device, entries[contender.name], failed)


def take_turns(calls, clock, seconds, doing=quiet, failed=None):
    """Times [turns] of every (backend, call), one call of each per turn, for about `seconds`, at least 3 turns.

    One that fails has no times and no more turns: `failed(name, error)` is told, without it the error goes up.
    """
    calls, times = dict(calls), {name: [] for name in calls}
    end, turns, longest = time.monotonic() + seconds, 0, 0.0
    while calls and (turns < LEAST_TURNS or (turns < MOST_TURNS and time.monotonic() + longest < end)):
        begin = time.monotonic()
        for name, (backend, call) in list(calls.items()):
            doing(name)
            try:
                with pruneops.backend(backend):
                    times[name].append(clock(call))
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del calls[name], times[name]
        longest, turns = max(longest, time.monotonic() - begin), turns + 1
    return times


def host_seconds(backend, call, device, blocks=15, calls=20):
    """Time that the host takes for one of many calls in a row, while a GPU works or, on a CPU, work included."""
    times, spent = [], 0.0
    with pruneops.backend(backend):
        while len(times) < LEAST_TURNS or (len(times) < blocks and spent < HOST_SECONDS):
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


def _time_host(contender, call, device, entry, failed):
    """Host time of short calls, and of a backend on a card whose call returns early though its work is long."""
    median = entry["median_s"]
    launches = device.type == "cuda" and contender.kind == "backend" and contender.backend != "reference"
    if not (median < SHORT or (launches and not contender.graph)):
        return
    try:
        calls = min(20, max(5, round(0.02 / median)))
        blocks = min(15, max(LEAST_TURNS, round(0.1 / (calls * median))))
        seconds = host_seconds(*call, device, blocks, calls)
    except Exception as error:
        failed(contender.name, error)
        return
    if median < SHORT or seconds < SHORT:
        entry["host_s"] = seconds


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
    """Prepare a contender and check it unless it was; returns what is timed, None if it failed, and fills its entry."""
    begin = time.monotonic()
    try:
        memory = _Memory(device)
        with pruneops.backend(contender.backend):
            call = contender.prepare(case, arguments)
            call()
            result = call()
        if entry["status"] in ("ok", "WRONG"):
            return call
        entry["extra_bytes"] = memory.peak()
        checked = operator.check(case, arguments, result, expected, contender.precision)
    except Exception as error:
        missing = isinstance(error, BackendUnavailable) and "has no such kernel" in str(error)
        entry |= {"status": "not there" if missing else "failed", "reason": words_of(error)}
        raise_if_lost(device, error)
        return None
    finally:
        entry["prepare_s"] = round(time.monotonic() - begin, 2)
        print(f"  {case.name} {contender.name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    entry |= {"status": "ok" if checked.right else "WRONG", "reason": checked.words, "check": checked.numbers}
    return call


def words_of(error):
    """An error in one line."""
    if isinstance(error, BackendUnavailable):
        return str(error).partition("cannot run here: ")[2] or str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def raise_if_lost(device, error):
    """After a device-side assert or an illegal access every call of CUDA fails."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as lost:
            raise ContextLost(words_of(lost)) from error


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
