"""Attention between groups of tokens: the specification.

Cost: materialised attention, 2 B H Sq Sk D operations and B H Sq Sk floats.
"""

import torch
from torch import Tensor


def attention_mass(
    query: Tensor,
    key: Tensor,
    query_group: Tensor,
    key_group: Tensor,
    groups: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mass [B, H, G, G], lse [B, H, Sq]); see `pruneops.attention_mass` for the contract."""
    if query.dim() == 3:
        query, key, query_group, key_group = query[None], key[None], query_group[None], key_group[None]
        lse = None if lse is None else lse[None]
        mass, lse = attention_mass(query, key, query_group, key_group, groups, causal=causal, scale=scale, lse=lse)
        return mass[0], lse[0]
    counted = query_group >= 0
    logits = visible_logits(query, key, key_group >= 0, causal, scale)
    if lse is None:
        lse = torch.where(counted[:, None], logits.logsumexp(-1), -torch.inf)
    probability = row_probability(logits, lse, counted)
    to_group = one_hot(key_group, groups)[:, None]  # [B, 1, Sk, G]
    from_group = one_hot(query_group, groups).mT[:, None]  # [B, 1, G, Sq]
    return from_group @ (probability @ to_group), lse.clone()


def visible_logits(query: Tensor, key: Tensor, key_mask: Tensor, causal: bool, scale: float | None) -> Tensor:
    """[B, H, Sq, Sk] float32; -inf where a query does not see a key."""
    B, H, Sq, D = query.shape
    Sk = key.shape[2]
    key = key.float().repeat_interleave(H // key.shape[1], 1) if key.shape[1] else key.float()
    logits = query.float() @ key.mT * (D**-0.5 if scale is None else scale)
    visible = key_mask[:, None, None, :].expand(B, 1, Sq, Sk)
    if causal:  # the last query sees the last key
        visible = visible & torch.ones(Sq, Sk, dtype=torch.bool, device=key.device).tril(Sk - Sq)
    return torch.where(visible, logits, -torch.inf)


def row_probability(logits: Tensor, lse: Tensor, counted: Tensor) -> Tensor:
    """exp(logits - lse) of the counted rows; 0 where nothing is visible."""
    visible = counted[:, None, :, None] & (logits != -torch.inf) & (lse[..., None] != -torch.inf)
    return torch.where(visible, (logits - lse[..., None]).exp(), 0.0)


def one_hot(group: Tensor, groups: int) -> Tensor:
    """[B, S, G] float32; a row of zeros for group -1."""
    return (group[..., None] == torch.arange(groups, device=group.device)).float()
