"""The contract that every operator's tests check, in pieces that know no operator.

- where: `every_backend` runs a test on each backend that can run here;
- `call`: an operator with poisoned outputs, its arguments checked for writes;
- `assert_greedy`: each choice of a greedy selection against float64 scores;
- `assert_no_worse`: error against float64 at most twice the PyTorch reference's;
- threads, offsets past 2^31, opcheck, torch.compile.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

import pruneops
from pruneops import backends
from tests.inputs import copied, poisoned
from tests.oracles import EPS, differ, not_greedy

ROOT = Path(__file__).resolve().parents[1]


class Target(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str

    def __str__(self):
        return f"{self.backend}-{self.device}"

    @property
    def problem(self):
        """None, or why this cannot run here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "PyTorch sees no GPU"
        return backends.why_not(self.backend, self.device)

    @property
    def interpreted(self):
        """Triton's interpreter runs every program in Python: inputs must be small."""
        return self == ("triton", "cpu")


REFERENCE = Target("reference", "cpu")
CPU_TARGETS = (REFERENCE, Target("cpu", "cpu"), Target("triton", "cpu"))
TARGETS = (*CPU_TARGETS, *(Target(backend, "cuda") for backend in ("reference", "triton", "cuda")))


def on_targets(*targets):
    """Parametrise a test over targets; one that cannot run here is skipped with its reason."""

    def case(target):
        gpu = [pytest.mark.gpu] if target.device == "cuda" else []
        return pytest.param(
            target,
            id=str(target),
            marks=[*gpu, pytest.mark.skipif(bool(target.problem), reason=f"{target}: {target.problem}")],
        )

    return pytest.mark.parametrize("target", [case(target) for target in targets])


NATIVE = Target("cpu", "cpu")
TRITON_TARGETS = tuple(target for target in TARGETS if target.backend == "triton")
CUDA_KERNELS = on_targets(Target("triton", "cuda"), Target("cuda", "cuda"))
every_backend = on_targets(*TARGETS)
# Without the reference, whose BLAS may sum equal rows in different orders.
every_kernel = on_targets(*(target for target in TARGETS if target.backend != "reference"))


def size(target, full, interpreted):
    """A test's sizes: smaller ones under Triton's interpreter."""
    return interpreted if target.interpreted else full


def call(target, op, *args, **kwargs):
    """`pruneops.<op>` on a target, with poisoned outputs.

    Arguments are CPU tensors of any strides, which the device copy keeps. Results are on the CPU. Fails if the operator
    writes to an argument.
    """
    args, kwargs = to_device((args, kwargs), target.device)
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    with pruneops.backend(target.backend), poisoned():
        results = getattr(pruneops, op)(*args, **kwargs)
    assert_same_bits(tensors, before)
    return to_device(results, "cpu")


def to_device(value, device):
    """A tensor, or all those in tuples, lists and dictionaries, on a device: these themselves, or `copied`."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    elsewhere = any(t.device.type != torch.device(device).type for t in tensors)
    return copied(value, device) if elsewhere else value


def assert_same_bits(left, right):
    """Equal shape, dtype and bits, of tensors or of sequences of them; NaN equals a NaN of the same bits."""
    if isinstance(left, torch.Tensor):
        problem = differ(left, right)
        assert not problem, problem
        return
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert_same_bits(one, other)


def assert_greedy(choices, scores, allowed, tolerance=0.0):
    """Each choice is, when made, within tolerance of the minimum of its scores; see `oracles.not_greedy`."""
    problem = not_greedy(choices, scores, allowed, tolerance)
    assert not problem, problem


def assert_no_worse(error, reference_error, scale, ulps=4):
    """The largest error is at most twice the reference's, give or take some float32 ulps of `scale`."""
    bound = 2 * reference_error + ulps * EPS * scale
    assert error <= bound, (
        f"error {error:.3g} against float64; the reference's is {reference_error:.3g}, bound {bound:.3g}"
    )


def assert_threads_change_no_bit(run):
    """run() gives the same bits on 1, 2, 3 and 7 OpenMP threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def run_concurrently(target, calls):
    """Results of functions called on one backend at the same time, each in its own thread."""
    results = [None] * len(calls)

    def work(i):
        with pruneops.backend(target.backend):
            results[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def with_gaps_past_2_31(folder, tensor, dim):
    """The tensor with its slices along a dimension far apart in a sparse file: the last begins past 2^31."""
    gap = 2**31 // (tensor.shape[dim] - 1) // 16 * 16 + 32
    slices = tensor.movedim(dim, 0).contiguous()
    count, room = len(slices), slices[0].numel()
    path = folder / "sparse"
    memory = torch.from_file(str(path), shared=True, size=(count - 1) * gap + room, dtype=tensor.dtype)
    path.unlink()
    spread = memory.as_strided(slices.shape, (gap, *slices.stride()[1:])).copy_(slices)
    return spread.movedim(0, dim)


def opcheck(target, op, *args, **kwargs):
    """torch.library.opcheck of `pruneops.<op>` on a target."""
    args, kwargs = to_device((args, kwargs), target.device)
    with pruneops.backend(target.backend):
        torch.library.opcheck(getattr(torch.ops.pruneops, op).default, args, kwargs)


def assert_compiles(target, function, calls):
    """`function` in one graph of dynamic shapes answers as it does without torch.compile; returns tensors."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    with pruneops.backend(target.backend):
        for args in to_device(calls, target.device):
            torch.testing.assert_close(compiled(*args), function(*args))


# The start of a program that measures memory: kilobytes("VmRSS"), kilobytes("VmHWM").
KILOBYTES = """
import re, torch, pruneops

def kilobytes(name):  # getrusage includes the parent process
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s+(\\d+) kB", status.read())[1])
"""


def run_compile_only(code, *args):
    """Output of a Python program that imports tests.compile_only_driver."""
    if torch.cuda.is_available():
        pytest.skip("the stub of libcuda cannot be loaded beside the real one")
    return run_python(code, *args)


def run_python(code, *args, timeout=300, **environment):
    """Output of a Python program in another process, outside of Triton's interpreter.

    `environment` adds variables; None removes one.
    """
    variables = {**os.environ, "TRITON_INTERPRET": None, **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
