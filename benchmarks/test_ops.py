"""The operators' small cases through pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest
import torch

import pruneops
from pruneops import backends

from . import harness, registry
from .machine import PeakRates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _implementations():
    able = [name for name in backends.BACKENDS if backends.why_not(name, DEVICE.type) is None]
    for operator in map(registry.operator, registry.names()):
        sets = operator.sets[DEVICE.type]
        for case in operator.select(f"tiny,{sets['quick'][0]}", DEVICE):
            rates, name = PeakRates(1e10, 1e10, {case.dtype: 1e11}), "tiny" if case.name in sets["tiny"] else "quick"
            for each in harness.implementations(operator, case, DEVICE, able, list(operator.baselines), rates):
                yield pytest.param(operator, case, each, id=f"{operator.name}-{name}-{case.name}-{each.name}")


@pytest.mark.parametrize("operator, case, implementation", list(_implementations()))
def test_operator(benchmark, operator, case, implementation):
    with pruneops.backend(implementation.backend):
        arguments = operator.arguments(case, DEVICE)
        call = implementation.prepare(case, arguments)
        checked = operator.verify(case, arguments, call(), None, implementation.precision)
        assert checked.right, checked.message
        benchmark.group = f"{operator.name} {case.shape}"

        def finish():
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(finish)
