"""Operator-independent checks on a GPU: CUDA graphs, synchronisation, streams, other devices.

A check takes a target; `run`, which calls the operator in all its variants and returns tensors; and `inputs`, which
makes the CUDA arguments of `run` from a seed. All seeds give the same shapes.
"""

import pytest
import torch

import pruneops
from tests.contract import assert_same_bits, to_device


def graph(target, run, inputs):
    """A graph, captured once, gives correct results for other values."""
    arguments = inputs(0)
    with pruneops.backend(target.backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*arguments)
        for seed in (1, 2):
            new = inputs(seed)
            for tensor, value in zip(arguments, new):
                tensor.copy_(value)
            graph.replay()
            assert_same_bits(to_device(captured, "cpu"), to_device(run(*new), "cpu"))


def no_synchronisation(target, run, inputs):
    arguments = inputs(0)
    with pruneops.backend(target.backend):
        run(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def stream(target, run, inputs):
    """Kernels run on the current stream, after its earlier work."""
    arguments, new = inputs(0), inputs(1)
    with pruneops.backend(target.backend):
        expected = run(*new)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            for tensor, value in zip(arguments, new):
                tensor.copy_(value)
            late = run(*arguments)
        stream.synchronize()
    assert_same_bits(to_device(late, "cpu"), to_device(expected, "cpu"))


def other_device(target, run, inputs):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    arguments = inputs(0)
    with pruneops.backend(target.backend):
        here, there = run(*arguments), run(*(tensor.to("cuda:1") for tensor in arguments))
    assert all(result.device == torch.device("cuda:1") for result in there)
    assert_same_bits(to_device(here, "cpu"), to_device(there, "cpu"))


every_check = pytest.mark.parametrize(
    "check", [graph, no_synchronisation, stream, other_device], ids=lambda check: check.__name__
)
