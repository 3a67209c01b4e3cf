"""Runs every operator on every backend of a device on small shapes; what compute-sanitizer watches.

`python -m tests.sanitize` exits with 1 if a result is wrong, 2 if no backend can run.
"""

import argparse
import re
import sys

import torch

import pruneops
from pruneops import backends
from tests import specs

WATCHED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # the quicker first: a tool may run out of time


def tokens(label):
    """The N of a call's label, 0 if it has none."""
    return int((re.search(r"\bN (\d+)", label) or [0, 0])[1])


def calls_of(names, most):
    """(operator, backend, label, check), those of the fewest tokens first: a tool may run out of time."""
    found = []
    for name in names:
        found += [
            (operator, name, label, check)
            for operator in specs.NAMES
            for label, check in specs.spec(operator).small_calls()
            if tokens(label) <= most
        ]
    return sorted(found, key=lambda call: (names.index(call[1]), tokens(call[2])))


def run(operator, backend, label, check, device):
    """Whether a call is right; prints so."""
    try:
        with pruneops.backend(backend):
            right = check(device)
        print(f"sanitize: {operator} {backend} {label}: {'ok' if right else 'WRONG'}", flush=True)
        return right
    except Exception as error:
        print(f"sanitize: {operator} {backend} {label}: {type(error).__name__}: {error}", flush=True)
        return False


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=tuple(WATCHED), default="cuda")
    parser.add_argument("--backends", help="comma-separated; default: all of the device")
    parser.add_argument("--max-tokens", type=int, default=1 << 30, help="leave out calls of more")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    names = WATCHED[device.type] if options.backends is None else options.backends.split(",")
    reasons = {name: backends.why_not(name, device.type) for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"sanitize: {name} not run: {reason}", flush=True)
    if all(reasons.values()):
        return 2
    calls = calls_of([name for name, reason in reasons.items() if reason is None], options.max_tokens)
    print(f"sanitize: {len(calls)} calls", flush=True)
    return 1 if [call for call in calls if not run(*call, device)] else 0


if __name__ == "__main__":
    sys.exit(main())
