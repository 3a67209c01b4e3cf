"""Greedy k-center on every backend: the contract of `pruneops.kcenter`, line by line."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    on_targets,
    seeds_and_mask,
    size,
)
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, assert_type_error, bools, ints, invalid
from tests.strategies import DTYPES, laid_out

METRICS = ("cosine", "euclidean")


@dataclasses.dataclass
class Case:
    """Arguments of one call."""

    x: torch.Tensor
    k: int
    metric: str = "cosine"
    seeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def run(self, target, **changes):
        """The answer of a target, arguments changed as told."""
        arguments = {**vars(self), **changes}
        return call(target, "kcenter", arguments.pop("x"), arguments.pop("k"), **arguments)


def float64_scores(x, indices, metric):
    """What the choices [K] among x [N, D] rank by: [K, N], row i before choice i and after those before it."""
    x = x.double()
    square = x.square().sum(-1)
    finite = square <= torch.finfo(torch.float32).max / 4
    nonzero = finite & (square >= torch.finfo(torch.float32).tiny)  # the others have no length in float32
    x, square = x.where(nonzero[:, None], 0), square.where(nonzero, 0)
    dot = x @ x[indices].T  # [N, K]
    if metric == "cosine":
        inverse = square.sqrt().reciprocal().where(nonzero, 0)
        similarity = dot * inverse[:, None] * inverse[indices]
    else:
        similarity = 2 * dot - square[:, None] - square[indices]
    similarity[:, ~finite[indices]] = -torch.inf
    nearest = torch.cat([torch.full_like(similarity[:, :1], -torch.inf), similarity[:, :-1]], 1).cummax(1).values
    nearest[~finite] = torch.inf
    return nearest.T


def scale_of(x, metric):
    """Size of the terms that a similarity is summed from."""
    square = x.double().square().sum(-1)
    return 1.0 if metric == "cosine" else 4 * float(square[square.isfinite()].max())


def rounding(x, metric):
    """How far a float32 similarity may lie from the true one."""
    return (4 + x.shape[-1] ** 0.5) * EPS * scale_of(x, metric)


def similarity_error(x, indices, radii, metric):
    """Largest error of the similarities that radii [K] tell, against float64 along the same choices."""
    radii = radii.double()
    score = float64_scores(x, indices, metric).gather(1, indices[:, None])[:, 0]
    truth = score.clamp(max=1.0 if metric == "cosine" else 0.0)
    told = 1 - radii if metric == "cosine" else -radii.square()
    return (told - truth)[radii.isfinite()].abs().max().item() if radii.isfinite().any() else 0.0


def assert_row(x, result, *, metric, seeds=None, mask=None, tolerance=0.0):
    """indices [K] and radii [K] are an answer for x [N, D]; the only one if tolerance is 0."""
    indices, radii = result
    first = 0 if seeds is None else len(seeds)
    allowed = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.clone()
    if seeds is not None:
        assert torch.equal(indices[:first], seeds)
        allowed[seeds] = False
    assert (radii[:first] == torch.inf).all()
    scores = float64_scores(x, indices.clamp(0, len(x) - 1), metric)  # assert_greedy refuses what is clamped here
    contract.assert_greedy(indices[first:], scores[first:], allowed, tolerance)

    indices, radii, scores = indices[first:], radii[first:], scores[first:]
    score = scores.gather(1, indices[:, None])[:, 0]
    assert torch.equal(radii.isnan(), score == torch.inf)
    assert torch.equal(radii == torch.inf, score == -torch.inf)
    known = radii[radii.isfinite()]
    assert (known[1:] <= known[:-1]).all(), "radii grow"
    if tolerance:
        assert similarity_error(x, result.indices, result.radii, metric) <= tolerance
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
    values = contract.signs if metric == "cosine" else contract.small_integers
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
    most = int(allowed.sum(-1).min()) if allowed.numel() else shape[-2]
    least = max(1, 0 if seeds is None else seeds.shape[-1])
    return Case(x, draw(st.integers(least, most) | st.just(most)), metric, seeds, mask)


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
    """Stands on no other code: a walk around a square, then its middle."""
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
        error, allowed = (similarity_error(x[b], r.indices[b], r.radii[b], metric) for r in (result, reference))
        contract.assert_no_worse(error, allowed, scale_of(x[b], metric))
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
    """Across tiles and rounds, in float32: greedy within rounding; copies of a token leave in index order."""
    tokens, width, k = size(target, (tokens, width, k), (tokens // 16, width // 3, k // 16))
    x = contract.with_copies(clustered((tokens, width)), torch.Generator().manual_seed(1), share=0.2)
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
        assert (steps[1:] >= steps[:-1]).all(), f"copies left in the order {steps.tolist()}"


@every_backend
@pytest.mark.parametrize("power", [-55, 55])
def test_huge_and_tiny_magnitudes(target, power):
    """Powers of two change no bit of a cosine, and scale Euclidean radii exactly, as long as squares fit."""
    x = contract.signs((2, 33, 20), torch.Generator().manual_seed(0))
    for metric, k in (("cosine", 33), ("euclidean", 5)):
        plain, scaled = Case(x, k, metric).run(target), Case(x * 2.0**power, k, metric).run(target)
        assert torch.equal(plain.indices, scaled.indices)
        torch.testing.assert_close(
            scaled.radii, plain.radii * (1 if metric == "cosine" else 2.0**power), rtol=EPS, atol=0
        )


@on_targets(*TRITON_TARGETS)
@pytest.mark.parametrize("metric", METRICS)
def test_triton_rounds(target, metric, monkeypatch):
    """The form for large N on small N, with tiles and candidates so few that there are many of each."""
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
    exact = contract.with_copies(contract.signs((2, tokens, 20), generator), generator)
    exact = strategies.with_special_tokens(exact, generator, ["nan", "inf", "zero"], share=0.1)
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
    x = contract.with_copies(clustered((90, 20)), torch.Generator().manual_seed(1))
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
def test_rows_of_a_batch_do_not_meet(target):
    x = clustered(size(target, (3, 300, 40), (3, 50, 20)))
    seeds, mask = seeds_and_mask(x.shape[:-1])
    case = Case(x, 30, "cosine", seeds, mask)
    alone = case.run(target)
    for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
        crowded = torch.full_like(x, neighbour)
        crowded[1] = x[1]
        assert_same_bits([result[1] for result in case.run(target, x=crowded)], [result[1] for result in alone])


@every_backend
def test_without_batch_dimension(target):
    x = clustered((60, 20))
    seeds, mask = seeds_and_mask(x.shape[:-1])
    single = Case(x, 20, "euclidean", seeds, mask).run(target)
    batched = Case(x[None], 20, "euclidean", seeds[None], mask[None]).run(target)
    assert_same_bits(single, [result[0] for result in batched])


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    """Rows, packed sequences, and the tokens of one row shared out among 1, 2, 3 and 7 threads."""
    x = clustered((3, 900, 130))
    bounds, ks = torch.tensor([0, 100, 100, 2000, 2700]), [30, 0, 300, 9]

    def run():
        single, several = Case(x[0], 150).run(target), Case(x, 150, "euclidean").run(target)
        return *single, *several, *call(target, "kcenter_varlen", x.flatten(0, 1), bounds, ks)

    contract.assert_threads_change_no_bit(run)


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    """Calls from several threads at once give the answers of calls in turn."""
    cases = [Case(clustered((40, 20), seed), 20) for seed in range(4)]
    results = contract.run_concurrently(target, [functools.partial(pruneops.kcenter, case.x, case.k) for case in cases])
    for case, result in zip(cases, results):
        assert_answer(case, result, rounding(case.x, case.metric))


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
        (torch.ones(2, 5, 4), 2, {"seeds": torch.tensor([[4, 1], [0, 3]])}),  # nothing left to choose
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
    """A seed that is no vector is near to nobody: the others are chosen as if it were not there."""
    generator = torch.Generator().manual_seed(0)
    x, (value, count) = contract.signs((2, 30, 16), generator), strategies.SPECIAL[name]
    for metric, tokens in (("cosine", x), ("euclidean", x.sign())):
        tokens[:, 7] = 0
        tokens[:, 7, :count] = value
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
    x = contract.small_integers((int(bounds[-1]), 4), generator)
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


@every_backend
def test_no_gradient(target):
    x = torch.randn(6, 4, device=target.device, requires_grad=True)
    with pruneops.backend(target.backend):
        results = (*pruneops.kcenter(x, 3), *pruneops.kcenter_varlen(x, torch.tensor([0, 6], device=x.device), [3]))
    assert not any(result.requires_grad for result in results)


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Two rows whose tokens interleave, far apart in a sparse file."""
    near = contract.signs((2, 4, 16), torch.Generator().manual_seed(0))
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
        """
import re, torch, pruneops

def kilobytes(name):  # getrusage would count the process that started this one
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s+(\\d+) kB", status.read())[1])

x = torch.randn(23328, 1024)
with pruneops.backend("cpu"):
    pruneops.kcenter(x[:64], 64)
    before = kilobytes("VmRSS")
    pruneops.kcenter(x, 2333)
print(1024 * (kilobytes("VmHWM") - before))
"""
    )
    assert int(extra) < 200e6, f"{int(extra) / 1e6:.0f} MB beyond the input"


# Compilation


def samples():
    """(operator, arguments, keyword arguments)"""
    x = torch.randn(2, 9, 5)
    seeds, mask = seeds_and_mask((2, 9), share=1.0)
    bounds = torch.tensor([0, 4, 9])
    return [
        ("kcenter", (x, 4), {}),
        ("kcenter", (x.mT.contiguous().mT, 4), {"seeds": seeds, "mask": mask, "metric": "euclidean"}),
        ("kcenter", (x[0].half(), 4), {"mask": mask[0]}),
        ("kcenter_varlen", (x[0], bounds, [2, 3]), {}),
        ("kcenter_varlen", (x[0], bounds.int(), [2, 3]), {"seeds": bounds[:2, None], "metric": "euclidean"}),
    ]


@every_backend
@pytest.mark.parametrize("sample", range(5))
def test_opcheck(target, sample):
    op, args, kwargs = samples()[sample]
    contract.opcheck(target, op, *args, **kwargs)


def pruned(x, seeds, k):
    """What a model does with the operator: prepare features, choose, gather."""
    features = x - x.mean(1, keepdim=True)
    kept = pruneops.kcenter(features, k, seeds=seeds, mask=features.abs().sum(-1) > 0).indices.sort().values
    flat, bounds = features.flatten(0, 1), torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)
    packed = pruneops.kcenter_varlen(flat, bounds, [k, k], metric="euclidean")
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, *packed


@every_backend
def test_compile_without_graph_break(target):
    sizes = (12, 8, 3), (20, 5, 7), (31, 16, 4)
    seeds = torch.tensor([[1], [2]])
    contract.assert_compiles(target, pruned, [(torch.randn(2, N, D), seeds, k) for N, D, k in sizes])


def test_compile_with_inductor():
    calls = "[(torch.randn(2, N, D), torch.tensor([[1], [2]]), k) for N, D, k in ((12, 8, 3), (20, 5, 7))]"
    contract.assert_compiles_with_inductor(__name__, "pruned", calls)


# Errors

X = torch.randn(2, 6, 4)
GOOD = {"kcenter": {"x": X, "k": 3}, "kcenter_varlen": {"x": X[0], "cu_seqlens": torch.tensor([0, 2, 6]), "ks": [1, 2]}}


kcenter = functools.partial(InvalidCall, "kcenter", GOOD["kcenter"])
packed = functools.partial(InvalidCall, "kcenter_varlen", GOOD["kcenter_varlen"])

HERE = "on the device of x, cpu"
TWO_OPEN = torch.arange(6).lt(2)
FEWER = "at most the 2 tokens that mask and seeds allow"
BAD = [
    kcenter(ValueError, "x", "of shape [4]", "of rank 2 or 3", x=X[0, 0]),
    kcenter(ValueError, "x", "of shape [1, 2, 6, 4]", "of rank 2 or 3", x=X[None]),
    kcenter(ValueError, "x", "of shape [2, 6, 0]", "at least one feature wide", x=X[..., :0]),
    kcenter(TypeError, "x", "torch.int64", DTYPE_NAMES, x=X.long()),
    kcenter(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X.double()),
    kcenter(ValueError, "metric", "'manhattan'", "one of ('cosine', 'euclidean')", metric="manhattan"),
    kcenter(ValueError, "k", "0", "at least 1", k=0),
    kcenter(ValueError, "k", "-1", "at least 1", k=-1),
    kcenter(ValueError, "k", "7", "at most the 6 tokens of x", k=7),
    kcenter(ValueError, "k", "1", "at most the 0 tokens of x", k=1, x=X[:, :0]),
    kcenter(TypeError, "seeds", "torch.int32", "int64", seeds=ints([0], [0], dtype=torch.int32)),
    kcenter(ValueError, "seeds", "of shape [1]", "of shape [2, P]", seeds=ints(1)),
    kcenter(ValueError, "seeds", "of shape [3, 1]", "of shape [2, P]", seeds=ints([0], [0], [0])),
    kcenter(ValueError, "seeds", "of shape [1, 2]", "of shape [P]", x=X[0], seeds=ints([1, 2])),
    kcenter(ValueError, "seeds", "4 a row", "at most k = 3 a row", seeds=torch.arange(4).expand(2, 4)),
    kcenter(ValueError, "seeds", "on meta", HERE, seeds=ints([0], [0], device="meta")),
    kcenter(ValueError, "seeds", "6 at one place", "in [0, 6)", seeds=ints([0, 1], [0, 6]), values=True),
    kcenter(ValueError, "seeds", "-1 at one place", "in [0, 6)", seeds=ints([0, 1], [-1, 6]), values=True),
    kcenter(
        ValueError,
        "seeds",
        "the same token twice",
        "different tokens in each row",
        seeds=ints([0, 1], [5, 5]),
        values=True,
    ),
    kcenter(TypeError, "mask", "torch.uint8", "bool", mask=bools(2, 6).byte()),
    kcenter(ValueError, "mask", "of shape [2, 5]", "of shape [2, 6]", mask=bools(2, 5)),
    kcenter(ValueError, "mask", "of shape [6]", "of shape [2, 6]", mask=bools(6)),
    kcenter(ValueError, "mask", "on meta", HERE, mask=bools(2, 6, device="meta")),
    kcenter(ValueError, "k", "3", FEWER, mask=TWO_OPEN.expand(2, 6), values=True),
    kcenter(ValueError, "k", "3", FEWER, x=X[0], mask=TWO_OPEN, seeds=ints(1), values=True),
    packed(ValueError, "x", "of shape [2, 6, 4]", "of rank 2", x=X),
    packed(TypeError, "cu_seqlens", "torch.float32", "int32 or int64", cu_seqlens=ints(0.0, 2.0, 6.0)),
    packed(ValueError, "cu_seqlens", "of shape [2]", "of shape [3]", cu_seqlens=ints(0, 6)),
    packed(ValueError, "cu_seqlens", "of shape [1, 3]", "of shape [3]", cu_seqlens=ints([0, 2, 6])),
    packed(ValueError, "cu_seqlens", "on meta", HERE, cu_seqlens=ints(0, 2, 6, device="meta")),
    packed(ValueError, "cu_seqlens[0]", "1", "0", cu_seqlens=ints(1, 2, 6), values=True),
    packed(ValueError, "cu_seqlens[-1]", "5", "the 6 tokens of x", cu_seqlens=ints(0, 2, 5), values=True),
    packed(
        ValueError, "cu_seqlens", "falling from 7 to 6 at 1", "non-decreasing", cu_seqlens=ints(0, 7, 6), values=True
    ),
    packed(ValueError, "ks[1]", "-1", "at least 0", ks=[1, -1]),
    packed(ValueError, "ks[0]", "3", "at most the 2 tokens of sequence 0", ks=[3, 2], values=True),
    packed(ValueError, "seeds", "2 a sequence", "no more than the smallest of ks", seeds=ints([0, 1], [2, 3])),
    packed(ValueError, "seeds", "of shape [1, 1]", "of shape [2, P]", seeds=ints([0])),
    packed(ValueError, "seeds", "2 at one place", "in [0, 2)", seeds=ints([2], [3]), values=True),
]


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@invalid([bad for bad in BAD if bad.argument in ("k", "ks[1]") and not bad.values])
def test_errors_under_compile(bad):
    bad.assert_raises_under_compile()


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("kcenter", {"x": [[1.0]]}, "x must be Tensor, got list"),
        ("kcenter", {"k": 2.0}, "k must be int or SymInt, got float"),
        ("kcenter", {"k": None}, "k must be int or SymInt, got NoneType"),
        ("kcenter", {"metric": 1}, "metric must be str, got int"),
        ("kcenter", {"seeds": [0]}, "seeds must be Tensor or NoneType, got list"),
        ("kcenter", {"mask": 1}, "mask must be Tensor or NoneType, got int"),
        ("kcenter_varlen", {"cu_seqlens": [0, 2, 6]}, "cu_seqlens must be Tensor, got list"),
        ("kcenter_varlen", {"ks": 3}, "ks must be list or tuple, got int"),
        ("kcenter_varlen", {"ks": [1, 2.0]}, "ks[1] must be int or SymInt, got float"),
    ],
)
def test_errors_of_type(op, changes, words):
    assert_type_error(op, {**GOOD[op], **changes}, words)


@pytest.mark.gpu
def test_errors_on_cuda(monkeypatch):
    """Values are read under PRUNEOPS_DEBUG=1 only; an unchecked call that runs out of tokens says so in its answer."""
    x, mask = X.cuda(), torch.arange(6, device="cuda").lt(2).expand(2, 6)
    with pytest.raises(ValueError, match="on the device of x, cuda"):
        pruneops.kcenter(x, 3, seeds=torch.zeros(2, 1, dtype=torch.int64))
    for name in ("triton", "cuda"):
        if Target(name, "cuda").problem is None:
            with pruneops.backend(name):
                indices, radii = pruneops.kcenter(x, 3, mask=mask)
            assert indices[:, 2].tolist() == [-1, -1] and radii[:, 2].isnan().all()
    monkeypatch.setenv("PRUNEOPS_DEBUG", "1")
    with pytest.raises(ValueError, match="at most the 2 tokens that mask and seeds allow"):
        pruneops.kcenter(x, 3, mask=mask)


# CUDA


def both_forms(x, seeds, mask, bounds):
    """A batched and a packed call on tensors x [B, N, D]."""
    batched = pruneops.kcenter(x, x.shape[1] // 10, seeds=seeds, mask=mask)
    lengths = bounds.shape[0] - 1
    return *batched, *pruneops.kcenter_varlen(x.flatten(0, 1), bounds, [20] * lengths, metric="euclidean")


def cuda_inputs(seed, shape=(2, 600, 128)):
    x = clustered(shape, seed, dtype=torch.bfloat16)
    seeds, mask = seeds_and_mask(shape[:-1], seed=seed)
    total = shape[0] * shape[1]
    return [t.cuda() for t in (x, seeds, mask, torch.tensor([0, 100 + seed, total // 2, total]))]


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    check(target, both_forms, cuda_inputs)


@CUDA_KERNELS
@pytest.mark.parametrize("tokens", [64, 5000])
def test_cuda_offsets_past_two_to_the_31(target, tokens):
    """Tokens spread over 2^31 + elements, in both forms: two rows that interleave."""
    width, gap = 16, 2**31 // (tokens - 1) // 16 * 16 + 32
    x = contract.signs((2, tokens, width), torch.Generator().manual_seed(0)).to(torch.bfloat16)
    room = torch.empty(tokens * gap, dtype=torch.bfloat16, device="cuda")
    spread = room.as_strided(x.shape, (width, gap, 1)).copy_(x)
    case = Case(x, 40)
    with pruneops.backend(target.backend):
        result = pruneops.kcenter(spread, 40)
        packed = pruneops.kcenter_varlen(spread[1], torch.tensor([0, tokens], device="cuda"), [40])
    assert_answer(case, contract.to_device(result, "cpu"))
    assert torch.equal(packed.indices, result.indices[1])


# Launches

TRITON_LAUNCHES = """
from pruneops.triton_kernels import kcenter as kernels

kernels.multiprocessors = lambda device: 132
for dtype, width in ((torch.bfloat16, 64), (torch.float32, 64), (torch.float16, 1), (torch.float32, 33)):
    for tokens in (50, 60, 5000, 5001):
        x = torch.ones(3, tokens, width, dtype=dtype)
        seeds, mask = torch.arange(6).view(3, 2), torch.ones(3, tokens, dtype=torch.bool)
        kernels.kcenter(x, 5, None, None, "cosine")
        kernels.kcenter(x[:1], 1, None, None, "cosine")
        kernels.kcenter(x, 7, seeds, mask, "cosine")
        kernels.kcenter_varlen(x[0], torch.tensor([0, 10, tokens]), [2, 3], None, "cosine")
        kernels.kcenter_varlen(x[0], torch.tensor([0, tokens]), [3], seeds[:1], "cosine")
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths, budgets and batches compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 4 * (2 * 9 + 2 * 6 + 4 * 4)
    # a dtype: norms with and without mask, for Gram and for rounds; gram; rounds as batch and packed, with seeds and
    # without; the greedy kernel, with seeds and without, serves all dtypes
    assert compiled == 4 * (4 + 1 + 4) + 2


TRITON_TEAMS = """
import sys
import torch
import pruneops
from pruneops import reference
from pruneops.triton_kernels import kcenter as kernels
from tests import contract
from tests.concurrent_programs import Resident

torch.set_num_threads(1)
small = {"BLOCK_S": 64, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_D": 16}
kernels.GRAM_TOKENS, kernels.CANDIDATES = 0, (32, 32)
kernels.ROUNDS = {alignment: (small, options) for alignment, (_, options) in kernels.ROUNDS.items()}
kernels._kcenter_rounds_kernel.jit = Resident(kernels._kcenter_rounds_kernel.jit)
generator = torch.Generator().manual_seed(0)
for programs, batch in ((3, 1), (5, 2), (4, 3)):
    kernels.multiprocessors = lambda device: programs
    x = contract.with_copies(contract.small_integers((batch, 150, 16), generator), generator)
    seeds = torch.arange(40).flip(0).expand(batch, -1) if batch < 3 else None
    with pruneops.backend("triton"):
        found = pruneops.kcenter(x, 100, seeds=seeds, metric="euclidean")
    assert torch.equal(found.indices, reference.kcenter(x, 100, seeds=seeds, metric="euclidean")[0]), (programs, batch)
packed = x[:2].flatten(0, 1), torch.tensor([0, 100, 100, 250, 300]), [20, 0, 40, 50]
with pruneops.backend("triton"):
    found = pruneops.kcenter_varlen(*packed, metric="euclidean")
assert torch.equal(found.indices, reference.kcenter_varlen(*packed, metric="euclidean")[0])
"""


def test_triton_teams():
    """Several programs a team and several teams, all running at once and meeting at the barriers."""
    contract.run_python(TRITON_TEAMS, TRITON_INTERPRET="1")
