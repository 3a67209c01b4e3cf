"""Greedy k-center as one would write it in PyTorch, from ToDRE's Algorithm 1 (arXiv:2505.18757).

All take v [B, N, D], pivot int64 [B] (the first center) and k, compute in the dtype of v as
public code does, and return indices [B, k]. Cost: the loops make one pass over v per step,
2 k N D operations; `n_by_n` 2 N^2 D operations and k^2 N / 2 elements read, N^2 kept.
"""

import torch
import torch.nn.functional as F


def similarity(v, center):
    """Cosine [B, N] of every token of normalised v [B, N, D] with one token of each row, center [B]."""
    if v.shape[0] == 1:
        return torch.mv(v[0], v[0].index_select(0, center)[0])[None]  # v[0, center[0]] would wait for the host
    rows = torch.arange(v.shape[0], device=v.device)
    return torch.bmm(v, v[rows, center, :, None])[..., 0]


def step(v, nearest):
    """The least similar token, and the maximum similarities once it is chosen too."""
    choice = nearest.argmin(-1)
    return choice, torch.maximum(nearest, similarity(v, choice))


def loop(v, k, pivot, step=step):
    """Algorithm 1, nothing read by the host; `step` may come compiled."""
    v = F.normalize(v, dim=-1)
    chosen = [pivot]
    nearest = similarity(v, pivot)
    for _ in range(k - 1):
        choice, nearest = step(v, nearest)
        chosen.append(choice)
    return torch.stack(chosen, dim=-1)


def loop_item(v, k, pivot):
    """Algorithm 1 image by image, with the index read by the host in every step."""
    chosen = []
    for image, first in zip(F.normalize(v, dim=-1), pivot.tolist()):
        centers = [first]
        nearest = image @ image[first]
        for _ in range(k - 1):
            choice = nearest.argmin().item()
            centers.append(choice)
            nearest = torch.maximum(nearest, image @ image[choice])
        chosen.append(centers)
    return torch.tensor(chosen, device=v.device)


def n_by_n(v, k, pivot):
    """All similarities at once, then in every step the maximum over all chosen rows, as DivPrune does."""
    v = F.normalize(v, dim=-1)
    similarities = v @ v.mT  # [B, N, N]
    rows = torch.arange(v.shape[0], device=v.device)[:, None]
    chosen = pivot.new_empty(v.shape[0], k)
    chosen[:, 0] = pivot
    for i in range(1, k):
        chosen[:, i] = similarities[rows, chosen[:, :i]].amax(1).argmin(-1)
    return chosen
