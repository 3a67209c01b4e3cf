"""DART's selection as one would write it in PyTorch (arXiv:2502.11494), from scores or from features.

`choose` and `features_choose` stay on the device: a `topk` and two small kernels per pivot, after the cosines of
`baselines/pivot_cosine.py`. `host_choose` and `host_features_choose` go the way of the public code: image by image, the
tokens that are left are a Python set; every pivot gathers them, ranks them and reads its choice back. All take quotas,
a list of int, and free bool [B, N], and return indices [B, sum(quotas)].
"""

import torch
import torch.nn.functional as F

from .pivot_cosine import normalized


def choose(scores, quotas, free):
    """From scores [B, P, N]."""
    chosen = []
    for score, quota in zip(scores.unbind(1), quotas):
        tokens = score.masked_fill(~free, torch.inf).topk(quota, largest=False).indices
        free = free.scatter(-1, tokens, False)
        chosen.append(tokens)
    return torch.cat(chosen, -1)


def features_choose(x, pivots, quotas, free):
    """From x [B, N, D] and pivots [B, P]."""
    return choose(normalized(x, pivots), quotas, free)


def host_choose(scores, quotas, free):
    """From scores [B, P, N]."""

    def rank(b, p, tokens):
        return scores[b, p, tokens]

    return _host_choose(rank, quotas, free)


def host_features_choose(x, pivots, quotas, free):
    """From x [B, N, D] and pivots [B, P]: a pivot computes its cosines with the tokens that are left."""

    def rank(b, p, tokens):
        return F.cosine_similarity(x[b, tokens], x[b, pivots[b, p]][None], dim=-1)

    return _host_choose(rank, quotas, free)


def _host_choose(rank, quotas, free):
    chosen = []
    for b, image in enumerate(free):
        left = set(image.nonzero()[:, 0].tolist())
        chosen.append([])
        for p, quota in enumerate(quotas):
            tokens = torch.tensor(list(left), device=free.device)
            taken = tokens[rank(b, p, tokens).topk(quota, largest=False).indices].tolist()
            left.difference_update(taken)
            chosen[b] += taken
    return torch.tensor(chosen, device=free.device)
