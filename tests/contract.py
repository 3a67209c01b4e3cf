"""The contract that every operator's tests check, in pieces that know no operator.

- where: `every_backend` runs a test on each backend that can run here;
- inputs whose float32 arithmetic is exact, so that backends must agree to the bit, ties included;
- `call`: an operator with poisoned outputs, its arguments watched;
- `assert_greedy`: each choice of a greedy selection against float64 scores;
- `assert_no_worse`: error against float64 at most twice the PyTorch reference's.
"""

import contextlib
import os
import subprocess
import sys
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


def on(*targets):
    """Parametrise a test over targets; one that cannot run here is skipped with its reason."""

    def case(target):
        gpu = [pytest.mark.gpu] if target.device == "cuda" else []
        return pytest.param(
            target,
            id=str(target),
            marks=[*gpu, pytest.mark.skipif(bool(target.problem), reason=f"{target}: {target.problem}")],
        )

    return pytest.mark.parametrize("target", [case(target) for target in targets])


every_backend = on(*TARGETS)


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
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    moved = {id(tensor): to_device(tensor, target.device) for tensor in tensors}
    args = [moved.get(id(value), value) for value in args]
    kwargs = {name: moved.get(id(value), value) for name, value in kwargs.items()}
    with pruneops.backend(target.backend), poisoned():
        results = getattr(pruneops, op)(*args, **kwargs)
    for tensor, copy in zip(tensors, before):
        assert_same_bits(moved[id(tensor)].cpu(), copy)
    return type(results)(*(result.cpu() for result in results))


def to_device(tensor, device):
    """The tensor on a device, in the same place of a storage of the same size."""
    if torch.device(device) == tensor.device:
        return tensor
    storage = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_same_bits(left, right):
    """Equal shape, dtype and bits; NaN equals a NaN of the same bits."""
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
