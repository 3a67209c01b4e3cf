"""Pivot-cosine duplication scoring: schemas, argument checks, fake kernels, choice of backend."""

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


def pivot_cosine(x, pivots, *, mask=None):
    """Cosine of every token with each of a few pivot tokens, in one pass over x.

    Parameters
    ----------
    x : Tensor [B, N, D] or [N, D], float32, float16 or bfloat16
        Tokens, any strides. Arithmetic is float32.
    pivots : Tensor [B, P] or [P], int64
        Indices into x, in any order, repeats allowed: image tokens, text tokens, both.
    mask : Tensor [B, N] or [N], bool, optional
        False where a token is to be left alone; it scores +inf. Pivots need not be in it.

    Returns
    -------
    Tensor [B, P, N] or [P, N], float32
        Cosines; 0 where the token or the pivot is a zero vector, NaN where one of them holds a
        NaN, an infinity, or has a squared norm above float32's range / 4.

    Raises
    ------
    ValueError, TypeError
        On bad arguments, before anything is launched. The values of `pivots` are checked on CPU
        always, on CUDA when PRUNEOPS_DEBUG=1; unchecked indices that are no token are undefined
        behaviour.

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


def duplication(x, pivots, *, mask=None, reduce="max"):
    """How much every token repeats the pivots: its greatest, mean or summed cosine with them.

    The same pass as `pivot_cosine`, reduced on the fly: [B, P, N] is never stored.

    Parameters
    ----------
    x, pivots, mask
        As in `pivot_cosine`; at least one pivot.
    reduce : {"max", "mean", "sum"}
        Over the pivots.

    Returns
    -------
    Tensor [B, N] or [N], float32
        Duplication scores: +inf where mask is False, NaN where the token or any of the pivots is
        not finite.

    Raises
    ------
    ValueError, TypeError
        As in `pivot_cosine`.

    Notes
    -----
    Source: DART (arXiv:2502.11494), Definition 2 (duplicate score), over all pivots at once.
    """
    check_types("duplication", x=(x, Tensor), pivots=(pivots, Tensor), mask=(mask, OPTIONAL_TENSOR))
    check_types("duplication", reduce=(reduce, str))
    return torch.ops.pruneops.duplication(x, pivots, mask=mask, reduce=reduce)


def pivot_cosine_varlen(x, cu_seqlens, pivots, *, mask=None):
    """`pivot_cosine` over sequences of different lengths packed into one tensor.

    Parameters
    ----------
    x : Tensor [T, D], float32, float16 or bfloat16
        Tokens of all sequences, one after another.
    cu_seqlens : Tensor [n + 1], int32 or int64, same device as x
        Where each sequence starts; first entry 0, last entry T.
    pivots : Tensor [n, P], int64
        Pivots of each sequence, as indices into the packed tensor; those of an empty sequence
        are not looked at.
    mask : Tensor [T], bool, optional

    Returns
    -------
    Tensor [P, T], float32
        Cosine of every token with the pivots of its own sequence.

    Raises
    ------
    ValueError, TypeError
        As in `pivot_cosine`; the values of `cu_seqlens` are checked where those of `pivots` are.
    """
    check_types("pivot_cosine_varlen", x=(x, Tensor), cu_seqlens=(cu_seqlens, Tensor), pivots=(pivots, Tensor))
    check_types("pivot_cosine_varlen", mask=(mask, OPTIONAL_TENSOR))
    return torch.ops.pruneops.pivot_cosine_varlen(x, cu_seqlens, pivots, mask=mask)


def duplication_varlen(x, cu_seqlens, pivots, *, mask=None, reduce="max"):
    """`duplication` over sequences of different lengths packed into one tensor.

    Parameters
    ----------
    x, cu_seqlens, pivots, mask
        As in `pivot_cosine_varlen`; at least one pivot.
    reduce : {"max", "mean", "sum"}

    Returns
    -------
    Tensor [T], float32

    Raises
    ------
    ValueError, TypeError
        As in `pivot_cosine_varlen`.
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
        for own, start, end in zip(pivots, bounds, bounds[1:]):
            if start < end:
                check_indices(op, "pivots", own, start, end)


def _check_reduce(op, pivots, reduce):
    if reduce is not None:
        check(reduce in REDUCTIONS, op, "reduce", repr(reduce), f"one of {REDUCTIONS}")
        check(pivots.shape[-1] > 0, op, "pivots", f"of shape {list(pivots.shape)}", "at least one a row")


def _scores_shape(x, pivots, reduce):
    """[B, P, N], reduced [B, N]; a packed x counts as one row."""
    return (*x.shape[:-2], *(() if reduce else (pivots.shape[-1],)), x.shape[-2])


def _define(name, reduced):
    """The operator and its varlen form, with or without `reduce`; run(x, cu_seqlens, pivots, mask, reduce)
    serves x [B, N, D], or [1, T, D] with cu_seqlens."""
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
            cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
            return run(last_dim_contiguous(x)[None], cu_seqlens, pivots, None if mask is None else mask[None], reduce)[
                0
            ]

        return call

    runs = {"cpu": _native, "triton": _triton, "cuda": _native}
    for schema, verify, empty, serve in (
        (f"{name}(Tensor x, Tensor pivots, *, Tensor? mask=None{option}) -> Tensor", check, fake, batched),
        (
            f"{name}_varlen(Tensor x, Tensor cu_seqlens, Tensor pivots, *, Tensor? mask=None{option}) -> Tensor",
            check_packed,
            fake_packed,
            packed,
        ),
    ):
        plain = getattr(reference, schema.partition("(")[0])
        define(schema, verify, empty, {"reference": plain} | {backend: serve(run) for backend, run in runs.items()})


def _native(x, cu_seqlens, pivots, mask, reduce):
    number = 0 if reduce is None else 1 + REDUCTIONS.index(reduce)
    return torch.ops.pruneops_native.pivot_cosine(x, cu_seqlens, pivots, mask, number)


def _triton(x, cu_seqlens, pivots, mask, reduce):
    from ..triton_kernels import pivot_cosine as kernels

    return kernels.pivot_cosine(x, cu_seqlens, pivots, mask, reduce)


_define("pivot_cosine", reduced=False)
_define("duplication", reduced=True)
