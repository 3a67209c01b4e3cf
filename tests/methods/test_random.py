"""Random tokens: repeatable, different per image, every token as likely."""

import hashlib

import pytest
import torch

from pruneops.methods import Image, Random, random_select


def test_documented_draw():
    digest = hashlib.sha256(b"7,2").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    expected = sorted(torch.randperm(50, generator=generator)[:9].tolist())
    assert random_select(50, 9, seed=7, index=2).tolist() == expected
    assert Random(keep=9, seed=7).select(Image(torch.ones(50, 3), index=2)).tolist() == expected


def test_batch_and_lists_number_their_images():
    x, method = torch.ones(4, 30, 2), Random(keep=0.5, seed=3)
    single = [method.select(Image(x[0], index=i)).tolist() for i in range(6)]
    assert len(set(map(tuple, single))) == 6
    assert method.select(Image(x, index=2)).tolist() == single[2:6]
    assert [indices.tolist() for indices in method.select_each([Image(x[0])] * 6)] == single


def test_seeds_differ_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len({tuple(random_select(40, 20, seed=seed).tolist()) for seed in range(20)}) == 20
    assert len({tuple(random_select(40, 20, seed=2**40 + seed).tolist()) for seed in range(20)}) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_every_token_is_as_likely():
    counts = torch.zeros(10)
    for index in range(2000):
        counts[random_select(10, 3, index=index)] += 1
    assert ((counts - 600).abs() < 100).all()  # five standard deviations


def test_sizes():
    for n in range(6):
        for k in range(n + 1):
            chosen = random_select(n, k).tolist()
            assert len(chosen) == k and chosen == sorted(set(chosen)) and set(chosen) <= set(range(n))
    assert Random(keep=2).select(Image(torch.ones(0, 5, 2))).shape == (0, 2)
    assert Random(keep=9).select(Image(torch.ones(3, 5, 2))).tolist() == [[0, 1, 2, 3, 4]] * 3
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"random_select: k must be 0 to the 3 tokens, got {k}"):
            random_select(3, k)
