"""Sweeps configurations of the kernels on this GPU (`make gpu-tune`, at most 240 s).

First as many processes as there are cores compile Triton's candidates. Then, alone on the GPU, each space of
`benchmarks/native_spaces.py` (launch parameters of CUDA C++) and `benchmarks/spaces.py` (Triton) is tried in a process
of its own: a configuration that does not compile, does not fit, crashes, hangs or gives a wrong result is left out; the
others are timed (device events, cold caches, replayed from a CUDA graph) and the best of them once more in turns with
the current one. After every configuration what is known is written to tune-<device>-<date>-<commit>.json, and the lines
that would be committed to the .md beside it. `--device cpu` rehearses this in Triton's interpreter, whose times mean
nothing. Exit status: 0, or 1 if a space has no time for the current configuration, 2 without a GPU, 130 after an
interruption.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import pruneops

from . import guard, harness, machine, native_spaces, record, registry, report, spaces
from .__main__ import CONTEXT_LOST, warm_up

SPACES = {space.name: space for space in (*native_spaces.SPACES, *spaces.SPACES)}  # the most important first
TOTAL_SECONDS = 240
COMPILING = 0.4  # of all, at most
CURRENT = "current"
BETTER = 0.98  # of the current configuration's time, at most, for a configuration to be proposed
TURNS, SECONDS = 30, 0.1  # a configuration is timed for so many turns or seconds, whichever ends first
FINALISTS, FINAL_SECONDS = 3, 0.6
STATUSES = ("ok", "WRONG", "failed", "crashed", "hung", "not read", "skipped")


def label(config):
    return CURRENT if config is None else " ".join(f"{key}={value}" for key, value in config.items()).replace(", ", ",")


def candidates(space, device):
    """(target, name of the case, configurations, None for the current one); None if a CPU cannot rehearse the space."""
    if device.type == "cuda":
        now = space.target.current()
        return space.target, space.case, [None, *(config for config in space.candidates if now | config != now)]
    return (*space.rehearsal, [None, space.candidates[0]]) if space.rehearsal else None


def problem(space, device):
    """None if a space can be tried, "" if nobody expects it here, else what is wrong with it."""
    try:
        return "" if candidates(space, device) is None else None
    except Exception as error:
        print(f"tune: {space.name}: {harness.message(error)}", flush=True)
        return harness.message(error)


def weight(space):
    """Share of the time."""
    return len(space.candidates) + 4


def backend_of(target):
    return getattr(target, "backend", "triton")


def override(target, config):
    return target.use(target.current() | (config or {}))


def measure(target, config, operator, case, arguments, clock, device):
    """(entry, call) of a configuration: checked, then timed; the call is None unless it is right."""
    entry = {"config": config, "label": label(config)}

    def call():
        return operator.call(arguments)

    try:
        spaces.clear_caches()
        with pruneops.backend(backend_of(target)), override(target, config) as used:
            checked = operator.check(case, arguments, call(), None, torch.float32)
            if not (checked.right and used):
                return entry | {"status": "WRONG" if used else "not read", "reason": checked.message}, None
            timed = harness.capture(call) if device.type == "cuda" else call
            times, end = [], time.monotonic() + SECONDS
            while len(times) < 3 or (len(times) < TURNS and time.monotonic() < end):
                times.append(clock(timed))
    except Exception as error:
        harness.raise_if_lost(device, error)
        return entry | {"status": "failed", "reason": harness.message(error)}, None
    return entry | {"status": "ok", "reason": checked.message, "median_s": statistics.median(times)}, timed


def sweep(options, worker):
    """Try one space; writes after every configuration, then times the best in turns with the current one."""
    end, device, space = time.monotonic() + options.seconds, torch.device(options.device), SPACES[options.sweep]
    target, name, configs = candidates(space, device)
    operator = registry.operator(space.operator)
    (case,) = operator.select(name, device)
    document = {"space": space.name, "case": name, "candidates": [], "final": [], "complete": False}
    if options.out.exists():
        document = json.loads(options.out.read_text())
    done, crashed = {entry["label"] for entry in document["candidates"]}, worker.crashed(space.name)
    arguments, clock, calls = operator.arguments(case, device), machine.Clock(device), {}
    for config in configs:
        entry = {"config": config, "label": label(config), "status": "skipped", "reason": harness.OUT_OF_TIME}
        if entry["label"] in done:
            continue
        if entry["label"] in crashed:
            entry |= {key: crashed[entry["label"]][key] for key in ("status", "reason")}
        elif time.monotonic() < end or config is None:
            worker.progress(space.name, entry["label"])
            entry, calls[entry["label"]] = measure(target, config, operator, case, arguments, clock, device)
        document["candidates"].append(entry)
        calls = best(calls, document["candidates"])
        report.write(options.out, document)
    if "final" not in crashed:
        worker.progress(space.name, "final")
        seconds = FINAL_SECONDS if device.type == "cuda" else 0
        turns = harness.take_turns({name: (backend_of(target), call) for name, call in calls.items()}, clock, seconds)
        document["final"] = [[name, statistics.median(times)] for name, times in turns.items()]
        worker.progress()
    document["complete"] = True
    report.write(options.out, document)


def best(calls, entries):
    """Of the calls, the current configuration's and the few fastest others: their graphs hold memory."""
    times = {entry["label"]: entry["median_s"] for entry in entries if entry["status"] == "ok"}
    others = sorted((name for name in calls if name in times and name != CURRENT), key=times.get)[:FINALISTS]
    return {name: call for name, call in calls.items() if name in others or (name == CURRENT and name in times)}


def compile_slice(options):
    """Call every n-th of all configurations once, so that Triton's cache on disk holds its kernels."""
    first, step = map(int, options.compile_slice.split("/"))
    device, made = torch.device(options.device), {}
    chosen = [space for space in spaces.SPACES if space.name in options.spaces]
    for space, config in [(s, c) for s in chosen for c in candidates(s, device)[2]][first::step]:
        operator = registry.operator(space.operator)
        if space.case not in made:
            (case,) = operator.select(space.case, device)
            made = {space.case: operator.arguments(case, device)}
        try:
            spaces.clear_caches()
            with pruneops.backend("triton"), override(space.target, config):
                operator.call(made[space.case])
        except Exception as error:
            harness.raise_if_lost(device, error)
    torch.cuda.synchronize()


def verdict(record):
    """(status, message, proposed configuration or None) of a space."""
    entries = {entry["label"]: entry for entry in record["candidates"]}
    statuses = [entry["status"] for entry in entries.values()]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses)
    current = entries.get(CURRENT, {"status": "skipped", "reason": "it was not reached"})
    if current["status"] != "ok":
        return "failed", f"current configuration: {current['status']}, {current['reason']} ({counts})", None
    times = dict(record["final"]) or {name: e["median_s"] for name, e in entries.items() if e["status"] == "ok"}
    now, winner = times.get(CURRENT, current["median_s"]), min(times, key=times.get)
    if winner == CURRENT or times[winner] > BETTER * now:
        return "passed", f"{report.time(now)} {CURRENT}, nothing faster ({counts})", None
    message = f"{winner}: {report.time(times[winner])}, was {report.time(now)} ({counts})"
    return "passed", message, entries[winner]["config"]


def table(document, device):
    """Python text of what would be committed."""
    lines = [f"# {document['device']}, compute capability {torch.cuda.get_device_capability(device)}"]
    lines[0] += f", {document['date'][:10]}"
    for space in SPACES.values():
        result, target = document["spaces"].get(space.name), space.target
        if result:
            _, message, config = verdict(result)
            place = target.place if backend_of(target) == "cuda" else f"triton_kernels/{target.module}.py"
            lines.append(f"# {place}, {result['case']}: {message}")
            lines += [space.target.text(space.target.current() | config)] if config else []
    return "\n".join(lines)


class Run(record.Run):
    """One run of `make gpu-tune`."""

    prefix = "tune-"

    def __init__(self, options):
        super().__init__(options, spaces={}, table="")
        chosen = [space for space in SPACES.values() if space.name in options.spaces]
        chosen = [space for space in chosen if options.only in (None, backend_of(space.target))]
        problems = [problem(space, self.device) for space in chosen]
        self.spaces = [space for space, wrong in zip(chosen, problems) if wrong is None]
        self.expected = len(self.spaces) + sum(map(bool, problems))
        self.command = [sys.executable, "-m", "benchmarks.tune", "--device", self.device.type]

    def markdown(self):
        return f"```python\n{self.document['table']}\n```\n"

    def save(self):
        if self.device.type == "cuda":
            self.document["table"] = table(self.document, self.device)
        super().save()

    def compile(self):
        """Fill Triton's cache on all cores; what takes too long is compiled where it is timed."""
        count = max(1, (os.cpu_count() or 1) - 2)
        named = ["--spaces", ",".join(space.name for space in self.spaces)]
        commands = [[*self.command, *named, "--compile-slice", f"{first}/{count}"] for first in range(count)]
        begin = time.monotonic()
        guard.run_together(commands, COMPILING * self.options.seconds)
        print(f"tune: compiled by {count} processes in {time.monotonic() - begin:.0f} s", flush=True)

    def sweep(self):
        """Space after space."""
        if self.device.type == "cuda" and any(backend_of(space.target) == "triton" for space in self.spaces):
            self.compile()
        environment = {} if self.device.type == "cuda" else {"TRITON_INTERPRET": "1"}
        with tempfile.TemporaryDirectory() as folder:
            supervisors = [
                guard.Supervisor(
                    [*self.command, "--sweep", space.name],
                    Path(folder, str(place)),
                    functools.partial(self.know, "spaces", space.name),
                    **environment,
                )
                for place, space in enumerate(self.spaces)
            ]
            work, weights = functools.partial(self.supervise, supervisors), [weight(space) for space in self.spaces]
            with guard.stopped_at_the_end(supervisors):
                guard.run_in_sequence(supervisors, weights, self.left, work)

    def supervise(self, supervisors, place, limit):
        """One space in its process."""
        name = self.spaces[place].name
        ended, _, output = supervisors[place].run(limit)
        supervisors[place].stop()
        space = self.document["spaces"].get(name)
        message = verdict(space)[1] if space else f"{ended}: {guard.exit_message(1, output)}"
        print(f"tune: {name}: {message}", flush=True)

    def conclude(self):
        """Print the table and where the record is; returns the exit status."""
        results = self.document["spaces"]
        print(self.document["table"])
        if self.device.type != "cuda":
            print("tune: rehearsed in Triton's interpreter, whose times mean nothing: no table")
        good = sum(space.name in results and verdict(results[space.name])[0] == "passed" for space in self.spaces)
        print(f"tune: {good} of {self.expected} spaces, record: {self.path}")
        if not self.document["complete"]:
            return 130
        return 0 if good == self.expected else 1


def main(argv=None):
    parser = record.parser("tune", __doc__, TOTAL_SECONDS)
    for name in ("--sweep", "--compile-slice"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("cuda", "triton"), help="spaces of one backend; default: both")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    guard.add_options(parser)
    options = record.parse(parser, argv, spaces=list(SPACES))
    if options.sweep or options.compile_slice:
        try:
            if options.compile_slice:
                compile_slice(options)
                return 0
            worker = guard.Worker(options)
            warm_up(torch.device(options.device))
            for _ in worker.passes():
                sweep(options, worker)
        except harness.ContextLost as error:
            print(f"tune: the CUDA context is lost: {error}", file=sys.stderr, flush=True)
            os._exit(CONTEXT_LOST)
        return 0
    run = Run(options)
    run.execute(run.sweep)
    return run.conclude()


if __name__ == "__main__":
    sys.exit(main())
