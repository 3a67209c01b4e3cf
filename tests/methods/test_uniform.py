"""Evenly spaced tokens: exact counts, no repetition, gaps that differ by at most one."""

import itertools

import pytest
import torch

from pruneops.methods import Image, Uniform, uniform_select


def test_spacing():
    for n in range(40):
        for k in range(n + 1):
            chosen = uniform_select(n, k).tolist()
            assert chosen == [((2 * i + 1) * n) // (2 * k) for i in range(k)]
            assert len(chosen) == k and chosen == sorted(set(chosen)) and set(chosen) <= set(range(n))
            gaps = {b - a for a, b in itertools.pairwise(chosen)}
            assert not gaps or max(gaps) - min(gaps) <= 1
    assert uniform_select(9, 3).tolist() == [1, 4, 7]
    assert uniform_select(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_images():
    x = torch.ones(2, 9, 3)
    assert Uniform(keep=3).select(Image(x)).tolist() == [[1, 4, 7]] * 2
    assert Uniform(keep=3).select(Image(x[0])).tolist() == [1, 4, 7]
    assert Uniform(keep=3).select(Image(x[:0])).shape == (0, 3)
    assert [len(indices) for indices in Uniform(keep=0.5).select_each([Image(x[0]), Image(x[0, :2])])] == [5, 1]
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"uniform_select: k must be 0 to the 3 tokens, got {k}"):
            uniform_select(3, k)
