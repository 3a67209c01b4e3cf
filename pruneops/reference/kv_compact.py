"""Compaction of key and value caches: the specification.

Cost: the kept part of a cache read and written once, an expanded index, and temporaries of the same size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def kv_compact(caches: Sequence[Tensor], keep: Tensor, *, lengths: Tensor | None = None) -> list[Tensor]:
    """[cache[b, h, keep[b, h]]] for every cache; see `pruneops.kv_compact` for the contract."""
    results = []
    for cache in caches:
        result = new_cache(cache, keep.shape[-1])
        bits(result).copy_(_compact(bits(cache), keep, lengths))
        results.append(result)
    return results


def kv_compact_(caches: Sequence[Tensor], keep: Tensor, *, lengths: Tensor | None = None) -> None:
    """The same in place; see `pruneops.kv_compact_` for the contract."""
    for cache in map(bits, caches):
        head = cache[:, :, : keep.shape[-1]]
        # all is read before anything is written
        head.copy_(torch.where(valid_mask(keep, lengths)[..., None], _compact(cache, keep, lengths), head))


def new_cache(cache: Tensor, K: int) -> Tensor:
    """Uninitialised [B, Hk, K, D] in the memory order of the cache: heads inside of tokens, or outside."""
    B, Hk, S, D = cache.shape
    if Hk > 1 and S > 1 and cache.stride(1) < cache.stride(2):
        return cache.new_empty((B, K, Hk, D)).transpose(1, 2)
    return cache.new_empty((B, Hk, K, D))


def valid_mask(keep: Tensor, lengths: Tensor | None) -> Tensor:
    """bool [B, 1 or Hk, K]: which entries of keep [B, K] or [B, Hk, K] are within `lengths`."""
    keep = keep[:, None] if keep.dim() == 2 else keep
    if lengths is None:
        return torch.ones_like(keep, dtype=torch.bool)
    return (torch.arange(keep.shape[-1], device=keep.device) < lengths[:, None, None]).expand(keep.shape)


def bits(tensor: Tensor) -> Tensor:
    """A view of the same memory in a dtype that every operation supports."""
    return tensor.view(BITS[tensor.element_size()])


def _compact(cache, keep, lengths):
    """[B, Hk, K, D]; zeros where keep is not valid."""
    B, Hk, S, D = cache.shape
    shape = (B, Hk, keep.shape[-1], D)
    if S == 0:
        return cache.new_zeros(shape)
    valid = valid_mask(keep, lengths)
    source = torch.where(valid, keep[:, None] if keep.dim() == 2 else keep, 0)
    return torch.where(valid[..., None], cache.gather(2, source[..., None].expand(shape)), 0)
