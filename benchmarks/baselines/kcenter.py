"""Greedy k-center as one would write it in PyTorch, from ToDRE's Algorithm 1 (arXiv:2505.18757), or, with Euclidean
distances, from the farthest point sampling of point clouds; and that of the package torch-quickfps.

All take v [B, N, D], pivot int64 [B] (the first center) and k, compute in the dtype of v as
public code does, and return indices [B, k]. Cost: the loops make one pass over v per step,
2 k N D operations (3 for distances); `n_by_n` 2 N^2 D operations and k^2 N / 2 elements read, N^2 kept.
"""

import torch
import torch.nn.functional as F


def similarity(v, center, metric="cosine"):
    """[B, N] of every token of v [B, N, D] with one token of each row, center [B]: the cosine of normalised ones, or
    minus the squared distance."""
    if metric == "euclidean":
        return -(v - v.gather(1, center[:, None, None].expand(-1, 1, v.shape[-1]))).square().sum(-1)
    if v.shape[0] == 1:
        return torch.mv(v[0], v[0].index_select(0, center)[0])[None]  # v[0, center[0]] would wait for the host
    rows = torch.arange(v.shape[0], device=v.device)
    return torch.bmm(v, v[rows, center, :, None])[..., 0]


def step(v, nearest, metric="cosine"):
    """The least similar token, and the maximum similarities once it is chosen too."""
    choice = nearest.argmin(-1)
    return choice, torch.maximum(nearest, similarity(v, choice, metric))


def loop(v, k, pivot, metric="cosine", step=step):
    """Algorithm 1, nothing read by the host; `step` may come compiled."""
    v = F.normalize(v, dim=-1) if metric == "cosine" else v
    chosen = [pivot]
    nearest = similarity(v, pivot, metric)
    for _ in range(k - 1):
        choice, nearest = step(v, nearest, metric)
        chosen.append(choice)
    return torch.stack(chosen, dim=-1)


def loop_item(v, k, pivot, metric="cosine"):
    """Algorithm 1 image by image, with the index read by the host in every step."""

    def similar(image, center):
        return image @ image[center] if metric == "cosine" else -(image - image[center]).square().sum(-1)

    chosen = []
    for image, first in zip(F.normalize(v, dim=-1) if metric == "cosine" else v, pivot.tolist()):
        centers = [first]
        nearest = similar(image, first)
        for _ in range(k - 1):
            choice = nearest.argmin().item()
            centers.append(choice)
            nearest = torch.maximum(nearest, similar(image, choice))
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


def quickfps(v, k, first, bucketed=True):
    """Of the package torch-quickfps: one first token for all rows; on CUDA with the settings that it advises for wide
    features."""
    import torch_quickfps

    if not bucketed:
        return torch_quickfps.sample_idx_baseline(v, k, start_idx=first)
    return torch_quickfps.sample_idx(v, k, start_idx=first, **({"h": 8, "low_d": 8} if v.is_cuda else {}))
