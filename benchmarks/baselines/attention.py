"""Sums of attention as one would write them in PyTorch, over the counted rows, and plain attention as a lower bound.

All take query [B, H, rows, D] and key [B, Hk, Sk, D], compute in their dtype as public code does, and mask keys by
`mask` [rows, Sk], causally, or not at all. Groups are one-hot, made once for all layers: from_group [B, 1, G, rows],
to_group [B, 1, Sk, G]. Cost: `materialised` and `column_sum` write the attention and make some five passes over it; the
others do what flash attention does.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

try:
    from torch.nn.attention.flex_attention import AuxRequest
except ImportError:  # before PyTorch 2.9
    AuxRequest = None


def probabilities(query, key, mask):
    """[B, H, rows, Sk]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)


def materialised(query, key, from_group, to_group, mask):
    """Mass [B, H, G, G]."""
    return from_group @ (probabilities(query, key, mask) @ to_group)


def column_sum(query, key, mask):
    """Attention received [B, H, Sk]."""
    return probabilities(query, key, mask).sum(2)


def one_hot(query, key, from_group, value, mask, causal):
    """Mass, from SDPA with the groups of the keys, padded to D, in place of values [B, Hk, Sk, D]."""
    shares = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    return from_group @ shares[..., : from_group.shape[2]]


def flex(query, key, from_group, value, block_mask, with_lse):
    """Mass, from flex_attention with the groups of the keys in place of values; and lse, its auxiliary output."""
    options = {"block_mask": block_mask, "enable_gqa": True}
    if not with_lse:
        return from_group @ flex_attention(query, key, value, **options)[..., : from_group.shape[2]]
    if AuxRequest is None:
        shares, lse = flex_attention(query, key, value, return_lse=True, **options)
    else:
        shares, auxiliary = flex_attention(query, key, value, return_aux=AuxRequest(lse=True), **options)
        lse = auxiliary.lse
    return from_group @ shares[..., : from_group.shape[2]], lse


def forward(query, key, causal):
    """The attention of a layer of this shape, any values: a lower bound, which returns nothing."""
    F.scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=True)
