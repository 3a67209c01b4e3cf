"""Compaction of key and value caches in Triton; _token_copy has the kernels and says what they cost.

Caches of one layout (shape, type, strides) take one launch, those of several one each; CUDA C++ takes one for all.
    64 caches, 3072 -> 352 tokens, B 1, Hk 32, D 128, bf16, new: 369 MB, 86 us on an H200 at 4.3 TB/s; 12288 programs.
        On an H100 134 us, right to the bit, where 123 are the floor.
    such caches losing 10 % in place, 3072 -> 2765: 2.9 GB, 674 us; 4096 programs, 22 blocks of tokens each.
"""

import torch

from ._token_copy import (
    COPY_SLICE,
    SHIFT_SLICE,
    Roles,
    alike,
    copy,
    copy_kernel,
    expect,
    expect_apart,
    expect_keep,
    form,
    grouped,
    shift,
    shift_kernel,
)

ROLES = Roles(token=2, batch=0, head=1)


def kv_compact(caches, keep, lengths):
    """caches of [B, Hk, S, D], keep [B, K] or [B, Hk, K]."""
    groups = grouped(caches)
    _expect(groups, keep, lengths)
    results = {}
    for layout, indices, sources in groups:
        own = alike(new_cache(caches[indices[0]], keep.shape[-1]), len(indices))
        copy(layout, sources, own, keep, lengths, ROLES)
        results.update(zip(indices, own))
    return [results[i] for i in range(len(caches))]


def kv_compact_(caches, keep, lengths):
    """The same in place, positions ascending."""
    groups = grouped(caches)
    _expect(groups, keep, lengths)
    expect_apart(groups)
    expect(all(keep.shape[-1] <= layout.shape[2] for layout, *_ in groups))
    for layout, _, sources in groups:
        shift(layout, sources, keep, lengths, ROLES)


def _expect(groups, keep, lengths):
    expect_keep(keep, lengths, (2, 3))
    B, Hk, device = keep.shape[0], keep.shape[1] if keep.dim() == 3 else None, keep.get_device()
    for layout, *_ in groups:
        expect(len(layout.shape) == 4 and layout.device == device)
        expect(layout.shape[0] == B and Hk in (None, layout.shape[1]))


def new_cache(cache, K):
    """Uninitialised [B, Hk, K, D] that lies in memory as the cache does: heads inside of tokens, or outside."""
    B, Hk, S, D = cache.shape
    if Hk > 1 and S > 1 and cache.stride(1) < cache.stride(2):
        return cache.new_empty((B, K, Hk, D)).transpose(1, 2)
    return cache.new_empty((B, Hk, K, D))


def specializations():
    """(kernel, form) of every kind of configuration that the launchers can ask for, to be compiled without a GPU."""
    for kernel, most, paged in ((copy_kernel, COPY_SLICE, ()), (shift_kernel, SHIFT_SLICE, (False,))):
        for count, rank, lengths in ((8, 2, None), (64, 2, torch.int64), (192, 2, torch.int32), (64, 6, None)):
            yield kernel, form(most, 16, 256, count, rank, lengths, *paged)
        for unit, width in ((16, 32), (16, 1024), (8, 8), (8, 72), (4, 132), (2, 2), (2, 1026), (1, 33)):
            yield kernel, form(most, unit, width, 8, 2, None, *paged)
