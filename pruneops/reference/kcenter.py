"""Greedy k-center selection (farthest-first traversal): the specification.

Cost: one pass over x per step, 2 k N D operations and k N D elements read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# A token whose squared norm is below this range is treated as a zero vector; one above it,
# or NaN, as non-finite. The factor 4 keeps |x - y|^2 <= 4 max |x|^2 finite in float32.
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny
LARGEST_SQUARE = torch.finfo(torch.float32).max / 4


def kcenter(
    x: Tensor, k: int, *, seeds: Tensor | None = None, mask: Tensor | None = None, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """Choose k of N tokens per batch row; see `pruneops.kcenter` for the contract."""
    if x.dim() == 2:
        seeds, mask = (None if t is None else t[None] for t in (seeds, mask))
        indices, radii = kcenter(x[None], k, seeds=seeds, mask=mask, metric=metric)
        return indices[0], radii[0]

    x = x.float()
    square = x.square().sum(-1)  # [B, N]
    finite = square <= LARGEST_SQUARE
    x = torch.where(finite[..., None], x, torch.nan)  # a non-finite center is near to no token
    if metric == "cosine":
        norm = torch.where(square < SMALLEST_SQUARE, torch.inf, square.sqrt())
        x = x / norm[..., None]
    rows = torch.arange(x.shape[0], device=x.device)

    # similarity to the nearest center so far; +inf makes non-finite tokens the last choice
    nearest = torch.where(finite, -torch.inf, torch.inf)
    available = torch.ones_like(finite) if mask is None else mask.clone()
    indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    radii = torch.empty(x.shape[0], k, device=x.device)
    for step in range(k):
        if seeds is not None and step < seeds.shape[1]:
            choice = seeds[:, step]
            radii[:, step] = torch.inf
        else:
            choice = _first_lowest(nearest, available)
            radii[:, step] = _radius(nearest[rows, choice], metric)
        indices[:, step] = choice
        available[rows, choice] = False
        dot = torch.einsum("bnd,bd->bn", x, x[rows, choice])
        similarity = dot if metric == "cosine" else 2 * dot - square - square[rows, choice, None]
        nearest = torch.where(similarity > nearest, similarity, nearest)
    return indices, radii


def kcenter_varlen(
    x: Tensor, cu_seqlens: Tensor, ks: Sequence[int], *, seeds: Tensor | None = None, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """`kcenter` over each sequence of a packed x [T, D]; indices into the packed tensor."""
    bounds = cu_seqlens.tolist()
    indices, radii = [torch.empty(0, dtype=torch.int64, device=x.device)], [x.new_empty(0, dtype=torch.float32)]
    for s, (start, end, k) in enumerate(zip(bounds, bounds[1:], ks)):
        if k == 0:
            continue
        chosen, radius = kcenter(x[start:end], k, seeds=None if seeds is None else seeds[s] - start, metric=metric)
        indices.append(chosen + start)
        radii.append(radius)
    return torch.cat(indices), torch.cat(radii)


def _first_lowest(nearest, available):
    """Index [B] of the first available token of smallest similarity, non-finite tokens last."""
    order = nearest.clamp(max=torch.finfo(torch.float32).max)  # below the +inf of the unavailable
    return torch.where(available, order, torch.inf).argmin(-1)


def _radius(similarity, metric):
    """Distance of a similarity: inf to an empty set, NaN for a non-finite token."""
    distance = (-similarity).clamp(min=0).sqrt() if metric == "euclidean" else (1 - similarity).clamp(min=0)
    return torch.where(similarity == torch.inf, torch.nan, distance)
