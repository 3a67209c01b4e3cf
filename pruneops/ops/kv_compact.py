"""Compaction of key and value caches: schemas, argument checks, fake kernels, backends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    OPTIONAL_TENSOR,
    check,
    check_no_overlap,
    check_same_device,
    check_tensor,
    check_tensor_list,
    check_types,
    has_values,
)
from ..reference.kv_compact import new_cache, valid_mask
from ._library import define

LENGTHS = (torch.int64, torch.int32)


def kv_compact(caches: Sequence[Tensor], keep: Tensor, *, lengths: Tensor | None = None) -> list[Tensor]:
    """Keep some of the tokens of any number of key and value caches, in new tensors.

    ``result[b, h, r] = cache[b, h, keep[b, h, r]]`` for every cache, in one launch at copy speed.

    Parameters
    ----------
    caches : list of Tensor [B, Hk, S, D], any dtype
        Keys and values of all layers. Any strides: caches [B, S, Hk, D] are passed as ``.transpose(1, 2)``. Hk, S, D
        and dtype may differ from cache to cache.
    keep : Tensor [B, K] or [B, Hk, K], int64
        Positions to keep, in any order, for all heads or for each.
    lengths : Tensor [B], int64 or int32, optional
        How many entries of each row of keep are valid; the others are ignored. All by default.

    Returns
    -------
    list of Tensor [B, Hk, K, D]
        In the memory order of its cache: heads inside of tokens, or outside. Zeros past `lengths`.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. Values of keep and lengths are checked on CPU always,
        on CUDA when PRUNEOPS_DEBUG=1; unchecked positions outside a cache read memory out of bounds.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Not differentiable.

    Examples
    --------
    >>> import torch, pruneops
    >>> cache = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> pruneops.kv_compact([cache], torch.tensor([[0, 3]]))[0].flatten()
    tensor([0., 3.])
    """
    try:
        return torch.ops.pruneops.kv_compact(caches, keep, lengths=lengths)
    except (RuntimeError, TypeError):  # types are checked after an error only: that keeps calls on many caches fast
        _check_types("kv_compact", caches, keep, lengths)
        raise


def kv_compact_(caches: Sequence[Tensor], keep: Tensor, *, lengths: Tensor | None = None) -> None:
    """Keep some of the tokens of any number of key and value caches, in place.

    ``cache[b, h, r]`` becomes what ``cache[b, h, keep[b, h, r]]`` was. No other byte changes: the memory past the kept
    tokens keeps its old content, which the caller must ignore.

    Parameters
    ----------
    caches : list of Tensor [B, Hk, S, D], any dtype
        As in `kv_compact`; no two of them may overlap in memory.
    keep : Tensor [B, K] or [B, Hk, K], int64
        Positions to keep, strictly ascending, for all heads or for each.
    lengths : Tensor [B], int64 or int32, optional
        How many entries of each row of keep are valid; nothing is written past them. All by default.

    Raises
    ------
    ValueError
        As in `kv_compact`; also on positions that do not ascend, and on a cache that is passed twice.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Safe because positions ascend: token r moves to a place that no later token is read from. Not differentiable.

    Examples
    --------
    >>> import torch, pruneops
    >>> cache = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> pruneops.kv_compact_([cache], torch.tensor([[0, 3]]))
    >>> cache.flatten()
    tensor([0., 3., 2., 3.])
    """
    try:
        torch.ops.pruneops.kv_compact_(caches, keep, lengths=lengths)
    except (RuntimeError, TypeError):
        _check_types("kv_compact_", caches, keep, lengths)
        raise
    if torch.is_grad_enabled():
        torch.autograd.graph.increment_version(caches)


def _check_types(op, caches, keep, lengths):
    check_tensor_list(op, "caches", caches)
    check_types(op, keep=(keep, Tensor), lengths=(lengths, OPTIONAL_TENSOR))


def check_keep(
    op: str, keep: Tensor, lengths: Tensor | None, first: tuple[str, Tensor], batch: int | None, heads: int
) -> None:
    """keep [B, K] or [B, Hk, K] and lengths [B] on the device of `first` = (name, tensor); a batch of None is any."""
    head_dims = () if keep.dim() == 2 else (heads,)
    free = "B, K" if batch is None else "K"
    check_tensor(op, "keep", keep, first, (torch.int64,), (batch, *head_dims, None), free)
    if lengths is not None:
        check_tensor(op, "lengths", lengths, first, LENGTHS, (keep.shape[0],))


def check_keep_values(op: str, keep: Tensor, lengths: Tensor | None, positions: int, ascending: bool) -> None:
    """Valid entries of keep lie within [0, positions) and, on demand, ascend; lengths lie within [0, K]."""
    K = keep.shape[-1]
    if lengths is not None and has_values(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        check(low >= 0 and high <= K, op, "lengths", high if low >= 0 else low, f"0 to the {K} entries of keep")
    if not has_values(keep) or not keep.numel():
        return
    valid = valid_mask(keep, lengths).reshape(keep.shape)
    inside = (keep >= 0) & (keep < positions) | ~valid
    if not inside.all():
        check(False, op, "keep", f"{int(keep[~inside][0])} at one place", f"in [0, {positions})")
    if ascending:
        rises = (keep[..., 1:] > keep[..., :-1]) | ~valid[..., 1:]
        if not rises.all():
            one = rises.logical_not().nonzero()[0].tolist()
            before, after = int(keep[..., :-1][tuple(one)]), int(keep[..., 1:][tuple(one)])
            check(False, op, "keep", f"{after} after {before} at {one}", "strictly ascending in every row")


def _check(op, caches, keep, lengths, in_place):
    check(len(caches) > 0, op, "caches", "an empty list", "at least one cache")
    for i, cache in enumerate(caches):
        check(cache.dim() == 4, op, f"caches[{i}]", f"of shape {list(cache.shape)}", "of rank 4: [B, Hk, S, D]")
    check_same_device(op, "caches", caches)
    check(keep.dim() in (2, 3), op, "keep", f"of shape {list(keep.shape)}", "[B, K] or [B, Hk, K]")
    B, Hk = caches[0].shape[:2]
    check_keep(op, keep, lengths, ("caches", caches[0]), B, Hk)
    K = keep.shape[-1]
    for i, cache in enumerate(caches):
        fits = cache.shape[0] == B and (keep.dim() == 2 or cache.shape[1] == Hk)
        wanted = f"[{B}, {'Hk' if keep.dim() == 2 else Hk}, S, D], as caches[0] and keep say"
        check(fits, op, f"caches[{i}]", f"of shape {list(cache.shape)}", wanted)
        if in_place:
            wanted = f"at most the {cache.shape[2]} positions of caches[{i}]"
            check(cache.shape[2] >= K, op, "keep", f"{K} entries a row", wanted)
    fewest = min(cache.shape[2] for cache in caches)
    if in_place:
        check_no_overlap(op, "caches", caches)
    check_keep_values(op, keep, lengths, fewest, ascending=in_place)


def _check_new(caches, keep, *, lengths=None):
    _check("kv_compact", caches, keep, lengths, in_place=False)


def _check_in_place(caches, keep, *, lengths=None):
    _check("kv_compact_", caches, keep, lengths, in_place=True)


def _native(caches, keep, *, lengths=None):
    return torch.ops.pruneops_native.kv_compact(caches, keep, lengths)


def _native_in_place(caches, keep, *, lengths=None):
    torch.ops.pruneops_native.kv_compact_(caches, keep, lengths)


def _triton(caches, keep, *, lengths=None):
    from ..triton_kernels import kv_compact as kernels

    if not keep.is_cuda:  # in its interpreter
        _check_new(caches, keep, lengths=lengths)
    return kernels.kv_compact(caches, keep, lengths)


def _triton_in_place(caches, keep, *, lengths=None):
    from ..triton_kernels import kv_compact as kernels

    if not keep.is_cuda:
        _check_in_place(caches, keep, lengths=lengths)
    kernels.kv_compact_(caches, keep, lengths)


define(
    "kv_compact(Tensor[] caches, Tensor keep, *, Tensor? lengths=None) -> Tensor[]",
    _check_new,
    lambda caches, keep, *, lengths=None: [new_cache(cache, keep.shape[-1]) for cache in caches],
    {"reference": reference.kv_compact, "cpu": _native, "triton": _triton, "cuda": _native},
    self_checking=("cpu", "triton", "cuda"),
)
define(
    "kv_compact_(Tensor(a!)[] caches, Tensor keep, *, Tensor? lengths=None) -> ()",
    _check_in_place,
    lambda caches, keep, *, lengths=None: None,
    {
        "reference": reference.kv_compact_,
        "cpu": _native_in_place,
        "triton": _triton_in_place,
        "cuda": _native_in_place,
    },
    self_checking=("cpu", "triton", "cuda"),
)
