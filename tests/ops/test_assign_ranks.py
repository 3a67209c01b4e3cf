"""Rank assignment on every backend: the contract of `pruneops.assign_ranks`, line by line."""

import functools
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
    assert_same_bits,
    call,
    every_backend,
    on_targets,
    size,
)
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, assert_type_error, invalid
from tests.ops.test_exclusive_bottomk import expected
from tests.strategies import DTYPES, LAYOUTS, laid_out


def float64_scores(logits):
    """-log probability [.., J, N] of logits [.., N, J + 1]; NaN where float32 cannot hold it."""
    scores = -logits.double().log_softmax(-1)[..., :-1].mT
    return scores.where(scores.float().isfinite(), torch.nan)


def assert_ranked(target, logits, j):
    """The one right answer, for logits whose log probabilities float32 holds."""
    ranks = expected(float64_scores(logits)[..., :j, :], [1] * j)
    assert_same_bits(call(target, "assign_ranks", logits, j), ranks)


def steep(shape, generator, greatest=3):
    """Logits [.., N, J + 1] whose log probabilities are exact in float32, many of them equal.

    The greatest of a token are 0 or, if it is one alone, any small integer; the others lie whole steps of
    128 below, where probabilities are 0 in float32.
    """
    steps = torch.randint(0, greatest + 1, shape, generator=generator)
    steps -= steps.amin(-1, keepdim=True)
    alone = (steps == 0).sum(-1, keepdim=True) == 1
    height = contract.small_integers((*shape[:-1], 1), generator)
    return height * alone - 128.0 * steps


SPECIAL = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38]


@st.composite
def exact_cases(draw):
    """(logits, j)"""
    generator = draw(strategies.generators)
    tokens, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 10) | st.sampled_from([15, 16, 31, 32, 63, 64]))
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    logits = steep((*batch, tokens, ranks + 1), generator)
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), logits.shape, generator=generator)]
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    logits = logits.where(torch.rand(logits.shape, generator=generator) >= share, special).to(draw(strategies.dtypes))
    most = min(tokens, ranks)
    return draw(laid_out(logits)), draw(st.integers(1, most) | st.just(most))


def real(shape, seed=0, dtype=torch.float32):
    """Logits of a model that is sure of some tokens and of few ranks."""
    generator = torch.Generator().manual_seed(seed)
    sure = torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    return (2 * sure * torch.randn(shape, generator=generator)).to(dtype)


# Answers


@every_backend
def test_known_answer(target):
    """Stands on no other code: probabilities, not logits, and each token once."""
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
    assert_ranked(target, steep((tokens, ranks + 1), torch.Generator().manual_seed(tokens)), ranks)


@every_backend
@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "descending"])
def test_every_rank_wants_the_same_tokens(target, ascending):
    """Rank p takes the token that p others have passed over, among up to 65536."""
    tokens, ranks = size(target, (65536, 64), (1500, 20))
    order = torch.arange(tokens) if ascending else torch.arange(tokens).flip(0)
    logits = torch.zeros(tokens, ranks + 1)
    logits[:, :ranks] = -128.0 * (1 + order[:, None])
    assert torch.equal(call(target, "assign_ranks", logits, ranks), order[:ranks])
    logits[:, ranks] = torch.nan  # nobody's logarithm is finite
    assert torch.equal(call(target, "assign_ranks", logits, ranks), torch.arange(ranks))


def assert_most_probable(logits, ranks):
    """Each of the ranks [j] is a token within rounding of the most probable one left."""
    scores = float64_scores(logits)
    everyone = torch.ones(len(logits), dtype=torch.bool)
    scale = 1 + float(scores.gather(1, ranks[:, None]).max())
    contract.assert_greedy(ranks, scores, everyone, 4 * EPS * scale)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_real_values(target, dtype):
    """Each rank's token is within rounding of the most probable, the same on every call."""
    logits = real(size(target, (2, 3000, 33), (2, 300, 33)), dtype=dtype)
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
    logits = torch.cat([real((2, 300, 21)), steep((2, 300, 21), torch.Generator().manual_seed(0))])
    whole = call(target, "assign_ranks", logits, 20)
    for j in (1, 2, 7, 16, 19):
        assert_same_bits(call(target, "assign_ranks", logits, j), whole[:, :j])


@every_backend
def test_permuted_tokens(target):
    """The same tokens, wherever they stand."""
    logits = real((500, 33))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    chosen = call(target, "assign_ranks", logits, 32)
    assert torch.equal(order[call(target, "assign_ranks", logits[order], 32)], chosen)


@every_backend
def test_shifted_logits(target):
    """A softmax knows no height: a constant added to a token's logits changes nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = contract.small_integers((300, 17), generator, 100) / 4
    height = 2 * contract.small_integers((300, 1), generator, 1000)
    assert_same_bits(*(call(target, "assign_ranks", own, 16) for own in (logits, logits + height)))


@every_backend
def test_rows_of_a_batch_do_not_meet(target):
    logits = real(size(target, (3, 1000, 17), (3, 200, 17)))
    alone = call(target, "assign_ranks", logits[1], 16)
    for neighbour in (torch.nan, torch.inf, 0.0, 1e4):
        crowded = torch.full_like(logits, neighbour)
        crowded[1] = logits[1]
        assert_same_bits(call(target, "assign_ranks", crowded, 16)[1], alone)


@every_backend
def test_strides_change_no_bit(target):
    logits = real((2, 150, 16), dtype=torch.bfloat16)  # coarse logits: ties that rounding could break
    plain = call(target, "assign_ranks", logits, 15)
    for name in LAYOUTS.keys() - {"expanded"}:
        assert_same_bits(call(target, "assign_ranks", LAYOUTS[name](logits), 15), plain)


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    """Batch rows, and the tokens of one row, shared out among threads."""
    logits = real((3, 9000, 33), dtype=torch.bfloat16)

    def run():
        return call(target, "assign_ranks", logits, 32), call(target, "assign_ranks", logits[0], 32)

    contract.assert_threads_change_no_bit(run)


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    """Calls from several threads at once give the answers of calls in turn."""
    inputs = [real((400, 17), seed) for seed in range(4)]
    results = contract.run_concurrently(target, [functools.partial(pruneops.assign_ranks, own, 16) for own in inputs])
    assert_same_bits(results, [call(target, "assign_ranks", own, 16) for own in inputs])


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
    logits = steep((2, 9, 5), torch.Generator().manual_seed(0))
    logits[:, ::2, column] = value
    for j in (1, 3, 4):
        assert_ranked(target, logits, j)


@every_backend
def test_no_gradient(target):
    logits = torch.randn(6, 4, device=target.device, requires_grad=True)
    with pruneops.backend(target.backend):
        assert not pruneops.assign_ranks(logits, 3).requires_grad


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Batch entries and tokens, far apart in sparse files."""
    near = steep((3, 30, 9), torch.Generator().manual_seed(0))
    for dim in (0, 1):
        with pruneops.backend(target.backend):  # `call` would copy the file
            ranks = pruneops.assign_ranks(contract.with_gaps_past_2_31(tmp_path, near, dim), 8)
        assert_same_bits(ranks, expected(float64_scores(near), [1] * 8))


# Compilation


@every_backend
@pytest.mark.parametrize("form", ["batched", "single", "half", "strided"])
def test_opcheck(target, form):
    logits = real((2, 9, 5))
    logits = {"batched": logits, "single": logits[0], "half": logits.half(), "strided": LAYOUTS["transposed"](logits)}
    contract.opcheck(target, "assign_ranks", logits[form], 3)


def ranked(x, weight, j):
    """What a model does with the operator: rank tokens, gather the best."""
    kept = pruneops.assign_ranks(x @ weight, j)
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, kept


@every_backend
def test_compile_without_graph_break(target):
    sizes = (12, 8, 5, 3), (20, 5, 9, 8), (31, 16, 7, 2)
    contract.assert_compiles(target, ranked, [(torch.randn(2, N, D), torch.randn(D, C), j) for N, D, C, j in sizes])


def test_compile_with_inductor():
    sizes = "((12, 8, 5, 3), (20, 5, 9, 8))"
    calls = f"[(torch.randn(2, N, D), torch.randn(D, C), j) for N, D, C, j in {sizes}]"
    contract.assert_compiles_with_inductor(__name__, "ranked", calls)


# Errors

LOGITS = torch.randn(2, 6, 4)
GOOD = {"logits": LOGITS, "j": 3}
bad = functools.partial(InvalidCall, "assign_ranks", GOOD)
RANKS = "ranks of logits (the last class is 'not ranked')"
BAD = [
    bad(ValueError, "logits", "of shape [4]", "of rank 2 or 3", logits=LOGITS[0, 0]),
    bad(ValueError, "logits", "of shape [1, 2, 6, 4]", "of rank 2 or 3", logits=LOGITS[None]),
    bad(ValueError, "logits", "of shape [2, 6, 0]", "at least one class wide", logits=LOGITS[..., :0]),
    bad(TypeError, "logits", "torch.int64", DTYPE_NAMES, logits=LOGITS.long()),
    bad(TypeError, "logits", "torch.float64", DTYPE_NAMES, logits=LOGITS.double()),
    bad(ValueError, "logits", "66 classes wide", "at most 65 classes wide", logits=torch.randn(6, 66)),
    bad(ValueError, "j", "0", "at least 1", j=0),
    bad(ValueError, "j", "-1", "at least 1", j=-1),
    bad(ValueError, "j", "4", f"at most the 3 {RANKS}", j=4),
    bad(ValueError, "j", "3", "at most the 2 tokens of logits", logits=LOGITS[:, :2]),
    bad(ValueError, "j", "1", f"at most the 0 {RANKS}", logits=LOGITS[..., :1], j=1),
    bad(ValueError, "j", "1", "at most the 0 tokens of logits", logits=LOGITS[:, :0], j=1),
]


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@invalid(BAD)
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@invalid([bad for bad in BAD if bad.argument == "j"])
def test_errors_under_compile(bad):
    bad.assert_raises_under_compile()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": [[1.0]]}, "logits must be Tensor, got list"),
        ({"j": 2.0}, "j must be int or SymInt, got float"),
        ({"j": None}, "j must be int or SymInt, got NoneType"),
    ],
)
def test_errors_of_type(changes, words):
    assert_type_error("assign_ranks", {**GOOD, **changes}, words)


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    def run(logits):
        return pruneops.assign_ranks(logits, 32), pruneops.assign_ranks(logits[0], 7)

    check(target, run, lambda seed: [real((3, 3000, 33), seed, torch.bfloat16).cuda()])


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


# Launches

TRITON_LAUNCHES = """
from pruneops.triton_kernels import assign_ranks as kernels

for tokens in (50, 64, 1025):
    for classes in (2, 3, 16, 17, 32, 48, 65):
        logits = torch.ones(2, tokens, classes)
        for j in (1, min(tokens, classes - 1)):
            kernels.assign_ranks(logits, j)
            kernels.assign_ranks(logits.bfloat16(), j)
        for own in (logits[:1], logits[:, ::2], logits[:1].expand(5, -1, -1)):
            kernels.assign_ranks(own, 1)
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths, ranks and batches compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 3 * 7 * (2 + 5)
    assert compiled == 4 * 2  # widths of the tile, dtypes
