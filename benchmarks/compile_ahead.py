"""Compiles what would compile on first use, a slice of it: `make gpu` runs this on idle cores while CUDA C++ is built.

First every specialization of every Triton kernel, which needs no GPU; then, on a GPU, the baselines that compile, as
far as there is time. Caches on disk hold them for every process that follows. A compilation that fails here fails again
where it counts.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from pruneops import backends

from . import ROOT, registry

REHEARSED = 2  # specializations on a CPU


def specializations():
    """(kernel, spec) of all Triton kernels, module after module."""
    names = [path.stem for path in sorted(Path(ROOT, "triton_kernels").glob("[!_]*.py"))]
    modules = [importlib.import_module(f"pruneops.triton_kernels.{name}") for name in names]
    return [pair for module in modules for pair in module.specializations()]


def compiled_baselines(operators, cases, device):
    """(operator, case, name of a baseline that compiles)."""
    for operator in map(registry.operator, operators):
        able = {name: each for name, each in operator.baselines.items() if each.compiles and not each.why_not(device)}
        for case in operator.select(cases, device):
            yield from ((operator, case, name) for name, each in able.items() if each.applies(case))


def attempt(label, work):
    try:
        work()
        outcome = "ok"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    print(f"compiled: {label}: {outcome}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_ahead")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--operators", default=",".join(registry.names()), help="whose baselines")
    parser.add_argument("--cases", default="goals", help="of the operators")
    parser.add_argument("--slice", default="0/1", metavar="I/N", help="every N-th from the I-th on")
    options = parser.parse_args(argv)
    device, (first, step) = torch.device(options.device), map(int, options.slice.split("/"))
    cuda = device.type == "cuda"
    if not (cuda and backends.why_not("triton", "cuda")) and not backends.interpreting():
        from triton.backends.compiler import GPUTarget

        capability = torch.cuda.get_device_capability() if cuda else (9, 0)
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        pairs = specializations() if cuda else specializations()[:REHEARSED]
        for kernel, spec in pairs[first::step]:
            label = "-".join([kernel.__name__, *(str(value).removeprefix("torch.") for value in spec)])
            attempt(label, lambda kernel=kernel, spec=spec: kernel.compile(spec, target))
    if cuda:
        baselines = list(compiled_baselines(options.operators.split(","), options.cases, device))
        for operator, case, name in baselines[first::step]:

            def call(operator=operator, case=case, name=name):
                operator.baselines[name].prepare(case, operator.arguments(case, device))()

            attempt(f"{operator.name} {case.name} {name}", call)
    return 0


if __name__ == "__main__":
    sys.exit(main())
