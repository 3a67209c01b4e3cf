"""Rank assignment on every backend: the contract of `pruneops.assign_ranks`, line by line."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, inputs, strategies
from tests.contract import CUDA_KERNELS, EPS, assert_same_bits, call, every_backend, on_targets, size
from tests.inputs import DTYPES, LAYOUTS, small_integers
from tests.ops.test_exclusive_bottomk import expected
from tests.oracles import negative_log_probabilities
from tests.strategies import laid_out


def assert_ranked(target, logits, j):
    """The only right answer, for logits whose log probabilities float32 holds."""
    ranks = expected(negative_log_probabilities(logits)[..., :j, :], [1] * j)
    assert_same_bits(call(target, "assign_ranks", logits, j), ranks)


SPECIAL = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38]


@st.composite
def exact_cases(draw):
    """(logits, j)"""
    generator = draw(strategies.generators)
    tokens, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 10) | st.sampled_from([15, 16, 31, 32, 63, 64]))
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    logits = inputs.steep_logits((*batch, tokens, ranks + 1), generator)
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), logits.shape, generator=generator)]
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    logits = logits.where(torch.rand(logits.shape, generator=generator) >= share, special).to(draw(strategies.dtypes))
    limit = min(tokens, ranks)
    return draw(laid_out(logits)), draw(st.integers(1, limit) | st.just(limit))


# Answers


@every_backend
def test_known_answer(target):
    """Written by hand: probabilities, not logits, and each token once."""
    nan, inf = torch.nan, torch.inf
    for logits, answer in (
        ([[5.0, 4, 0], [3, 3, 0], [0, 0, 9]], [0, 1]),
        ([[5.0, 9, 0], [1, -9, -9], [0, 0, 0]], [1, 0]),  # 0.02 against nearly 1
        ([[0.0, 0, 9], [0, 0, 8], [0, 0, 8]], [1, 2]),  # ties, and the class that is no rank counts
        ([[-200.0, -300, 0], [-201, -100, 0], [-199, -300, 0]], [2, 1]),  # probabilities below float32
        ([[0.0, nan, 0], [inf, 0, 0], [-9, -inf, 0]], [2, 0]),  # not finite: last, in index order
    ):
        assert call(target, "assign_ranks", torch.tensor(logits), 2).tolist() == answer
        assert call(target, "assign_ranks", torch.tensor([logits] * 2), 1).tolist() == [answer[:1]] * 2


@every_backend
@given(case=exact_cases())
def test_exact_inputs(target, case):
    """Ties, special logits, strides, dtypes, batches, one rank to 64."""
    assert_ranked(target, *case)


@every_backend
@pytest.mark.parametrize(("tokens", "ranks"), [(576, 32), (700, 64), (5000, 5), (3000, 63)])
def test_many_tokens(target, tokens, ranks):
    """Across tiles, conflicts everywhere."""
    tokens = size(target, tokens, tokens // 3)
    assert_ranked(target, inputs.steep_logits((tokens, ranks + 1), torch.Generator().manual_seed(tokens)), ranks)


@every_backend
@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "descending"])
def test_all_ranks_prefer_the_same_tokens(target, ascending):
    """Rank p takes the token that is next for all, among up to 65536."""
    tokens, ranks = size(target, (65536, 64), (1500, 20))
    order = torch.arange(tokens) if ascending else torch.arange(tokens).flip(0)
    logits = torch.zeros(tokens, ranks + 1)
    logits[:, :ranks] = -128.0 * (1 + order[:, None])
    assert torch.equal(call(target, "assign_ranks", logits, ranks), order[:ranks])
    logits[:, ranks] = torch.nan  # no logarithm is finite
    assert torch.equal(call(target, "assign_ranks", logits, ranks), torch.arange(ranks))


def assert_most_probable(logits, ranks):
    """Each rank's token [j] is within rounding of the most probable one left."""
    scores = negative_log_probabilities(logits)
    allowed = torch.ones(len(logits), dtype=torch.bool)
    scale = 1 + float(scores.gather(1, ranks[:, None]).max())
    contract.assert_greedy(ranks, scores, allowed, 4 * EPS * scale)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_real_values(target, dtype):
    """Each rank's token is within rounding of the most probable, the same on every call."""
    logits = inputs.logits(size(target, (2, 3000, 33), (2, 300, 33)), dtype=dtype)
    ranks = call(target, "assign_ranks", logits, 32)
    for own, chosen in zip(logits, ranks):
        assert_most_probable(own, chosen)
    for _ in range(2):
        assert_same_bits(call(target, "assign_ranks", logits, 32), ranks)


@every_backend
@pytest.mark.parametrize("ranks", [3, 32, 64])
def test_close_calls(target, ranks):
    """Two tokens for every rank, of all but equal probability: one has one other class, one has many."""
    generator = torch.Generator().manual_seed(ranks)
    logits = torch.full((2, ranks, ranks + 1), -30.0, dtype=torch.float64)
    own = torch.arange(ranks)
    logits[0, own, own] = 0
    logits[0, :, -1] = 3 * torch.rand(ranks, generator=generator) - 1.5
    best = logits[0].log_softmax(-1)[own, own] - (1.5 + 3.5 * torch.rand(ranks, generator=generator)) * 1e-6
    logits[1] = 0
    logits[1, own, own] = best + math.log(ranks) - torch.log1p(-best.exp())
    logits = logits.flatten(0, 1)[torch.randperm(2 * ranks, generator=generator)].float()
    assert_most_probable(logits, call(target, "assign_ranks", logits, ranks))


# Relations between answers


@every_backend
def test_prefix(target):
    """A smaller j gives the same ranks, only fewer, whatever the ranks beyond hold."""
    logits = torch.cat(
        [inputs.logits((2, 300, 21)), inputs.steep_logits((2, 300, 21), torch.Generator().manual_seed(0))]
    )
    whole = call(target, "assign_ranks", logits, 20)
    for j in (1, 2, 7, 16, 19):
        assert_same_bits(call(target, "assign_ranks", logits, j), whole[:, :j])


@every_backend
def test_permuted_tokens(target):
    """The same tokens are chosen in any order of the tokens."""
    logits = inputs.logits((500, 33))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    chosen = call(target, "assign_ranks", logits, 32)
    assert torch.equal(order[call(target, "assign_ranks", logits[order], 32)], chosen)


@every_backend
def test_shifted_logits(target):
    """A softmax is invariant to shifts: a constant added to a token's logits changes nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = small_integers((300, 17), generator, 100) / 4
    height = 2 * small_integers((300, 1), generator, 1000)
    assert_same_bits(*(call(target, "assign_ranks", own, 16) for own in (logits, logits + height)))


@every_backend
def test_batch_rows_are_independent(target):
    logits = inputs.logits(size(target, (3, 1000, 17), (3, 200, 17)))
    alone = call(target, "assign_ranks", logits[1], 16)
    for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
        batch = torch.full_like(logits, neighbour)
        batch[1] = logits[1]
        assert_same_bits(call(target, "assign_ranks", batch, 16)[1], alone)


@every_backend
def test_strides_change_no_bit(target):
    logits = inputs.logits((2, 150, 16), dtype=torch.bfloat16)  # coarse logits: ties that rounding could break
    plain = call(target, "assign_ranks", logits, 15)
    for name in LAYOUTS.keys() - {"expanded"}:
        assert_same_bits(call(target, "assign_ranks", LAYOUTS[name](logits), 15), plain)


# Edges


@every_backend
def test_edges(target):
    for logits, j in (
        (torch.zeros(1, 1, 2), 1),  # one token, one rank
        (torch.zeros(1, 2), 1),
        (torch.zeros(5, 6), 5),  # as many ranks as tokens
        (torch.zeros(2, 5, 65), 5),  # more ranks than tokens
        (torch.zeros(2, 70, 65), 64),
        (torch.empty(0, 5, 4), 3),  # no batch
        (torch.full((2, 5, 4), torch.nan), 3),  # nothing finite
        (torch.full((2, 5, 4), -torch.inf), 3),
        (torch.full((2, 5, 4), torch.inf), 3),
        (torch.tensor([[3e38, -3e38, 0], [0, 0, 0], [-3e38, 3e38, 3e38]]), 2),  # 6e38 apart
    ):
        assert_ranked(target, logits, j)


@every_backend
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("column", [0, 3, 4])
def test_special_logit(target, value, column):
    """In a rank taken, in one beyond j, in the class that is no rank."""
    logits = inputs.steep_logits((2, 9, 5), torch.Generator().manual_seed(0))
    logits[:, ::2, column] = value
    for j in (1, 3, 4):
        assert_ranked(target, logits, j)


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Batch entries and tokens, far apart in sparse files."""
    near = inputs.steep_logits((3, 30, 9), torch.Generator().manual_seed(0))
    for dim in (0, 1):
        with pruneops.backend(target.backend):  # `call` would copy the file
            ranks = pruneops.assign_ranks(contract.with_gaps_past_2_31(tmp_path, near, dim), 8)
        assert_same_bits(ranks, expected(negative_log_probabilities(near), [1] * 8))


# CUDA


@CUDA_KERNELS
def test_cuda_offsets_past_two_to_the_31(target):
    """More than 2^31 logits in one piece: the last batch row is the one that it is alone."""
    shape = 520, 65536, 65
    if torch.cuda.mem_get_info()[0] < 7 * shape[0] * shape[1] * shape[2]:
        pytest.skip("too little memory")
    logits = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
    with pruneops.backend(target.backend):
        ranks = pruneops.assign_ranks(logits, 64)
        for row in (0, len(logits) - 1):
            assert torch.equal(ranks[row], pruneops.assign_ranks(logits[row], 64))
