"""Runs every operator on every backend of a device on small shapes; what compute-sanitizer watches.

`python -m benchmarks.sanitize` exits with 1 if a result is wrong, 2 if no backend can run.
"""

import argparse
import sys

import torch

import pruneops
from pruneops import backends

from . import registry

WATCHED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # the quicker first: a tool may run out of time


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.partition("\n")[0])
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
        for operator in map(registry.operator, registry.names()):
            try:
                with pruneops.backend(name):
                    for words, passed in operator.sanitize(device):
                        wrong += not passed
                        print(f"sanitize: {operator.name} {name} {words}: {'ok' if passed else 'WRONG'}", flush=True)
            except Exception as error:
                wrong += 1
                print(f"sanitize: {operator.name} {name}: {type(error).__name__}: {error}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
