"""DivPrune: start and steps against their definition."""

import math

import pytest
import torch

from pruneops.methods import DivPrune, Image, divprune, divprune_select, divprune_start
from tests.contract import assert_same_bits
from tests.methods.oracles import cosine, farthest_first, finite, hard_tokens

pytestmark = pytest.mark.usefixtures("backend")


def start(features):
    """The token whose nearest neighbour is farthest, in loops."""
    x, best = features.double().tolist(), None
    for token in range(len(x)):
        near = [cosine(x[token], x[other]) for other in range(len(x)) if other != token and finite(x[other])]
        key = (0, max(near, default=-math.inf)) if finite(x[token]) else (1, 0)
        if best is None or key < best[0]:
            best = key, token
    return best[1]


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_selection(tokens, dtype):
    x = hard_tokens((4, tokens, 16), seed=tokens).to(dtype)
    assert divprune_start(x).tolist() == [start(image) for image in x]
    for k in {1, (tokens + 1) // 2, tokens}:
        chosen = DivPrune(keep=k).select(Image(x))
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == [farthest_first(image, k, start(image)) for image in x]
        for image, row in zip(x, chosen):
            assert_same_bits(DivPrune(keep=k).select(Image(image)), row)
            assert_same_bits(divprune_select(image, k), row)


def test_steps_without_odd_tokens():
    """Many different tokens, so that the start is not a tie."""
    x = torch.randint(-3, 4, (40, 5), generator=torch.Generator().manual_seed(0)).float()
    x[23] = torch.tensor([-9.0, 1, -9, 1, -9])
    assert divprune_start(x) == start(x)


@pytest.mark.parametrize("block", [1, 50, 17 * 5, 17 * 17])
def test_blocks_of_rows(block, monkeypatch):
    x = hard_tokens((17, 16), seed=5)
    monkeypatch.setattr(divprune, "BLOCK", block)
    assert divprune_start(x) == start(x)


def test_odd_tokens():
    nan = torch.full((3, 2), torch.nan)
    assert divprune_start(nan) == 0
    nan[1] = 1
    assert divprune_start(nan) == 1  # has no neighbour
    assert divprune_start(torch.zeros(3, 2)) == 0
    copies = torch.ones(5, 2)
    assert divprune_select(copies, 3).tolist() == [0, 1, 2]
    assert divprune_start(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 2], [-1, -1]])) == 4


@pytest.mark.parametrize("block", [4, 8, 16])
def test_neighbours_behind_it(block, monkeypatch):
    """A token whose neighbours all have negative similarity; itself and a NaN are no neighbours."""
    monkeypatch.setattr(divprune, "BLOCK", block)
    assert divprune_start(torch.tensor([[-1.0, 1], [-1, -1], [1, 0], [torch.nan, 0]])) == 2


def test_gradients_do_not_matter():
    x = hard_tokens((9, 16))[:4].requires_grad_()
    assert divprune_select(x, 2).tolist() == divprune_select(x.detach(), 2).tolist()


def test_empty():
    assert DivPrune(keep=3).select(Image(torch.ones(0, 7, 4))).shape == (0, 3)
    assert DivPrune(keep=3).select(Image(torch.ones(2, 0, 4))).shape == (2, 0)
    for bad in (0, 4, True):
        with pytest.raises(ValueError, match="divprune_select: k must be 1 to the 3 tokens"):
            divprune_select(torch.ones(3, 2), bad)
