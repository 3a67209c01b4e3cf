"""Gathering tokens on every backend: the contract of `pruneops.gather_tokens`, line by line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, strategies
from tests.contract import assert_same_bits, call, every_backend, on_targets, size
from tests.inputs import BITS, PLACES, any_bits, model_state
from tests.oracles import gather_tokens


@st.composite
def cases(draw):
    """(tensors, keep, dim): ranks 1 to 5, a batch or none, one that all rows share."""
    generator = draw(strategies.generators)
    B, S, K = draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    tensors, dims = [], []
    for i in range(draw(st.integers(1, 4))):
        before = draw(st.lists(st.integers(1, 2), max_size=2))
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
    assert_same_bits(results, [gather_tokens(tensor, keep, dim) for tensor, dim in zip(tensors, dims)])
    assert all(result.is_contiguous() for result in results)


@every_backend
@pytest.mark.parametrize("B", [1, 3])
def test_many_tiles(target, B):
    """All that a decoder layer takes, in one call."""
    S, D, K = size(target, (2880, 1024, 288), (300, 64, 70))
    tensors, dims = model_state(B, S, D)
    keep = torch.randint(0, S, (B, K), generator=torch.Generator().manual_seed(0)).sort(-1).values
    results = call(target, "gather_tokens", tensors, keep, dim=dims)
    with pruneops.backend("reference"):
        assert_same_bits(results, pruneops.gather_tokens(tensors, keep, dim=dims))


@every_backend
def test_many_tensors(target):
    """More of them, and of more kinds, than one launch takes."""
    tensors = [any_bits((2, 5 + i % 3, 1 + i % 23), BITS[i % len(BITS)], i) for i in range(200)]
    keep = torch.tensor([[4, 0, 0], [1, 2, 3]])
    assert_same_bits(call(target, "gather_tokens", tensors, keep), [gather_tokens(own, keep, 1) for own in tensors])


@every_backend
def test_one_dim_for_all(target):
    tensors, keep = [torch.randn(2, 4, 3), torch.arange(8).view(2, 4)], torch.tensor([[3, 1], [0, 2]])
    for dim in (1, [1], (1, 1)):
        results = call(target, "gather_tokens", tensors, keep, dim=dim)
        assert_same_bits(results, [gather_tokens(tensor, keep, 1) for tensor in tensors])


@every_backend
def test_high_rank(target):
    """Seven permuted dimensions."""
    tensor = any_bits((2, 3, 2, 2, 4, 3, 2), torch.float32).permute(6, 4, 2, 0, 1, 3, 5)
    keep = torch.tensor([0, 2, 1, 1])
    assert_same_bits(call(target, "gather_tokens", [tensor], keep, dim=4), [gather_tokens(tensor, keep, 4)])


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
    assert_same_bits(results, [gather_tokens(near, keep, 1)])


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
    """Tensors that require no gradient get none; without any there is no graph."""
    tensor, other = (torch.randn(1, 4, 2, device=target.device) for _ in range(2))
    keep = torch.tensor([[1, 3]], device=target.device)
    with pruneops.backend(target.backend):
        assert not pruneops.gather_tokens([tensor], keep)[0].requires_grad
        tensor.requires_grad_()
        results = pruneops.gather_tokens([tensor, other], keep)
    results[0].sum().backward()
    assert tensor.grad[0, :, 0].tolist() == [0, 1, 0, 1] and other.grad is None
