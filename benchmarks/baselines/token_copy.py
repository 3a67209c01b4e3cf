"""Keeping some tokens as one would write it in PyTorch, tensor after tensor, and a plain copy as a lower bound.

All take lists of tensors and make an index of the positions once for all layers, whose tensors have one shape. Cost: a
read and a write of what is kept; in place twice that, because it passes through a temporary; `gather` reads a position
for every element. `copy` moves as many bytes, all of them contiguous.
"""

import torch


def shared(cache, keep):
    """Whether one list of positions serves caches [B, Hk, S, D], as index_select needs."""
    return cache.shape[0] == 1 and keep.dim() == 2


def rows(cache, keep):
    """keep [B, K] or [B, Hk, K] as positions [B, Hk, K]."""
    return (keep if keep.dim() == 3 else keep[:, None]).expand(*cache.shape[:2], keep.shape[-1])


def places(cache, keep):
    """Index for index_select: positions [K], or for several lists rows of the cache as [B Hk S, D]."""
    if shared(cache, keep):
        return keep[0]
    B, Hk, S, _ = cache.shape
    first = S * torch.arange(B * Hk, device=keep.device).reshape(B, Hk, 1)
    return (rows(cache, keep) + first).flatten()


def _selected(cache, keep, index):
    if shared(cache, keep):
        return cache.index_select(2, index)
    B, Hk, _, D = cache.shape
    return cache.view(-1, D).index_select(0, index).view(B, Hk, -1, D)


def index_select(caches, keep):
    index = places(caches[0], keep)
    return [_selected(cache, keep, index) for cache in caches]


def index_select_(caches, keep):
    index = places(caches[0], keep)
    for cache in caches:
        cache[:, :, : keep.shape[-1]].copy_(_selected(cache, keep, index))


def _expanded(cache, keep):
    index = rows(cache, keep)[..., None]
    return index.expand(*index.shape[:3], cache.shape[-1])


def gather(caches, keep):
    index = _expanded(caches[0], keep)
    return [cache.gather(2, index) for cache in caches]


def gather_(caches, keep):
    index = _expanded(caches[0], keep)
    for cache in caches:
        cache[:, :, : keep.shape[-1]].copy_(cache.gather(2, index))


def slots(pages, block_table, positions):
    """(page, slot) of positions [B, K], each [B, K]."""
    size = pages.shape[1]
    return block_table.long().gather(1, positions // size), positions % size


def _from_and_to(pages, block_table, keep):
    to = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return slots(pages, block_table, keep), slots(pages, block_table, to)


def paged_indexing_(tensors, block_table, keep):
    """Pages [pages, page, Hk, D], all rows of keep in full."""
    source, target = _from_and_to(tensors[0], block_table, keep)
    for tensor in tensors:
        tensor[target] = tensor[source]


def paged_index_select_(tensors, block_table, keep):
    """The same on pages seen as [pages page, Hk, D]."""
    size = tensors[0].shape[1]
    source, target = ((page * size + slot).flatten() for page, slot in _from_and_to(tensors[0], block_table, keep))
    for tensor in tensors:
        tokens = tensor.flatten(0, 1)
        tokens.index_copy_(0, target, tokens.index_select(0, source))


def tokens_index_select(tensors, keep, dim):
    """Tokens of tensors [..., B, S, ...] at dim, one a tensor. index_select where there is one image, else indexing."""
    if keep.shape[0] == 1:
        return [tensor.index_select(d, keep[0]) for tensor, d in zip(tensors, dim)]
    row = torch.arange(keep.shape[0], device=keep.device)[:, None]
    return [tensor[(slice(None),) * (d - 1) + (row, keep)] for tensor, d in zip(tensors, dim)]


def tokens_gather(tensors, keep, dim):
    results = []
    for tensor, d in zip(tensors, dim):
        index = keep.reshape((1,) * (d - 1) + keep.shape + (1,) * (tensor.dim() - d - 1))
        results.append(tensor.gather(d, index.expand(*tensor.shape[:d], -1, *tensor.shape[d + 1 :])))
    return results


def copy(sources, targets=None):
    """A lower bound, which returns nothing: contiguous tensors copied into others, or into new ones as results are.

    Memory that a process has not used before can cost a CPU more than the copy.
    """
    targets = [torch.empty_like(source) for source in sources] if targets is None else targets
    for source, target in zip(sources, targets):
        target.copy_(source)
