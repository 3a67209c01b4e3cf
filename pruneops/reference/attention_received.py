"""Attention that every key receives from selected queries: the specification.

Cost: materialised attention, 2 B H Sq Sk D operations and B H Sq Sk floats.
"""

import torch
from torch import Tensor

from .attention_mass import row_probability, visible_logits


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """[B, H, Sk]; see `pruneops.attention_received` for the contract."""
    if query.dim() == 3:
        query_mask, key_mask, lse = (None if t is None else t[None] for t in (query_mask, key_mask, lse))
        options = {"query_mask": query_mask, "key_mask": key_mask, "lse": lse}
        return attention_received(query[None], key[None], causal=causal, scale=scale, **options)[0]
    all_true = torch.ones((), dtype=torch.bool, device=query.device)
    query_mask = all_true.expand(query.shape[0], query.shape[2]) if query_mask is None else query_mask
    key_mask = all_true.expand(key.shape[0], key.shape[2]) if key_mask is None else key_mask
    logits = visible_logits(query, key, key_mask, causal, scale)
    lse = logits.logsumexp(-1) if lse is None else lse
    return row_probability(logits, lse, query_mask).sum(2)
