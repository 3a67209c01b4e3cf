"""Exclusive bottom-k on every backend: the contracts of `pruneops.exclusive_bottomk` and `pivot_bottomk`."""

import functools
import heapq
import importlib
import math

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
from tests.ops.test_pivot_cosine import float64_cosines, pivots_of
from tests.strategies import DTYPES, LAYOUTS, laid_out


def in_turn(scores, quotas, taken=None):
    """The definition in plain Python: tokens that the rows of scores [P, N] take, -1 where none is left."""
    free = set(range(scores.shape[-1])) - set(() if taken is None else taken.nonzero()[:, 0].tolist())
    chosen = []
    for row, quota in zip(scores.tolist(), quotas):
        rank = [(0, score, token) if math.isfinite(score) else (1, 0, token) for token, score in enumerate(row)]
        own = heapq.nsmallest(quota, free, key=rank.__getitem__)
        chosen += [*own, *[-1] * (quota - len(own))]
        free -= set(own)
    return chosen


def expected(scores, quotas, taken=None):
    """`in_turn` for every batch row of scores [.., P, N]."""
    if scores.dim() == 2:
        return torch.tensor(in_turn(scores, quotas, taken), dtype=torch.int64)
    taken = [None] * len(scores) if taken is None else taken
    rows = [in_turn(own, quotas, own_taken) for own, own_taken in zip(scores, taken)]
    return torch.tensor(rows, dtype=torch.int64).view(len(scores), sum(quotas))


def assert_taken(target, scores, quotas, taken=None):
    chosen = call(target, "exclusive_bottomk", scores, quotas, taken=taken)
    assert_same_bits(chosen, expected(scores, quotas, taken))


def shared_out(total, rows, generator):
    """`total` cut into as many quotas, uneven ones, some of them 0."""
    cuts = torch.randint(0, total + 1, (max(rows - 1, 0),), generator=generator).sort().values.tolist()
    return [end - start for start, end in zip([0, *cuts], [*cuts, total])][:rows]


# Scores that compare in unusual ways, in any dtype.
SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 6e-8, -6e-8, 1e-40, -1e-40, 65504.0, -65504.0]


@st.composite
def quotas_and_free(draw, rows, shape, generator):
    """(quotas, free): as many quotas as rows, and the tokens [.., N] that may be taken, or None."""
    free, fewest = None, shape[-1]
    if draw(st.booleans()):
        free = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
        fewest = int(free.sum(-1).min()) if free.numel() else shape[-1]
    total = draw(st.integers(0, fewest) | st.just(fewest)) if rows else 0
    return shared_out(total, rows, generator), free


rows_of_scores = st.integers(0, 6) | st.sampled_from([16, 64])


@st.composite
def score_cases(draw):
    """(scores, quotas, taken): few different scores, some of them special."""
    generator = draw(strategies.generators)
    rows, tokens = draw(rows_of_scores), draw(st.integers(1, 60))
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    scores = contract.small_integers((*batch, rows, tokens), generator, draw(st.sampled_from([0, 2, 100])))
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), scores.shape, generator=generator)]
    share = draw(st.sampled_from([0.0, 0.2, 1.0]))
    scores = scores.where(torch.rand(scores.shape, generator=generator) >= share, special).to(draw(strategies.dtypes))
    quotas, free = draw(quotas_and_free(rows, (*batch, tokens), generator))
    return draw(laid_out(scores)), quotas, None if free is None else draw(laid_out(~free, expand=False))


@st.composite
def feature_cases(draw):
    """(x, pivots, quotas, mask): tokens whose cosines are exact, pivots that repeat, masked ones among them."""
    generator = draw(strategies.generators)
    shape = draw(strategies.shapes())
    x = draw(laid_out(draw(strategies.exact_tokens(shape, generator))))
    pivots = draw(laid_out(pivots_of(shape[:-1], draw(rows_of_scores), generator)))
    quotas, mask = draw(quotas_and_free(pivots.shape[-1], shape[:-1], generator))
    return x, pivots, quotas, None if mask is None else draw(laid_out(mask, expand=False))


# Scores [P, N] that are hard to select from.
HARD = {
    "equal": lambda shape, generator: torch.zeros(shape),
    "two values": lambda shape, generator: torch.randint(0, 2, shape, generator=generator).float(),
    "last bits": lambda shape, generator: 1 + torch.randint(0, 300, shape, generator=generator) * EPS,
    "denormal": lambda shape, generator: torch.randint(-300, 300, shape, generator=generator) * 2.0**-149,
    "huge range": lambda shape, generator: (
        torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-130, 125, shape, generator=generator))
    ),
    "ascending": lambda shape, generator: torch.arange(shape[1]).expand(shape).float(),
    "descending": lambda shape, generator: -torch.arange(shape[1]).expand(shape).float(),
    "all want the same": lambda shape, generator: torch.randn(shape[1], generator=generator).expand(shape),
    "real": lambda shape, generator: torch.randn(shape, generator=generator),
    "largest and infinite": lambda shape, generator: torch.tensor(
        [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, torch.inf, -torch.inf, torch.nan]
    )[torch.randint(0, 5, shape, generator=generator)],
    "one finite": lambda shape, generator: torch.full(shape, torch.nan).index_fill(1, ints(shape[1] // 2), 0.0),
}


@functools.cache
def hard_case(name, rows, tokens):
    """(scores [P, N], quotas, taken [N], answer): the rows together take half of what is free."""
    generator = torch.Generator().manual_seed(0)
    scores = HARD[name]((rows, tokens), generator)
    taken = torch.rand(tokens, generator=generator) < 0.1
    quotas = shared_out(int(taken.logical_not().sum()) // 2, rows, generator)
    return scores, quotas, taken, expected(scores, quotas, taken)


# Answers


@every_backend
def test_known_answer(target):
    """Stands on no other code."""
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[3.0, 1, 2, 1, 0], [nan, 0, 5, -1, -2], [-inf, inf, nan, 4, 4]])
    for quotas, taken, answer in (
        ([2, 1, 2], None, [4, 1, 3, 0, 2]),
        ([0, 3, 0], None, [4, 3, 1]),
        ([0, 0, 5], None, [3, 4, 0, 1, 2]),
        ([5, 0, 0], None, [4, 1, 3, 2, 0]),
        ([1, 1, 1], [False, True, False, False, True], [3, 2, 0]),
        ([0, 0, 0], None, []),
    ):
        taken = None if taken is None else torch.tensor(taken)
        assert call(target, "exclusive_bottomk", scores, quotas, taken=taken).tolist() == answer
    x = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [1, 1], [0, 0]])
    pivots, mask = torch.tensor([0, 2]), torch.tensor([True, True, True, True, False])
    assert call(target, "pivot_bottomk", x, pivots, [2, 2]).tolist() == [2, 1, 0, 3]
    assert call(target, "pivot_bottomk", x, pivots, [1, 3], mask=mask).tolist() == [2, 0, 3, 1]


@every_backend
@given(case=score_cases())
def test_exact_scores(target, case):
    """Ties, special scores, taken tokens, strides, dtypes, batches, rows from none to 64, quotas from 0 to all."""
    assert_taken(target, *case)


@every_backend
@given(case=feature_cases())
def test_exact_features(target, case):
    """`pivot_bottomk` where float32 cosines are exact."""
    x, pivots, quotas, mask = case
    chosen = call(target, "pivot_bottomk", x, pivots, quotas, mask=mask)
    assert_same_bits(chosen, expected(float64_cosines(x, pivots), quotas, None if mask is None else ~mask))


@every_backend
@pytest.mark.parametrize("tokens", [700, 5000])
@pytest.mark.parametrize("name", HARD)
def test_hard_scores(target, name, tokens):
    """Whatever they are, across tiles; a row may take more than fits one helping of a kernel."""
    scores, quotas, taken, answer = hard_case(name, 5, tokens)
    assert_same_bits(call(target, "exclusive_bottomk", scores, quotas, taken=taken), answer)


@every_backend
@pytest.mark.parametrize("lower", [0, 1, 255, 256, 300])
def test_quota_ends_among_ties(target, lower):
    """As many as are lower than thousands of equals, and a few of those."""
    tokens = 3000
    scores = torch.zeros(1, tokens)
    scores[:, torch.randperm(tokens, generator=torch.Generator().manual_seed(lower))[:lower]] = -1
    for quota in (lower, lower + 1, lower + 2, lower + 600):
        assert_taken(target, scores, [quota])


@on_targets(REFERENCE, NATIVE, Target("triton", "cuda"), Target("cuda", "cuda"))
@pytest.mark.parametrize("name", ["two values", "descending", "real"])
def test_many_tokens(target, name):
    """70000 tokens; 2^20 of which the last come first."""
    scores, quotas, taken, answer = hard_case(name, 4, 70000)
    assert_same_bits(call(target, "exclusive_bottomk", scores, quotas, taken=taken), answer)
    tokens = 2**20 + 3
    chosen = call(target, "exclusive_bottomk", HARD["descending"]((2, tokens), None), [3, 600])
    assert torch.equal(chosen, tokens - 1 - torch.arange(603))


@every_backend
@pytest.mark.parametrize("rows", [1, 3, 16, 64])
def test_every_token_is_taken(target, rows):
    """Quotas that sum to N: the answer is a permutation, and the right one."""
    tokens = size(target, 3000, 300)
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(2, rows, tokens, generator=generator).half()  # many ties
    for quotas in (shared_out(tokens, rows, generator), [0] * (rows - 1) + [tokens], [tokens] + [0] * (rows - 1)):
        assert_taken(target, scores, quotas)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_real_features(target, dtype):
    """Each choice within rounding of the least float64 cosine, the same bits on every call."""
    x = clustered(size(target, (2, 700, 200), (2, 70, 33)), dtype=dtype)
    pivots, mask = seeds_and_mask(x.shape[:-1], 5)
    quotas = [x.shape[1] // share for share in (20, 9, 30, 6, 15)]
    chosen = call(target, "pivot_bottomk", x, pivots, quotas, mask=mask)
    for own, own_pivots, own_mask, own_chosen in zip(x, pivots, mask, chosen):
        cosines = float64_cosines(own, own_pivots).repeat_interleave(ints(*quotas), 0)  # [K, N]
        contract.assert_greedy(own_chosen, cosines, own_mask, (4 + x.shape[-1] ** 0.5) * EPS)
    for _ in range(2):
        assert_same_bits(call(target, "pivot_bottomk", x, pivots, quotas, mask=mask), chosen)


# Relations between answers


@every_backend
@pytest.mark.parametrize("shape", [(2, 600, 65), (70000, 3)], ids=str)
def test_pivot_bottomk_is_both_operators(target, shape):
    """The same as `exclusive_bottomk` of `pivot_cosine`, in which order so ever a backend does it."""
    x = clustered(size(target, shape, (*shape[:-2], 50, 3)))
    pivots, mask = pivots_of(x.shape[:-1], 20, torch.Generator().manual_seed(0)), seeds_and_mask(x.shape[:-1])[1]
    x = strategies.with_special_tokens(x, torch.Generator().manual_seed(1), ["nan", "inf", "zero"], share=0.1)
    quotas = shared_out(int(mask.sum(-1).min()), 20, torch.Generator().manual_seed(2))
    for own in (mask, None):
        scores = call(target, "pivot_cosine", x, pivots)
        chosen = call(target, "exclusive_bottomk", scores, quotas, taken=None if own is None else ~own)
        assert_same_bits(call(target, "pivot_bottomk", x, pivots, quotas, mask=own), chosen)


@every_kernel
def test_copies_leave_in_index_order(target):
    x = contract.with_copies(clustered(size(target, (900, 67), (120, 33))), torch.Generator().manual_seed(0))
    chosen = call(target, "pivot_bottomk", x, torch.tensor([5, 7]), [len(x) // 2, len(x) - len(x) // 2])
    step = chosen.argsort()
    token_of = x.unique(dim=0, return_inverse=True)[1]
    for token in token_of.bincount().gt(1).nonzero()[:, 0]:
        steps = step[token_of == token]
        assert (steps[1:] >= steps[:-1]).all(), f"copies left in the order {steps.tolist()}"


@every_backend
def test_permuted_tokens(target):
    """The same tokens are chosen wherever they stand, as long as no two score the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = size(target, 2000, 200)
    scores = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(4)]).float()
    order = torch.randperm(tokens, generator=generator)
    quotas = [tokens // 5, 0, 7, tokens // 3]
    chosen = call(target, "exclusive_bottomk", scores, quotas)
    assert torch.equal(order[call(target, "exclusive_bottomk", scores[:, order], quotas)], chosen)


@every_backend
def test_quotas_in_parts(target):
    """A row that comes again, or a second call without the first one's tokens, goes on where it had stopped."""
    generator = torch.Generator().manual_seed(0)
    tokens = size(target, 2000, 300)
    scores = torch.randn(2, 3, tokens, generator=generator).bfloat16()
    quotas = [tokens // 4, tokens // 6, tokens // 2]
    whole = call(target, "exclusive_bottomk", scores, quotas)
    parts = [part for quota in quotas for part in (quota // 3, quota - quota // 3)]
    assert_same_bits(call(target, "exclusive_bottomk", scores.repeat_interleave(2, 1), parts), whole)
    taken, chosen = torch.zeros(2, tokens, dtype=torch.bool), []
    for row, part in zip([0, 0, 1, 1, 2, 2], parts):
        chosen.append(call(target, "exclusive_bottomk", scores[:, row : row + 1], [part], taken=taken))
        taken = taken.scatter(1, chosen[-1], True)
    assert_same_bits(torch.cat(chosen, 1), whole)


@every_backend
def test_rows_of_a_batch_do_not_meet(target):
    generator = torch.Generator().manual_seed(0)
    tokens = size(target, 1500, 200)
    scores, taken = torch.randn(3, 4, tokens, generator=generator), torch.rand(3, tokens, generator=generator) < 0.2
    quotas = [tokens // 9, 3, 0, tokens // 4]
    alone = call(target, "exclusive_bottomk", scores[1], quotas, taken=taken[1])
    for neighbour in (torch.nan, torch.inf, 0.0, -1e4):
        crowded = torch.full_like(scores, neighbour)
        crowded[1] = scores[1]
        assert_same_bits(call(target, "exclusive_bottomk", crowded, quotas, taken=taken)[1], alone)
    x = clustered((3, 50, 20))
    pivots, mask = seeds_and_mask((3, 50), 2)
    alone = call(target, "pivot_bottomk", x, pivots, [5, 6], mask=mask)[1]
    for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
        crowded = torch.full_like(x, neighbour)
        crowded[1] = x[1]
        assert_same_bits(call(target, "pivot_bottomk", crowded, pivots, [5, 6], mask=mask)[1], alone)


@every_kernel
def test_strides_change_no_bit(target):
    x = clustered((2, 50, 64), dtype=torch.float16)
    pivots, mask = seeds_and_mask(x.shape[:-1], 5)
    plain = call(target, "pivot_bottomk", x, pivots, [3, 9, 0, 7, 4], mask=mask)
    for name in LAYOUTS.keys() - {"expanded"}:
        layout = LAYOUTS[name]
        again = call(target, "pivot_bottomk", layout(x), layout(pivots), [3, 9, 0, 7, 4], mask=layout(mask))
        assert_same_bits(again, plain)


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    """Batch rows, and the tokens of one row, shared out among threads."""
    scores = torch.randn(3, 5, 9000, generator=torch.Generator().manual_seed(0)).half()
    x, quotas = clustered((3, 900, 130)), [100, 0, 7, 300, 20]
    pivots, mask = seeds_and_mask((3, 900), 5)

    def run():
        return (
            call(target, "exclusive_bottomk", scores, quotas),
            call(target, "exclusive_bottomk", scores[0], quotas),
            call(target, "pivot_bottomk", x, pivots, quotas, mask=mask),
            call(target, "pivot_bottomk", x[0], pivots[0], quotas),
        )

    contract.assert_threads_change_no_bit(run)


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    """Calls from several threads at once give the answers of calls in turn."""
    cases = [hard_case(name, 3, 500) for name in ("real", "two values", "equal", "huge range")]
    calls = [functools.partial(pruneops.exclusive_bottomk, scores, q, taken=taken) for scores, q, taken, _ in cases]
    assert_same_bits(contract.run_concurrently(target, calls), [answer for *_, answer in cases])
    inputs = [(clustered((150, 20), seed), torch.arange(3), [10, 20, 30]) for seed in range(4)]
    results = contract.run_concurrently(target, [functools.partial(pruneops.pivot_bottomk, *own) for own in inputs])
    assert_same_bits(results, [call(target, "pivot_bottomk", *own) for own in inputs])


# Edges


@every_backend
def test_edges(target):
    everyone = torch.ones(2, 5, dtype=torch.bool)
    for scores, quotas, taken in (
        (torch.zeros(1, 1, 1), [1], None),  # one row, one token
        (torch.zeros(1, 1), [0], None),
        (torch.empty(2, 0, 5), [], None),  # no rows
        (torch.empty(0, 5), [], everyone[0]),
        (torch.empty(0, 2, 5), [2, 3], None),  # no batch
        (torch.empty(0, 2, 5), [2, 3], everyone[:0]),
        (torch.full((2, 2, 5), torch.nan), [2, 3], None),  # nothing finite
        (torch.full((2, 2, 5), -torch.inf), [1, 4], ~everyone),
        (torch.zeros(2, 2, 5), [0, 0], everyone),  # nothing to take, nothing to be had
        (torch.zeros(2, 2, 5), [1, 0], torch.arange(5).ne(3).expand(2, 5)),  # one token to be had
        (torch.zeros(2, 64, 5), [0] * 63 + [5], None),
    ):
        assert_taken(target, scores, quotas, taken)
    none = torch.empty(2, 0, dtype=torch.int64)
    for x, pivots, quotas, mask in (
        (torch.ones(1, 1, 1), none[:1, :0].new_zeros(1, 1), [1], None),
        (torch.empty(2, 0, 3), none, [], None),  # no tokens
        (torch.ones(2, 5, 3), none, [], everyone),  # no pivots
        (torch.empty(0, 5, 3), none.new_zeros(0, 2), [2, 3], None),  # no batch
        (torch.zeros(2, 5, 3), none.new_zeros(2, 2), [2, 3], everyone),  # nothing but zero vectors
        (torch.full((2, 5, 3), torch.nan), none.new_zeros(2, 2), [2, 3], None),
        (torch.ones(2, 5, 3), none.new_zeros(2, 1), [0], ~everyone),
    ):
        chosen = call(target, "pivot_bottomk", x, pivots, quotas, mask=mask)
        scores = float64_cosines(x, pivots) if x.numel() else torch.empty(len(x), len(quotas), x.shape[1])
        assert_same_bits(chosen, expected(scores.round(), quotas, None if mask is None else ~mask))


@every_backend
def test_tokens_run_out(target, monkeypatch):
    """Where nobody checked: every row gets what is left, then -1."""
    monkeypatch.setattr(importlib.import_module("pruneops.ops.exclusive_bottomk"), "is_concrete", lambda tensor: False)
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, size(target, 3000, 700)):
        scores = contract.small_integers((2, 4, tokens), generator)
        taken = torch.rand(2, tokens, generator=generator) < torch.tensor([[0.3], [1.0]])
        for quotas in ([1, 2, 0, tokens - 3], [tokens, 0, 0, 0], shared_out(tokens, 4, generator)):
            assert_taken(target, scores, quotas, taken)
    x, mask = torch.eye(4), torch.tensor([False, True, False, True])
    assert call(target, "pivot_bottomk", x, torch.tensor([1, 0]), [1, 3], mask=mask).tolist() == [3, 1, -1, -1]


@every_backend
def test_no_gradient(target):
    x, pivots = torch.randn(6, 4, device=target.device, requires_grad=True), torch.tensor([0, 1], device=target.device)
    with pruneops.backend(target.backend):
        results = pruneops.exclusive_bottomk(x, [1, 0, 1, 0, 0, 1]), pruneops.pivot_bottomk(x, pivots, [2, 1])
    assert not any(result.requires_grad for result in results)


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Rows, batch entries, marks and tokens, far apart in sparse files."""
    generator = torch.Generator().manual_seed(0)
    near, taken = contract.small_integers((3, 4, 30), generator), torch.rand(3, 30, generator=generator) < 0.3
    quotas = [3, 0, 7, 5]
    answer = expected(near, quotas, taken)
    x = contract.signs((2, 30, 16), generator)
    pivots = pivots_of((2, 30), 4, generator)
    with pruneops.backend(target.backend):  # `call` would copy the files
        for dim in (0, 1):
            scores, marks = (
                contract.with_gaps_past_2_31(tmp_path, near, dim),
                contract.with_gaps_past_2_31(tmp_path, taken, dim),
            )
            assert_same_bits(pruneops.exclusive_bottomk(scores, quotas, taken=marks), answer)
            chosen = pruneops.pivot_bottomk(
                contract.with_gaps_past_2_31(tmp_path, x, dim), pivots, quotas, mask=~taken[:2]
            )
            assert_same_bits(chosen, expected(float64_cosines(x, pivots), quotas, taken[:2]))
        marks = contract.with_gaps_past_2_31(tmp_path, ~taken[:2], 1)
        chosen = pruneops.pivot_bottomk(x, contract.with_gaps_past_2_31(tmp_path, pivots, 1), quotas, mask=marks)
        assert_same_bits(chosen, expected(float64_cosines(x, pivots), quotas, taken[:2]))


# Compilation


def samples():
    """(operator, arguments, keyword arguments)"""
    x = torch.randn(2, 9, 5)
    pivots, mask = seeds_and_mask((2, 9), share=0.9)
    return [
        ("exclusive_bottomk", (x.mT, [1, 0, 2, 3, 1]), {}),
        ("exclusive_bottomk", (x.mT.contiguous().bfloat16(), [1, 0, 2, 0, 1]), {"taken": ~mask}),
        ("exclusive_bottomk", (x[0].half(), [0] * 9), {}),
        ("pivot_bottomk", (x, pivots, [3, 0, 4]), {}),
        ("pivot_bottomk", (x[0].mT.contiguous().mT.half(), pivots[0], [1, 2, 1]), {"mask": mask[0]}),
    ]


@every_backend
@pytest.mark.parametrize("sample", range(5))
def test_opcheck(target, sample):
    op, args, kwargs = samples()[sample]
    contract.opcheck(target, op, *args, **kwargs)


def selected(x, pivots, k):
    """What a model does with the operators: score, choose around the pivots, gather."""
    features = x - x.mean(1, keepdim=True)
    mask = torch.ones_like(x[..., 0], dtype=torch.bool).scatter(1, pivots, False)
    quotas = [k, 0, x.shape[1] // 4]
    kept = pruneops.exclusive_bottomk(pruneops.pivot_cosine(features, pivots), quotas, taken=~mask)
    again = pruneops.pivot_bottomk(features, pivots, quotas, mask=mask)
    kept = kept.sort().values
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, again


@every_backend
def test_compile_without_graph_break(target):
    pivots = torch.tensor([[1, 2, 3], [7, 0, 5]])
    calls = [(torch.randn(2, N, D), pivots, k) for N, D, k in ((12, 8, 3), (20, 5, 7), (31, 16, 4))]
    contract.assert_compiles(target, selected, calls)


def test_compile_with_inductor():
    pivots = "torch.tensor([[1, 2, 3], [7, 0, 5]])"
    calls = f"[(torch.randn(2, N, D), {pivots}, k) for N, D, k in ((12, 8, 3), (20, 5, 7))]"
    contract.assert_compiles_with_inductor(__name__, "selected", calls)


# Errors

X = torch.randn(2, 6, 4)
GOOD = {
    "exclusive_bottomk": {"scores": torch.randn(2, 3, 6), "quotas": [1, 2, 0]},
    "pivot_bottomk": {"x": X, "pivots": ints([0, 1, 2], [5, 5, 5]), "quotas": [1, 2, 0]},
}
bottomk = functools.partial(InvalidCall, "exclusive_bottomk", GOOD["exclusive_bottomk"])
pivoted = functools.partial(InvalidCall, "pivot_bottomk", GOOD["pivot_bottomk"])
SCORES, PIVOTS = GOOD["exclusive_bottomk"]["scores"], GOOD["pivot_bottomk"]["pivots"]
TWO_FREE = torch.arange(6).lt(2).expand(2, 6)
ONE_EACH = "one for each of the 3 rows of"
FEWER = "at most the 2 tokens that are free in every row"
BAD = [
    bottomk(ValueError, "scores", "of shape [6]", "of rank 2 or 3", scores=SCORES[0, 0]),
    bottomk(ValueError, "scores", "of shape [1, 2, 3, 6]", "of rank 2 or 3", scores=SCORES[None]),
    bottomk(ValueError, "scores", "of shape [2, 3, 0]", "at least one token wide", scores=SCORES[..., :0]),
    bottomk(TypeError, "scores", "torch.int64", DTYPE_NAMES, scores=SCORES.long()),
    bottomk(TypeError, "scores", "torch.float64", DTYPE_NAMES, scores=SCORES.double()),
    bottomk(ValueError, "scores", "65 rows", "at most 64 rows", scores=torch.randn(65, 6), quotas=[0] * 65),
    bottomk(TypeError, "taken", "torch.uint8", "bool", taken=bools(2, 6).byte()),
    bottomk(ValueError, "taken", "of shape [2, 5]", "of shape [2, 6]", taken=bools(2, 5)),
    bottomk(ValueError, "taken", "of shape [6]", "of shape [2, 6]", taken=bools(6)),
    bottomk(ValueError, "taken", "of shape [1, 6]", "of shape [6]", scores=SCORES[0], taken=bools(1, 6)),
    bottomk(ValueError, "taken", "on meta", "on the device of scores, cpu", taken=bools(2, 6, device="meta")),
    bottomk(ValueError, "quotas", "2 of them", f"{ONE_EACH} scores", quotas=[1, 2]),
    bottomk(ValueError, "quotas", "4 of them", f"{ONE_EACH} scores", quotas=[1, 2, 0, 0]),
    bottomk(ValueError, "quotas[1]", "-1", "at least 0", quotas=[1, -1, 0]),
    bottomk(ValueError, "sum(quotas)", "7", "at most the 6 tokens of scores", quotas=[3, 3, 1]),
    bottomk(ValueError, "sum(quotas)", "3", FEWER, taken=~TWO_FREE, values=True),
    bottomk(ValueError, "sum(quotas)", "3", FEWER, taken=~(TWO_FREE | ints([False], [True])), values=True),
    pivoted(ValueError, "x", "of shape [4]", "of rank 2 or 3", x=X[0, 0]),
    pivoted(ValueError, "x", "of shape [2, 6, 0]", "at least one feature wide", x=X[..., :0]),
    pivoted(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X.double()),
    pivoted(TypeError, "pivots", "torch.int32", "int64", pivots=PIVOTS.int()),
    pivoted(ValueError, "pivots", "of shape [3]", "of shape [2, P]", pivots=PIVOTS[0]),
    pivoted(ValueError, "pivots", "of shape [1, 3]", "of shape [2, P]", pivots=PIVOTS[:1]),
    pivoted(ValueError, "pivots", "on meta", "on the device of x, cpu", pivots=PIVOTS.to("meta")),
    pivoted(ValueError, "pivots", "65 rows", "at most 64 rows", pivots=ints(0).expand(2, 65), quotas=[0] * 65),
    pivoted(ValueError, "pivots", "6 at one place", "in [0, 6)", pivots=PIVOTS + 1, values=True),
    pivoted(ValueError, "pivots", "-1 at one place", "in [0, 6)", pivots=PIVOTS - 1, values=True),
    pivoted(TypeError, "mask", "torch.uint8", "bool", mask=bools(2, 6).byte()),
    pivoted(ValueError, "mask", "of shape [2, 5]", "of shape [2, 6]", mask=bools(2, 5)),
    pivoted(ValueError, "mask", "on meta", "on the device of x, cpu", mask=bools(2, 6, device="meta")),
    pivoted(ValueError, "quotas", "2 of them", f"{ONE_EACH} pivots", quotas=[1, 2]),
    pivoted(ValueError, "quotas[2]", "-1", "at least 0", quotas=[1, 1, -1]),
    pivoted(ValueError, "sum(quotas)", "7", "at most the 6 tokens of x", quotas=[3, 3, 1]),
    pivoted(ValueError, "sum(quotas)", "3", FEWER, mask=TWO_FREE, values=True),
    pivoted(ValueError, "sum(quotas)", "3", FEWER, x=X[0], pivots=PIVOTS[0], mask=TWO_FREE[0], values=True),
]


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@invalid([bad for bad in BAD if bad.argument in ("quotas[1]", "sum(quotas)") and not bad.values])
def test_errors_under_compile(bad):
    bad.assert_raises_under_compile()


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("exclusive_bottomk", {"scores": [[1.0]]}, "scores must be Tensor, got list"),
        ("exclusive_bottomk", {"quotas": 3}, "quotas must be list or tuple, got int"),
        ("exclusive_bottomk", {"quotas": None}, "quotas must be list or tuple, got NoneType"),
        ("exclusive_bottomk", {"quotas": [1, 2.0, 0]}, "quotas[1] must be int or SymInt, got float"),
        ("exclusive_bottomk", {"taken": 1}, "taken must be Tensor or NoneType, got int"),
        ("pivot_bottomk", {"x": [[1.0]]}, "x must be Tensor, got list"),
        ("pivot_bottomk", {"pivots": [0]}, "pivots must be Tensor, got list"),
        ("pivot_bottomk", {"quotas": [1, 2, None]}, "quotas[2] must be int or SymInt, got NoneType"),
        ("pivot_bottomk", {"mask": [True]}, "mask must be Tensor or NoneType, got list"),
    ],
)
def test_errors_of_type(op, changes, words):
    assert_type_error(op, {**GOOD[op], **changes}, words)


@pytest.mark.gpu
def test_errors_on_cuda(monkeypatch):
    """Values are read under PRUNEOPS_DEBUG=1 only."""
    scores, taken = SCORES.cuda(), ~TWO_FREE.cuda()
    with pytest.raises(ValueError, match="on the device of scores, cuda"):
        pruneops.exclusive_bottomk(scores, [1, 2, 0], taken=~TWO_FREE)
    assert pruneops.exclusive_bottomk(scores, [1, 2, 0], taken=taken)[:, 2].tolist() == [-1, -1]
    monkeypatch.setenv("PRUNEOPS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"sum\(quotas\) must be at most the 2 tokens that are free"):
        pruneops.exclusive_bottomk(scores, [1, 2, 0], taken=taken)
    with pytest.raises(ValueError, match="at most the 2 tokens that are free"):
        pruneops.pivot_bottomk(X.cuda(), PIVOTS.cuda(), [1, 2, 0], mask=~taken)
    with pytest.raises(ValueError, match=r"pivots must be in \[0, 6\), got 6"):
        pruneops.pivot_bottomk(X.cuda(), PIVOTS.cuda() + 1, [1, 2, 0])


# CUDA


def both_operators(scores, taken, x, pivots, mask):
    quotas = [40, 0, 3, 200, 1]
    return (
        pruneops.exclusive_bottomk(scores, quotas, taken=taken),
        pruneops.exclusive_bottomk(scores[0], quotas),
        pruneops.pivot_bottomk(x, pivots, quotas, mask=mask),
    )


def cuda_inputs(seed, tokens=3000):
    generator = torch.Generator().manual_seed(seed)
    scores, taken = torch.randn(3, 5, tokens, generator=generator), torch.rand(3, tokens, generator=generator) < 0.2
    x = clustered((2, 600, 128), seed, dtype=torch.bfloat16)
    return contract.to_device([scores, taken, x, *seeds_and_mask((2, 600), 5, seed=seed)], "cuda")


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    check(target, both_operators, cuda_inputs)


@CUDA_KERNELS
def test_cuda_rows_far_apart(target):
    """Rows that begin past 2^31."""
    near, gap = HARD["two values"]((5, 3000), torch.Generator().manual_seed(0)).half(), 2**29 + 32
    room = torch.empty(4 * gap + 3000, dtype=torch.float16, device="cuda")
    scores = room.as_strided(near.shape, (gap, 1)).copy_(near)
    with pruneops.backend(target.backend):
        chosen = pruneops.exclusive_bottomk(scores, [1, 2, 3, 400, 500])
    assert_same_bits(chosen.cpu(), expected(near, [1, 2, 3, 400, 500]))


@CUDA_KERNELS
def test_cuda_offsets_past_two_to_the_31(target):
    """More than 2^31 scores in one piece: the last batch row is the one that it is alone."""
    batch, rows, tokens = 33, 64, 2**20 + 1
    if torch.cuda.mem_get_info()[0] < 3 * batch * rows * tokens:
        pytest.skip("too little memory")
    scores = torch.empty(batch, rows, tokens, dtype=torch.float16, device="cuda").normal_()
    quotas = [5] * rows
    with pruneops.backend(target.backend):
        chosen = pruneops.exclusive_bottomk(scores, quotas)
    with pruneops.backend("reference"):
        for row in (0, batch - 1):
            assert torch.equal(chosen[row], pruneops.exclusive_bottomk(scores[row], quotas))


# Launches

TRITON_LAUNCHES = """
from pruneops.triton_kernels import exclusive_bottomk as kernels

for tokens in (50, 64, 1000, 1024, 1025, 70000):
    for quotas in ([1], [5, 0, 16], [1] * 8, [1, 2] * 5):
        scores, taken = torch.ones(2, len(quotas), tokens), torch.zeros(2, tokens, dtype=torch.bool)
        kernels.exclusive_bottomk(scores, quotas, None)
        kernels.exclusive_bottomk(scores[:1], quotas, None)
        kernels.exclusive_bottomk(scores, quotas, taken)
        kernels.exclusive_bottomk(scores[:, :, ::3].contiguous(), quotas, taken[:, ::3])
        kernels.exclusive_bottomk(scores.half(), quotas, None)
        x, pivots = torch.ones(2, tokens, 16), torch.zeros(2, len(quotas), dtype=torch.int64)
        kernels.pivot_bottomk(x, pivots, quotas, taken)
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths, quotas and batches compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 6 * 4 * 7
    assert compiled == 2 * 2 * 4 + 2  # tiles, numbers of rows, forms; scores for few or many tokens
