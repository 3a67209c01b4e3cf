"""kv_compact and kv_compact_ in Triton: argument checks and launches; _token_copy has the kernels.

Caches of one layout (type, shape, strides) share a launch. Kept bytes are read once and written once.
Documentation: docs/kernels/token_copy.md
"""

import torch

from ._token_copy import (
    IN_PLACE_CHUNK,
    NEW_CHUNK,
    DimRoles,
    allocate_like,
    check,
    check_keep,
    check_no_overlap,
    copy_in_place,
    copy_in_place_kernel,
    copy_new,
    copy_new_kernel,
    group_by_layout,
    make_spec,
)

ROLES = DimRoles(token=2, batch=0, head=1)


def kv_compact(caches, keep, lengths):
    """caches of [B, Hk, S, D], keep [B, K] or [B, Hk, K]."""
    groups = group_by_layout(caches)
    _check(groups, keep, lengths)
    results = {}
    for layout, indices, sources in groups:
        group_results = allocate_like(new_cache(caches[indices[0]], keep.shape[-1]), len(indices))
        copy_new(layout, sources, group_results, keep, lengths, ROLES)
        results.update(zip(indices, group_results))
    return [results[i] for i in range(len(caches))]


def kv_compact_(caches, keep, lengths):
    """The same in place; positions ascend."""
    groups = group_by_layout(caches)
    _check(groups, keep, lengths)
    check_no_overlap(groups)
    check(all(keep.shape[-1] <= layout.shape[2] for layout, *_ in groups))
    for layout, _, sources in groups:
        copy_in_place(layout, sources, keep, lengths, ROLES)


def _check(groups, keep, lengths):
    check_keep(keep, lengths, (2, 3))
    B, Hk, device = keep.shape[0], keep.shape[1] if keep.dim() == 3 else None, keep.get_device()
    for layout, *_ in groups:
        check(len(layout.shape) == 4 and layout.device == device)
        check(layout.shape[0] == B and Hk in (None, layout.shape[1]))


def new_cache(cache, K):
    """Uninitialised [B, Hk, K, D] with the order of heads and tokens that the cache has in memory."""
    B, Hk, S, D = cache.shape
    if Hk > 1 and S > 1 and cache.stride(1) < cache.stride(2):
        return cache.new_empty((B, K, Hk, D)).transpose(1, 2)
    return cache.new_empty((B, Hk, K, D))


def specializations():
    """(kernel, spec) of every kind of configuration of the launchers, to be compiled without a GPU."""
    for kernel, max_chunk, paged in (
        (copy_new_kernel, NEW_CHUNK, ()),
        (copy_in_place_kernel, IN_PLACE_CHUNK, (False,)),
    ):
        for count, rank, lengths in ((8, 2, None), (64, 2, torch.int64), (192, 2, torch.int32), (64, 6, None)):
            yield kernel, make_spec(max_chunk, 16, 256, count, rank, lengths, *paged)
        for vec_bytes, width in ((16, 32), (16, 1024), (8, 8), (8, 72), (4, 132), (2, 2), (2, 1026), (1, 33)):
            yield kernel, make_spec(max_chunk, vec_bytes, width, 8, 2, None, *paged)
