"""Cosines with a few pivot tokens as one would write them in PyTorch (DART, arXiv:2502.11494).

All take x [B, N, D], pivots int64 [B, P] and reduce (None, "max", "mean" or "sum"), compute in the dtype of x as public
code does, and return [B, P, N], reduced [B, N]. Cost: `normalized` reads x twice to normalise it, writes that and
reads it again; `per_pivot` makes P passes over x, with temporaries as large.
"""

import torch
import torch.nn.functional as F


def normalized(x, pivots, reduce=None):
    """Every token normalised, then one product with the pivots."""
    v = F.normalize(x, dim=-1)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return _reduced(torch.bmm(v[rows, pivots], v.mT), reduce)


def per_pivot(x, pivots, reduce=None):
    """`cosine_similarity` of all tokens with one pivot after another."""
    rows = torch.arange(x.shape[0], device=x.device)
    scores = [F.cosine_similarity(x, x[rows, own, None], dim=-1) for own in pivots.unbind(1)]
    return _reduced(torch.stack(scores, 1), reduce)


def _reduced(scores, reduce):
    if reduce is None:
        return scores
    return {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}[reduce](scores, 1)
