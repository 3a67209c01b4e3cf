"""paged_kv_compact_ in Triton: argument checks and launches; _token_copy has the kernel.

Tensors of one layout (type, shape, strides) share a launch. Kept bytes are read once and written once; a program also
reads two entries of the block table per token.
Documentation: docs/kernels/token_copy.md
"""

import torch

from ._token_copy import (
    IN_PLACE_CHUNK,
    DimRoles,
    check,
    check_keep,
    check_no_overlap,
    copy_in_place,
    copy_in_place_kernel,
    group_by_layout,
    make_spec,
)


def paged_kv_compact_(pages, block_table, keep, lengths, layout):
    """pages of [pages, page, Hk, D] (NHD) or [pages, Hk, page, D] (HND), or with a dimension of two after the pages."""
    check_keep(keep, lengths, (2, 3))
    check(block_table.dtype is torch.int32 and block_table.dim() == 2 and block_table.shape[0] == keep.shape[0])
    check(block_table.get_device() == keep.get_device())
    groups = group_by_layout(pages)
    check_no_overlap(groups)
    check(layout in ("NHD", "HND"))
    check(len({_page_size(tensor_layout, keep, layout) for tensor_layout, *_ in groups}) == 1)
    for tensor_layout, _, sources in groups:
        token, head = _token_and_head(tensor_layout, layout)
        roles = DimRoles(token, None, head, 0)
        copy_in_place(tensor_layout, sources, keep, lengths, roles, block_table, tensor_layout.shape[token])


def _token_and_head(tensor_layout, layout):
    """(token, head): dimensions of tensors of a layout."""
    rank = len(tensor_layout.shape)
    return (rank - 3, rank - 2) if layout == "NHD" else (rank - 2, rank - 3)


def _page_size(tensor_layout, keep, layout):
    """Tokens of a page; checks tensor_layout against keep."""
    check(len(tensor_layout.shape) in (4, 5) and tensor_layout.device == keep.get_device())
    token, head = _token_and_head(tensor_layout, layout)
    check(tensor_layout.shape[token] > 0 and (keep.dim() == 2 or tensor_layout.shape[head] == keep.shape[1]))
    return tensor_layout.shape[token]


def specializations():
    """(kernel, spec) of every kind of configuration of the launcher, to be compiled without a GPU."""
    for count, rank, lengths in ((8, 2, torch.int32), (64, 2, torch.int64), (192, 6, torch.int32)):
        yield copy_in_place_kernel, make_spec(IN_PLACE_CHUNK, 16, 256, count, rank, lengths, True)
    for vec_bytes, width in ((16, 32), (8, 8), (8, 72), (4, 132), (2, 2), (2, 1026), (1, 33)):
        yield copy_in_place_kernel, make_spec(IN_PLACE_CHUNK, vec_bytes, width, 8, 2, torch.int32, True)
