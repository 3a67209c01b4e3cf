"""Attention that every key receives from marked queries: the specification.

Cost: materialised attention, 2 B H Sq Sk D operations and B H Sq Sk floats.
"""

import torch

from .attention_mass import row_probability, visible_logits


def attention_received(query, key, *, query_mask=None, key_mask=None, causal=True, scale=None, lse=None):
    """[B, H, Sk]; see `pruneops.attention_received` for the contract."""
    if query.dim() == 3:
        optional = {"query_mask": query_mask, "key_mask": key_mask, "lse": lse}
        optional = {name: None if t is None else t[None] for name, t in optional.items()}
        return attention_received(query[None], key[None], causal=causal, scale=scale, **optional)[0]
    every = torch.ones((), dtype=torch.bool, device=query.device)
    marked = every.expand(query.shape[0], query.shape[2]) if query_mask is None else query_mask
    seen = every.expand(key.shape[0], key.shape[2]) if key_mask is None else key_mask
    logits = visible_logits(query, key, seen, causal, scale)
    lse = logits.logsumexp(-1) if lse is None else lse
    return row_probability(logits, lse, marked).sum(2)
