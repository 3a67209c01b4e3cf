"""`python -m benchmarks ops <operator>`: time every backend against its baselines; `... end_to_end`: whole models.

Exit status: 0 if every backend that ran is right, 1 if one is wrong or failed, 2 for an invalid request, 3 if an
implementation broke the CUDA context, 130 after an interruption (finished cases are shown and written).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from pruneops import backends

from . import guard, harness, machine, registry, report

SECONDS_PER_CASE = {"cpu": 20, "cuda": 15}
BACKENDS_SECONDS = 1.0  # of a case on CUDA at most while all backends are timed before any baseline
LAST_PHASE = 2
CONTEXT_LOST = 3


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message):
        self.exit(2, f"benchmarks: {message}\n")


def parse(argv):
    parser = Parser(prog="python -m benchmarks", description="Benchmarks of the pruneops operators.")
    what = parser.add_subparsers(dest="what", required=True, metavar="{ops,end_to_end}")
    what.add_parser("end_to_end", help="whole models, pruned against unpruned")
    ops = what.add_parser("ops", help="one operator: every backend against its baselines")
    ops.add_argument("operator", help=", ".join(registry.names()))
    ops.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    ops.add_argument("--cases", default="quick", help="comma-separated sets (tiny, quick, full, goals) and cases")
    ops.add_argument("--backends", help="comma-separated; default: all that can run")
    ops.add_argument("--baselines", help="comma-separated, all or none; default: all, or none with --backends")
    ops.add_argument("--out", type=Path, metavar="FILE.json", help="write all numbers here")
    ops.add_argument("--seconds", type=float, help="for the whole run; default 20 s a case on CPU, 15 s on CUDA")
    ops.add_argument("--backends-first", action="store_true", help="all cases without baselines, then with them")
    ops.add_argument("--rates", type=Path, help=argparse.SUPPRESS)  # file of the peak rates of several processes
    guard.add_options(ops)
    options = parser.parse_args(argv)
    try:
        _resolve(options)
    except (KeyError, ValueError) as error:
        parser.error(error.args[0])
    return options


def _resolve(options):
    """Replace names by what they denote; KeyError or ValueError for invalid ones."""
    options.operator = registry.operator(options.operator)
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU")
    options.cases = options.operator.select(options.cases, options.device)
    chosen, known = options.baselines or ("all" if options.backends is None else "none"), options.operator.baselines
    options.baselines = [] if chosen == "none" else _names(None if chosen == "all" else chosen, known, "baseline")
    options.backends = _names(options.backends, backends.BACKENDS, "backend")
    if options.out and (options.out.is_dir() or not options.out.resolve().parent.is_dir()):
        raise ValueError(f"--out: no file can be written at {options.out.resolve()}")
    if options.seconds is None:
        options.seconds = SECONDS_PER_CASE[options.device.type] * len(options.cases)


def _names(given, known, what):
    chosen = list(known) if given is None else given.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise KeyError(f"no {what} {unknown[0]!r}; there is: {', '.join(known)}")
    return chosen


def run(options, worker, last_phase=LAST_PHASE):
    """Run the cases up to a phase; returns the document that --out holds, written after every case.

    With --backends-first all cases run their backends before any runs baselines, and those before what compiles: a slow
    compilation costs only what comes last. Every step gets its share of the time that is left.
    """
    load, end = machine.BackgroundLoad(), time.monotonic() + options.seconds
    reasons = {name: backends.why_not(name, options.device.type) for name in options.backends}
    document = _document(options, reasons)
    done = {case["name"]: case for case in document["cases"]}  # of an earlier process
    steps = [step for step in _steps(options) if done.get(step[1].name, {"phase": -1})["phase"] < step[0] <= last_phase]
    try:
        dtypes = dict.fromkeys(case.dtype for case in options.cases)
        rates = machine.shared_peak_rates(options.rates, options.device, dtypes)
        document["peak_rates"] = rates.facts()
        for place, (phase, case) in enumerate(steps):
            print(f"{case.name} ({place + 1}/{len(steps)})", file=sys.stderr, flush=True)
            weights = [harness.WEIGHTS[step[0]] for step in steps[place:]]
            seconds = (end - time.monotonic()) * weights[0] / sum(weights)
            if phase == 0 and options.seconds > 0:
                seconds = max(seconds, 1e-3)  # backends run, however long earlier ones took to compile
                seconds = min(seconds, BACKENDS_SECONDS) if options.device.type == "cuda" else seconds
            earlier = _entries(done.get(case.name)) | worker.crashed(case.name)
            done[case.name] = harness.run_case(
                options.operator, case, options.device, _implementations(options, case, rates), rates, seconds, phase,
                earlier, _prepare_seconds(done.values(), case.name), worker.progress,
            )  # fmt: skip
            document["cases"] = [done[case.name] for case in options.cases if case.name in done]
            document["background_load"] = load.share()
            document["complete"] = place + 1 == len(steps)
            if options.out:
                report.write(options.out, document)
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return document
    if not steps:
        document["complete"] = True
        if options.out:
            report.write(options.out, document)
    return document


def _document(options, reasons):
    """What --out holds from an earlier process, or a new document."""
    if options.resume and options.out and options.out.exists():
        return json.loads(options.out.read_text()) | {"complete": False}
    unavailable = {name: reason for name, reason in reasons.items() if reason}
    for name in options.baselines:
        reason = options.operator.baselines[name].why_not(options.device)
        if reason:
            unavailable[name] = reason
    return machine.facts(options.device) | {
        "operator": options.operator.name,
        "seconds": options.seconds,
        "baselines": options.baselines,
        "unavailable": unavailable,
        "peak_rates": {},
        "background_load": None,
        "complete": False,
        "cases": [],
    }


def _steps(options):
    """(phase, case): a case runs its implementations up to a phase."""
    if not options.backends_first:
        return [(2, case) for case in options.cases]
    baselines = [options.operator.baselines[name] for name in options.baselines]
    phases = {2 if each.compiles else 1 for each in baselines if each.why_not(options.device) is None}
    return [(phase, case) for phase in sorted({0, *phases}) for case in options.cases]


def _implementations(options, case, rates):
    able = [name for name in options.backends if backends.why_not(name, options.device.type) is None]
    return harness.implementations(options.operator, case, options.device, able, options.baselines, rates)


def _entries(case):
    return {entry["name"]: entry for entry in case["implementations"]} if case else {}


def _prepare_seconds(cases, current):
    """Baseline -> seconds that it took to prepare in the last of the other cases."""
    entries = [entry for case in cases if case["name"] != current for entry in case["implementations"]]
    return {entry["name"]: entry["prepare_s"] for entry in entries if "prepare_s" in entry}


def main(argv=None):
    if argv is None:
        machine.keep_freed_memory()
        argv = sys.argv[1:]
    if argv[:1] == ["end_to_end"]:
        from . import end_to_end

        return end_to_end.main(argv[1:])
    options = parse(argv)
    worker, status = guard.Worker(options), 0
    try:
        if options.wait:
            warm_up(options.device)
        for words in worker.passes():
            status = concluded(run(options, worker, *map(int, words)))
            if options.device.type == "cuda":
                torch.cuda.empty_cache()  # other processes work before the next pass
    except harness.ContextLost as error:
        print(f"benchmarks: the CUDA context is lost: {error}", file=sys.stderr, flush=True)
        os._exit(CONTEXT_LOST)  # freeing device memory would fail or hang
    return status


def warm_up(device):
    """What a process does once, ahead of its time: a CUDA context, libraries in memory."""
    for name in backends.BACKENDS:
        backends.why_not(name, device.type)
    if device.type == "cuda":
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            square = torch.ones(64, 64, dtype=dtype, device=device)
            (square @ square).sum().item()


def concluded(document):
    """Print the table; returns the exit status."""
    print(report.text(document), flush=True)
    if not document["complete"]:
        return 130
    entries = [entry for _, entry in report.entries(document)]
    bad = [entry for entry in entries if entry["kind"] == "backend" and entry["status"] in ("WRONG", "failed")]
    for entry in bad:
        print(f"benchmarks: backend {entry['name']}: {entry['reason']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
