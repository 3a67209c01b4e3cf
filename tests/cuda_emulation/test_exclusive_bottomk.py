import ctypes

import pytest
import torch

from pruneops import reference

from . import ELEMENTS, INT, INT32, POINTER, by_dtype, compile_kernels, needs_compiler, pointer, strides

pytestmark = needs_compiler


class Call(ctypes.Structure):
    _fields_ = (
        *(("scores", POINTER), ("batch", INT), ("rows", INT), ("tokens", INT), ("stride", INT * 2)),
        *(("mask", POINTER), ("mask_stride", INT * 2), ("quotas", POINTER), ("out", POINTER)),
        *((name, INT32) for name in ("element", "excluded_value", "cluster_blocks", "backwards")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("exclusive_bottomk", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """exclusive_bottomk into a poisoned output. `blocks` 0: no candidate lists; `free`: `taken` marks free tokens."""

    def run(scores, quotas, taken=None, *, blocks=1, free=False, backwards=False):
        quotas = torch.tensor(quotas, dtype=torch.int64)
        out = torch.full((scores.shape[0], int(quotas.sum())), -77)
        call = Call(
            scores=pointer(scores),
            batch=scores.shape[0],
            rows=scores.shape[1],
            tokens=scores.shape[2],
            stride=strides(scores),
            mask=pointer(taken),
            mask_stride=strides(taken),
            quotas=pointer(quotas),
            out=pointer(out),
            element=ELEMENTS.index(scores.dtype),
            excluded_value=not free,
            cluster_blocks=blocks,
            backwards=backwards,
        )
        kernel(ctypes.byref(call))
        return out

    return run


VARIANTS = {
    "row by row": dict(blocks=0),
    "one block": dict(blocks=1),
    "cluster": dict(blocks=3),
    "cluster backwards": dict(blocks=4, backwards=True),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def assert_equals_reference(emulate, scores, quotas, taken=None, **variant):
    got = emulate(scores, quotas, taken, **variant)
    assert torch.equal(got, reference.exclusive_bottomk(scores, quotas, taken=taken))


@every_variant
@by_dtype
def test_ties(emulate, variant, dtype):
    scores = torch.randint(-3, 4, (2, 5, 200)).to(dtype)
    assert_equals_reference(emulate, scores, [7, 0, 40, 1, 90], **variant)


@every_variant
def test_correlated_rows(emulate, variant):
    scores = torch.randn(2, 1, 700) + 0.3 * torch.randn(2, 8, 700)
    assert_equals_reference(emulate, scores, [36] * 8, torch.rand(2, 700) < 0.4, **variant)


@every_variant
def test_specials(emulate, variant):
    scores = torch.randn(3, 4, 90)
    for value in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1e-42, -1e-42):
        scores[torch.rand(scores.shape) < 0.1] = value
    assert_equals_reference(emulate, scores, [20, 20, 0, 50], **variant)


@every_variant
def test_strides(emulate, variant):
    scores = torch.randn(6, 70, 300)[::2, 3::9, 5:297]
    taken = (torch.rand(300, 3) < 0.3).t()[:, 4:296]
    assert_equals_reference(emulate, scores, [9] * 8, taken, **variant)


@every_variant
def test_mask_of_free_tokens(emulate, variant):
    scores, mask = torch.randn(2, 3, 50), torch.rand(2, 50) < 0.7
    got = emulate(scores, [5, 4, 3], mask, free=True, **variant)
    assert torch.equal(got, reference.exclusive_bottomk(scores, [5, 4, 3], taken=~mask))


@every_variant
def test_one_token(emulate, variant):
    assert emulate(torch.full((1, 3, 1), torch.nan), [0, 1, 0], **variant).tolist() == [[0]]


@every_variant
def test_out_of_tokens(emulate, variant):
    scores, taken = torch.randn(2, 3, 40), torch.ones(2, 40, dtype=torch.bool)
    taken[0, 10:15] = False
    assert_equals_reference(emulate, scores, [3, 3, 4], taken, **variant)


@every_variant
def test_sixty_four_rows(emulate, variant):
    scores = torch.randint(0, 50, (1, 64, 333)).float()
    assert_equals_reference(emulate, scores, torch.randint(0, 6, (64,)).tolist(), **variant)


@every_variant
@pytest.mark.parametrize("tokens", (511, 4096, 4097, 9000))
def test_every_token(emulate, variant, tokens):
    scores = torch.randn(1, 2, tokens)
    assert_equals_reference(emulate, scores, [tokens // 2, tokens - tokens // 2], **variant)


@every_variant
@pytest.mark.parametrize("spread", ("equal", "narrow", "wide", "two", "steps"))
def test_more_candidates_than_the_capacity(emulate, variant, spread):
    """One bin holds them all and is divided again, by score bits or by index."""
    scores = {
        "equal": torch.zeros(12000),
        "narrow": 1 + torch.rand(12000) * 1e-4,
        "wide": torch.randn(12000) * torch.exp2(torch.randint(-140, 120, (12000,))),
        "two": (torch.arange(12000) % 3 == 0).float(),
        "steps": torch.tensor([-1.0] * 50 + [1.0] * 950 + [1.00004] * 9000 + [2.0] * 2000)[torch.randperm(12000)],
    }[spread].expand(1, 3, -1)
    assert_equals_reference(emulate, scores, [100, 2500, 7], torch.rand(1, 12000) < 0.1, **variant)


@every_variant
@pytest.mark.parametrize("spread", ("equal", "narrow", "outlier", "steps", "infinite"))
def test_scores_that_crowd_bins_of_equal_width(emulate, variant, spread):
    scores = {
        "equal": torch.ones(3000),
        "narrow": 1 + torch.rand(3000) * 1e-6,
        "outlier": torch.cat((torch.rand(2999), torch.tensor([-1e6]))),
        "steps": torch.randint(0, 20, (3000,)).float(),
        "infinite": torch.cat((torch.rand(100), torch.full((2900,), torch.nan)))[torch.randperm(3000)],
    }[spread].expand(1, 5, -1)
    assert_equals_reference(emulate, scores, [36] * 5, torch.rand(1, 3000) < 0.1, **variant)


@every_variant
def test_lists_longer_than_shared_memory(emulate, variant):
    assert_equals_reference(emulate, torch.randn(2, 8, 4000), [300] * 8, **variant)
