"""Sweeps configurations of the Triton kernels on this card (`make gpu-tune`, at most 240 s).

First as many processes as there are cores compile what is to be tried. Then, alone on the card, each space of
`benchmarks/spaces.py` is tried in a process of its own: a configuration that does not compile, does not fit, crashes,
hangs or gives a wrong result is left out; the others are timed (device events, cold caches, replayed from a CUDA graph)
and the best of them once more in turns with what is there today. After every configuration what is known is written to
tune-<device>-<date>-<commit>.json, and the table that would be committed to the .md beside it. `--device cpu`
rehearses this in Triton's interpreter, whose times mean nothing. Exit status: 0, or 1 if a space has no time for what
is there today, 2 without a GPU, 130 after an interruption.
"""

import argparse
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import pruneops

from . import ROOT, guard, harness, machine, registry, report, spaces
from .__main__ import CONTEXT_LOST
from .gpu import plain

TOTAL_SECONDS = 240
COMPILING = 0.4  # of all, at most
TODAY = "as it is"
BETTER = 0.98  # of today's time, at most, for a configuration to be proposed
TURNS, SECONDS = 30, 0.15  # a configuration is timed for so many turns or seconds, whichever ends first
FINALISTS, FINAL_SECONDS = 3, 1.0
STATUSES = ("ok", "WRONG", "failed", "crashed", "hung", "not read", "skipped")
REHEARSED = 1  # configurations of a space on a CPU


def label(config):
    return TODAY if config is None else " ".join(f"{key}={value}" for key, value in config.items()).replace(", ", ",")


def tried(space, device):
    """(target, name of the case, configurations) of a space; None where a CPU has nothing to rehearse."""
    if device.type == "cuda":
        return space.target, space.case, [None, *space.candidates]
    return (*space.rehearsal, [None, *space.candidates[:REHEARSED]]) if space.rehearsal else None


def measure(target, config, operator, case, arguments, clock, device):
    """(entry, call) of a configuration, None for today's: checked, then timed; the call is None unless it is right."""
    entry = {"config": config, "label": label(config)}

    def call():
        return operator.call(arguments)

    try:
        spaces.forget()
        with pruneops.backend("triton"), target.use(target.current() | (config or {})) as used:
            checked = operator.check(case, arguments, call(), None, torch.float32)
            if not (checked.right and used):
                return entry | {"status": "WRONG" if used else "not read", "reason": checked.words}, None
            timed = harness.capture(call) if device.type == "cuda" else call
            times, end = [], time.monotonic() + SECONDS
            while len(times) < 3 or (len(times) < TURNS and time.monotonic() < end):
                times.append(clock(timed))
    except Exception as error:
        harness.raise_if_lost(device, error)
        return entry | {"status": "failed", "reason": harness.words_of(error)}, None
    return entry | {"status": "ok", "reason": checked.words, "median_s": statistics.median(times)}, timed


def child(options):
    """Try one space; writes after every configuration, the best of them once more in turns with today's."""
    watch = guard.Watch(options)
    end = time.monotonic() + options.seconds
    space = next(space for space in spaces.SPACES if space.name == options.child)
    device = torch.device(options.device)
    target, name, configs = tried(space, device)
    operator = registry.operator(space.operator)
    case = next(case for case in operator.cases if case.name == name)
    document = {"space": space.name, "case": name, "candidates": [], "final": [], "complete": False}
    if options.out.exists():
        document = json.loads(options.out.read_text())
    done, left_out = {entry["label"] for entry in document["candidates"]}, watch.crashed(space.name)
    arguments, clock, calls = operator.arguments(case, device), machine.Clock(device), {}
    for config in configs:
        entry = {"config": config, "label": label(config), "status": "skipped", "reason": harness.USED_UP}
        if entry["label"] in done:
            continue
        if entry["label"] in left_out:
            entry |= {key: left_out[entry["label"]][key] for key in ("status", "reason")}
        elif time.monotonic() < end or config is None:
            watch.doing(space.name, entry["label"])
            entry, call = measure(target, config, operator, case, arguments, clock, device)
            calls[entry["label"]] = call
        document["candidates"].append(entry)
        calls = best(calls, document["candidates"])
        report.write(options.out, document)
    if "final" not in left_out:
        watch.doing(space.name, "final")
        seconds = FINAL_SECONDS if device.type == "cuda" else 0
        turns = harness.take_turns({words: ("triton", call) for words, call in calls.items()}, clock, seconds)
        document["final"] = [[words, statistics.median(times)] for words, times in turns.items()]
        watch.doing()
    document["complete"] = True
    report.write(options.out, document)


def best(calls, entries):
    """Of the calls, today's and the few fastest others: their graphs hold memory."""
    times = {entry["label"]: entry["median_s"] for entry in entries if entry["status"] == "ok"}
    others = sorted((words for words in calls if words in times and words != TODAY), key=times.get)[:FINALISTS]
    return {words: call for words, call in calls.items() if words in others or (words == TODAY and words in times)}


def compile_slice(options):
    """Call every n-th of all configurations once, so that Triton's cache on disk holds its kernels."""
    first, step = map(int, options.compile_slice.split("/"))
    device, made = torch.device(options.device), {}
    for space, config in [(s, c) for s in spaces.SPACES for c in tried(s, device)[2]][first::step]:
        operator = registry.operator(space.operator)
        if space.case not in made:
            case = next(case for case in operator.cases if case.name == space.case)
            made = {space.case: operator.arguments(case, device)}
        try:
            spaces.forget()
            with pruneops.backend("triton"), space.target.use(space.target.current() | (config or {})):
                operator.call(made[space.case])
        except Exception as error:
            harness.raise_if_lost(device, error)
    torch.cuda.synchronize()


def verdict(known):
    """(status, words, line of the table or None) of a space: which configuration is proposed."""
    entries = {entry["label"]: entry for entry in known["candidates"]}
    counts = {status: sum(e["status"] == status for e in entries.values()) for status in STATUSES}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    today = entries.get(TODAY, {"status": "skipped", "reason": "it was not reached"})
    if today["status"] != "ok":
        return "failed", f"what is there today: {today['status']}, {today['reason']} ({words})", None
    times = dict(known["final"]) or {name: e["median_s"] for name, e in entries.items() if e["status"] == "ok"}
    now = times.get(TODAY, today["median_s"])
    winner = min(times, key=times.get)
    if winner == TODAY or times[winner] > BETTER * now:
        return "passed", f"{report.time(now)} as it is, nothing faster ({words})", None
    return (
        "passed",
        f"{winner}: {report.time(times[winner])}, was {report.time(now)} ({words})",
        entries[winner]["config"],
    )


def table(document, device):
    """Python text of what would be committed."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    lines = [f"# {document['device']}, compute capability {capability}, {document['date'][:10]}"]
    for space in spaces.SPACES:
        known = document["spaces"].get(space.name)
        if known is None:
            continue
        _, words, config = verdict(known)
        lines.append(f"# triton_kernels/{space.target.module}.py, {known['case']}: {words}")
        if config:
            lines.append(space.target.text(space.target.current() | config))
    return "\n".join(lines)


class Sweep:
    """The parent's side: what is known, and where it is written."""

    def __init__(self, options):
        self.options, self.device = options, torch.device(options.device)
        self.end = time.monotonic() + options.seconds
        self.document = machine.facts(self.device) | {"spaces": {}, "table": "", "complete": False}
        words = [self.document["device"], self.document["date"][:10], (self.document["commit"] or "unknown")[:12]]
        self.path = options.results / f"tune-{'-'.join(map(plain, words))}.json"
        self.spaces = [s for s in spaces.SPACES if s.name in options.spaces and tried(s, self.device)]

    def left(self):
        return self.end - time.monotonic()

    def know(self, name, known):
        self.document["spaces"][name] = known
        self.save()

    def save(self):
        if self.device.type == "cuda":
            self.document["table"] = table(self.document, self.device)
        report.write(self.path, self.document)
        report.write_text(self.path.with_suffix(".md"), f"```python\n{self.document['table']}\n```\n")

    def compile(self):
        """Fill Triton's cache by all cores; what takes too long is compiled where it is timed."""
        count = max(1, (os.cpu_count() or 1) - 2)
        command = [sys.executable, "-m", "benchmarks.tune", "--device", self.device.type, "--compile-slice"]
        begin, processes = time.monotonic(), []
        try:
            processes += [guard.Process([*command, f"{first}/{count}"]) for first in range(count)]
            for process in processes:
                process.wait(begin + COMPILING * self.options.seconds - time.monotonic())
        finally:
            for process in processes:
                process.kill()
        print(f"tune: compiled by {count} processes in {time.monotonic() - begin:.0f} s", flush=True)

    def run(self, folder):
        """Space after space; the next one's process gets ready while one runs."""
        command = [sys.executable, "-m", "benchmarks.tune", "--device", self.device.type, "--child"]
        environment = {} if self.device.type == "cuda" else {"TRITON_INTERPRET": "1"}
        guards = []
        for place, space in enumerate(self.spaces):
            own = Path(folder, str(place))
            own.mkdir()
            record = functools.partial(self.know, space.name)
            guards.append(guard.Guarded([*command, space.name], own, record, **environment))
        try:
            for place, (space, guarded) in enumerate(zip(self.spaces, guards)):
                for waiting in guards[place : place + 2]:
                    waiting.ready()
                ended, _, output = guarded.run((self.left() - 1) / (len(guards) - place))
                known = self.document["spaces"].get(space.name)
                words = verdict(known)[1] if known else f"{ended}: {guard.last_words(1, output)}"
                print(f"tune: {space.name}: {words}", flush=True)
        finally:
            for guarded in guards:
                guarded.stop()


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    names = [space.name for space in spaces.SPACES]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument("--spaces", default=",".join(names), help="comma-separated; default: all")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything; default %(default)s")
    for name in ("--child", "--compile-slice"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    guard.add_options(parser)
    options = parser.parse_args(argv)
    options.spaces = options.spaces.split(",")
    unknown = [name for name in options.spaces if name not in names]
    if unknown:
        print(f"benchmarks.tune: no space {unknown[0]!r}; there is: {', '.join(names)}", file=sys.stderr)
        return None
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.tune: PyTorch sees no GPU here; nothing was run", file=sys.stderr)
        return None
    return options


def main(argv=None):
    options = parse(argv)
    if options is None:
        return 2
    if options.child or options.compile_slice:
        try:
            (child if options.child else compile_slice)(options)
        except harness.ContextLost as error:
            print(f"tune: the CUDA context is lost: {error}", file=sys.stderr, flush=True)
            os._exit(CONTEXT_LOST)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    guard.Process.stopped.clear()
    options.results.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(options)
    sweep.save()
    try:
        if sweep.device.type == "cuda":
            sweep.compile()
        with tempfile.TemporaryDirectory() as folder:
            sweep.run(folder)
        sweep.document["complete"] = True
    except KeyboardInterrupt:
        guard.Process.stop_all()
        print("tune: interrupted", file=sys.stderr)
    sweep.save()
    return conclude(sweep)


def conclude(sweep):
    """Print the table and where the record is; the exit status."""
    known = sweep.document["spaces"]
    print(sweep.document["table"])
    if sweep.device.type != "cuda":
        print("tune: rehearsed in Triton's interpreter, whose times mean nothing: no table")
    good = sum(space.name in known and verdict(known[space.name])[0] == "passed" for space in sweep.spaces)
    print(f"tune: {good} of {len(sweep.spaces)} spaces, record: {sweep.path}")
    if not sweep.document["complete"]:
        return 130
    return 0 if good == len(sweep.spaces) else 1


if __name__ == "__main__":
    sys.exit(main())
