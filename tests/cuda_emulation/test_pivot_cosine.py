import ctypes

import pytest
import torch

from pruneops import reference
from tests.inputs import signs, with_copies

from . import ELEMENTS, INT, INT32, POINTER, by_dtype, compile_kernels, needs_compiler, pointer, strides

pytestmark = needs_compiler
REDUCTIONS = (None, "max", "mean", "sum")


class Call(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        *((name, INT) for name in ("batch", "tokens", "width", "batch_stride", "row_stride")),
        *(("pivots", POINTER), ("pivots_stride", INT * 2), ("count", INT), ("mask", POINTER), ("mask_stride", INT * 2)),
        *(("cu_seqlens", POINTER), ("sequences", INT), ("out", POINTER)),
        *((name, INT32) for name in ("element", "reduce", "block_tokens", "many", "stages", "backwards")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("pivot_cosine", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """pivot_cosine or, given `reduce`, duplication; packed, given cu_seqlens. Outputs are poisoned first."""

    def run(x, pivots, *, mask=None, cu_seqlens=None, reduce=None, tokens=0, many=False, stages=4, backwards=False):
        packed = cu_seqlens is not None
        batch = () if packed else x.shape[:1]
        out = torch.full((*batch, *(() if reduce else pivots.shape[1:]), x.shape[-2]), -77.0)
        call = Call(
            x=pointer(x),
            batch=1 if packed else x.shape[0],
            tokens=x.shape[-2],
            width=x.shape[-1],
            batch_stride=0 if packed else x.stride(0),
            row_stride=x.stride(-2),
            pivots=pointer(pivots),
            pivots_stride=strides(pivots),
            count=pivots.shape[1],
            mask=pointer(mask),
            mask_stride=strides(mask[None] if packed and mask is not None else mask),
            cu_seqlens=pointer(cu_seqlens),
            sequences=pivots.shape[0],
            out=pointer(out),
            element=ELEMENTS.index(x.dtype),
            reduce=REDUCTIONS.index(reduce),
            block_tokens=tokens,
            many=many,
            stages=stages,
            backwards=backwards,
        )
        kernel(ctypes.byref(call))
        return out

    return run


VARIANTS = {
    "balanced": dict(),
    "11 tokens a block": dict(tokens=11, stages=8),
    "24 tokens a block": dict(tokens=24, backwards=True),
    "many pivots": dict(tokens=22, many=True, backwards=True),
}
by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
by_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)


def expected(x, pivots, mask=None, reduce=None):
    if reduce is None:
        return reference.pivot_cosine(x, pivots, mask=mask)
    return reference.duplication(x, pivots, mask=mask, reduce=reduce)


def exact_inputs(*shape, dtype=torch.float32):
    """Tokens whose norms and cosines are exact, half of them copies of others."""
    generator = torch.Generator().manual_seed(1)
    return with_copies(signs(shape, generator), generator).to(dtype)


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@by_variant
@by_dtype
@pytest.mark.parametrize("width", (5, 128, 1100))
def test_exact_inputs(emulate, variant, dtype, width):
    x, pivots = exact_inputs(2, 50, width, dtype=dtype), torch.randint(0, 50, (2, 4))
    mask = torch.rand(2, 50) < 0.7
    assert_equal(emulate(x, pivots, mask=mask, **variant), expected(x, pivots, mask))


@by_variant
@by_dtype
@pytest.mark.parametrize("count", (1, 8, 17, 64, 70))
def test_any_number_of_pivots(emulate, variant, dtype, count):
    x, pivots = exact_inputs(1, 33, 64, dtype=dtype), torch.randint(0, 33, (1, count))
    assert_equal(emulate(x, pivots, **variant), expected(x, pivots))


@by_variant
@by_reduction
@pytest.mark.parametrize("count", (1, 19, 64))
def test_reductions(emulate, variant, reduce, count):
    x, pivots, mask = exact_inputs(2, 33, 64), torch.randint(0, 33, (2, count)), torch.rand(2, 33) < 0.7
    assert_equal(emulate(x, pivots, mask=mask, reduce=reduce, **variant), expected(x, pivots, mask, reduce))


@by_variant
@by_dtype
@pytest.mark.parametrize("reduce", (None, "max"))
def test_specials(emulate, variant, dtype, reduce):
    x = exact_inputs(1, 40, 20, dtype=dtype)
    x[0, 0], x[0, 7, 3], x[0, 8, 19], x[0, 9] = torch.nan, torch.inf, -torch.inf, 0
    x[0, 10] = 1e-30  # a zero vector as well
    x[0, 11, 0] = 3e38 if dtype != torch.float16 else torch.inf
    mask = torch.rand(1, 40) < 0.8
    for pivots in ([[9, 12, 10]], [[12, 7, 13]], [[11]]):
        pivots = torch.tensor(pivots)
        assert_equal(emulate(x, pivots, mask=mask, reduce=reduce, **variant), expected(x, pivots, mask, reduce))


@by_variant
@by_dtype
def test_strides_change_no_bit(emulate, variant, dtype):
    x, pivots, mask = torch.randn(3, 45, 520).to(dtype), torch.randint(0, 45, (3, 6)), torch.rand(3, 45) < 0.7
    want = emulate(x, pivots, mask=mask, **variant)
    laid_out = torch.zeros(45, 6, 523, dtype=dtype)[:, ::2, 3:].copy_(x.transpose(0, 1)).transpose(0, 1)
    padded = torch.full((3, 45, 528), torch.nan, dtype=dtype)[..., :520].copy_(x)
    for other in (laid_out, padded):
        assert_equal(emulate(other, pivots.t().contiguous().t(), mask=mask.t().contiguous().t(), **variant), want)
    for row in range(3):
        assert_equal(emulate(x[row : row + 1], pivots[row : row + 1], mask=mask[row : row + 1])[0], want[row])


@by_variant
@by_dtype
def test_real_values(emulate, variant, dtype):
    x, pivots = torch.randn(1, 64, 333).to(dtype), torch.randint(0, 64, (1, 5))
    got = emulate(x, pivots, **variant)
    torch.testing.assert_close(got, reference.pivot_cosine(x.double(), pivots), rtol=0, atol=5e-7, check_dtype=False)


@by_variant
@pytest.mark.parametrize("reduce", (None, "max"))
@pytest.mark.parametrize("lengths", ((1,), (0, 0, 3), (130, 0, 1, 47, 64, 0), (16, 32, 15, 17, 1) * 9))
def test_packed_sequences(emulate, variant, reduce, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, mask = exact_inputs(sum(lengths), 70, dtype=torch.bfloat16), torch.rand(sum(lengths)) < 0.9
    pivots = torch.full((len(lengths), 3), 2**62)  # ignored where a sequence is empty
    for s, (start, length) in enumerate(zip(bounds.tolist(), lengths)):
        if length:
            pivots[s] = start + torch.randint(0, length, (3,))
    got = emulate(x, pivots, mask=mask, cu_seqlens=bounds, reduce=reduce, **variant)
    varlen = reference.duplication_varlen if reduce else reference.pivot_cosine_varlen
    assert_equal(got, varlen(x, bounds, pivots, mask=mask, **({"reduce": reduce} if reduce else {})))
