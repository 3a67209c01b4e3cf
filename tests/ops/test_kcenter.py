"""Greedy k-center on every backend: the contract of `pruneops.kcenter`, line by line."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, inputs, oracles, strategies
from tests.contract import (
    CUDA_KERNELS,
    EPS,
    NATIVE,
    REFERENCE,
    TRITON_TARGETS,
    assert_same_bits,
    call,
    every_backend,
    on_targets,
    size,
)
from tests.inputs import DTYPES, clustered, seeds_and_mask
from tests.strategies import laid_out

METRICS = ("cosine", "euclidean")


def rounding(x, metric):
    """How far a float32 similarity may lie from the true one."""
    return (4 + x.shape[-1] ** 0.5) * EPS * oracles.similarity_scale(x, metric)


def similarity_error(x, result, metric):
    """Maximum error of the similarities that radii [K] state, against float64 along the same choices."""
    scores = oracles.kcenter_scores(x, result.indices, metric)
    return max(oracles.similarity_errors(result.radii, scores, result.indices, metric).tolist(), default=0.0)


@dataclasses.dataclass
class Case:
    """Arguments of one call."""

    x: torch.Tensor
    k: int
    metric: str = "cosine"
    seeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def run(self, target, **changes):
        """The answer of a target, with some arguments changed."""
        arguments = {**vars(self), **changes}
        return call(target, "kcenter", arguments.pop("x"), arguments.pop("k"), **arguments)


def assert_row(x, result, *, metric, seeds=None, mask=None, tolerance=0.0):
    """indices [K] and radii [K] are an answer for x [N, D]; the only one if tolerance is 0."""
    indices, radii = result
    first = 0 if seeds is None else len(seeds)
    allowed = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.clone()
    if seeds is not None:
        assert torch.equal(indices[:first], seeds)
        allowed[seeds] = False
    assert (radii[:first] == torch.inf).all()
    scores = oracles.kcenter_scores(x, indices.clamp(0, len(x) - 1), metric)  # assert_greedy rejects what is clamped
    contract.assert_greedy(indices[first:], scores[first:], allowed, tolerance)

    indices, radii, scores = indices[first:], radii[first:], scores[first:]
    score = scores.gather(1, indices[:, None])[:, 0]
    assert torch.equal(radii.isnan(), score == torch.inf)
    assert torch.equal(radii == torch.inf, score == -torch.inf)
    known = radii[radii.isfinite()]
    assert (known[1:] <= known[:-1]).all(), "radii increase"
    if tolerance:
        assert similarity_error(x, result, metric) <= tolerance
    else:
        score = score[score.isfinite()]
        truth = (1 - score if metric == "cosine" else (-score).sqrt()).clamp(min=0)
        ulp = 0 if metric == "cosine" else 2.0**-22  # a square root may be one ulp off
        torch.testing.assert_close(known, truth.float(), rtol=ulp, atol=0)


def assert_answer(case, result, tolerance=0.0):
    """`assert_row` for every row of a batch, and shapes and dtypes."""
    assert type(result) is type(pruneops.kcenter(torch.eye(2), 1))
    assert result.indices.shape == result.radii.shape == (*case.x.shape[:-2], case.k)
    assert (result.indices.dtype, result.radii.dtype) == (torch.int64, torch.float32)
    batched = [t if t is None or case.x.dim() == 3 else t[None] for t in (case.x, case.seeds, case.mask, *result)]
    for b in range(len(batched[0])):
        x, seeds, mask, indices, radii = (None if t is None else t[b] for t in batched)
        row = type(result)(indices, radii)
        assert_row(x, row, metric=case.metric, seeds=seeds, mask=mask, tolerance=tolerance)


@st.composite
def exact_tokens(draw, shape, generator):
    """(x, metric): tokens whose similarities are exact in float32."""
    metric = draw(st.sampled_from(METRICS))
    values = inputs.signs if metric == "cosine" else inputs.small_integers
    return draw(strategies.exact_tokens(shape, generator, values)), metric


@st.composite
def exact_cases(draw):
    generator = draw(strategies.generators)
    shape = draw(strategies.shapes())
    x, metric = draw(exact_tokens(shape, generator))
    x = draw(laid_out(x))
    seeds, mask, allowed = None, None, torch.zeros(shape[:-1], dtype=torch.bool)
    if draw(st.booleans()):
        seeds = draw(laid_out(draw(strategies.seeds(shape[:-1], generator)), expand=len(shape) == 3))
        allowed = allowed.scatter(-1, seeds, True)
    if draw(st.booleans()):
        mask = draw(laid_out(draw(strategies.masks(shape[:-1], generator))))
    allowed |= True if mask is None else mask
    limit = int(allowed.sum(-1).min()) if allowed.numel() else shape[-2]
    minimum = max(1, 0 if seeds is None else seeds.shape[-1])
    return Case(x, draw(st.integers(minimum, limit) | st.just(limit)), metric, seeds, mask)


@st.composite
def exact_packings(draw):
    """(x, cu_seqlens, ks, seeds, metric)"""
    generator = draw(strategies.generators)
    lengths, ks = draw(strategies.packings())
    x, metric = draw(exact_tokens((sum(lengths), draw(st.integers(1, 70))), generator))
    bounds = draw(strategies.bounds(lengths))
    seeds = None
    if draw(st.booleans()):
        count = draw(st.integers(0, min(3, min(ks, default=0))))
        rows = [start + torch.randperm(n, generator=generator)[:count] for start, n in zip(bounds.tolist(), lengths)]
        seeds = draw(laid_out(torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.int64), expand=False))
    return draw(laid_out(x)), bounds, ks, seeds, metric


# Answers


@every_backend
def test_known_answer(target):
    """Written by hand: a walk around a square, then its middle."""
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    indices, radii = Case(x, 5, "euclidean").run(target)
    assert indices.tolist() == [0, 4, 2, 3, 1]
    torch.testing.assert_close(radii, torch.tensor([torch.inf, 8**0.5, 2.0, 2.0, 2**0.5]))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    indices, radii = Case(x, 5).run(target)
    assert indices.tolist() == [0, 3, 2, 4, 1]
    torch.testing.assert_close(radii, torch.tensor([torch.inf, 2.0, 1.0, 1.0, 1 - 1.01**-0.5]), rtol=0, atol=1e-6)


@every_backend
@given(case=exact_cases())
def test_exact_inputs(target, case):
    """One right answer: ties, special tokens, masks, seeds, strides, dtypes, batches, k up to all tokens."""
    assert_answer(case, case.run(target))


@every_backend
@given(packing=exact_packings())
def test_exact_packings(target, packing):
    x, bounds, ks, seeds, metric = packing
    result = call(target, "kcenter_varlen", x, bounds, ks, seeds=seeds, metric=metric)
    assert result.indices.shape == result.radii.shape == (sum(ks),)
    assert (result.indices.dtype, result.radii.dtype) == (torch.int64, torch.float32)
    starts = bounds.tolist()
    for s, (indices, radii) in enumerate(zip(result.indices.split(ks), result.radii.split(ks))):
        own = None if seeds is None else seeds[s] - starts[s]
        row = type(result)(indices - starts[s], radii)
        assert_row(x[starts[s] : starts[s + 1]], row, metric=metric, seeds=own) if ks[s] else None


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_real_values(target, dtype, metric):
    """Greedy within rounding, error at most twice the reference's, the same bits on every call."""
    x = clustered(size(target, (2, 700, 200), (2, 70, 33)), dtype=dtype)
    seeds, mask = seeds_and_mask(x.shape[:-1])
    case = Case(x, x.shape[1] // 5, metric, seeds, mask)
    result = case.run(target)
    assert_answer(case, result, rounding(x, metric))
    reference = case.run(REFERENCE)
    for b in range(len(x)):
        error, allowed = (
            similarity_error(x[b], type(r)(r.indices[b], r.radii[b]), metric) for r in (result, reference)
        )
        contract.assert_no_worse(error, allowed, oracles.similarity_scale(x[b], metric))
    for again in (case.run(target), case.run(target)):
        assert_same_bits(again, result)


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tokens", "width"), [(1500, 65), (3000, 64)])
def test_many_rounds_exact(target, metric, tokens, width):
    """Codes of few letters: few distinct similarities, ties across tiles, and rounds that end after one choice."""
    tokens, width = size(target, (tokens, width), (150, width))
    letters = torch.arange(tokens)[:, None] // torch.tensor([512, 64, 8, 1]) % 8  # [N, 4]
    x = torch.zeros(tokens, width)
    x.scatter_(1, letters + torch.arange(0, 32, 8), 1.0)
    case = Case(x, tokens // 6, metric)
    assert_answer(case, case.run(target))


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tokens", "width", "k"), [(1023, 129, 1023), (3000, 67, 300), (2048, 1030, 40)])
def test_many_tiles(target, metric, tokens, width, k):
    """Across tiles and rounds, in float32: greedy within rounding; equal tokens are chosen in index order."""
    tokens, width, k = size(target, (tokens, width, k), (tokens // 16, width // 3, k // 16))
    x = inputs.with_copies(clustered((tokens, width)), torch.Generator().manual_seed(1), share=0.2)
    case = Case(x, k, metric)
    result = case.run(target)
    assert_answer(case, result, rounding(x, metric))
    if target.backend == "reference":  # a BLAS may sum equal rows in different orders
        return
    assert_copies_in_order(x, result.indices)


def assert_copies_in_order(x, indices):
    """Of equal tokens [N, D] the first is chosen first."""
    step = torch.full((len(x),), len(indices))
    step[indices] = torch.arange(len(indices))
    token_of = x.unique(dim=0, return_inverse=True)[1]
    for token in token_of.bincount().gt(1).nonzero()[:, 0]:
        steps = step[token_of == token]
        assert (steps[1:] >= steps[:-1]).all(), f"copies are chosen in the order {steps.tolist()}"


@every_backend
@pytest.mark.parametrize("power", [-55, 55])
def test_huge_and_tiny_magnitudes(target, power):
    """Powers of two change no bit of a cosine, and scale Euclidean radii exactly, as long as squares fit."""
    x = inputs.signs((2, 33, 20), torch.Generator().manual_seed(0))
    for metric, k in (("cosine", 33), ("euclidean", 5)):
        plain, scaled = Case(x, k, metric).run(target), Case(x * 2.0**power, k, metric).run(target)
        assert torch.equal(plain.indices, scaled.indices)
        torch.testing.assert_close(
            scaled.radii, plain.radii * (1 if metric == "cosine" else 2.0**power), rtol=EPS, atol=0
        )


@on_targets(*TRITON_TARGETS)
@pytest.mark.parametrize("metric", METRICS)
def test_triton_rounds(target, metric, monkeypatch):
    """The kernel for large N on small N, with small tiles and few candidates, so that there are many of each."""
    from pruneops.triton_kernels import kcenter as kernels

    small = {"BLOCK_S": 64, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_D": 16}
    monkeypatch.setattr(kernels, "GRAM_TOKENS", 0)
    monkeypatch.setattr(kernels, "CANDIDATES", (16, 16))
    monkeypatch.setattr(
        kernels, "ROUNDS", {alignment: (small, options) for alignment, (_, options) in kernels.ROUNDS.items()}
    )
    generator = torch.Generator().manual_seed(0)
    tokens = 100
    seeds, mask = seeds_and_mask((2, tokens), count=20)
    exact = inputs.with_copies(inputs.signs((2, tokens, 20), generator), generator)
    exact = inputs.with_special_tokens(exact, generator, ["nan", "inf", "zero"], share=0.1)
    exact = exact if metric == "cosine" else exact.sign()
    real = clustered((2, tokens, 20))
    for chosen in ({}, {"seeds": seeds, "mask": mask}):
        for x, tolerance in ((exact, 0.0), (real, rounding(real, metric))):
            case = Case(x, 50, metric, **chosen)
            assert_answer(case, case.run(target), tolerance)


@on_targets(contract.Target("triton", "cpu"))
@pytest.mark.parametrize("metric", METRICS)
def test_triton_similarities_of_copies(target, metric, monkeypatch):
    """Equal tokens are equally similar to all others, to the bit, in tiles that are computed and that are mirrored."""
    from pruneops.triton_kernels import kcenter as kernels

    small = {alignment: ({"BLOCK": 16, "BLOCK_D": 16}, options) for alignment, (_, options) in kernels.GRAM.items()}
    seen, greedy = [], kernels._kcenter_greedy_kernel
    monkeypatch.setattr(kernels, "GRAM", small)
    monkeypatch.setattr(kernels, "_kcenter_greedy_kernel", lambda *args: (seen.append(args[2].clone()), greedy(*args)))
    x = inputs.with_copies(clustered((90, 20)), torch.Generator().manual_seed(1))
    Case(x, 90, metric).run(target)
    first_of = (x[:, None] == x).all(-1).int().argmax(1)  # [N] the first token that equals this one
    rows = seen[0].view(90, 90)
    contract.assert_same_bits(rows, rows[first_of])


# Relations between answers


@every_backend
@pytest.mark.parametrize("metric", METRICS)
def test_prefix(target, metric):
    """A smaller budget gives the same bits, only fewer."""
    x = clustered(size(target, (2, 400, 50), (2, 60, 20)))
    seeds, mask = seeds_and_mask(x.shape[:-1])
    for chosen in ({}, {"seeds": seeds}, {"mask": mask}):
        case = Case(x, size(target, 200, 40), metric, **chosen)
        whole = case.run(target)
        for k in (3, 4, case.k // 2, case.k - 1):
            assert_same_bits(case.run(target, k=k), [result[:, :k] for result in whole])


@every_backend
def test_batch_rows_are_independent(target):
    x = clustered(size(target, (3, 300, 40), (3, 50, 20)))
    seeds, mask = seeds_and_mask(x.shape[:-1])
    case = Case(x, 30, "cosine", seeds, mask)
    alone = case.run(target)
    for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
        batch = torch.full_like(x, neighbour)
        batch[1] = x[1]
        assert_same_bits([result[1] for result in case.run(target, x=batch)], [result[1] for result in alone])


@every_backend
def test_without_batch_dimension(target):
    x = clustered((60, 20))
    seeds, mask = seeds_and_mask(x.shape[:-1])
    single = Case(x, 20, "euclidean", seeds, mask).run(target)
    batched = Case(x[None], 20, "euclidean", seeds[None], mask[None]).run(target)
    assert_same_bits(single, [result[0] for result in batched])


# Edges


@every_backend
def test_edges(target):
    empty = torch.empty(2, 0, dtype=torch.int64)
    for x, k, chosen in (
        (torch.ones(1, 1), 1, {}),  # one token, one feature
        (torch.zeros(2, 5, 3), 5, {}),  # nothing but zero vectors
        (torch.full((2, 5, 3), torch.nan), 5, {}),  # nothing finite
        (torch.ones(2, 5, 4), 3, {"seeds": empty}),
        (torch.ones(2, 5, 4), 1, {"mask": torch.arange(5).eq(3).expand(2, 5)}),  # one token allowed
        (torch.ones(2, 5, 4), 2, {"seeds": torch.tensor([[4, 1], [0, 3]])}),  # all are seeds
        (torch.eye(5), 2, {"seeds": torch.tensor([2]), "mask": torch.arange(5).eq(4)}),
        (torch.empty(0, 5, 3), 4, {}),
        (torch.empty(0, 5, 3), 4, {"seeds": empty[:0], "mask": torch.empty(0, 5, dtype=torch.bool)}),
    ):
        for metric in METRICS:
            case = Case(x, k, metric, **chosen)
            assert_answer(case, case.run(target))


@every_backend
@pytest.mark.parametrize("name", ["nan", "one nan", "inf", "-inf", "overflow"])
def test_non_finite_center(target, name):
    """A non-finite seed is similar to no token: the others are chosen as if it were not there."""
    x = inputs.signs((2, 30, 16), torch.Generator().manual_seed(0))
    for metric, tokens in (("cosine", x), ("euclidean", x.sign())):
        tokens[:, 7] = inputs.special_token(name, tokens)
        for seeds in ([7], [7, 3]):
            case = Case(tokens, 12, metric, seeds=torch.tensor(seeds).expand(2, -1))
            assert_answer(case, case.run(target))


@every_backend
def test_many_sequences(target):
    """More than one launch takes, some empty, with bounds of any stride."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (size(target, 300, 40),), generator=generator)
    ks = [int(length) // 2 for length in lengths]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x = inputs.small_integers((int(bounds[-1]), 4), generator)
    strided = bounds.repeat_interleave(2)[::2]
    result = call(target, "kcenter_varlen", x, strided, ks, metric="euclidean")
    expected = pruneops.reference.kcenter_varlen(x, bounds, ks, metric="euclidean")
    assert torch.equal(result.indices, expected[0])
    assert_same_bits(result.radii, expected[1])


@every_backend
def test_empty_packing(target):
    for bounds, ks in (([0], []), ([0, 0, 0], [0, 0])):
        result = call(target, "kcenter_varlen", torch.empty(0, 3), torch.tensor(bounds), ks)
        assert result.indices.shape == result.radii.shape == (0,)


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Two rows whose tokens interleave, far apart in a sparse file."""
    near = inputs.signs((2, 4, 16), torch.Generator().manual_seed(0))
    x = contract.with_gaps_past_2_31(tmp_path, near, 1)
    case = Case(near, 4)
    with pruneops.backend(target.backend):  # `call` would copy the file
        assert_answer(case, pruneops.kcenter(x, 4))
        packed = pruneops.kcenter_varlen(x[1], torch.tensor([0, 4]), [4])
    assert torch.equal(packed.indices, case.run(REFERENCE).indices[1])


@on_targets(NATIVE)
def test_memory(target):
    """O(N m): far below the 2.2 GB of N x N and the 96 MB of a copy of x."""
    extra = contract.run_python(
        contract.KILOBYTES
        + """
x = torch.randn(23328, 1024)
with pruneops.backend("cpu"):
    pruneops.kcenter(x[:64], 64)
    before = kilobytes("VmRSS")
    pruneops.kcenter(x, 2333)
print(1024 * (kilobytes("VmHWM") - before))
"""
    )
    assert int(extra) < 200e6, f"{int(extra) / 1e6:.0f} MB beyond the input"


# CUDA


@CUDA_KERNELS
def test_cuda_tokens_run_out(target):
    """Where values are not checked: -1 and NaN."""
    x, mask = torch.randn(2, 6, 4, device="cuda"), torch.arange(6, device="cuda").lt(2).expand(2, 6)
    with pruneops.backend(target.backend):
        indices, radii = pruneops.kcenter(x, 3, mask=mask)
    assert indices[:, 2].tolist() == [-1, -1] and radii[:, 2].isnan().all()


@CUDA_KERNELS
@pytest.mark.parametrize("tokens", [64, 5000])
def test_cuda_offsets_past_two_to_the_31(target, tokens):
    """Tokens spread over 2^31 + elements, batched and packed: two rows that interleave."""
    width, gap = 16, 2**31 // (tokens - 1) // 16 * 16 + 32
    x = inputs.signs((2, tokens, width), torch.Generator().manual_seed(0)).to(torch.bfloat16)
    room = torch.empty(tokens * gap, dtype=torch.bfloat16, device="cuda")
    spread = room.as_strided(x.shape, (width, gap, 1)).copy_(x)
    case = Case(x, 40)
    with pruneops.backend(target.backend):
        result = pruneops.kcenter(spread, 40)
        packed = pruneops.kcenter_varlen(spread[1], torch.tensor([0, tokens], device="cuda"), [40])
    assert_answer(case, contract.to_device(result, "cpu"))
    assert torch.equal(packed.indices, result.indices[1])


# Launches

TRITON_BLOCK_GROUPS = """
import sys
import torch
import pruneops
from pruneops import reference
from pruneops.triton_kernels import kcenter as kernels
from tests import inputs
from tests.concurrent_programs import ConcurrentPrograms

torch.set_num_threads(1)
small = {"BLOCK_S": 64, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_D": 16}
kernels.GRAM_TOKENS, kernels.CANDIDATES = 0, (32, 32)
kernels.ROUNDS = {alignment: (small, options) for alignment, (_, options) in kernels.ROUNDS.items()}
kernels._kcenter_rounds_kernel.jit = ConcurrentPrograms(kernels._kcenter_rounds_kernel.jit)
generator = torch.Generator().manual_seed(0)
for programs, batch in ((3, 1), (5, 2), (4, 3)):
    kernels.multiprocessors = lambda device: programs
    x = inputs.with_copies(inputs.small_integers((batch, 150, 16), generator), generator)
    seeds = torch.arange(40).flip(0).expand(batch, -1) if batch < 3 else None
    with pruneops.backend("triton"):
        result = pruneops.kcenter(x, 100, seeds=seeds, metric="euclidean")
    assert torch.equal(result.indices, reference.kcenter(x, 100, seeds=seeds, metric="euclidean")[0]), (programs, batch)
packed = x[:2].flatten(0, 1), torch.tensor([0, 100, 100, 250, 300]), [20, 0, 40, 50]
with pruneops.backend("triton"):
    result = pruneops.kcenter_varlen(*packed, metric="euclidean")
assert torch.equal(result.indices, reference.kcenter_varlen(*packed, metric="euclidean")[0])
"""


def test_triton_block_groups():
    """Several programs a group and several groups, all running at once and synchronised by the barriers."""
    contract.run_python(TRITON_BLOCK_GROUPS, TRITON_INTERPRET="1")
