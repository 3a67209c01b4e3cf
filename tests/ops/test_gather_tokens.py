"""Gathering tokens on every backend: the contract of `pruneops.gather_tokens`, line by line."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from pruneops.ops.gather_tokens import _dims
from tests import contract, cuda_checks, strategies
from tests.contract import (
    CUDA_KERNELS,
    NATIVE,
    REFERENCE,
    assert_same_bits,
    call,
    every_backend,
    on_targets,
    size,
    to_device,
)
from tests.invalid_calls import InvalidCall, assert_type_error, ints, invalid
from tests.token_copy import BITS, PLACES, any_bits


def gathered(tensor, keep, dim):
    """Token by token."""
    dim %= tensor.dim()
    if keep.dim() == 1:
        return torch.stack([tensor.select(dim, int(i)) for i in keep], dim)
    rows = tensor.expand(*(-1 if d != dim - 1 else len(keep) for d in range(tensor.dim())))
    parts = [gathered(row, own, dim - 1) for row, own in zip(rows.unbind(dim - 1), keep)]
    return torch.stack(parts, dim - 1)


@st.composite
def cases(draw):
    """(tensors, keep, dim): ranks 1 to 5, a batch or none, one that all rows share."""
    generator = draw(strategies.generators)
    B, S, K = draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    tensors, dims = [], []
    for i in range(draw(st.integers(1, 4))):
        before = draw(st.lists(st.integers(1, 3), max_size=2))
        after = draw(st.lists(st.sampled_from([1, 2, 3, 16]), max_size=2))
        batch = [] if B is None else [draw(st.sampled_from([1, B]))]
        tensor = any_bits((*before, *batch, S, *after), draw(st.sampled_from(BITS)), i)
        place = PLACES[draw(st.sampled_from(list(PLACES)))] if tensor.dim() > 1 else torch.clone
        tensors.append(place(tensor))
        dim = len(before) + len(batch)
        dims.append(draw(st.sampled_from([dim, dim - tensor.dim()])))
    keep = torch.randint(0, S, (K,) if B is None else (B, K), generator=generator)
    if draw(st.booleans()):
        keep = keep.mT.contiguous().mT if keep.dim() == 2 else keep.repeat_interleave(2)[::2]
    return tensors, keep, dims


def model_state(B, S, D, dtype=torch.bfloat16, seed=0):
    """What a decoder carries along: hidden states, mRoPE positions, mask, cos and sin; and where their tokens are."""
    positions = torch.arange(S).expand(3, B, S) + torch.arange(3)[:, None, None]
    rotary = [any_bits((1, S, 128), dtype, seed + i) for i in (1, 2)]
    return [any_bits((B, S, D), dtype, seed), positions, torch.rand(B, S) < 0.9, *rotary], [1, 2, 1, 1, 1]


# Answers


@every_backend
def test_known_answer(target):
    hidden = torch.arange(12.0).view(2, 3, 2)
    positions = torch.arange(6).view(3, 1, 2, 1)[..., 0]  # [3, 1, 2]
    keep = torch.tensor([[2, 0], [1, 1]])
    (result,) = call(target, "gather_tokens", [hidden], keep)
    assert result.tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    one, other = call(target, "gather_tokens", [positions, hidden[:, :2]], torch.tensor([[1, 0], [0, 0]]), dim=[-1, 1])
    assert one.tolist() == [[[1, 0], [0, 0]], [[3, 2], [2, 2]], [[5, 4], [4, 4]]]
    assert other.tolist() == [[[2, 3], [0, 1]], [[6, 7], [6, 7]]]
    (flat,) = call(target, "gather_tokens", [torch.tensor([7, 8, 9])], torch.tensor([2, 2, 0]), dim=0)
    assert flat.tolist() == [9, 9, 7]


@every_backend
@given(case=cases())
def test_exact_tokens(target, case):
    tensors, keep, dims = case
    results = call(target, "gather_tokens", tensors, keep, dim=dims)
    assert_same_bits(results, [gathered(tensor, keep, dim) for tensor, dim in zip(tensors, dims)])
    assert all(result.is_contiguous() for result in results)


@every_backend
@pytest.mark.parametrize("B", [1, 3])
def test_many_tiles(target, B):
    """All that a decoder carries along, in one call."""
    S, D, K = size(target, (2880, 1024, 288), (300, 64, 70))
    tensors, dims = model_state(B, S, D)
    keep = torch.randint(0, S, (B, K), generator=torch.Generator().manual_seed(0)).sort(-1).values
    results = call(target, "gather_tokens", tensors, keep, dim=dims)
    with pruneops.backend("reference"):
        assert_same_bits(results, pruneops.gather_tokens(tensors, keep, dim=dims))


@every_backend
def test_many_tensors(target):
    """More of them, and of more forms, than one launch can hold."""
    tensors = [any_bits((2, 5 + i % 3, 1 + i % 23), BITS[i % len(BITS)], i) for i in range(200)]
    keep = torch.tensor([[4, 0, 0], [1, 2, 3]])
    assert_same_bits(call(target, "gather_tokens", tensors, keep), [gathered(own, keep, 1) for own in tensors])


@every_backend
def test_one_dim_for_all(target):
    tensors, keep = [torch.randn(2, 4, 3), torch.arange(8).view(2, 4)], torch.tensor([[3, 1], [0, 2]])
    for dim in (1, [1], (1, 1)):
        results = call(target, "gather_tokens", tensors, keep, dim=dim)
        assert_same_bits(results, [gathered(tensor, keep, 1) for tensor in tensors])


@every_backend
def test_high_rank(target):
    """Seven dimensions that do not lie next to each other."""
    tensor = any_bits((2, 3, 2, 2, 4, 3, 2), torch.float32).permute(6, 4, 2, 0, 1, 3, 5)
    keep = torch.tensor([0, 2, 1, 1])
    assert_same_bits(call(target, "gather_tokens", [tensor], keep, dim=4), [gathered(tensor, keep, 4)])


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    tensors, dims = model_state(2, 2000, 512)
    keep = torch.randint(0, 2000, (2, 500), generator=torch.Generator().manual_seed(0))
    contract.assert_threads_change_no_bit(lambda: call(target, "gather_tokens", tensors, keep, dim=dims))


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    inputs = [any_bits((2, 300, 64), torch.float32, seed) for seed in range(4)]
    keep = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    results = contract.run_concurrently(
        target, [functools.partial(pruneops.gather_tokens, [own], keep) for own in inputs]
    )
    assert_same_bits(results, [call(target, "gather_tokens", [own], keep) for own in inputs])


# Edges


@every_backend
def test_edges(target):
    for shape, keep_shape in (
        ((1, 1), (1, 1)),
        ((2, 5, 3), (2, 0)),  # nothing kept
        ((0, 5, 3), (0, 2)),  # no batch
        ((1, 5, 3), (0, 2)),  # none shared by none
        ((2, 5, 0), (2, 3)),  # nothing wide
        ((2, 0, 3), (2, 0)),  # no tokens
    ):
        tensor, keep = any_bits(shape, torch.float16), torch.zeros(keep_shape, dtype=torch.int64)
        (result,) = call(target, "gather_tokens", [tensor], keep)
        assert_same_bits(result, tensor if result.numel() else torch.empty(*keep_shape, *shape[2:]).half())


@on_targets(*contract.CPU_TARGETS)
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_past_two_to_the_31(target, tmp_path, dim):
    """Batch rows and tokens far apart in sparse files."""
    near, keep = any_bits((3, 4, 8), torch.float32), torch.tensor([[0, 3], [2, 1], [3, 3]])
    with pruneops.backend(target.backend):  # `call` would copy the file
        results = pruneops.gather_tokens([contract.with_gaps_past_2_31(tmp_path, near, dim)], keep)
    assert_same_bits(results, [gathered(near, keep, 1)])


# Gradients


@every_backend
@pytest.mark.parametrize("batched", [True, False])
def test_gradient(target, batched):
    """Tokens kept twice, a tensor that rows share, one of integers beside."""
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(10).view(2, 5)
    keep = torch.tensor([[4, 0, 4], [1, 1, 2]]) if batched else torch.tensor([4, 0, 4])
    hidden, shared, positions, keep = (t.detach().to(target.device) for t in (hidden, shared, positions, keep))

    def run(hidden, shared):
        with pruneops.backend(target.backend):
            one, other, integers = pruneops.gather_tokens([hidden, shared, positions], keep, dim=[1, 2, 1])
        assert not integers.requires_grad
        return one, other

    assert torch.autograd.gradcheck(run, (hidden.requires_grad_(), shared.requires_grad_()))


@every_backend
def test_gradient_of_one(target):
    """Tensors that nobody asks about get none; without gradients there is no graph."""
    asked, other = (torch.randn(1, 4, 2, device=target.device) for _ in range(2))
    keep = torch.tensor([[1, 3]], device=target.device)
    with pruneops.backend(target.backend):
        assert not pruneops.gather_tokens([asked], keep)[0].requires_grad
        asked.requires_grad_()
        results = pruneops.gather_tokens([asked, other], keep)
    results[0].sum().backward()
    assert asked.grad[0, :, 0].tolist() == [0, 1, 0, 1] and other.grad is None


# Compilation


@every_backend
@pytest.mark.parametrize("form", ["batched", "single", "gradient", "mrope"])
def test_opcheck(target, form):
    keep, dim = torch.tensor([[0, 2, 5], [1, 2, 2]]), 1
    tensors = [torch.randn(2, 6, 4, requires_grad=form == "gradient"), torch.arange(12).view(2, 6)]
    if form == "single":
        tensors, keep, dim = [tensor.detach()[0] for tensor in tensors], keep[0], 0
    if form == "mrope":
        tensors, dim = [tensors[0].detach(), torch.arange(6).expand(3, 1, 6)], [1, 2]
    contract.opcheck(target, "gather_tokens", tensors, keep, dim)


def prune(hidden, positions, keep):
    """What a model does with the operator."""
    hidden, positions = pruneops.gather_tokens([hidden, positions], keep, dim=[1, 2])
    return hidden * 2, positions + 1


@every_backend
def test_compile_without_graph_break(target):
    sizes = (2, 12, 8, 5), (3, 20, 4, 7)
    calls = [
        (torch.randn(B, S, D), torch.arange(S).expand(3, B, S), torch.arange(K).expand(B, -1) * 2)
        for B, S, D, K in sizes
    ]
    contract.assert_compiles(target, prune, calls)


def test_compile_with_inductor():
    sizes = "((2, 12, 8, 5), (3, 20, 4, 7))"
    calls = (
        "[(torch.randn(B, S, D, requires_grad=True), torch.arange(S).expand(3, B, S),"
        f" torch.arange(K).expand(B, -1) * 2) for B, S, D, K in {sizes}]"
    )
    contract.assert_compiles_with_inductor(__name__, "prune", calls)


# Errors

HIDDEN = torch.randn(2, 5, 3)
GOOD = {"tensors": [HIDDEN], "keep": ints([0, 2], [4, 4])}
bad = functools.partial(InvalidCall, "gather_tokens", GOOD)
BAD = [
    bad(ValueError, "tensors", "an empty list", "at least one tensor", tensors=[]),
    bad(TypeError, "keep", "torch.int32", "int64", keep=GOOD["keep"].int()),
    bad(ValueError, "keep", "of shape [1, 2, 2]", "[K] or [B, K]", keep=GOOD["keep"][None]),
    bad(ValueError, "dim", "2 of them", "one, or one for each of 1 tensors", dim=[1, 1]),
    bad(ValueError, "dim", "0 for tensors[0] of shape [2, 5, 3]", "1 (the batch stands before it) to 2", dim=0),
    bad(ValueError, "dim", "3 for tensors[0] of shape [2, 5, 3]", "1 (the batch stands before it) to 2", dim=3),
    bad(ValueError, "dim", "-1 for tensors[0] of shape [2, 5, 3]", "0 to 2", dim=-4, keep=ints(0, 1)),
    bad(
        ValueError, "tensors[0]", "of shape [3, 5, 3]", "with 2 rows, as keep, or 1, in dimension 0",
        tensors=[torch.randn(3, 5, 3)],
    ),
    bad(ValueError, "keep", "5 at one place", "in [0, 5)", values=True, keep=ints([0, 2], [5, 4])),
    bad(ValueError, "keep", "-1 at one place", "in [0, 5)", values=True, keep=ints([0, -1], [4, 4])),
]  # fmt: skip


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@on_targets(*contract.CPU_TARGETS)
@invalid(BAD)
def test_errors_of_backends(target, bad):
    with pruneops.backend(target.backend), pytest.raises(bad.error) as error:
        pruneops.gather_tokens(*bad.args, **bad.kwargs)
    assert str(error.value) == bad.message


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensors": HIDDEN}, "tensors must be list or tuple, got Tensor"),
        ({"keep": [0]}, "keep must be Tensor, got list"),
        ({"dim": 1.0}, "dim must be int or list or tuple, got float"),
        ({"dim": [None]}, "dim[0] must be int or SymInt, got NoneType"),
    ],
)
def test_errors_of_type(changes, words):
    assert_type_error("gather_tokens", {**GOOD, **changes}, words)


# Triton's launcher


@invalid([bad for bad in BAD if not bad.values])
def test_triton_refuses(bad):
    """As on a card, where nothing looks at the arguments before the launcher does."""
    kernels = pytest.importorskip("pruneops.triton_kernels.gather_tokens")
    tensors, keep = bad.args
    with pytest.raises(RuntimeError):
        kernels.gather_tokens(tensors, keep, _dims(tensors, bad.kwargs.get("dim", 1)))


TRITON_LAUNCHES = """
import itertools
from pruneops.triton_kernels import gather_tokens as kernels
from tests.ops.test_gather_tokens import model_state
for B, S, K in itertools.product((1, 2), (40, 300), (3, 32)):
    tensors, dims = model_state(B, S, 256)
    kernels.gather_tokens(tensors, torch.arange(K).expand(B, -1), dims)
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths and batches compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 2 * 2 * 2 * 4  # hidden states, positions, mask, cos and sin
    assert compiled == 4  # 16 bytes at a time in slices of two widths, 8, 1


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    def run(keep, *tensors):
        return pruneops.gather_tokens(list(tensors), keep, dim=[1, 2, 1, 1, 1])

    def inputs(seed):
        tensors, _ = model_state(2, 900, 256, seed=seed)
        keep = torch.randint(0, 900, (2, 300), generator=torch.Generator().manual_seed(seed))
        return [to_device(own.clone(), "cuda") for own in (keep, *tensors)]

    check(target, run, inputs)
