"""Pivot cosines and duplication on every backend: the contract of `pruneops.pivot_cosine` and its kin, line by line."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pruneops
from tests import contract, inputs, oracles, strategies
from tests.contract import (
    CUDA_KERNELS,
    EPS,
    NATIVE,
    REFERENCE,
    TRITON_TARGETS,
    Target,
    assert_same_bits,
    call,
    every_backend,
    every_kernel,
    on_targets,
    size,
)
from tests.inputs import DTYPES, LAYOUTS, clustered, seeds_and_mask
from tests.invalid_calls import ints
from tests.specs.pivot_cosine import REDUCTIONS
from tests.strategies import laid_out

VARIANTS = (None, *REDUCTIONS)  # of a call: every pivot's cosines, or their reduction


def score(target, x, pivots, reduce=None, **options):
    """`pivot_cosine`, or `duplication` with a reduction, on a target; packed with `cu_seqlens`."""
    op, options = ("pivot_cosine", options) if reduce is None else ("duplication", {**options, "reduce": reduce})
    if "cu_seqlens" not in options:
        return call(target, op, x, pivots, **options)
    return call(target, f"{op}_varlen", x, options.pop("cu_seqlens"), pivots, **options)


def assert_scores(scores, truth):
    """Scores equal float64 ones whose values float32 holds."""
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, truth.float(), rtol=0, atol=0, equal_nan=True)


def pivots_of(shape, count, generator):
    """int64 [.., count]: tokens of [.., N], perhaps the same more than once."""
    return torch.randint(0, max(shape[-1], 1), (*shape[:-1], count), generator=generator)


counts = st.integers(0, 5) | st.sampled_from([16, 17, 64, 70])


@st.composite
def exact_cases(draw):
    """(x, pivots, mask, reduce)"""
    generator = draw(strategies.generators)
    shape = draw(strategies.shapes())
    x = draw(laid_out(draw(strategies.exact_tokens(shape, generator))))
    pivots = draw(laid_out(pivots_of(shape[:-1], draw(counts), generator)))
    mask = None
    if draw(st.booleans()):
        mask = draw(laid_out(torch.rand(shape[:-1], generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))))
    return x, pivots, mask, draw(st.sampled_from(VARIANTS if pivots.shape[-1] else VARIANTS[:1]))


@st.composite
def exact_packings(draw):
    """(x, bounds, pivots, mask, reduce); the pivots of empty sequences are garbage."""
    generator = draw(strategies.generators)
    lengths = draw(st.lists(st.just(0) | st.integers(1, 20), max_size=8))
    x = draw(laid_out(draw(strategies.exact_tokens((sum(lengths), draw(st.integers(1, 70))), generator))))
    bounds = draw(strategies.bounds(lengths))
    pivots = torch.full((len(lengths), draw(counts)), draw(st.sampled_from([-1, 2**40])))
    for own, start, length in zip(pivots, bounds.tolist(), lengths):
        if length:
            own.copy_(start + pivots_of((length,), len(own), generator))
    mask = None
    if draw(st.booleans()):
        mask = draw(laid_out(torch.rand(len(x), generator=generator) < 0.7))
    reduce = draw(st.sampled_from(VARIANTS if pivots.shape[1] else VARIANTS[:1]))
    return x, draw(laid_out(bounds, expand=False)), draw(laid_out(pivots, expand=False)), mask, reduce


# Answers


@every_backend
def test_known_answer(target):
    """Written by hand: angles of 0, 90, 180 and 45 degrees, a zero vector, a NaN, a masked token."""
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [0.5, 0.5], [0, 0], [nan, 1], [1, 0]])
    mask = torch.arange(7).ne(6)
    cosines = torch.tensor([[1.0, 0, -1, 0.5**0.5, 0, nan, inf], [0, 0, 0, 0, 0, nan, inf]])
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=2 * EPS, equal_nan=True)
    close(call(target, "pivot_cosine", x, torch.tensor([0, 4]), mask=mask), cosines)
    close(call(target, "duplication", x, torch.tensor([0, 4]), mask=mask), cosines.amax(0))
    for reduce, share in (("mean", 3), ("sum", 1)):
        answer = call(target, "duplication", x, torch.tensor([0, 0, 4]), mask=mask, reduce=reduce)
        close(answer, 2 * cosines[0] / share)
    bounds = torch.tensor([0, 2, 4])
    packed = call(target, "pivot_cosine_varlen", x[:4], bounds, torch.tensor([[0], [2]]))
    close(packed, torch.tensor([[1.0, 0, 1, -(0.5**0.5)]]))
    close(call(target, "duplication_varlen", x[:4], bounds, torch.tensor([[0], [2]])), packed[0])


@every_backend
@given(case=exact_cases())
def test_exact_inputs(target, case):
    """One right answer: special tokens and pivots, masks, strides, dtypes, batches, pivots from none to many."""
    x, pivots, mask, reduce = case
    assert_scores(
        score(target, x, pivots, reduce, mask=mask), oracles.reduced(oracles.cosines(x, pivots, mask), reduce)
    )


@every_backend
@given(packing=exact_packings())
def test_exact_packings(target, packing):
    x, bounds, pivots, mask, reduce = packing
    scores = score(target, x, pivots, reduce, mask=mask, cu_seqlens=bounds)
    assert scores.shape == (len(x),) if reduce else (pivots.shape[1], len(x))
    starts = bounds.tolist()
    for own, start, end in zip(pivots, starts, starts[1:]):
        if start < end:
            part = None if mask is None else mask[start:end]
            truth = oracles.reduced(oracles.cosines(x[start:end], own - start, part), reduce)
            assert_scores(scores[..., start:end], truth)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", [8, 64])
def test_real_values(target, count, dtype):
    """Error at most twice the reference's, the same bits on every call."""
    x = clustered(size(target, (2, 700, 333), (2, 60, 200)), dtype=dtype)
    pivots, mask = seeds_and_mask(x.shape[:-1], count)
    cosines = oracles.cosines(x, pivots, mask)
    for reduce, scale in ((None, 1), ("max", 1), ("mean", 1), ("sum", count)):
        scores = score(target, x, pivots, reduce, mask=mask)
        truth = oracles.reduced(cosines, reduce)
        error, allowed = (
            float((s.double() - truth).nan_to_num(0).abs().max())  # masked: inf - inf
            for s in (scores, score(REFERENCE, x, pivots, reduce, mask=mask))
        )
        assert torch.equal(scores.isfinite(), truth.isfinite())
        contract.assert_no_worse(error, allowed, scale)
        assert_same_bits(score(target, x, pivots, reduce, mask=mask), scores)


@every_backend
@pytest.mark.parametrize(
    ("tokens", "width", "count"), [(5000, 67, 64), (3000, 1030, 8), (70000, 3, 17), (40, 16384, 5)]
)
def test_many_tiles(target, tokens, width, count):
    """Across tiles of tokens, features and pivots, exactly."""
    tokens, count = size(target, (tokens, count), (min(tokens // 16, 300), count))
    generator = torch.Generator().manual_seed(0)
    x = inputs.signs((tokens, size(target, width, min(width, 2100))), generator)
    pivots = pivots_of((tokens,), count, generator)
    cosines = oracles.cosines(x, pivots)
    for reduce in VARIANTS:
        assert_scores(score(target, x, pivots, reduce), oracles.reduced(cosines, reduce))


@every_backend
def test_every_length(target):
    """Every remainder in the last tile, of tokens and of features."""
    generator = torch.Generator().manual_seed(0)
    for length in (15, 16, 17, 31, 32, 33, 64) if target.interpreted else range(1, 200):
        x, pivots = inputs.signs((length, 1 + length % 64), generator), torch.tensor([length - 1, 0])
        assert_scores(call(target, "pivot_cosine", x, pivots), oracles.cosines(x, pivots))


@on_targets(NATIVE, Target("triton", "cuda"), Target("cuda", "cuda"))
def test_million_tokens(target):
    """2^20 tokens: their angles with the first step through four values, again and again."""
    tokens = 2**20 + 1
    x = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -4]]).repeat(tokens // 4 + 1, 1)[:tokens]
    expected = torch.tensor([1.0, 0, -1, 0]).repeat(tokens // 4 + 1)[:tokens]
    pivots = torch.tensor([0, tokens - 1])
    assert_scores(call(target, "pivot_cosine", x, pivots), expected.expand(2, -1))
    assert_scores(call(target, "duplication", x, pivots, reduce="sum"), 2 * expected)


def test_reference_mean_divides():
    """On CUDA `mean` multiplies by 1 / P, which is another number."""

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket is not torch.ops.aten.mean
            return function(*args, **(kwargs or {}))

    x = inputs.signs((9, 16), torch.Generator().manual_seed(0))
    with Called():
        pruneops.reference.duplication(x, torch.tensor([0, 3, 5]), reduce="mean")


@every_backend
def test_many_sequences(target):
    """Hundreds of sequences of lengths around the width of a tile, a third of them empty."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (size(target, 400, 30),), generator=generator)
    lengths[torch.rand(len(lengths), generator=generator) < 0.3] = 0
    lengths[:2] = lengths[-2:] = 0
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x = inputs.signs((int(bounds[-1]), 20), generator)
    pivots = bounds[:-1, None] + torch.rand(len(lengths), 3, generator=generator).mul(lengths[:, None]).long()
    pivots[lengths == 0] = -1
    own = pivots.repeat_interleave(lengths, 0)  # [T, 3]
    cosines = (oracles.directions(x)[own] @ oracles.directions(x)[:, :, None])[..., 0].T
    for reduce in VARIANTS:
        assert_scores(score(target, x, pivots, reduce, cu_seqlens=bounds), oracles.reduced(cosines, reduce))


@every_backend
@pytest.mark.parametrize("power", [-55, 55])
def test_huge_and_tiny_magnitudes(target, power):
    """Powers of two change no bit, as long as squares fit."""
    x = inputs.signs((2, 33, 20), torch.Generator().manual_seed(0))
    pivots, _ = seeds_and_mask((2, 33), 5)
    for reduce in VARIANTS:
        assert_same_bits(score(target, x * 2.0**power, pivots, reduce), score(target, x, pivots, reduce))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 4])
def test_shortest_and_longest_vector(target, dtype, width):
    """Either side of the squared norms 2^-126 and FLT_MAX / 4, where vectors begin and end."""
    below = 1 - torch.finfo(dtype).eps / 2  # the number before 1
    lengths = torch.tensor([1.0, 2.0**-63, 2.0**-63 * 0.99, 2.0**63 * below, 2.0**63, 0, -(2.0**-63)])
    x = (lengths / width**0.5)[:, None].expand(-1, width).to(dtype)  # in width 4 tiny squares are no normal numbers
    kind = torch.tensor([1.0, 1, 0, 1, torch.nan, 0, -1])
    pivots = torch.arange(7)
    scores = score(target, x, pivots)
    torch.testing.assert_close(scores, kind * kind[:, None], rtol=0, atol=4 * EPS, equal_nan=True)


@every_backend
@pytest.mark.parametrize("name", inputs.SPECIAL)
def test_special_pivot(target, name):
    """A non-finite one makes its row NaN and every duplication; a zero vector has cosine 0 with all."""
    generator = torch.Generator().manual_seed(0)
    x = inputs.signs((2, 30, 16), generator)
    x[:, 7] = inputs.special_token(name, x)
    mask = torch.arange(30).ne(3).expand(2, 30)
    for count in (2, 20):
        pivots = torch.tensor([7, 5]).repeat(count // 2).expand(2, -1)
        cosines = oracles.cosines(x, pivots, mask)
        for reduce in VARIANTS:
            scores = score(target, x, pivots, reduce, mask=mask)
            assert_scores(scores, oracles.reduced(cosines, reduce))
            assert (scores[..., 3] == torch.inf).all()
            if reduce and name not in ("zero", "underflow"):
                assert scores[mask].isnan().all()


@on_targets(*TRITON_TARGETS)
def test_triton_tiles_change_no_bit(target, monkeypatch):
    """Tiles for many tokens on few: strides and batches that choose others change no bit."""
    from pruneops.triton_kernels import pivot_cosine as kernels

    x = clustered((3, 70, 150))
    mask = seeds_and_mask(x.shape[:-1])[1]
    for own in (x, x.half()[..., :144].contiguous()):
        for count in (5, 40):
            pivots = pivots_of(x.shape[:-1], count, torch.Generator().manual_seed(0))
            narrow = [score(target, own, pivots, reduce, mask=mask) for reduce in VARIANTS]
            with monkeypatch.context() as changed:
                changed.setattr(kernels, "FEW_TOKENS", 0)
                assert_same_bits([score(target, own, pivots, reduce, mask=mask) for reduce in VARIANTS], narrow)


# Relations between answers


@every_backend
@pytest.mark.parametrize("count", [1, 3, 40, 64, 100])
def test_duplication_reduces_cosines(target, count):
    """Their maximum to the bit, their sum up to its order, and a mean that is the sum divided once."""
    x = clustered(size(target, (2, 300, 50), (2, 40, 20)))
    pivots, mask = pivots_of(x.shape[:-1], count, torch.Generator().manual_seed(0)), seeds_and_mask(x.shape[:-1])[1]
    cosines = score(target, x, pivots, mask=mask)
    maximum, mean, total = (score(target, x, pivots, reduce, mask=mask) for reduce in REDUCTIONS)
    assert_same_bits(maximum, cosines.amax(-2))
    assert_same_bits(mean, total / count)
    known = mask & total.isfinite()
    error = (total.double() - cosines.double().sum(-2))[known].abs().max()
    assert error <= EPS * count * count


@every_kernel
def test_packing_changes_no_bit(target):
    """Sequences of one length, packed and as a batch."""
    x = clustered(size(target, (3, 200, 50), (3, 40, 20)))
    pivots, mask = seeds_and_mask(x.shape[:-1], 20)
    B, N = x.shape[:2]
    starts = torch.arange(0, B * N + 1, N)
    packing = (x.flatten(0, 1), pivots + starts[:-1, None])
    for reduce in VARIANTS:
        packed = score(target, *packing, reduce, mask=mask.flatten(), cu_seqlens=starts)
        batched = score(target, x, pivots, reduce, mask=mask)
        assert_same_bits(packed, batched.flatten() if reduce else batched.mT.flatten(0, 1).T)


@every_kernel
def test_equal_tokens_score_equally(target):
    """To the bit, anywhere in x; so do equal pivots."""
    generator = torch.Generator().manual_seed(0)
    x = inputs.with_copies(clustered(size(target, (900, 67), (120, 33))), generator, share=0.7)
    first = (x[:, None] == x).all(-1).int().argmax(-1)  # the first copy of every token
    assert (first != torch.arange(len(x))).any()
    pivots = pivots_of(x.shape[:-1], 20, generator)
    scores = score(target, x, pivots)
    assert_same_bits(scores[:, first], scores)
    assert_same_bits(score(target, x, first[pivots]), scores)


@every_kernel
def test_strides_change_no_bit(target):
    x = clustered((2, 50, 64), dtype=torch.bfloat16)
    pivots, mask = seeds_and_mask(x.shape[:-1], 5)
    plain = [score(target, x, pivots, reduce, mask=mask) for reduce in VARIANTS]
    for name in LAYOUTS.keys() - {"expanded"}:
        layout = LAYOUTS[name]
        again = [score(target, layout(x), layout(pivots), reduce, mask=layout(mask)) for reduce in VARIANTS]
        assert_same_bits(again, plain)


@every_backend
def test_batch_rows_are_independent(target):
    x = clustered(size(target, (3, 300, 40), (3, 50, 20)))
    pivots, mask = seeds_and_mask(x.shape[:-1], 6)
    for reduce in VARIANTS:
        alone = score(target, x, pivots, reduce, mask=mask)[1]
        for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
            batch = torch.full_like(x, neighbour)
            batch[1] = x[1]
            assert_same_bits(score(target, batch, pivots, reduce, mask=mask)[1], alone)
        single = score(target, x[1], pivots[1], reduce, mask=mask[1])
        assert_same_bits(score(target, x[1:2], pivots[1:2], reduce, mask=mask[1:2])[0], single)
        if target.backend != "reference":
            assert_same_bits(single, alone)


@every_backend
def test_sequences_are_independent(target):
    x = clustered((90, 20))
    bounds, pivots = torch.tensor([0, 30, 30, 61, 90]), torch.tensor([[0, 9], [-1, -1], [60, 31], [62, 61]])
    for reduce in VARIANTS:
        alone = score(target, x, pivots, reduce, cu_seqlens=bounds)[..., 30:61]
        for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
            batch = torch.full_like(x, neighbour)
            batch[30:61] = x[30:61]
            assert_same_bits(score(target, batch, pivots, reduce, cu_seqlens=bounds)[..., 30:61], alone)


# Edges


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3), (1, 1, 1), (2, 5, 3), (0, 3), (5, 3)], ids=str)
def test_edges(target, shape):
    """No batch, no tokens, no pivots, one of each, and a mask without tokens."""
    for x in (torch.ones(shape), torch.zeros(shape), torch.full(shape, torch.nan)):
        for count in (0, 1, 3):
            pivots = torch.zeros(*shape[:-2], count, dtype=torch.int64)
            if pivots.numel() and shape[-2] == 0:
                continue
            for mask in (None, torch.zeros(shape[:-1], dtype=torch.bool)):
                for reduce in VARIANTS if count else VARIANTS[:1]:
                    truth = oracles.reduced(oracles.cosines(x, pivots, mask), reduce) if x.numel() else None
                    scores = score(target, x, pivots, reduce, mask=mask)
                    assert scores.shape == (*shape[:-2], *(() if reduce else (count,)), shape[-2])
                    if truth is not None:
                        torch.testing.assert_close(scores, truth.float(), rtol=0, atol=2 * EPS, equal_nan=True)


@every_backend
def test_empty_packing(target):
    x = torch.empty(0, 3)
    for bounds in ([0], [0, 0, 0]):
        pivots = torch.full((len(bounds) - 1, 2), 99)
        for reduce in VARIANTS:
            scores = score(target, x, pivots, reduce, cu_seqlens=torch.tensor(bounds))
            assert scores.shape == ((0,) if reduce else (2, 0))
    assert score(target, torch.ones(4, 3), torch.empty(1, 0, dtype=torch.int64), cu_seqlens=ints(0, 4)).shape == (0, 4)


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Tokens, pivots and mask of two rows, far apart in sparse files."""
    generator = torch.Generator().manual_seed(0)
    near = inputs.signs((2, 4, 16), generator)
    pivots, mask = pivots_of((2, 4), 3, generator), torch.tensor([[True, True, False, True], [True, False, True, True]])
    x, *far = (contract.with_gaps_past_2_31(tmp_path, tensor, 1) for tensor in (near, pivots, mask))
    starts = torch.tensor([0, 4])
    with pruneops.backend(target.backend):  # `call` would copy the files
        assert_scores(pruneops.pivot_cosine(x, far[0], mask=far[1]), oracles.cosines(near, pivots, mask))
        rows = contract.with_gaps_past_2_31(tmp_path, near, 0), far[0]
        assert_scores(pruneops.duplication(*rows), oracles.reduced(oracles.cosines(near, pivots), "max"))
        packed = pruneops.pivot_cosine_varlen(x[1], starts, far[0][1:], mask=far[1][1])
        assert_scores(packed, oracles.cosines(near, pivots, mask)[1])


@on_targets(NATIVE)
def test_memory(target):
    """Duplication: far below the 256 MB of [P, N]; cosines: nothing beside them."""
    extra = contract.run_python(
        contract.KILOBYTES
        + """
x, pivots = torch.randn(2**20, 8), torch.arange(64)
with pruneops.backend("cpu"):
    for op, out in ((pruneops.duplication, 4 * 2**20), (pruneops.pivot_cosine, 256 * 2**20)):
        op(x[:64], pivots)
        before = kilobytes("VmRSS")
        op(x, pivots)
        print(1024 * (kilobytes("VmHWM") - before) - out)
"""
    )
    for own in map(int, extra.split()):
        assert own < 30e6, f"{own / 1e6:.0f} MB beyond the input and the answer"


# CUDA


@CUDA_KERNELS
@pytest.mark.parametrize("tokens", [64, 5000])
def test_cuda_offsets_past_two_to_the_31(target, tokens):
    """Tokens of two rows that interleave, spread over 2^31 elements, batched and packed."""
    generator = torch.Generator().manual_seed(0)
    near = inputs.signs((2, tokens, 16), generator).to(torch.bfloat16)
    gap = 2**31 // (tokens - 1) // 16 * 16 + 32
    room = torch.empty(tokens * gap, dtype=torch.bfloat16, device="cuda")
    x = room.as_strided(near.shape, (16, gap, 1)).copy_(near)
    pivots = pivots_of((2, tokens), 6, generator)
    cosines = oracles.cosines(near, pivots)
    with pruneops.backend(target.backend):
        assert_scores(pruneops.pivot_cosine(x, pivots.cuda()).cpu(), cosines)
        packed = pruneops.duplication_varlen(x[1], torch.tensor([0, tokens], device="cuda"), pivots[1:].cuda())
        assert_scores(packed.cpu(), oracles.reduced(cosines[1], "max"))


@CUDA_KERNELS
def test_cuda_scores_past_two_to_the_31(target):
    """More than 2^31 scores: the last row is the one that it is alone."""
    rows, count, tokens = 33, 64, 2**20 + 1
    if torch.cuda.mem_get_info()[0] < 4 * rows * count * tokens + 2**30:
        pytest.skip("too little memory")
    x = torch.randn(rows, tokens, 1, device="cuda")
    pivots = torch.arange(count, device="cuda").expand(rows, -1)
    with pruneops.backend(target.backend):
        scores = pruneops.pivot_cosine(x, pivots)
        for row in (0, rows - 1):
            assert torch.equal(scores[row], pruneops.pivot_cosine(x[row], pivots[row]))


@CUDA_KERNELS
def test_cuda_memory(target):
    """Duplication: nothing beside the answer; far below the 256 MB of [P, N]."""
    x, pivots = torch.randn(2**20, 8, device="cuda"), torch.arange(64, device="cuda")
    with pruneops.backend(target.backend):
        pruneops.duplication(x, pivots)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pruneops.duplication(x, pivots)
        assert torch.cuda.max_memory_allocated() - before < 30e6
