"""Exclusive bottom-k, each row in turn takes its lowest tokens among those not yet taken: the specification.

Cost: one stable sort of N scores per row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pivot_cosine import pivot_cosine


def exclusive_bottomk(scores: Tensor, quotas: Sequence[int], *, taken: Tensor | None = None) -> Tensor:
    """Tokens [B, sum(quotas)] that the rows of scores [B, P, N] take; see `pruneops.exclusive_bottomk`."""
    if scores.dim() == 2:
        return exclusive_bottomk(scores[None], quotas, taken=None if taken is None else taken[None])[0]
    B, _, N = scores.shape
    taken = torch.zeros(B, N, dtype=torch.bool, device=scores.device) if taken is None else taken
    chosen = [torch.empty(B, 0, dtype=torch.int64, device=scores.device)]
    for score, quota in zip(scores.float().unbind(1), quotas):
        order = torch.where(score.isfinite(), score, torch.inf)
        order = torch.where(taken, torch.nan, order)  # sorts after infinity
        order, tokens = torch.sort(order, dim=-1, stable=True)
        taken = taken.scatter(-1, tokens[:, :quota], True)
        chosen.append(torch.where(order.isnan(), -1, tokens)[:, :quota])
    return torch.cat(chosen, -1)


def pivot_bottomk(x: Tensor, pivots: Tensor, quotas: Sequence[int], *, mask: Tensor | None = None) -> Tensor:
    """`exclusive_bottomk` of the pivots' cosines, among the tokens that mask allows."""
    return exclusive_bottomk(pivot_cosine(x, pivots), quotas, taken=None if mask is None else ~mask)
