import ctypes

import pytest
import torch

from pruneops import reference

from . import ELEMENTS, INT, INT32, POINTER, by_dtype, compile_kernels, needs_compiler, pointer, strides

pytestmark = needs_compiler


class Call(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        *((name, INT) for name in ("batch", "tokens", "width", "batch_stride", "row_stride")),
        *(("seeds", POINTER), ("seeds_stride", INT * 2), ("seeds_count", INT)),
        *(("mask", POINTER), ("mask_stride", INT * 2)),
        *(("cu_seqlens", POINTER), ("offsets", POINTER), ("k", INT), ("indices", POINTER), ("radii", POINTER)),
        *((name, INT32) for name in ("element", "cosine", "rounds")),
        *((name, INT32) for name in ("groups", "blocks", "candidates", "backwards", "tile", "work_kb")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("kcenter", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """kcenter or, given cu_seqlens, kcenter_varlen; outputs are poisoned first."""

    def run(x, k, *, seeds=None, mask=None, metric="cosine", cu_seqlens=None, **shape):
        packed = cu_seqlens is not None
        size = (sum(k),) if packed else (x.shape[0], k)
        indices, radii = torch.full(size, -77), torch.full(size, -77.0)
        offsets = torch.tensor([0, *k]).cumsum(0) if packed else None
        call = Call(
            x=pointer(x),
            batch=len(k) if packed else x.shape[0],
            tokens=x.shape[-2],
            width=x.shape[-1],
            batch_stride=0 if packed else x.stride(0),
            row_stride=x.stride(-2),
            seeds=pointer(seeds),
            seeds_stride=strides(seeds),
            seeds_count=0 if seeds is None else seeds.shape[1],
            mask=pointer(mask),
            mask_stride=strides(mask),
            cu_seqlens=pointer(cu_seqlens),
            offsets=pointer(offsets),
            k=0 if packed else k,
            indices=pointer(indices),
            radii=pointer(radii),
            element=ELEMENTS.index(x.dtype),
            cosine=metric == "cosine",
            **{
                **{"rounds": packed, "groups": 1, "blocks": 1, "candidates": 128, "backwards": False, "tile": 0},
                **{"work_kb": 216, **shape},
            },
        )
        kernel(ctypes.byref(call))
        return indices, radii

    return run


def exact_inputs(metric, *shape, dtype=torch.float32, seed=0):
    """Tokens whose similarities are exact in float32, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    if metric == "euclidean":
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(dtype)


def assert_same(got, want, rtol=1.2e-7):
    """Equal indices; radii to one bit, because the square root of torch is not always correctly rounded."""
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=rtol, atol=0, equal_nan=True)


VARIANTS = [
    dict(rounds=False),
    dict(rounds=False, blocks=4, backwards=True),
    dict(rounds=True, candidates=16, work_kb=92),
    dict(rounds=True, blocks=3, candidates=40, backwards=True),
    dict(rounds=True, blocks=2, groups=2, candidates=250),
]
by_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda f: "-".join(f"{k}{int(v)}" for k, v in f.items()))
by_metric = pytest.mark.parametrize("metric", ("cosine", "euclidean"))


@by_variant
@by_metric
@by_dtype
def test_exact_inputs_give_equal_answers(emulate, variant, metric, dtype):
    x = exact_inputs(metric, 2, 150, 64, dtype=dtype)
    assert_same(emulate(x, 60, metric=metric, **variant), reference.kcenter(x, 60, metric=metric))


@by_variant
@by_metric
def test_every_token_of_a_small_set(emulate, variant, metric):
    x = exact_inputs(metric, 3, 37, 4, dtype=torch.float16)  # 16 different tokens at most under cosine
    assert_same(emulate(x, 37, metric=metric, **variant), reference.kcenter(x, 37, metric=metric))


@by_variant
@by_dtype
def test_seeds_mask_and_any_strides(emulate, variant, dtype):
    x = exact_inputs("euclidean", 300, 3, 154, dtype=dtype)[..., 1:78].transpose(0, 1)  # odd width, no row at 16 bytes
    seeds = torch.stack([torch.randperm(300)[:20] for _ in range(3)]).t().contiguous().t()
    mask = (torch.rand(300, 3) < 0.5).t()
    want = reference.kcenter(x, 90, seeds=seeds, mask=mask, metric="euclidean")
    assert_same(emulate(x, 90, seeds=seeds, mask=mask, metric="euclidean", **variant), want)


@by_variant
@by_metric
def test_odd_width_with_aligned_rows(emulate, variant, metric):
    x = torch.zeros(1, 140, 136, dtype=torch.bfloat16)[..., :131]
    x.copy_(exact_inputs("euclidean", 1, 140, 131))
    if metric == "cosine":
        x[..., 64:] = 0
        x[..., :64] = exact_inputs("cosine", 1, 140, 64)
    padding = x.as_strided((140, 5), (136, 1), 131)
    padding.fill_(torch.nan)
    assert_same(emulate(x, 50, metric=metric, **variant), reference.kcenter(x, 50, metric=metric))


@by_variant
@by_metric
@by_dtype
def test_zeros_duplicates_and_non_finite(emulate, variant, metric, dtype):
    x = exact_inputs(metric, 1, 60, 16, dtype=dtype)
    x[0, 40:50] = x[0, 5]
    x[0, 50:53] = 0
    x[0, 2], x[0, 7, 3], x[0, 33, 0] = torch.nan, torch.inf, -torch.inf
    mask = torch.ones(1, 60, dtype=torch.bool)
    mask[0, 0] = False
    want = reference.kcenter(x, 59, mask=mask, metric=metric)
    assert_same(emulate(x, 59, mask=mask, metric=metric, **variant), want)


@by_variant
def test_negative_zero_is_zero(emulate, variant):
    x = torch.tensor([[[1, 0], [0, 0], [-1e-25, 0], [1, 1]]])  # the third counts as a zero vector; its product is -0
    assert emulate(x, 4, **variant)[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("blocks", (0, 1, 4, 16))  # gram path; candidate gram tiles of 128, 64 and 32
@by_dtype
def test_wide_tokens(emulate, blocks, dtype):
    x = exact_inputs("euclidean", 1, 300, 328, dtype=dtype)  # 6 or 11 stages, the last of them partly filled
    got = emulate(x, 100, metric="euclidean", rounds=blocks > 0, blocks=max(blocks, 1))
    assert_same(got, reference.kcenter(x, 100, metric="euclidean"))


@pytest.mark.parametrize(("tile", "tokens"), ((64, 130), (64, 192), (128, 257), (192, 200), (192, 400)))
@pytest.mark.parametrize("dtype", ELEMENTS[1:], ids=("float16", "bfloat16"))
def test_wgmma_tiles(emulate, tile, tokens, dtype):
    x = exact_inputs("euclidean", 2, tokens, 336, dtype=dtype)[..., :328]  # the last stage is partly filled
    got = emulate(x, 40, metric="euclidean", tile=tile, blocks=2, backwards=tokens % 2)
    assert_same(got, reference.kcenter(x, 40, metric="euclidean"))


@pytest.mark.parametrize("blocks", (1, 3, 16))
def test_more_tokens_than_candidates(emulate, blocks):
    """Rounds, bins that must be divided again, and ties past the candidates."""
    x = torch.randn(1, 1030, 24, generator=torch.Generator().manual_seed(0)).half()
    x[0, 300:500], x[0, 600:900] = x[0, 3], -x[0, 3]
    tall = emulate(x, 500, blocks=blocks)
    plain = reference.kcenter(x.float(), 500)
    torch.testing.assert_close(tall[1], plain[1], rtol=1e-4, atol=1e-5)
    assert tall[0].unique().numel() == 500


@by_variant
def test_no_token_is_finite(emulate, variant):
    x = torch.full((1, 140, 4), torch.inf)
    mask = torch.rand(1, 140) < 0.7
    want = reference.kcenter(x, 9, mask=mask, metric="euclidean")
    assert_same(emulate(x, 9, mask=mask, metric="euclidean", **variant), want)


@by_variant
def test_more_seeds_than_candidates(emulate, variant):
    x = exact_inputs("euclidean", 1, 330, 8)
    seeds = torch.randperm(330)[None, :290]
    want = reference.kcenter(x, 320, seeds=seeds, metric="euclidean")
    assert_same(emulate(x, 320, seeds=seeds, metric="euclidean", **variant), want)


@pytest.mark.parametrize("shape", (dict(work_kb=24, candidates=100), dict(candidates=256, blocks=4)))
@pytest.mark.parametrize("levels", (2, 9))  # of a feature: many ties, few ties
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_many_tokens(emulate, shape, levels, dtype):
    """A copy of the scores in shared memory or not; ranges of scores and of equal scores' indices that are divided."""
    x = torch.randint(0, levels, (1, 5000, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 2000:2100] *= 100
    got = emulate(x, 400, metric="euclidean", rounds=True, **shape)
    assert_same(got, reference.kcenter(x, 400, metric="euclidean"))


@by_variant
def test_out_of_tokens(emulate, variant):
    x = exact_inputs("euclidean", 2, 40, 8)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 10:15], mask[1, 3] = True, True
    indices, radii = emulate(x, 9, mask=mask, metric="euclidean", **variant)
    for row, allowed in enumerate((5, 1)):
        want = reference.kcenter(x[row], allowed, mask=mask[row], metric="euclidean")
        assert_same((indices[row, :allowed], radii[row, :allowed]), want)
        assert (indices[row, allowed:] == -1).all() and radii[row, allowed:].isnan().all()


@by_variant
def test_a_seed_out_of_range_is_skipped(emulate, variant):
    x = exact_inputs("euclidean", 1, 40, 8)
    indices, radii = emulate(x, 9, seeds=torch.tensor([[40, 7, -1]]), metric="euclidean", **variant)
    want = reference.kcenter(x, 7, seeds=torch.tensor([[7]]), metric="euclidean")
    assert indices[0, [0, 2]].tolist() == [-1, -1] and radii[0, [0, 2]].isnan().all()
    assert_same((indices[:, [1, *range(3, 9)]], radii[:, [1, *range(3, 9)]]), want)


@by_metric
@by_dtype
def test_variants_agree_to_the_bit_and_prefixes_hold(emulate, metric, dtype):
    x = torch.randn(1, 200, 96).to(dtype)
    x[0, 100:130] = x[0, 17]
    want = emulate(x, 200, metric=metric)
    rounds = emulate(x, 200, metric=metric, **VARIANTS[2])
    torch.testing.assert_close(rounds[1], want[1], rtol=1e-5, atol=1e-2)  # norms are summed in another order
    for first, variant in ((want, VARIANTS[1]), (rounds, VARIANTS[3]), (rounds, VARIANTS[4])):
        assert_same(emulate(x, 200, metric=metric, **variant), first, rtol=0)
        assert_same(emulate(x, 31, metric=metric, **variant), (first[0][:, :31], first[1][:, :31]), rtol=0)
    finite = want[1][0, 1:]
    assert (finite.diff() <= 0).all()


@by_variant
def test_low_scores_in_few_classes(emulate, variant):
    """Low scores at multiples of 256, so that one class of tokens could hold all of them."""
    x = torch.zeros(1, 1200, 2)
    x[0, ::256, 0], x[0, 1::256, 1] = torch.arange(1.0, 6), torch.arange(7.0, 12)
    assert_same(emulate(x, 20, metric="euclidean", **variant), reference.kcenter(x, 20, metric="euclidean"))


@by_metric
@pytest.mark.parametrize("variant", VARIANTS[2:], ids=("one block", "group of 3", "two groups"))
def test_packed_sequences(emulate, variant, metric):
    lengths, ks = (130, 0, 1, 47, 64), (40, 0, 1, 47, 3)
    x = exact_inputs(metric, sum(lengths), 64, dtype=torch.bfloat16)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    want = reference.kcenter_varlen(x, bounds, ks, metric=metric)
    assert_same(emulate(x, ks, cu_seqlens=bounds, metric=metric, **variant), want)


@pytest.mark.parametrize("variant", VARIANTS[2:], ids=("one block", "group of 3", "two groups"))
def test_packed_sequences_with_seeds(emulate, variant):
    lengths, ks = (70, 20), (30, 20)
    x = exact_inputs("euclidean", sum(lengths), 7)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    seeds = torch.stack([start + torch.randperm(n)[:18] for start, n in zip((0, 70), lengths)])
    want = reference.kcenter_varlen(x, bounds, ks, seeds=seeds, metric="euclidean")
    assert_same(emulate(x, ks, cu_seqlens=bounds, seeds=seeds, metric="euclidean", **variant), want)
