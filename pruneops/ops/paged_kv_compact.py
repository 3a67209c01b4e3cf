"""Compaction of paged caches in place: schema, argument checks, fake kernel, backends."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    INT,
    check,
    check_no_overlap,
    check_same_device,
    check_tensor,
    check_tensor_list,
    check_types,
    has_values,
)
from ..reference.kv_compact import valid_mask
from ._library import define
from .kv_compact import check_keep, check_keep_values

LAYOUTS = ("NHD", "HND")


def paged_kv_compact_(
    pages: Sequence[Tensor],
    block_table: Tensor,
    keep: Tensor,
    lengths: Tensor,
    *,
    layout: Literal["NHD", "HND"] = "NHD",
) -> None:
    """Keep some of the tokens of every request in a paged cache, in place.

    Token ``keep[b, r]`` of request b moves to its position r, for ``r < lengths[b]``, in all tensors in one launch. No
    other byte changes, and block_table stays as it is; ``pages_in_use(lengths, page_size)`` says how many of a
    request's pages are still needed, the rest can be freed.

    Parameters
    ----------
    pages : list of Tensor [pages, page, Hk, D] (NHD) or [pages, Hk, page, D] (HND), any dtype
        Keys and values of all layers in separate tensors; or together as [pages, 2, page, Hk, D] or
        [pages, 2, Hk, page, D]. Any strides; no two may overlap in memory.
    block_table : Tensor [B, blocks], int32
        Page of tokens 0 .. page - 1 of a request, of the next ones, and so on. Entries past the last kept token are
        ignored.
    keep : Tensor [B, K] or [B, Hk, K], int64
        Positions within each request, strictly ascending, for all heads or for each.
    lengths : Tensor [B], int64 or int32
        How many entries of each row of keep are valid.
    layout : {"NHD", "HND"}
        Order of a page's dimensions: tokens before heads, or heads before tokens.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. Values are checked on CPU always, on CUDA when
        PRUNEOPS_DEBUG=1: positions, pages, and that a page that tokens move to is listed only once.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    A page may stand in the rows of several requests (a shared prefix) as long as no token moves to it, which would
    overwrite tokens of the others. A token with ``keep[b, r] = r`` stays where it is and is not written, so a prefix of
    which every token is kept can be shared, and so can pages that tokens are only moved from. Requests outside of this
    call must not share a page that tokens move to either; this cannot be checked here.

    Not differentiable.

    Examples
    --------
    >>> import torch, pruneops
    >>> pages = torch.arange(6.0).reshape(3, 2, 1, 1)  # three pages of two tokens
    >>> table = torch.tensor([[2, 0]], dtype=torch.int32)  # one request: tokens 4, 5, 0, 1
    >>> pruneops.paged_kv_compact_([pages], table, torch.tensor([[1, 3]]), torch.tensor([2]))
    >>> pages[2].flatten()
    tensor([5., 1.])
    >>> pruneops.pages_in_use(torch.tensor([2]), 2)
    tensor([1])
    """
    op = "paged_kv_compact_"
    try:
        torch.ops.pruneops.paged_kv_compact_(pages, block_table, keep, lengths, layout=layout)
    except (RuntimeError, TypeError):  # types are checked after an error only: that keeps calls on many tensors fast
        check_types(op, block_table=(block_table, Tensor), lengths=(lengths, Tensor), layout=(layout, str))
        check_tensor_list(op, "pages", pages)
        check_types(op, keep=(keep, Tensor))
        raise
    if torch.is_grad_enabled():
        torch.autograd.graph.increment_version(pages)


def pages_in_use(lengths: Tensor, page_size: int) -> Tensor:
    """How many of its pages each request needs after compaction.

    Parameters
    ----------
    lengths : Tensor [B], int64 or int32
        Tokens kept of each request.
    page_size : int
        Tokens of a page.

    Returns
    -------
    Tensor [B], dtype of lengths
        Number of pages: the first that many entries of a row of the block table are in use; the pages of the others
        can be freed.

    Raises
    ------
    ValueError
        If `page_size` is not positive.
    TypeError
        On arguments of a wrong type.

    Examples
    --------
    >>> import torch, pruneops
    >>> pruneops.pages_in_use(torch.tensor([0, 16, 17]), 16)
    tensor([0, 1, 2])
    """
    check_types("pages_in_use", lengths=(lengths, Tensor), page_size=(page_size, INT))
    check(page_size > 0, "pages_in_use", "page_size", page_size, "at least 1")
    return (lengths + page_size - 1) // page_size


def _check(pages, block_table, keep, lengths, *, layout="NHD"):
    op = "paged_kv_compact_"
    _check_layout(layout)
    check(len(pages) > 0, op, "pages", "an empty list", "at least one tensor")
    order = ("page", "Hk") if layout == "NHD" else ("Hk", "page")
    for i, tensor in enumerate(pages):
        shape, wanted = list(tensor.shape), f"of rank 4 or 5: [pages, {', '.join(order)}, D] or [pages, 2, ...]"
        check(tensor.dim() in (4, 5), op, f"pages[{i}]", f"of shape {shape}", wanted)
    check_same_device(op, "pages", pages)
    check(keep.dim() in (2, 3), op, "keep", f"of shape {list(keep.shape)}", "[B, K] or [B, Hk, K]")
    page, Hk = (pages[0].shape[-3 + order.index(name)] for name in ("page", "Hk"))
    check_keep(op, keep, lengths, ("pages", pages[0]), None, Hk)
    check_tensor(op, "block_table", block_table, ("pages", pages[0]), (torch.int32,), (keep.shape[0], None), "blocks")
    for i, tensor in enumerate(pages):
        sizes = {name: tensor.shape[-3 + order.index(name)] for name in order}
        fits = sizes["page"] == page and (keep.dim() == 2 or sizes["Hk"] == Hk)
        wanted = f"pages of {page} tokens{'' if keep.dim() == 2 else f' and {Hk} heads'}, as pages[0] and keep say"
        check(fits, op, f"pages[{i}]", f"of shape {list(tensor.shape)}", wanted)
    check(page > 0, op, "pages[0]", f"of shape {list(pages[0].shape)}", "pages of at least one token")
    check_no_overlap(op, "pages", pages)
    capacity = block_table.shape[1] * page
    check_keep_values(op, keep, lengths, capacity, ascending=True)
    if has_values(block_table) and keep.numel():
        _check_blocks(op, block_table, keep, lengths, page, min(tensor.shape[0] for tensor in pages))


def _check_layout(layout):
    check(layout in LAYOUTS, "paged_kv_compact_", "layout", repr(layout), f"one of {LAYOUTS}")


def _check_blocks(op, block_table, keep, lengths, page, pages):
    """The pages up to each request's last kept token exist, and a page that tokens move to is listed only once."""
    valid, keep = valid_mask(keep, lengths), keep if keep.dim() == 3 else keep[:, None]
    starts = torch.arange(block_table.shape[1], device=keep.device) * page
    used = starts <= torch.where(valid, keep, -1).amax((1, 2))[:, None]
    blocks = block_table[used]
    if not blocks.numel():
        return
    outside = (blocks < 0) | (blocks >= pages)
    if outside.any():
        check(False, op, "block_table", f"{int(blocks[outside][0])} at one place", f"in [0, {pages})")
    # positions ascend, so the tokens that stay come first
    stay = (valid & (keep == torch.arange(keep.shape[-1], device=keep.device))).sum(-1).amin(-1)[:, None]
    written = torch.maximum(starts, stay) < torch.minimum(starts + page, lengths[:, None])
    _, inverse, counts = blocks.unique(return_inverse=True, return_counts=True)
    overwritten = (counts[inverse] > 1) & written[used]
    if overwritten.any():
        shared = f"page {int(blocks[overwritten].min())} at two places"
        check(False, op, "block_table", shared, "a page of its own at every place that tokens move to")


def _fake(pages, block_table, keep, lengths, *, layout="NHD"):
    return None


def _native(pages, block_table, keep, lengths, *, layout="NHD"):
    _check_layout(layout)
    torch.ops.pruneops_native.paged_kv_compact_(pages, block_table, keep, lengths, layout == "NHD")


def _triton(pages, block_table, keep, lengths, *, layout="NHD"):
    from ..triton_kernels import paged_kv_compact as kernels

    if not keep.is_cuda:  # in its interpreter
        _check(pages, block_table, keep, lengths, layout=layout)
    kernels.paged_kv_compact_(pages, block_table, keep, lengths, layout)


define(
    "paged_kv_compact_(Tensor(a!)[] pages, Tensor block_table, Tensor keep, Tensor lengths, *, str layout='NHD') -> ()",
    _check,
    _fake,
    {"reference": reference.paged_kv_compact_, "cpu": _native, "triton": _triton, "cuda": _native},
    self_checking=("cpu", "triton", "cuda"),
)
