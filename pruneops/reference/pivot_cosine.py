"""Cosine of every token with a few pivots, and its reduction over the pivots: the specification.

Cost: 2 P N D operations; x is read three times, once in fused implementations.
"""

import torch
from torch import Tensor

from .kcenter import LARGEST_SQUARE, SMALLEST_SQUARE


def pivot_cosine(x: Tensor, pivots: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """[B, P, N] cosine of every token with each pivot; see `pruneops.pivot_cosine` for the contract."""
    if x.dim() == 2:
        return pivot_cosine(x[None], pivots[None], mask=None if mask is None else mask[None])[0]
    x = x.float()
    square = x.square().sum(-1, keepdim=True)  # [B, N, 1]
    norm = torch.where(square < SMALLEST_SQUARE, torch.inf, square.sqrt())  # a zero vector stays one
    x = torch.where(square <= LARGEST_SQUARE, x / norm, torch.nan)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    scores = x[rows, pivots] @ x.mT
    return scores if mask is None else torch.where(mask[:, None], scores, torch.inf)


def duplication(x: Tensor, pivots: Tensor, *, mask: Tensor | None = None, reduce: str = "max") -> Tensor:
    """[B, N] largest, mean or summed cosine of every token with the pivots."""
    scores = pivot_cosine(x, pivots, mask=mask)
    if reduce == "max":
        return scores.amax(-2)
    total = scores.sum(-2)
    return total / scores.shape[-2] if reduce == "mean" else total  # `mean` would multiply by 1 / P on CUDA


def pivot_cosine_varlen(x: Tensor, cu_seqlens: Tensor, pivots: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """[P, T] cosine of every token of a packed x [T, D] with the pivots [n, P] of its own sequence."""
    return _per_sequence(pivot_cosine, (pivots.shape[1],), x, cu_seqlens, pivots, mask)


def duplication_varlen(
    x: Tensor, cu_seqlens: Tensor, pivots: Tensor, *, mask: Tensor | None = None, reduce: str = "max"
) -> Tensor:
    """[T] duplication of every token of a packed x [T, D] in its own sequence."""

    def score(x, pivots, *, mask):
        return duplication(x, pivots, mask=mask, reduce=reduce)

    return _per_sequence(score, (), x, cu_seqlens, pivots, mask)


def _per_sequence(score, rows, x, cu_seqlens, pivots, mask):
    scores = [x.new_empty(*rows, 0, dtype=torch.float32)]
    bounds = cu_seqlens.tolist()
    for row, start, end in zip(pivots, bounds, bounds[1:]):
        if start < end:
            scores.append(score(x[start:end], row - start, mask=None if mask is None else mask[start:end]))
    return torch.cat(scores, -1)
