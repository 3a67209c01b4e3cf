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
from tests import contract, inputs, strategies
from tests.contract import (
    CUDA_KERNELS,
    EPS,
    NATIVE,
    REFERENCE,
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
from tests.ops.test_pivot_cosine import pivots_of
from tests.oracles import cosines
from tests.strategies import laid_out


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


def random_quotas(total, rows, generator):
    """`total` cut into as many quotas, uneven ones, some of them 0."""
    cuts = torch.randint(0, total + 1, (max(rows - 1, 0),), generator=generator).sort().values.tolist()
    return [end - start for start, end in zip([0, *cuts], [*cuts, total])][:rows]


# Scores that compare in unusual ways, in any dtype.
SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 6e-8, -6e-8, 1e-40, -1e-40, 65504.0, -65504.0]


@st.composite
def quotas_and_free(draw, rows, shape, generator):
    """(quotas, free): as many quotas as rows, and the tokens [.., N] that may be taken, or None."""
    free, limit = None, shape[-1]
    if draw(st.booleans()):
        free = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
        limit = int(free.sum(-1).min()) if free.numel() else shape[-1]
    total = draw(st.integers(0, limit) | st.just(limit)) if rows else 0
    return random_quotas(total, rows, generator), free


rows_of_scores = st.integers(0, 6) | st.sampled_from([16, 64])


@st.composite
def score_cases(draw):
    """(scores, quotas, taken): few different scores, some of them special."""
    generator = draw(strategies.generators)
    rows, tokens = draw(rows_of_scores), draw(st.integers(1, 60))
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    scores = inputs.small_integers((*batch, rows, tokens), generator, draw(st.sampled_from([0, 2, 100])))
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
    "equal rows": lambda shape, generator: torch.randn(shape[1], generator=generator).expand(shape),
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
    quotas = random_quotas(int(taken.logical_not().sum()) // 2, rows, generator)
    return scores, quotas, taken, expected(scores, quotas, taken)


# Answers


@every_backend
def test_known_answer(target):
    """Written by hand."""
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
    assert_same_bits(chosen, expected(cosines(x, pivots), quotas, None if mask is None else ~mask))


@every_backend
@pytest.mark.parametrize("tokens", [700, 5000])
@pytest.mark.parametrize("name", HARD)
def test_hard_scores(target, name, tokens):
    """Whatever they are, across tiles; a row may take more than one chunk of a kernel."""
    scores, quotas, taken, answer = hard_case(name, 5, tokens)
    assert_same_bits(call(target, "exclusive_bottomk", scores, quotas, taken=taken), answer)


@every_backend
@pytest.mark.parametrize("lower", [0, 1, 255, 256, 300])
def test_quota_ends_among_ties(target, lower):
    """All that are lower than thousands of equal ones, and a few of those."""
    tokens = 3000
    scores = torch.zeros(1, tokens)
    scores[:, torch.randperm(tokens, generator=torch.Generator().manual_seed(lower))[:lower]] = -1
    for quota in (lower, lower + 1, lower + 2, lower + 600):
        assert_taken(target, scores, [quota])


@on_targets(REFERENCE, NATIVE, Target("triton", "cuda"), Target("cuda", "cuda"))
@pytest.mark.parametrize("name", ["two values", "descending", "real"])
def test_many_tokens(target, name):
    """70000 tokens; 2^20 of descending scores."""
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
    for quotas in (random_quotas(tokens, rows, generator), [0] * (rows - 1) + [tokens], [tokens] + [0] * (rows - 1)):
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
        scores = cosines(own, own_pivots).repeat_interleave(ints(*quotas), 0)  # [K, N]
        contract.assert_greedy(own_chosen, scores, own_mask, (4 + x.shape[-1] ** 0.5) * EPS)
    for _ in range(2):
        assert_same_bits(call(target, "pivot_bottomk", x, pivots, quotas, mask=mask), chosen)


# Relations between answers


@every_backend
@pytest.mark.parametrize("shape", [(2, 600, 65), (70000, 3)], ids=str)
def test_pivot_bottomk_composes_both_operators(target, shape):
    """The same as `exclusive_bottomk` of `pivot_cosine`, however a backend computes it."""
    x = clustered(size(target, shape, (*shape[:-2], 50, 3)))
    pivots, mask = pivots_of(x.shape[:-1], 20, torch.Generator().manual_seed(0)), seeds_and_mask(x.shape[:-1])[1]
    x = inputs.with_special_tokens(x, torch.Generator().manual_seed(1), ["nan", "inf", "zero"], share=0.1)
    quotas = random_quotas(int(mask.sum(-1).min()), 20, torch.Generator().manual_seed(2))
    for own in (mask, None):
        scores = call(target, "pivot_cosine", x, pivots)
        chosen = call(target, "exclusive_bottomk", scores, quotas, taken=None if own is None else ~own)
        assert_same_bits(call(target, "pivot_bottomk", x, pivots, quotas, mask=own), chosen)


@every_kernel
def test_equal_tokens_are_chosen_in_index_order(target):
    x = inputs.with_copies(clustered(size(target, (900, 67), (120, 33))), torch.Generator().manual_seed(0))
    chosen = call(target, "pivot_bottomk", x, torch.tensor([5, 7]), [len(x) // 2, len(x) - len(x) // 2])
    step = chosen.argsort()
    token_of = x.unique(dim=0, return_inverse=True)[1]
    for token in token_of.bincount().gt(1).nonzero()[:, 0]:
        steps = step[token_of == token]
        assert (steps[1:] >= steps[:-1]).all(), f"copies are chosen in the order {steps.tolist()}"


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
    """A repeated row, or a second call with the first one's tokens taken, continues where it stopped."""
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
def test_batch_rows_are_independent(target):
    generator = torch.Generator().manual_seed(0)
    tokens = size(target, 1500, 200)
    scores, taken = torch.randn(3, 4, tokens, generator=generator), torch.rand(3, tokens, generator=generator) < 0.2
    quotas = [tokens // 9, 3, 0, tokens // 4]
    alone = call(target, "exclusive_bottomk", scores[1], quotas, taken=taken[1])
    for neighbour in (torch.nan, torch.inf, 0.0, -1e4):
        batch = torch.full_like(scores, neighbour)
        batch[1] = scores[1]
        assert_same_bits(call(target, "exclusive_bottomk", batch, quotas, taken=taken)[1], alone)
    x = clustered((3, 50, 20))
    pivots, mask = seeds_and_mask((3, 50), 2)
    alone = call(target, "pivot_bottomk", x, pivots, [5, 6], mask=mask)[1]
    for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
        batch = torch.full_like(x, neighbour)
        batch[1] = x[1]
        assert_same_bits(call(target, "pivot_bottomk", batch, pivots, [5, 6], mask=mask)[1], alone)


@every_kernel
def test_strides_change_no_bit(target):
    x = clustered((2, 50, 64), dtype=torch.float16)
    pivots, mask = seeds_and_mask(x.shape[:-1], 5)
    plain = call(target, "pivot_bottomk", x, pivots, [3, 9, 0, 7, 4], mask=mask)
    for name in LAYOUTS.keys() - {"expanded"}:
        layout = LAYOUTS[name]
        again = call(target, "pivot_bottomk", layout(x), layout(pivots), [3, 9, 0, 7, 4], mask=layout(mask))
        assert_same_bits(again, plain)


# Edges


@every_backend
def test_edges(target):
    all_tokens = torch.ones(2, 5, dtype=torch.bool)
    for scores, quotas, taken in (
        (torch.zeros(1, 1, 1), [1], None),  # one row, one token
        (torch.zeros(1, 1), [0], None),
        (torch.empty(2, 0, 5), [], None),  # no rows
        (torch.empty(0, 5), [], all_tokens[0]),
        (torch.empty(0, 2, 5), [2, 3], None),  # no batch
        (torch.empty(0, 2, 5), [2, 3], all_tokens[:0]),
        (torch.full((2, 2, 5), torch.nan), [2, 3], None),  # nothing finite
        (torch.full((2, 2, 5), -torch.inf), [1, 4], ~all_tokens),
        (torch.zeros(2, 2, 5), [0, 0], all_tokens),  # no quota, no free token
        (torch.zeros(2, 2, 5), [1, 0], torch.arange(5).ne(3).expand(2, 5)),  # one free token
        (torch.zeros(2, 64, 5), [0] * 63 + [5], None),
    ):
        assert_taken(target, scores, quotas, taken)
    none = torch.empty(2, 0, dtype=torch.int64)
    for x, pivots, quotas, mask in (
        (torch.ones(1, 1, 1), none[:1, :0].new_zeros(1, 1), [1], None),
        (torch.empty(2, 0, 3), none, [], None),  # no tokens
        (torch.ones(2, 5, 3), none, [], all_tokens),  # no pivots
        (torch.empty(0, 5, 3), none.new_zeros(0, 2), [2, 3], None),  # no batch
        (torch.zeros(2, 5, 3), none.new_zeros(2, 2), [2, 3], all_tokens),  # nothing but zero vectors
        (torch.full((2, 5, 3), torch.nan), none.new_zeros(2, 2), [2, 3], None),
        (torch.ones(2, 5, 3), none.new_zeros(2, 1), [0], ~all_tokens),
    ):
        chosen = call(target, "pivot_bottomk", x, pivots, quotas, mask=mask)
        scores = cosines(x, pivots) if x.numel() else torch.empty(len(x), len(quotas), x.shape[1])
        assert_same_bits(chosen, expected(scores.round(), quotas, None if mask is None else ~mask))


@every_backend
def test_tokens_run_out(target, monkeypatch):
    """Where values are not checked: every row takes what is left, then -1."""
    monkeypatch.setattr(importlib.import_module("pruneops.ops.exclusive_bottomk"), "has_values", lambda tensor: False)
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, size(target, 3000, 700)):
        scores = inputs.small_integers((2, 4, tokens), generator)
        taken = torch.rand(2, tokens, generator=generator) < torch.tensor([[0.3], [1.0]])
        for quotas in ([1, 2, 0, tokens - 3], [tokens, 0, 0, 0], random_quotas(tokens, 4, generator)):
            assert_taken(target, scores, quotas, taken)
    x, mask = torch.eye(4), torch.tensor([False, True, False, True])
    assert call(target, "pivot_bottomk", x, torch.tensor([1, 0]), [1, 3], mask=mask).tolist() == [3, 1, -1, -1]


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Rows, batch entries, marks and tokens, far apart in sparse files."""
    generator = torch.Generator().manual_seed(0)
    near, taken = inputs.small_integers((3, 4, 30), generator), torch.rand(3, 30, generator=generator) < 0.3
    quotas = [3, 0, 7, 5]
    answer = expected(near, quotas, taken)
    x = inputs.signs((2, 30, 16), generator)
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
            assert_same_bits(chosen, expected(cosines(x, pivots), quotas, taken[:2]))
        marks = contract.with_gaps_past_2_31(tmp_path, ~taken[:2], 1)
        chosen = pruneops.pivot_bottomk(x, contract.with_gaps_past_2_31(tmp_path, pivots, 1), quotas, mask=marks)
        assert_same_bits(chosen, expected(cosines(x, pivots), quotas, taken[:2]))


# CUDA


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
