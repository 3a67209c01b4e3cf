"""Greedy k-center selection: schemas, argument checks, fake kernels, backends."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    INT,
    OPTIONAL_TENSOR,
    check,
    check_cu_seqlens,
    check_float_tensor,
    check_indices,
    check_tensor,
    check_types,
    has_values,
)
from ._library import define, last_dim_contiguous

METRICS = ("cosine", "euclidean")


class KCenter(NamedTuple):
    """Chosen tokens in order of choice, and the distance of each to the set when chosen."""

    indices: Tensor
    radii: Tensor


def kcenter(
    x: Tensor,
    k: int,
    *,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> KCenter:
    """Choose k tokens, each the farthest from those chosen before it.

    Greedy k-center (farthest-first traversal): the next token is the allowed one whose
    largest similarity to the chosen set is smallest; ties go to the lowest index. Every
    prefix of the result is the result for a smaller budget.

    Parameters
    ----------
    x : Tensor [B, N, D] or [N, D], float32, float16 or bfloat16
        Tokens, any strides. Arithmetic is float32.
    k : int
        Tokens to choose, seeds included; 1 <= k <= number of tokens allowed.
    seeds : Tensor [B, P] or [P], int64, optional
        Centers already chosen, all different. They come first in the output, in their order, and need
        not be allowed by `mask`. Without seeds the first allowed finite token is the first center.
    mask : Tensor [B, N] or [N], bool, optional
        True where a token may be chosen.
    metric : {"cosine", "euclidean"}
        Distance 1 - cos (a zero vector has similarity 0 to everything) or the Euclidean
        distance, computed as ``sqrt(|x|^2 + |y|^2 - 2 x.y)``: absolute error about
        ``sqrt(1e-7 (|x|^2 + |y|^2))`` for nearly equal tokens.

    Returns
    -------
    indices : Tensor [B, k] or [k], int64
        In order of choice. No token appears twice.
    radii : Tensor [B, k] or [k], float32
        Distance of each token to the set when it was chosen: inf for seeds and for a first
        token chosen without seeds, then non-increasing.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. Values (seeds in range and different,
        enough tokens allowed) are checked on CPU always, on CUDA when PRUNEOPS_DEBUG=1; an
        unchecked CUDA call that runs out of allowed tokens returns index -1, radius NaN.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    A token with a NaN, an infinity, or a squared norm above a quarter of float32's largest number is chosen
    only after all others, in index order, with radius NaN, and is near to no other token.
    Not differentiable.

    Source: Gonzalez 1985; stage 1 of ToDRE (arXiv:2505.18757), Algorithm 1, with chosen
    tokens taken out of the pool.

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    >>> pruneops.kcenter(x, 3).indices
    tensor([0, 3, 2])
    """
    check_types("kcenter", x=(x, Tensor), k=(k, INT), metric=(metric, str))
    check_types("kcenter", seeds=(seeds, OPTIONAL_TENSOR), mask=(mask, OPTIONAL_TENSOR))
    return KCenter(*torch.ops.pruneops.kcenter(x, k, seeds=seeds, mask=mask, metric=metric))


def kcenter_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    ks: Sequence[int],
    *,
    seeds: Tensor | None = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> KCenter:
    """`kcenter` over sequences of different lengths packed into one tensor.

    Parameters
    ----------
    x : Tensor [T, D], float32, float16 or bfloat16
        Tokens of all sequences, one after another.
    cu_seqlens : Tensor [n + 1], int32 or int64, same device as x
        Where each sequence starts; first entry 0, last entry T.
    ks : list or tuple of n int
        Budget of every sequence, ``0 <= ks[i] <=`` its length.
    seeds : Tensor [n, P], int64, optional
        Centers already chosen in each sequence, as indices into the packed tensor; P <= min(ks).
    metric : {"cosine", "euclidean"}
        As in `kcenter`.

    Returns
    -------
    indices : Tensor [sum(ks)], int64
        Indices into the packed tensor: the choices of sequence 0 in their order, then of
        sequence 1, ...
    radii : Tensor [sum(ks)], float32
        As in `kcenter`.

    Raises
    ------
    ValueError
        On bad shapes and values, as in `kcenter`; the values of `cu_seqlens`, and `ks` against them, are checked
        on CPU always, on CUDA when PRUNEOPS_DEBUG=1. Unchecked bounds that fall are undefined behaviour.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    As in `kcenter`.

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    >>> pruneops.kcenter_varlen(x, torch.tensor([0, 2, 5]), [1, 2]).indices
    tensor([0, 2, 4])
    """
    check_types("kcenter_varlen", x=(x, Tensor), cu_seqlens=(cu_seqlens, Tensor), ks=(ks, (list, tuple)))
    check_types("kcenter_varlen", seeds=(seeds, OPTIONAL_TENSOR), metric=(metric, str))
    for i, k in enumerate(ks):
        check_types("kcenter_varlen", **{f"ks[{i}]": (k, INT)})
    return KCenter(*torch.ops.pruneops.kcenter_varlen(x, cu_seqlens, ks, seeds=seeds, metric=metric))


def _check_features(op, x, metric, ranks):
    check_float_tensor(op, "x", x, ranks)
    check(metric in METRICS, op, "metric", repr(metric), f"one of {METRICS}")


def _check_kcenter(x, k, *, seeds=None, mask=None, metric="cosine"):
    _check_features("kcenter", x, metric, ranks=(2, 3))
    batch, tokens = tuple(x.shape[:-2]), x.shape[-2]
    if seeds is not None:
        check_tensor("kcenter", "seeds", seeds, ("x", x), (torch.int64,), (*batch, None))
    if mask is not None:
        check_tensor("kcenter", "mask", mask, ("x", x), (torch.bool,), (*batch, tokens))
    check(k >= 1, "kcenter", "k", k, "at least 1")
    check(k <= tokens, "kcenter", "k", k, f"at most the {tokens} tokens of x")
    if seeds is not None:
        check(seeds.shape[-1] <= k, "kcenter", "seeds", f"{seeds.shape[-1]} a row", f"at most k = {k} a row")
        if has_values(seeds):
            _check_seeds("kcenter", seeds, 0, tokens)
    if mask is not None and has_values(mask) and mask.numel():
        allowed = mask if seeds is None else mask.scatter(-1, seeds, True)
        fewest = int(allowed.sum(-1).min())
        check(k <= fewest, "kcenter", "k", k, f"at most the {fewest} tokens that mask and seeds allow")


def _check_varlen(x, cu_seqlens, ks, *, seeds=None, metric="cosine"):
    op = "kcenter_varlen"
    _check_features(op, x, metric, ranks=(2,))
    check_tensor(op, "cu_seqlens", cu_seqlens, ("x", x), (torch.int32, torch.int64), (len(ks) + 1,))
    for i, k in enumerate(ks):
        check(k >= 0, op, f"ks[{i}]", k, "at least 0")
    if seeds is not None:
        check_tensor(op, "seeds", seeds, ("x", x), (torch.int64,), (len(ks), None))
        fits = seeds.shape[1] <= min(ks, default=0) or seeds.numel() == 0
        check(fits, op, "seeds", f"{seeds.shape[1]} a sequence", "no more than the smallest of ks")
    if not has_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    check_cu_seqlens(op, bounds, x.shape[0])
    for i, (start, end, k) in enumerate(zip(bounds, bounds[1:], ks)):
        check(k <= end - start, op, f"ks[{i}]", k, f"at most the {end - start} tokens of sequence {i}")
        if seeds is not None:
            _check_seeds(op, seeds[i], start, end)


def _check_seeds(op, seeds, start, end):
    if seeds.numel() == 0:
        return
    check_indices(op, "seeds", seeds, start, end)
    ordered = seeds.sort(-1).values
    distinct = bool((ordered[..., 1:] != ordered[..., :-1]).all())
    check(distinct, op, "seeds", "the same token twice", "different tokens in each row")


def _fake_kcenter(x, k, *, seeds=None, mask=None, metric="cosine"):
    shape = (*x.shape[:-2], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


def _fake_varlen(x, cu_seqlens, ks, *, seeds=None, metric="cosine"):
    return x.new_empty(sum(ks), dtype=torch.int64), x.new_empty(sum(ks), dtype=torch.float32)


def _batched(run):
    """Adapts x [N, D] of any strides to a backend that takes [B, N, D] with contiguous features only."""

    def call(x, k, *, seeds=None, mask=None, metric="cosine"):
        x = last_dim_contiguous(x)
        if x.dim() == 3:
            return run(x, k, seeds, mask, metric)
        seeds, mask = (None if t is None else t[None] for t in (seeds, mask))
        indices, radii = run(x[None], k, seeds, mask, metric)
        return indices[0], radii[0]

    return call


def _packed(run):
    """Adapts any strides and cu_seqlens dtype to a backend that takes int64 and contiguous features only."""

    def call(x, cu_seqlens, ks, *, seeds=None, metric="cosine"):
        x = last_dim_contiguous(x)
        return run(x, cu_seqlens.to(torch.int64).contiguous(), ks, seeds, metric)

    return call


def _native(x, k, seeds, mask, metric):
    return torch.ops.pruneops_native.kcenter(x, k, seeds, mask, metric == "cosine")


def _native_varlen(x, cu_seqlens, ks, seeds, metric):
    return torch.ops.pruneops_native.kcenter_varlen(x, cu_seqlens, ks, seeds, metric == "cosine")


def _triton(x, k, seeds, mask, metric):
    from ..triton_kernels import kcenter as kernels

    return kernels.kcenter(x, k, seeds, mask, metric)


def _triton_varlen(x, cu_seqlens, ks, seeds, metric):
    from ..triton_kernels import kcenter as kernels

    return kernels.kcenter_varlen(x, cu_seqlens, ks, seeds, metric)


define(
    'kcenter(Tensor x, int k, *, Tensor? seeds=None, Tensor? mask=None, str metric="cosine")'
    " -> (Tensor indices, Tensor radii)",
    _check_kcenter,
    _fake_kcenter,
    {
        "reference": reference.kcenter,
        "cpu": _batched(_native),
        "triton": _batched(_triton),
        "cuda": _batched(_native),
    },
)
define(
    'kcenter_varlen(Tensor x, Tensor cu_seqlens, int[] ks, *, Tensor? seeds=None, str metric="cosine")'
    " -> (Tensor indices, Tensor radii)",
    _check_varlen,
    _fake_varlen,
    {
        "reference": reference.kcenter_varlen,
        "cpu": _packed(_native_varlen),
        "triton": _packed(_triton_varlen),
        "cuda": _packed(_native_varlen),
    },
)
