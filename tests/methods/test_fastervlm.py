"""FasterVLM: the most attended tokens, and the attention of a vision tower."""

import pytest
import torch

from pruneops.methods import FasterVLM, Image, cls_attention, fastervlm_select, mean_attention
from tests.contract import assert_same_bits
from tests.methods.oracles import attention, descending

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_selection(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (3, 12), generator=generator).to(dtype)
    scores[0, 3], scores[1, :4], scores[2] = torch.nan, torch.inf, torch.nan
    x = torch.ones(3, 12, 2)
    for k in (1, 5, 11, 12):
        chosen = FasterVLM(keep=k).select(Image(x, scores))
        assert chosen.tolist() == [sorted(descending(row, k)) for row in scores]
        for score, row in zip(scores, chosen):
            assert_same_bits(fastervlm_select(score, k), row)
            assert_same_bits(FasterVLM(keep=k).select(Image(x[0], score)), row)
    assert fastervlm_select(scores, 0).shape == (3, 0)


def test_tower():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8, generator=generator), torch.randn(2, 4, 7, 8, generator=generator)
    weights = torch.stack([attention(q, k, causal=False) for q, k in zip(query, key)])
    for cls in (0, 3, -1):
        others = [j for j in range(7) if j != cls % 7]
        expected = weights[:, :, cls].mean(1)[:, others]
        torch.testing.assert_close(cls_attention(query, key, cls=cls).double(), expected, rtol=1e-5, atol=1e-6)
        assert_same_bits(cls_attention(query[0], key[0], cls=cls), cls_attention(query, key, cls=cls)[0])
    expected = weights.mean((1, 2))
    torch.testing.assert_close(mean_attention(query, key).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="cls_attention: cls must be one of the 7 positions, got 7"):
        cls_attention(query, key, cls=7)


def test_refusals():
    with pytest.raises(ValueError, match=r"FasterVLM: image\.cls_attention must be given: this method chooses by it"):
        FasterVLM(keep=1).select(Image(torch.ones(3, 2)))
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"k must be 0 to the 3 tokens, got {k}"):
            fastervlm_select(torch.ones(3), k)
