"""`python -m benchmarks ops <operator>`: time every backend that can run against its peers; `... end_to_end`: models.

Exit status: 0 if every backend that ran is right, 1 if one is wrong or failed, 2 for a request
that cannot be served, 3 if a contender broke the CUDA context, 130 after an interruption (finished cases are shown
and written).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

import pruneops
from pruneops import backends

from . import guard, harness, machine, registry, report

SECONDS_PER_CASE = {"cpu": 20, "cuda": 15}
CONTEXT_LOST = 3


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message):
        self.exit(2, f"benchmarks: {message}\n")


def parse(argv):
    parser = Parser(prog="python -m benchmarks", description="Benchmarks of the pruneops operators.")
    what = parser.add_subparsers(dest="what", required=True, metavar="{ops,end_to_end}")
    what.add_parser("end_to_end", help="whole models, pruned against unpruned")
    ops = what.add_parser("ops", help="one operator: every backend against its peers")
    ops.add_argument("operator", help=", ".join(registry.names()))
    ops.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    ops.add_argument("--cases", default="quick", help="comma-separated sets (tiny, quick, full, goals) and cases")
    ops.add_argument("--backends", help="comma-separated; default: all that can run")
    ops.add_argument("--peers", help="comma-separated, or none; default: all")
    ops.add_argument("--out", type=Path, metavar="FILE.json", help="write all numbers here")
    ops.add_argument("--seconds", type=float, help="for the whole run; default 20 s a case on CPU, 15 s on CUDA")
    ops.add_argument("--backends-first", action="store_true", help="all cases without peers, then with them")
    ops.add_argument("--compile-only", action="store_true", help="call what compiles once, so that caches hold it")
    guard.add_options(ops)
    options = parser.parse_args(argv)
    try:
        _resolve(options)
    except (KeyError, ValueError) as error:
        parser.error(error.args[0])
    return options


def _resolve(options):
    """Turn names into what they stand for, or say what there is not."""
    options.operator = registry.operator(options.operator)
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU")
    options.cases = options.operator.select(options.cases, options.device)
    options.backends = _names(options.backends, backends.BACKENDS, "backend")
    options.peers = [] if options.peers == "none" else _names(options.peers, tuple(options.operator.peers), "peer")
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


def run(options):
    """Run the cases; returns the document that --out holds, written after every case.

    With --backends-first every case gets its backends' times before any has its peers', and those before what compiles:
    a slow compilation costs what comes last. Every step gets its share of the time that is left.
    """
    watch = guard.Watch(options)
    end = time.monotonic() + options.seconds
    reasons = {name: backends.why_not(name, options.device.type) for name in options.backends}
    able = [name for name, reason in reasons.items() if reason is None]
    document = _document(options, reasons)
    found = {c["name"]: c for c in document["cases"]}  # of an earlier process
    company = machine.Company()
    try:
        dtypes = dict.fromkeys(case.dtype for case in options.cases)
        ceilings = machine.ceilings(options.device, dtypes)
        document["ceilings"] = ceilings.facts()
        steps = [step for step in _steps(options) if found.get(step[1].name, {"rank": -1})["rank"] < step[0]]
        document["complete"] = not steps
        for place, (rank, case) in enumerate(steps):
            print(f"{case.name} ({place + 1}/{len(steps)})", file=sys.stderr, flush=True)
            weights = [harness.WEIGHTS[rank] for rank, _ in steps[place:]]
            share = (end - time.monotonic()) * weights[0] / sum(weights)
            if rank == 0 and options.seconds > 0:
                share = max(share, 1e-3)  # backends run, however long earlier ones took to compile
            known = {e["name"]: e for e in found.get(case.name, {"contenders": []})["contenders"]}
            known |= watch.crashed(case.name)
            contenders = harness.contenders(options.operator, case, options.device, able, options.peers, ceilings)
            found[case.name] = harness.run_case(
                options.operator, case, options.device, contenders, ceilings, share, rank, known,
                _prepare_seconds(found.values(), case.name), watch.doing,
            )  # fmt: skip
            document["cases"] = [found[case.name] for case in options.cases if case.name in found]
            document["others_share"] = company.share()
            document["complete"] = place + 1 == len(steps)
            if options.out:
                report.write(options.out, document)
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
    return document


def _document(options, reasons):
    """What --out holds from an earlier process, or a new document."""
    if options.resume and options.out and options.out.exists():
        return json.loads(options.out.read_text()) | {"complete": False}
    unavailable = {name: reason for name, reason in reasons.items() if reason}
    for name in options.peers:
        devices = options.operator.peers[name].devices
        if options.device.type not in devices:
            unavailable[name] = f"it runs on {' and '.join(devices)} only"
    return machine.facts(options.device) | {
        "operator": options.operator.name,
        "seconds": options.seconds,
        "peers": options.peers,
        "unavailable": unavailable,
        "ceilings": {},
        "others_share": None,
        "complete": False,
        "cases": [],
    }


def _steps(options):
    """(rank, case): contenders up to a rank are run in a case."""
    peers = [options.operator.peers[name] for name in options.peers]
    ranks = sorted({0, *(2 if peer.compiles else 1 for peer in peers if options.device.type in peer.devices)})
    return [(rank, case) for rank in (ranks if options.backends_first else [2]) for case in options.cases]


def _prepare_seconds(cases, own):
    """Peer -> seconds that it took to prepare in the last of the other cases."""
    entries = [entry for case in cases if case["name"] != own for entry in case["contenders"]]
    return {entry["name"]: entry["prepare_s"] for entry in entries if "prepare_s" in entry}


def compile_only(options):
    """Call every contender that compiles once in every case, right or wrong, so that caches on disk hold it."""
    guess = machine.Ceilings(1e12, 1e12, dict.fromkeys((case.dtype for case in options.cases), 1e14))
    able = [name for name in options.backends if backends.why_not(name, options.device.type) is None]
    for case in options.cases:
        arguments = options.operator.arguments(case, options.device)
        for contender in harness.contenders(options.operator, case, options.device, able, options.peers, guess):
            if contender.graph or contender.rank == 1 or contender.name == "reference":
                continue
            try:
                with pruneops.backend(contender.backend):
                    contender.prepare(case, arguments)()
                words = "ok"
            except Exception as error:
                words = f"{type(error).__name__}: {error}"
            print(f"compiled: {options.operator.name} {case.name} {contender.name}: {words}", flush=True)


def main(argv=None):
    if argv is None:
        machine.keep_freed_memory()
        argv = sys.argv[1:]
    if argv[:1] == ["end_to_end"]:
        from . import end_to_end

        return end_to_end.main(argv[1:])
    options = parse(argv)
    if options.compile_only:
        compile_only(options)
        return 0
    try:
        document = run(options)
    except harness.ContextLost as error:
        print(f"benchmarks: the CUDA context is lost: {error}", file=sys.stderr, flush=True)
        os._exit(CONTEXT_LOST)  # the clean-up of what holds device memory would fail or hang
    print(report.text(document))
    if not document["complete"]:
        return 130
    entries = [entry for case in document["cases"] for entry in case["contenders"]]
    bad = [e for e in entries if e["kind"] == "backend" and e["status"] in ("WRONG", "failed")]
    for entry in bad:
        print(f"benchmarks: backend {entry['name']}: {entry['reason']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
