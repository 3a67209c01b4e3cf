"""The operators' small cases through pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest
import torch

import pruneops
from pruneops import backends

from . import harness, registry
from .machine import Ceilings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _contenders():
    able = [name for name in backends.BACKENDS if backends.why_not(name, DEVICE.type) is None]
    for name in registry.names():
        operator = registry.operator(name)
        smallest = operator.sets[DEVICE.type]["quick"][0]
        for case in operator.select(f"tiny,{smallest}", DEVICE):
            guess = Ceilings(1e10, 1e10, {case.dtype: 1e11})
            for contender in harness.contenders(operator, case, DEVICE, able, list(operator.peers), guess):
                yield pytest.param(operator, case, contender, id=f"{name}-{case.name}-{contender.name}")


@pytest.mark.parametrize("operator, case, contender", list(_contenders()))
def test_operator(benchmark, operator, case, contender):
    with pruneops.backend(contender.backend):
        arguments = operator.arguments(case, DEVICE)
        call = contender.prepare(case, arguments)
        checked = operator.check(case, arguments, call(), None, contender.precision)
        assert checked.right, checked.words
        benchmark.group = f"{operator.name} {case.shape}"

        def finish():
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(finish)
