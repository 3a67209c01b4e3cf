"""Runs every operator on every backend of a device on small shapes; what compute-sanitizer watches.

`python -m tests.sanitize` exits with 1 if a result is wrong, 2 if no backend can run.
"""

import argparse
import sys

import torch

import pruneops
from pruneops import backends
from tests import specs

WATCHED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # the quicker first: a tool may run out of time


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=tuple(WATCHED), default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    reasons = {name: backends.why_not(name, device.type) for name in WATCHED[device.type]}
    for name, reason in reasons.items():
        if reason:
            print(f"sanitize: {name} not run: {reason}", flush=True)
    if all(reasons.values()):
        return 2
    wrong = 0
    for name in (name for name, reason in reasons.items() if reason is None):
        for operator in specs.NAMES:
            try:
                with pruneops.backend(name):
                    for label, check in specs.spec(operator).small_calls():
                        right = check(device)
                        wrong += not right
                        print(f"sanitize: {operator} {name} {label}: {'ok' if right else 'WRONG'}", flush=True)
            except Exception as error:
                wrong += 1
                print(f"sanitize: {operator} {name}: {type(error).__name__}: {error}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
