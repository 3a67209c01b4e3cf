import ctypes

import pytest
import torch

from pruneops import reference

from . import ELEMENTS, INT, INT32, POINTER, by_dtype, compile_kernels, needs_compiler, pointer, strides

pytestmark = needs_compiler


class Call(ctypes.Structure):
    _fields_ = (
        *(("logits", POINTER), ("batch", INT), ("tokens", INT), ("classes", INT), ("stride", INT * 2)),
        *(("ranks", INT), ("shared_bytes", INT), ("out", POINTER), ("element", INT32), ("backwards", INT32)),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("assign_ranks", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """assign_ranks into a poisoned output, with `kilobytes` of shared memory."""

    def run(logits, j, *, kilobytes=99, backwards=False):
        out = torch.full((logits.shape[0], j), -77)
        call = Call(
            logits=pointer(logits),
            batch=logits.shape[0],
            tokens=logits.shape[1],
            classes=logits.shape[2],
            stride=strides(logits),
            ranks=j,
            shared_bytes=kilobytes * 1024,
            out=pointer(out),
            element=ELEMENTS.index(logits.dtype),
            backwards=backwards,
        )
        kernel(ctypes.byref(call))
        return out

    return run


VARIANTS = {"one tile": dict(), "tiles": dict(kilobytes=9), "tiles backwards": dict(kilobytes=20, backwards=True)}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def assert_equals_reference(emulate, logits, j, **variant):
    assert torch.equal(emulate(logits, j, **variant), reference.assign_ranks(logits, j))


@every_variant
@by_dtype
@pytest.mark.parametrize("classes", (2, 32, 33, 65))
def test_columns_that_prefer_the_same_tokens(emulate, variant, dtype, classes):
    """Every logit is 0 or -inf: probabilities are 0 or 1 / n, and equal ones have logarithms of equal bits."""
    logits = torch.where(torch.rand(2, 150, classes) < 0.3, 0.0, -torch.inf)
    logits[..., -1] = torch.where(torch.rand(2, 150) < 0.5, 0.0, -torch.inf)
    assert_equals_reference(emulate, logits.to(dtype), min(classes - 1, 64), **variant)


@every_variant
def test_real_logits(emulate, variant):
    shared = 3 * torch.randn(3, 200, 1)  # most ranks prefer the same few tokens
    logits = (shared + torch.randn(3, 200, 33)).mT.contiguous().mT[:, ::2]
    logits = torch.nn.functional.pad(logits, (0, 4))[..., :33]
    assert_equals_reference(emulate, logits, 20, **variant)


@every_variant
def test_specials(emulate, variant):
    logits = torch.randn(2, 90, 9)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38):
        logits[torch.rand(logits.shape) < 0.04] = value
    assert_equals_reference(emulate, logits, 8, **variant)


@every_variant
def test_every_token(emulate, variant):
    assert_equals_reference(emulate, torch.randn(1, 64, 65), 64, **variant)


@every_variant
def test_one_token(emulate, variant):
    assert emulate(torch.full((1, 1, 2), torch.nan), 1, **variant).tolist() == [[0]]


def test_more_tokens_than_threads(emulate):
    assert_equals_reference(emulate, torch.randn(1, 2500, 6), 5)
