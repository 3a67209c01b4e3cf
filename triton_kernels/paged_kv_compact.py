"""Compaction of paged caches in place in Triton; _token_copy has the kernel and says what it costs.

Tensors of one layout (shape, type, strides) take one launch, those of several one each; CUDA C++ takes one for all.
Beside what kv_compact_ costs: two entries of the block table a token and slice, out of L1, and their divisions.
"""

import torch

from ._token_copy import SHIFT_SLICE, Roles, expect, expect_apart, expect_keep, form, grouped, shift, shift_kernel


def paged_kv_compact_(pages, block_table, keep, lengths, layout):
    """pages of [pages, page, Hk, D] (NHD) or [pages, Hk, page, D] (HND), or with a dimension of two after the pages."""
    expect_keep(keep, lengths, (2, 3))
    expect(block_table.dtype is torch.int32 and block_table.dim() == 2 and block_table.shape[0] == keep.shape[0])
    expect(block_table.get_device() == keep.get_device())
    groups = grouped(pages)
    expect_apart(groups)
    expect(layout in ("NHD", "HND") and len({_page_size(own, keep, layout) for own, *_ in groups}) == 1)
    for own, _, sources in groups:
        token, head = _places(own, layout)
        shift(own, sources, keep, lengths, Roles(token, None, head, 0), block_table, own.shape[token])


def _places(own, layout):
    """Dimensions of tokens and heads."""
    rank = len(own.shape)
    return (rank - 3, rank - 2) if layout == "NHD" else (rank - 2, rank - 3)


def _page_size(own, keep, layout):
    """Tokens of a page, of tensors that fit keep."""
    expect(len(own.shape) in (4, 5) and own.device == keep.get_device())
    token, head = _places(own, layout)
    expect(own.shape[token] > 0 and (keep.dim() == 2 or own.shape[head] == keep.shape[1]))
    return own.shape[token]


def specializations():
    """(kernel, form) of every kind of configuration that the launcher can ask for, to be compiled without a GPU."""
    for count, rank, lengths in ((8, 2, torch.int32), (64, 2, torch.int64), (192, 6, torch.int32)):
        yield shift_kernel, form(SHIFT_SLICE, 16, 256, count, rank, lengths, True)
    for unit, width in ((16, 32), (8, 8), (8, 72), (4, 132), (2, 2), (2, 1026), (1, 33)):
        yield shift_kernel, form(SHIFT_SLICE, unit, width, 8, 2, torch.int32, True)
