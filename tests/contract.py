"""The contract that every operator's tests check, in pieces that know no operator.

- where: `every_backend` runs a test on each backend that can run here;
- inputs whose float32 arithmetic is exact, so that backends must agree to the bit, ties included; real ones;
- `call`: an operator with poisoned outputs, its arguments watched;
- `assert_greedy`: each choice of a greedy selection against float64 scores;
- `assert_no_worse`: error against float64 at most twice the PyTorch reference's;
- threads, offsets past 2^31, opcheck, torch.compile.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import pruneops
from pruneops import backends

ROOT = Path(__file__).resolve().parents[1]
EPS = torch.finfo(torch.float32).eps


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
        """Triton on CPU tensors runs every program in Python: keep its inputs small."""
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
every_kernel = on_targets(*(target for target in TARGETS if target.backend != "reference"))  # a BLAS has its own ways


def size(target, full, interpreted):
    """A test's sizes: smaller ones under Triton's interpreter."""
    return interpreted if target.interpreted else full


@contextlib.contextmanager
def poisoned():
    """Fresh memory holds NaN or the greatest integer, in native code too (new_empty of the stable ABI)."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def call(target, op, *args, **kwargs):
    """`pruneops.<op>` on a target, with poisoned outputs.

    Arguments are CPU tensors of any strides, which the device copy keeps. Results come back on
    the CPU. Fails if the operator writes to an argument.
    """
    args, kwargs = to_device((args, kwargs), target.device)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    with pruneops.backend(target.backend), poisoned():
        results = getattr(pruneops, op)(*args, **kwargs)
    assert_same_bits(tensors, before)
    return to_device(results, "cpu")


def to_device(value, device):
    """A tensor, or all those in tuples, lists and dictionaries, on a device.

    Each lies in the same place of a storage of the same size.
    """
    if isinstance(value, dict):
        return {name: to_device(own, device) for name, own in value.items()}
    if isinstance(value, list | tuple):
        own = [to_device(one, device) for one in value]
        return type(value)(*own) if hasattr(value, "_fields") else type(value)(own)
    if not isinstance(value, torch.Tensor) or torch.device(device) == value.device:
        return value
    storage = value.new_empty(0).set_(value.untyped_storage()).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def assert_same_bits(left, right):
    """Equal shape, dtype and bits, of tensors or of sequences of them; NaN equals a NaN of the same bits."""
    if not isinstance(left, torch.Tensor):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same_bits(one, other)
        return
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    left, right = (t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (left, right))
    differ = (left != right).nonzero()
    assert not len(differ), f"{len(differ)} bytes of {len(left)} differ, the first at byte {int(differ[0])}"


def small_integers(shape, generator, greatest=3):
    """Integers in [-greatest, greatest]: sums of their products are exact in float32, ties frequent."""
    return torch.randint(-greatest, greatest + 1, shape, generator=generator).float()


def signs(shape, generator):
    """Vectors of 4^j entries +-1 (the rest 0) times a power of two: their norms and cosines are exact."""
    *rows, width = shape
    ones = 4 ** ((width.bit_length() - 1) // 2)
    entries = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    where = torch.rand(shape, generator=generator).argsort(-1) < ones
    scale = torch.exp2(torch.randint(-5, 6, (*rows, 1), generator=generator))
    return entries * where * scale


def with_copies(x, generator, share=0.5):
    """x [..., N, D] with a share of its tokens replaced by copies of others."""
    tokens = x.shape[-2]
    source = torch.where(
        torch.rand(tokens, generator=generator) < share,
        torch.randint(0, max(tokens, 1), (tokens,), generator=generator),
        torch.arange(tokens),
    )
    return x[..., source, :]


def clustered(shape, seed=0, clusters=7, spread=0.3, dtype=torch.float32):
    """Real-valued tokens in tight clusters, lengths over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(*shape[:-2], clusters, shape[-1], generator=generator)
    which = torch.randint(0, clusters, (shape[-2],), generator=generator)
    x = centers[..., which, :] + spread * torch.randn(shape, generator=generator)
    return (x * torch.exp(1.5 * torch.randn(*shape[:-1], 1, generator=generator))).to(dtype)


def seeds_and_mask(shape, count=3, share=0.7, seed=0):
    """Different tokens [..., count] of [..., N] and a mask [..., N] that forbids some of them."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.rand(shape, generator=generator).argsort(-1)[..., :count]
    return seeds, torch.rand(shape, generator=generator) < share


def assert_greedy(choices, scores, allowed, tolerance=0.0):
    """Each choice is, when made, a least one among those allowed and not yet taken.

    Parameters
    ----------
    choices : Tensor [K], int64
    scores : Tensor [K, N], float64
        What the choices rank by, each row at the moment of one choice and given the earlier
        ones. Scores that rank last are +inf.
    allowed : Tensor [N], bool
    tolerance : float
        How far above the least score a choice may be. With 0, and among infinite scores in
        any case, ties must go to the lowest index.
    """
    open_ = allowed.clone()
    for step, choice in enumerate(choices.tolist()):
        assert 0 <= choice < len(open_), f"step {step}: index {choice} is no token"
        assert open_[choice], f"step {step}: token {choice} is taken or not allowed"
        candidates = open_.nonzero()[:, 0]
        own = scores[step, candidates]
        score, least = scores[step, choice], own.min()
        if tolerance == 0 or least.isinf():
            first = int(candidates[own.argmin()])
            assert choice == first, f"step {step}: took {choice} (score {score}), expected {first} (score {least})"
        assert score <= least + tolerance, f"step {step}: took {choice} of score {score}, the least is {least}"
        open_[choice] = False


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
    """Results of functions that are called on one backend at the same time, each in a thread of its own."""
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
    """The tensor with its slices along a dimension so far apart in a sparse file that the last begins past 2^31."""
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


def assert_compiles_with_inductor(module, function, calls):
    """The same under inductor on the default backend, in a process of its own; `calls` is Python for a list."""
    code = f"""
import torch
from {module} import {function} as function
with torch.device("{"cuda" if torch.cuda.is_available() else "cpu"}"):
    calls = {calls}
compiled = torch.compile(function, fullgraph=True, dynamic=True)
for args in calls:
    torch.testing.assert_close(compiled(*args), function(*args))
print("same")
"""
    assert run_python(code).strip() == "same"


def run_compile_only(code):
    """Output of a Python program that imports tests.compile_only_driver."""
    if torch.cuda.is_available():
        pytest.skip("a libcuda that runs nothing cannot stand beside a real one")
    return run_python(code)


def triton_launches(code):
    """(launches, compilations) of Python code that calls Triton launchers on a card which runs nothing."""
    count = "print(len(compile_only_driver.launches), len(compile_only_driver.compilations))"
    lines = f"import torch\nfrom tests import compile_only_driver\ncompile_only_driver.count()\n{code}\n{count}"
    return tuple(map(int, run_compile_only(lines).split()))


def run_python(code, *args, timeout=300, **environment):
    """Output of a Python program in a process of its own, outside of Triton's interpreter.

    `environment` adds variables; None removes one.
    """
    variables = {**os.environ, "TRITON_INTERPRET": None, **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
