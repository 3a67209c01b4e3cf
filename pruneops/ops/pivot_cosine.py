"""Pivot-cosine duplication scores: schemas, argument checks, fake kernels, backends."""

from typing import Literal

import torch
from torch import Tensor

from .. import reference
from ..checks import (
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

REDUCTIONS = ("max", "mean", "sum")


def pivot_cosine(x: Tensor, pivots: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Cosine of every token with each of a few pivot tokens, in one pass over x.

    Parameters
    ----------
    x : Tensor [B, N, D] or [N, D], float32, float16 or bfloat16
        Tokens, any strides. Arithmetic is float32.
    pivots : Tensor [B, P] or [P], int64
        Indices into x, in any order, repeats allowed: image tokens, text tokens, both.
    mask : Tensor [B, N] or [N], bool, optional
        False for a token to be excluded: it scores +inf. Pivots need not be in it.

    Returns
    -------
    Tensor [B, P, N] or [P, N], float32
        Cosines; 0 where the token or the pivot is a zero vector, NaN where one of them holds a NaN, an
        infinity, or has a squared norm above a quarter of float32's largest number.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. The values of `pivots` are checked on CPU
        always, on CUDA when PRUNEOPS_DEBUG=1; unchecked indices out of range are undefined behaviour.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Not differentiable. Extra memory: none.

    Source: DART (arXiv:2502.11494), duplication to pivot tokens.

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    >>> pruneops.pivot_cosine(x, torch.tensor([0]))
    tensor([[ 1.,  0., -1.,  0.]])
    """
    check_types("pivot_cosine", x=(x, Tensor), pivots=(pivots, Tensor), mask=(mask, OPTIONAL_TENSOR))
    return torch.ops.pruneops.pivot_cosine(x, pivots, mask=mask)


def duplication(
    x: Tensor, pivots: Tensor, *, mask: Tensor | None = None, reduce: Literal["max", "mean", "sum"] = "max"
) -> Tensor:
    """How much every token repeats the pivots: its largest, mean or summed cosine with them.

    The same pass as `pivot_cosine`, reduced on the fly: [B, P, N] is never stored.

    Parameters
    ----------
    x : Tensor [B, N, D] or [N, D], float32, float16 or bfloat16
        Tokens, any strides. Arithmetic is float32.
    pivots : Tensor [B, P] or [P], int64
        Indices into x, in any order, repeats allowed; at least one.
    mask : Tensor [B, N] or [N], bool, optional
        False for a token to be excluded: it scores +inf. Pivots need not be in it.
    reduce : {"max", "mean", "sum"}
        Over the pivots.

    Returns
    -------
    Tensor [B, N] or [N], float32
        Duplication scores: +inf where mask is False, NaN where the token or any of the pivots is
        not finite.

    Raises
    ------
    ValueError
        On bad shapes and values, as in `pivot_cosine`.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Not differentiable. Extra memory: none.

    Source: DART (arXiv:2502.11494), Definition 2 (duplicate score), over all pivots at once.

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    >>> pruneops.duplication(x, torch.tensor([0, 1]))
    tensor([1., 1., 0., 0.])
    """
    check_types("duplication", x=(x, Tensor), pivots=(pivots, Tensor), mask=(mask, OPTIONAL_TENSOR))
    check_types("duplication", reduce=(reduce, str))
    return torch.ops.pruneops.duplication(x, pivots, mask=mask, reduce=reduce)


def pivot_cosine_varlen(x: Tensor, cu_seqlens: Tensor, pivots: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`pivot_cosine` over sequences of different lengths packed into one tensor.

    Parameters
    ----------
    x : Tensor [T, D], float32, float16 or bfloat16
        Tokens of all sequences, one after another.
    cu_seqlens : Tensor [n + 1], int32 or int64, same device as x
        Where each sequence starts; first entry 0, last entry T.
    pivots : Tensor [n, P], int64
        Pivots of each sequence, as indices into the packed tensor; those of an empty sequence
        are ignored.
    mask : Tensor [T], bool, optional
        As in `pivot_cosine`.

    Returns
    -------
    Tensor [P, T], float32
        Cosine of every token with the pivots of its own sequence.

    Raises
    ------
    ValueError
        On bad shapes and values, as in `pivot_cosine`; the values of `cu_seqlens` are checked where those of
        `pivots` are.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    As in `pivot_cosine`.

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0], [0.0, -1.0]])
    >>> pruneops.pivot_cosine_varlen(x, torch.tensor([0, 2, 4]), torch.tensor([[0], [2]]))
    tensor([[ 1.,  0.,  1., -1.]])
    """
    check_types("pivot_cosine_varlen", x=(x, Tensor), cu_seqlens=(cu_seqlens, Tensor), pivots=(pivots, Tensor))
    check_types("pivot_cosine_varlen", mask=(mask, OPTIONAL_TENSOR))
    return torch.ops.pruneops.pivot_cosine_varlen(x, cu_seqlens, pivots, mask=mask)


def duplication_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    pivots: Tensor,
    *,
    mask: Tensor | None = None,
    reduce: Literal["max", "mean", "sum"] = "max",
) -> Tensor:
    """`duplication` over sequences of different lengths packed into one tensor.

    Parameters
    ----------
    x : Tensor [T, D], float32, float16 or bfloat16
        Tokens of all sequences, one after another.
    cu_seqlens : Tensor [n + 1], int32 or int64, same device as x
        Where each sequence starts; first entry 0, last entry T.
    pivots : Tensor [n, P], int64
        Pivots of each sequence, at least one, as indices into the packed tensor; those of an empty
        sequence are ignored.
    mask : Tensor [T], bool, optional
        As in `duplication`.
    reduce : {"max", "mean", "sum"}
        Over the pivots.

    Returns
    -------
    Tensor [T], float32
        Duplication of every token in its own sequence.

    Raises
    ------
    ValueError
        On bad shapes and values, as in `pivot_cosine_varlen`.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    As in `duplication`.

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0], [0.0, -1.0]])
    >>> pruneops.duplication_varlen(x, torch.tensor([0, 2, 4]), torch.tensor([[0], [2]]))
    tensor([ 1.,  0.,  1., -1.])
    """
    check_types("duplication_varlen", x=(x, Tensor), cu_seqlens=(cu_seqlens, Tensor), pivots=(pivots, Tensor))
    check_types("duplication_varlen", mask=(mask, OPTIONAL_TENSOR), reduce=(reduce, str))
    return torch.ops.pruneops.duplication_varlen(x, cu_seqlens, pivots, mask=mask, reduce=reduce)


def _check(op, x, pivots, mask, reduce):
    check_float_tensor(op, "x", x, ranks=(2, 3))
    batch, tokens = tuple(x.shape[:-2]), x.shape[-2]
    check_tensor(op, "pivots", pivots, ("x", x), (torch.int64,), (*batch, None))
    if mask is not None:
        check_tensor(op, "mask", mask, ("x", x), (torch.bool,), (*batch, tokens))
    _check_reduce(op, pivots, reduce)
    if has_values(pivots):
        check_indices(op, "pivots", pivots, 0, tokens)


def _check_packed(op, x, cu_seqlens, pivots, mask, reduce):
    check_float_tensor(op, "x", x, ranks=(2,))
    check(cu_seqlens.dim() == 1, op, "cu_seqlens", f"of shape {list(cu_seqlens.shape)}", "of rank 1")
    sequences = cu_seqlens.shape[0] - 1
    check(sequences >= 0, op, "cu_seqlens", "empty", "of at least one entry")
    check_tensor(op, "cu_seqlens", cu_seqlens, ("x", x), (torch.int32, torch.int64), (sequences + 1,))
    check_tensor(op, "pivots", pivots, ("x", x), (torch.int64,), (sequences, None))
    if mask is not None:
        check_tensor(op, "mask", mask, ("x", x), (torch.bool,), (x.shape[0],))
    _check_reduce(op, pivots, reduce)
    if has_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        check_cu_seqlens(op, bounds, x.shape[0])
        for row, start, end in zip(pivots, bounds, bounds[1:]):
            if start < end:
                check_indices(op, "pivots", row, start, end)


def _check_reduce(op, pivots, reduce):
    if reduce is not None:
        check(reduce in REDUCTIONS, op, "reduce", repr(reduce), f"one of {REDUCTIONS}")
        check(pivots.shape[-1] > 0, op, "pivots", f"of shape {list(pivots.shape)}", "at least one a row")


def _scores_shape(x, pivots, reduce):
    """[B, P, N], reduced [B, N]; a packed x counts as one row."""
    return (*x.shape[:-2], *(() if reduce else (pivots.shape[-1],)), x.shape[-2])


def _define(name, reduced):
    """Define an operator and its varlen variant, with or without `reduce`.

    Backends are functions of (x, cu_seqlens, pivots, mask, reduce); x is [B, N, D], or [1, T, D] with cu_seqlens.
    """
    option, value = (', str reduce="max"', "max") if reduced else ("", None)

    def check(x, pivots, *, mask=None, reduce=value):
        _check(name, x, pivots, mask, reduce)

    def check_packed(x, cu_seqlens, pivots, *, mask=None, reduce=value):
        _check_packed(f"{name}_varlen", x, cu_seqlens, pivots, mask, reduce)

    def fake(x, pivots, *, mask=None, reduce=value):
        return x.new_empty(_scores_shape(x, pivots, reduce), dtype=torch.float32)

    def fake_packed(x, cu_seqlens, pivots, *, mask=None, reduce=value):
        return x.new_empty(_scores_shape(x, pivots, reduce), dtype=torch.float32)

    def batched(run):
        def call(x, pivots, *, mask=None, reduce=value):
            x = last_dim_contiguous(x)
            if x.dim() == 3:
                return run(x, None, pivots, mask, reduce)
            return run(x[None], None, pivots[None], None if mask is None else mask[None], reduce)[0]

        return call

    def packed(run):
        def call(x, cu_seqlens, pivots, *, mask=None, reduce=value):
            x, cu_seqlens = last_dim_contiguous(x), cu_seqlens.to(torch.int64).contiguous()
            return run(x[None], cu_seqlens, pivots, None if mask is None else mask[None], reduce)[0]

        return call

    backends = {"cpu": _native, "triton": _triton, "cuda": _native}
    define(
        f"{name}(Tensor x, Tensor pivots, *, Tensor? mask=None{option}) -> Tensor",
        check,
        fake,
        {"reference": getattr(reference, name)} | {backend: batched(run) for backend, run in backends.items()},
    )
    define(
        f"{name}_varlen(Tensor x, Tensor cu_seqlens, Tensor pivots, *, Tensor? mask=None{option}) -> Tensor",
        check_packed,
        fake_packed,
        {"reference": getattr(reference, f"{name}_varlen")}
        | {backend: packed(run) for backend, run in backends.items()},
    )


def _native(x, cu_seqlens, pivots, mask, reduce):
    number = 0 if reduce is None else 1 + REDUCTIONS.index(reduce)
    return torch.ops.pruneops_native.pivot_cosine(x, cu_seqlens, pivots, mask, number)


def _triton(x, cu_seqlens, pivots, mask, reduce):
    from ..triton_kernels import pivot_cosine as kernels

    return kernels.pivot_cosine(x, cu_seqlens, pivots, mask, reduce)


_define("pivot_cosine", reduced=False)
_define("duplication", reduced=True)
