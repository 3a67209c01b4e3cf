"""`python -m benchmarks ops <operator>`: time every backend that can run against its peers; `... end_to_end`: models.

Exit status: 0 if every backend that ran is right, 1 if one is wrong or failed, 2 for a request
that cannot be served, 130 after an interruption (finished cases are shown and written).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from pruneops import backends

from . import harness, machine, registry, report

SECONDS_PER_CASE = {"cpu": 20, "cuda": 15}


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
    """Run the cases; returns the document that --out holds, written after every case."""
    end = time.monotonic() + options.seconds
    reasons = {name: backends.why_not(name, options.device.type) for name in options.backends}
    able = [name for name, reason in reasons.items() if reason is None]
    unavailable = {name: reason for name, reason in reasons.items() if reason}
    for name in options.peers:
        devices = options.operator.peers[name].devices
        if options.device.type not in devices:
            unavailable[name] = f"it runs on {' and '.join(devices)} only"
    document = machine.facts(options.device) | {
        "operator": options.operator.name,
        "seconds": options.seconds,
        "peers": options.peers,
        "unavailable": unavailable,
        "ceilings": {},
        "others_share": None,
        "complete": False,
        "cases": [],
    }
    company = machine.Company()
    try:
        dtypes = dict.fromkeys(case.dtype for case in options.cases)
        ceilings = machine.ceilings(options.device, dtypes)
        document["ceilings"] = ceilings.facts()
        for place, case in enumerate(options.cases):
            print(f"{case.name} ({place + 1}/{len(options.cases)})", file=sys.stderr, flush=True)
            share = (end - time.monotonic()) / (len(options.cases) - place)
            found = harness.contenders(options.operator, case, options.device, able, options.peers, ceilings)
            result = harness.run_case(options.operator, case, options.device, found, ceilings, share)
            document["cases"].append(result)
            document["others_share"] = company.share()
            document["complete"] = len(document["cases"]) == len(options.cases)
            if options.out:
                report.write(options.out, document)
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
    return document


def main(argv=None):
    if argv is None:
        machine.keep_freed_memory()
        argv = sys.argv[1:]
    if argv[:1] == ["end_to_end"]:
        from . import end_to_end

        return end_to_end.main(argv[1:])
    options = parse(argv)
    document = run(options)
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
