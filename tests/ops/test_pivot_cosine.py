"""Pivot cosines and duplication on every backend: the contract of `pruneops.pivot_cosine` and its kin, line by line."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pruneops
from tests import contract, cuda_checks, strategies
from tests.contract import (
    CUDA_KERNELS,
    EPS,
    NATIVE,
    REFERENCE,
    TRITON_TARGETS,
    Target,
    assert_same_bits,
    call,
    clustered,
    every_backend,
    every_kernel,
    on_targets,
    seeds_and_mask,
    size,
)
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, assert_type_error, bools, ints, invalid
from tests.strategies import DTYPES, LAYOUTS, laid_out

REDUCTIONS = ("max", "mean", "sum")
FORMS = (None, *REDUCTIONS)  # of a call: every pivot's cosines, or their reduction


def score(target, x, pivots, reduce=None, **options):
    """`pivot_cosine`, or `duplication` with a reduction, on a target; packed with `cu_seqlens`."""
    op, options = ("pivot_cosine", options) if reduce is None else ("duplication", {**options, "reduce": reduce})
    if "cu_seqlens" not in options:
        return call(target, op, x, pivots, **options)
    return call(target, f"{op}_varlen", x, options.pop("cu_seqlens"), pivots, **options)


def directions(x):
    """Tokens divided by their length, in float64; 0 for a zero vector of float32, NaN for a non-finite one."""
    x = x.double()
    square = x.square().sum(-1, keepdim=True)
    direction = (x / square.sqrt()).where(square >= torch.finfo(torch.float32).tiny, 0.0)
    return direction.where(square <= torch.finfo(torch.float32).max / 4, torch.nan)


def float64_cosines(x, pivots, mask=None):
    """Cosines [.., P, N] of x [.., N, D] with its tokens `pivots`."""
    direction = directions(x)
    cosines = torch.take_along_dim(direction, pivots[..., None], -2) @ direction.mT
    return cosines if mask is None else cosines.where(mask[..., None, :], torch.inf)


def reduced(cosines, reduce):
    """[.., N] from cosines [.., P, N]; in float64 a mean is divided in float32, as it must be."""
    if reduce is None:
        return cosines
    if reduce == "mean":
        return cosines.sum(-2).float() / cosines.shape[-2]
    return cosines.amax(-2) if reduce == "max" else cosines.sum(-2)


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
    return x, pivots, mask, draw(st.sampled_from(FORMS if pivots.shape[-1] else FORMS[:1]))


@st.composite
def exact_packings(draw):
    """(x, bounds, pivots, mask, reduce); the pivots of empty sequences are anything."""
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
    reduce = draw(st.sampled_from(FORMS if pivots.shape[1] else FORMS[:1]))
    return x, draw(laid_out(bounds, expand=False)), draw(laid_out(pivots, expand=False)), mask, reduce


# Answers


@every_backend
def test_known_answer(target):
    """Stands on no other code: angles of 0, 90, 180 and 45 degrees, a zero vector, one that is none, one left alone."""
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
    assert_scores(score(target, x, pivots, reduce, mask=mask), reduced(float64_cosines(x, pivots, mask), reduce))


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
            truth = reduced(float64_cosines(x[start:end], own - start, part), reduce)
            assert_scores(scores[..., start:end], truth)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", [8, 64])
def test_real_values(target, count, dtype):
    """Error at most twice the reference's, the same bits on every call."""
    x = clustered(size(target, (2, 700, 333), (2, 60, 200)), dtype=dtype)
    pivots, mask = seeds_and_mask(x.shape[:-1], count)
    cosines = float64_cosines(x, pivots, mask)
    for reduce, scale in ((None, 1), ("max", 1), ("mean", 1), ("sum", count)):
        scores = score(target, x, pivots, reduce, mask=mask)
        truth = reduced(cosines, reduce)
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
    x = contract.signs((tokens, size(target, width, min(width, 2100))), generator)
    pivots = pivots_of((tokens,), count, generator)
    cosines = float64_cosines(x, pivots)
    for reduce in FORMS:
        assert_scores(score(target, x, pivots, reduce), reduced(cosines, reduce))


@every_backend
def test_every_length(target):
    """Whatever is left for the last tile, of tokens and of features."""
    generator = torch.Generator().manual_seed(0)
    for length in (15, 16, 17, 31, 32, 33, 64) if target.interpreted else range(1, 200):
        x, pivots = contract.signs((length, 1 + length % 64), generator), torch.tensor([length - 1, 0])
        assert_scores(call(target, "pivot_cosine", x, pivots), float64_cosines(x, pivots))


@on_targets(NATIVE, Target("triton", "cuda"), Target("cuda", "cuda"))
def test_most_tokens(target):
    """2^20 tokens: their angles with the first step through four values, again and again."""
    tokens = 2**20 + 1
    x = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -4]]).repeat(tokens // 4 + 1, 1)[:tokens]
    expected = torch.tensor([1.0, 0, -1, 0]).repeat(tokens // 4 + 1)[:tokens]
    pivots = torch.tensor([0, tokens - 1])
    assert_scores(call(target, "pivot_cosine", x, pivots), expected.expand(2, -1))
    assert_scores(call(target, "duplication", x, pivots, reduce="sum"), 2 * expected)


def test_reference_divides_for_the_mean():
    """On CUDA `mean` multiplies by 1 / P, which is another number."""

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket is not torch.ops.aten.mean
            return function(*args, **(kwargs or {}))

    x = contract.signs((9, 16), torch.Generator().manual_seed(0))
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
    x = contract.signs((int(bounds[-1]), 20), generator)
    pivots = bounds[:-1, None] + torch.rand(len(lengths), 3, generator=generator).mul(lengths[:, None]).long()
    pivots[lengths == 0] = -1
    own = pivots.repeat_interleave(lengths, 0)  # [T, 3]
    cosines = (directions(x)[own] @ directions(x)[:, :, None])[..., 0].T
    for reduce in FORMS:
        assert_scores(score(target, x, pivots, reduce, cu_seqlens=bounds), reduced(cosines, reduce))


@every_backend
@pytest.mark.parametrize("power", [-55, 55])
def test_huge_and_tiny_magnitudes(target, power):
    """Powers of two change no bit, as long as squares fit."""
    x = contract.signs((2, 33, 20), torch.Generator().manual_seed(0))
    pivots, _ = seeds_and_mask((2, 33), 5)
    for reduce in FORMS:
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
@pytest.mark.parametrize("name", strategies.SPECIAL)
def test_special_pivot(target, name):
    """One that is no vector makes its own row NaN and every duplication; a zero vector is like nobody."""
    generator = torch.Generator().manual_seed(0)
    x, (value, count) = contract.signs((2, 30, 16), generator), strategies.SPECIAL[name]
    x[:, 7] = 0
    x[:, 7, :count] = value
    mask = torch.arange(30).ne(3).expand(2, 30)
    for count in (2, 20):
        pivots = torch.tensor([7, 5]).repeat(count // 2).expand(2, -1)
        cosines = float64_cosines(x, pivots, mask)
        for reduce in FORMS:
            scores = score(target, x, pivots, reduce, mask=mask)
            assert_scores(scores, reduced(cosines, reduce))
            assert (scores[..., 3] == torch.inf).all()
            if reduce and name not in ("zero", "underflow"):
                assert scores[mask].isnan().all()


@on_targets(*TRITON_TARGETS)
def test_triton_tiles_change_no_bit(target, monkeypatch):
    """The tiles for many tokens on few: strides and batches that choose others must not show."""
    from pruneops.triton_kernels import pivot_cosine as kernels

    x = clustered((3, 70, 150))
    mask = seeds_and_mask(x.shape[:-1])[1]
    for own in (x, x.half()[..., :144].contiguous()):
        for count in (5, 40):
            pivots = pivots_of(x.shape[:-1], count, torch.Generator().manual_seed(0))
            narrow = [score(target, own, pivots, reduce, mask=mask) for reduce in FORMS]
            with monkeypatch.context() as changed:
                changed.setattr(kernels, "FEW_TOKENS", 0)
                assert_same_bits([score(target, own, pivots, reduce, mask=mask) for reduce in FORMS], narrow)


# Relations between answers


@every_backend
@pytest.mark.parametrize("count", [1, 3, 40, 64, 100])
def test_duplication_reduces_cosines(target, count):
    """The greatest of them to the bit, their sum up to its order, and a mean that is the sum divided once."""
    x = clustered(size(target, (2, 300, 50), (2, 40, 20)))
    pivots, mask = pivots_of(x.shape[:-1], count, torch.Generator().manual_seed(0)), seeds_and_mask(x.shape[:-1])[1]
    cosines = score(target, x, pivots, mask=mask)
    greatest, mean, total = (score(target, x, pivots, reduce, mask=mask) for reduce in REDUCTIONS)
    assert_same_bits(greatest, cosines.amax(-2))
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
    for reduce in FORMS:
        packed = score(target, *packing, reduce, mask=mask.flatten(), cu_seqlens=starts)
        batched = score(target, x, pivots, reduce, mask=mask)
        assert_same_bits(packed, batched.flatten() if reduce else batched.mT.flatten(0, 1).T)


@every_kernel
def test_equal_tokens_score_equally(target):
    """Wherever in x they are, to the bit; so do equal pivots."""
    generator = torch.Generator().manual_seed(0)
    x = contract.with_copies(clustered(size(target, (900, 67), (120, 33))), generator, share=0.7)
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
    plain = [score(target, x, pivots, reduce, mask=mask) for reduce in FORMS]
    for name in LAYOUTS.keys() - {"expanded"}:
        layout = LAYOUTS[name]
        again = [score(target, layout(x), layout(pivots), reduce, mask=layout(mask)) for reduce in FORMS]
        assert_same_bits(again, plain)


@every_backend
def test_rows_of_a_batch_do_not_meet(target):
    x = clustered(size(target, (3, 300, 40), (3, 50, 20)))
    pivots, mask = seeds_and_mask(x.shape[:-1], 6)
    for reduce in FORMS:
        alone = score(target, x, pivots, reduce, mask=mask)[1]
        for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
            crowded = torch.full_like(x, neighbour)
            crowded[1] = x[1]
            assert_same_bits(score(target, crowded, pivots, reduce, mask=mask)[1], alone)
        single = score(target, x[1], pivots[1], reduce, mask=mask[1])
        assert_same_bits(score(target, x[1:2], pivots[1:2], reduce, mask=mask[1:2])[0], single)
        if target.backend != "reference":
            assert_same_bits(single, alone)


@every_backend
def test_sequences_do_not_meet(target):
    x = clustered((90, 20))
    bounds, pivots = torch.tensor([0, 30, 30, 61, 90]), torch.tensor([[0, 9], [-1, -1], [60, 31], [62, 61]])
    for reduce in FORMS:
        alone = score(target, x, pivots, reduce, cu_seqlens=bounds)[..., 30:61]
        for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
            crowded = torch.full_like(x, neighbour)
            crowded[30:61] = x[30:61]
            assert_same_bits(score(target, crowded, pivots, reduce, cu_seqlens=bounds)[..., 30:61], alone)


def every_form(x, pivots, mask, bounds):
    """All operators on tensors x [B, N, D], batched and packed."""
    flat, own = x.flatten(0, 1), bounds[:-1, None] + torch.arange(3, device=x.device)
    mean = {"mask": mask.flatten(), "reduce": "mean"}
    return (
        pruneops.pivot_cosine(x, pivots, mask=mask),
        pruneops.duplication(x, pivots),
        pruneops.pivot_cosine_varlen(flat, bounds, own),
        pruneops.duplication_varlen(flat, bounds, own, **mean),
    )


def form_inputs(seed, shape=(3, 900, 130), dtype=torch.float32):
    x = clustered(shape, seed, dtype=dtype)
    total = shape[0] * shape[1]
    return x, *seeds_and_mask(shape[:-1], 8, seed=seed), torch.tensor([0, total // 3 + seed, total // 2, total])


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    inputs = form_inputs(0)
    with pruneops.backend(target.backend):
        contract.assert_threads_change_no_bit(lambda: every_form(*inputs))


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    """Calls from several threads at once give the answers of calls in turn."""
    calls = [functools.partial(every_form, *form_inputs(seed, (2, 150, 20))) for seed in range(4)]
    results = contract.run_concurrently(target, calls)
    with pruneops.backend(target.backend):
        assert_same_bits(results, [call() for call in calls])


# Edges


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3), (1, 1, 1), (2, 5, 3), (0, 3), (5, 3)], ids=str)
def test_edges(target, shape):
    """No batch, no tokens, no pivots, one of each, and a mask that leaves nobody."""
    for x in (torch.ones(shape), torch.zeros(shape), torch.full(shape, torch.nan)):
        for count in (0, 1, 3):
            pivots = torch.zeros(*shape[:-2], count, dtype=torch.int64)
            if pivots.numel() and shape[-2] == 0:
                continue
            for mask in (None, torch.zeros(shape[:-1], dtype=torch.bool)):
                for reduce in FORMS if count else FORMS[:1]:
                    truth = reduced(float64_cosines(x, pivots, mask), reduce) if x.numel() else None
                    scores = score(target, x, pivots, reduce, mask=mask)
                    assert scores.shape == (*shape[:-2], *(() if reduce else (count,)), shape[-2])
                    if truth is not None:
                        torch.testing.assert_close(scores, truth.float(), rtol=0, atol=2 * EPS, equal_nan=True)


@every_backend
def test_empty_packing(target):
    x = torch.empty(0, 3)
    for bounds in ([0], [0, 0, 0]):
        pivots = torch.full((len(bounds) - 1, 2), 99)
        for reduce in FORMS:
            scores = score(target, x, pivots, reduce, cu_seqlens=torch.tensor(bounds))
            assert scores.shape == ((0,) if reduce else (2, 0))
    assert score(target, torch.ones(4, 3), torch.empty(1, 0, dtype=torch.int64), cu_seqlens=ints(0, 4)).shape == (0, 4)


@every_backend
def test_no_gradient(target):
    x, pivots, mask, bounds = contract.to_device(form_inputs(0, (2, 60, 4)), target.device)
    with pruneops.backend(target.backend):
        assert not any(result.requires_grad for result in every_form(x.requires_grad_(), pivots, mask, bounds))


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Tokens, pivots and mask of two rows, far apart in sparse files."""
    generator = torch.Generator().manual_seed(0)
    near = contract.signs((2, 4, 16), generator)
    pivots, mask = pivots_of((2, 4), 3, generator), torch.tensor([[True, True, False, True], [True, False, True, True]])
    x, *far = (contract.with_gaps_past_2_31(tmp_path, tensor, 1) for tensor in (near, pivots, mask))
    starts = torch.tensor([0, 4])
    with pruneops.backend(target.backend):  # `call` would copy the files
        assert_scores(pruneops.pivot_cosine(x, far[0], mask=far[1]), float64_cosines(near, pivots, mask))
        rows = contract.with_gaps_past_2_31(tmp_path, near, 0), far[0]
        assert_scores(pruneops.duplication(*rows), reduced(float64_cosines(near, pivots), "max"))
        packed = pruneops.pivot_cosine_varlen(x[1], starts, far[0][1:], mask=far[1][1])
        assert_scores(packed, float64_cosines(near, pivots, mask)[1])


@on_targets(NATIVE)
def test_memory(target):
    """Duplication: far below the 256 MB of [P, N]; cosines: nothing beside them."""
    extra = contract.run_python(
        """
import re, torch, pruneops

def kilobytes(name):  # getrusage would count the process that started this one
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s+(\\d+) kB", status.read())[1])

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


# Compilation


def samples():
    """(operator, arguments, keyword arguments)"""
    x = torch.randn(2, 9, 5)
    pivots, mask = seeds_and_mask((2, 9))
    bounds, own = torch.tensor([0, 4, 9]), torch.tensor([[0, 3], [4, 8]])
    return [
        ("pivot_cosine", (x, pivots), {}),
        ("pivot_cosine", (x[0].mT.contiguous().mT.half(), pivots[0]), {"mask": mask[0]}),
        ("duplication", (x.bfloat16(), pivots), {"mask": mask, "reduce": "mean"}),
        ("pivot_cosine_varlen", (x[0], bounds, own), {}),
        ("duplication_varlen", (x[0], bounds.int(), own), {"mask": mask[0], "reduce": "sum"}),
    ]


@every_backend
@pytest.mark.parametrize("sample", range(5))
def test_opcheck(target, sample):
    op, args, kwargs = samples()[sample]
    contract.opcheck(target, op, *args, **kwargs)


def scored(x, pivots, k):
    """What a model does with the operators: prepare features, score, keep the least similar."""
    features = x - x.mean(1, keepdim=True)
    mask = features.abs().sum(-1) > 0
    kept = pruneops.duplication(features, pivots, mask=mask).topk(k, largest=False).indices.sort().values
    flat = features.flatten(0, 1)
    bounds = torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)
    packed = pruneops.duplication_varlen(flat, bounds, pivots + bounds[:-1, None], reduce="sum")
    cosines = pruneops.pivot_cosine(features, pivots), pruneops.pivot_cosine_varlen(flat, bounds[[0, -1]], pivots[:1])
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, packed, *cosines


@every_backend
def test_compile_without_graph_break(target):
    sizes = (12, 8, 3, 2), (20, 5, 7, 3), (31, 16, 4, 8)
    calls = [(torch.randn(2, N, D), torch.arange(2 * P).view(2, P) % N, k) for N, D, k, P in sizes]
    contract.assert_compiles(target, scored, calls)


def test_compile_with_inductor():
    calls = "[(torch.randn(2, N, D), torch.arange(2 * k).view(2, k), k) for N, D, k in ((12, 8, 3), (20, 5, 7))]"
    contract.assert_compiles_with_inductor(__name__, "scored", calls)


# Errors

X = torch.randn(2, 6, 4)
GOOD = {"x": X, "pivots": ints([0, 1], [5, 5])}
PACKED = {"x": X[0], "cu_seqlens": ints(0, 2, 6), "pivots": ints([0], [5])}
HERE = "on the device of x, cpu"


def bad_calls(op):
    bad = functools.partial(InvalidCall, op, GOOD)
    return [
        bad(ValueError, "x", "of shape [4]", "of rank 2 or 3", x=X[0, 0]),
        bad(ValueError, "x", "of shape [1, 2, 6, 4]", "of rank 2 or 3", x=X[None]),
        bad(ValueError, "x", "of shape [2, 6, 0]", "at least one feature wide", x=X[..., :0]),
        bad(TypeError, "x", "torch.int64", DTYPE_NAMES, x=X.long()),
        bad(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X.double()),
        bad(TypeError, "pivots", "torch.int32", "int64", pivots=GOOD["pivots"].int()),
        bad(ValueError, "pivots", "of shape [2]", "of shape [2, P]", pivots=ints(1, 2)),
        bad(ValueError, "pivots", "of shape [3, 1]", "of shape [2, P]", pivots=ints([0], [0], [0])),
        bad(ValueError, "pivots", "of shape [2, 2]", "of shape [P]", x=X[0]),
        bad(ValueError, "pivots", "on meta", HERE, pivots=GOOD["pivots"].to("meta")),
        bad(ValueError, "pivots", "6 at one place", "in [0, 6)", pivots=ints([0, 1], [0, 6]), values=True),
        bad(ValueError, "pivots", "-1 at one place", "in [0, 6)", pivots=ints([0, -1], [0, 6]), values=True),
        bad(ValueError, "pivots", "0 at one place", "in [0, 0)", x=X[:, :0], pivots=ints([0], [0]), values=True),
        bad(TypeError, "mask", "torch.uint8", "bool", mask=bools(2, 6).byte()),
        bad(ValueError, "mask", "of shape [2, 5]", "of shape [2, 6]", mask=bools(2, 5)),
        bad(ValueError, "mask", "of shape [6]", "of shape [2, 6]", mask=bools(6)),
        bad(ValueError, "mask", "on meta", HERE, mask=bools(2, 6, device="meta")),
    ]


def bad_packings(op):
    bad = functools.partial(InvalidCall, f"{op}_varlen", PACKED)
    falling = {"cu_seqlens": ints(0, 7, 6), "pivots": ints([0], [5])}
    return [
        bad(ValueError, "x", "of shape [2, 6, 4]", "of rank 2", x=X),
        bad(ValueError, "x", "of shape [6, 0]", "at least one feature wide", x=X[0, :, :0]),
        bad(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X[0].double()),
        bad(TypeError, "cu_seqlens", "torch.float32", "int32 or int64", cu_seqlens=ints(0.0, 2.0, 6.0)),
        bad(ValueError, "cu_seqlens", "of shape [1, 3]", "of rank 1", cu_seqlens=ints([0, 2, 6])),
        bad(ValueError, "cu_seqlens", "empty", "of at least one entry", cu_seqlens=ints(dtype=torch.int64)),
        bad(ValueError, "cu_seqlens", "on meta", HERE, cu_seqlens=ints(0, 2, 6, device="meta")),
        bad(ValueError, "cu_seqlens[0]", "1", "0", cu_seqlens=ints(1, 2, 6), values=True),
        bad(ValueError, "cu_seqlens[-1]", "5", "the 6 tokens of x", cu_seqlens=ints(0, 2, 5), values=True),
        bad(ValueError, "cu_seqlens", "falling from 7 to 6 at 1", "non-decreasing", **falling, values=True),
        bad(TypeError, "pivots", "torch.int32", "int64", pivots=PACKED["pivots"].int()),
        bad(ValueError, "pivots", "of shape [2]", "of shape [2, P]", pivots=ints(0, 5)),
        bad(ValueError, "pivots", "of shape [1, 1]", "of shape [2, P]", pivots=ints([0])),
        bad(ValueError, "pivots", "on meta", HERE, pivots=PACKED["pivots"].to("meta")),
        bad(ValueError, "pivots", "2 at one place", "in [0, 2)", pivots=ints([2], [3]), values=True),
        bad(ValueError, "pivots", "1 at one place", "in [2, 6)", pivots=ints([0], [1]), values=True),
        bad(TypeError, "mask", "torch.uint8", "bool", mask=bools(6).byte()),
        bad(ValueError, "mask", "of shape [5]", "of shape [6]", mask=bools(5)),
        bad(ValueError, "mask", "on meta", HERE, mask=bools(6, device="meta")),
    ]


def bad_reductions(op, good):
    bad = functools.partial(InvalidCall, op, good)
    return [
        bad(ValueError, "reduce", "'median'", f"one of {REDUCTIONS}", reduce="median"),
        bad(ValueError, "pivots", "of shape [2, 0]", "at least one a row", pivots=torch.empty(2, 0, dtype=torch.int64)),
    ]


BAD = [bad for op in ("pivot_cosine", "duplication") for bad in (*bad_calls(op), *bad_packings(op))]
BAD += [*bad_reductions("duplication", GOOD), *bad_reductions("duplication_varlen", PACKED)]


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@invalid([bad for bad in BAD if bad.argument == "reduce" or bad.id.startswith("pivot_cosine-mask-of")])
def test_errors_under_compile(bad):
    bad.assert_raises_under_compile()


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("pivot_cosine", {"x": [[1.0]]}, "x must be Tensor, got list"),
        ("pivot_cosine", {"pivots": [0]}, "pivots must be Tensor, got list"),
        ("pivot_cosine", {"mask": 1}, "mask must be Tensor or NoneType, got int"),
        ("duplication", {"x": 1.0}, "x must be Tensor, got float"),
        ("duplication", {"pivots": 0}, "pivots must be Tensor, got int"),
        ("duplication", {"mask": [True]}, "mask must be Tensor or NoneType, got list"),
        ("duplication", {"reduce": 1}, "reduce must be str, got int"),
        ("duplication", {"reduce": None}, "reduce must be str, got NoneType"),
    ],
)
def test_errors_of_type(packed, op, changes, words):
    if packed:
        assert_type_error(f"{op}_varlen", {**PACKED, **changes}, words)
        assert_type_error(f"{op}_varlen", {**PACKED, "cu_seqlens": [0]}, "cu_seqlens must be Tensor, got list")
    else:
        assert_type_error(op, {**GOOD, **changes}, words)


@pytest.mark.gpu
def test_errors_on_cuda(monkeypatch):
    """Values are read under PRUNEOPS_DEBUG=1 only."""
    x, outside = X.cuda(), torch.tensor([[0], [6]])
    with pytest.raises(ValueError, match="on the device of x, cuda"):
        pruneops.pivot_cosine(x, outside)
    monkeypatch.setenv("PRUNEOPS_DEBUG", "1")
    for op in (pruneops.pivot_cosine, pruneops.duplication):
        with pytest.raises(ValueError, match=r"pivots must be in \[0, 6\), got 6 at one place"):
            op(x, outside.cuda())
    for op in (pruneops.pivot_cosine_varlen, pruneops.duplication_varlen):
        with pytest.raises(ValueError, match=r"cu_seqlens\[-1\] must be the 6 tokens of x, got 5"):
            op(x[0], torch.tensor([0, 5]).cuda(), outside[:1].cuda())


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    check(target, every_form, lambda seed: contract.to_device(form_inputs(seed, dtype=torch.bfloat16), "cuda"))


@CUDA_KERNELS
@pytest.mark.parametrize("tokens", [64, 5000])
def test_cuda_offsets_past_two_to_the_31(target, tokens):
    """Tokens of two rows that interleave, spread over 2^31 elements, in both forms."""
    generator = torch.Generator().manual_seed(0)
    near = contract.signs((2, tokens, 16), generator).to(torch.bfloat16)
    gap = 2**31 // (tokens - 1) // 16 * 16 + 32
    room = torch.empty(tokens * gap, dtype=torch.bfloat16, device="cuda")
    x = room.as_strided(near.shape, (16, gap, 1)).copy_(near)
    pivots = pivots_of((2, tokens), 6, generator)
    cosines = float64_cosines(near, pivots)
    with pruneops.backend(target.backend):
        assert_scores(pruneops.pivot_cosine(x, pivots.cuda()).cpu(), cosines)
        packed = pruneops.duplication_varlen(x[1], torch.tensor([0, tokens], device="cuda"), pivots[1:].cuda())
        assert_scores(packed.cpu(), reduced(cosines[1], "max"))


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


# Launches

TRITON_LAUNCHES = """
from pruneops.triton_kernels import pivot_cosine as kernels

for dtype, width in ((torch.bfloat16, 64), (torch.float32, 33)):
    for tokens in (50, 51, 64, 9000, 9001):
        x, mask = torch.ones(3, tokens, width, dtype=dtype), torch.ones(3, tokens, dtype=torch.bool)
        for count in (1, 3, 16, 17, 64, 100):
            pivots = torch.zeros(3, count, dtype=torch.int64)
            kernels.pivot_cosine(x, None, pivots, None, None)
            kernels.pivot_cosine(x[:1], None, pivots[:1], None, None)
            if dtype == torch.bfloat16:
                kernels.pivot_cosine(x, None, pivots, mask, "max")
                kernels.pivot_cosine(x[:1], torch.tensor([0, 7, tokens]), pivots[:2], mask[:1], "mean")
                kernels.pivot_cosine(x[:1], torch.tensor([0, tokens]), pivots[:1], mask[:1], "mean")
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths and numbers of pivots compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 5 * 6 * (5 + 2)
    # few or many pivots, few or many tokens: as a batch, reduced, packed (with few tokens here)
    assert compiled == (4 + 4 + 2) + 4
