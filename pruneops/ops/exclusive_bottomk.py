"""Exclusive bottom-k selection: schemas, argument checks, fake kernels, backends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    INT,
    OPTIONAL_TENSOR,
    check,
    check_float_tensor,
    check_indices,
    check_tensor,
    check_types,
    has_values,
)
from ._library import define, last_dim_contiguous

MAX_ROWS = 64  # quotas are kernel arguments, so that nothing is copied from the host


def exclusive_bottomk(scores: Tensor, quotas: Sequence[int], *, taken: Tensor | None = None) -> Tensor:
    """Each row in turn takes its lowest tokens among those that no row before it has taken.

    The result of a host loop of `topk` and `scatter`, in one launch and without a host synchronisation.

    Parameters
    ----------
    scores : Tensor [B, P, N] or [P, N], float32, float16 or bfloat16
        P rows of scores, at most 64. Any strides.
    quotas : list or tuple of P int
        How many tokens each row takes, 0 allowed; the same for every batch entry.
    taken : Tensor [B, N] or [N], bool, optional
        True where a token cannot be taken.

    Returns
    -------
    Tensor [B, sum(quotas)] or [sum(quotas)], int64
        The tokens of row 0, lowest first, then those of row 1, ... No token appears twice. Ties go
        to the lowest index; scores that are not finite (NaN, inf and -inf alike) come last, in
        index order.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. That enough tokens are left is checked on
        CPU always, on CUDA when PRUNEOPS_DEBUG=1; an unchecked CUDA call that runs out of tokens
        returns index -1.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Not differentiable.

    Source: the public code of DART (arXiv:2502.11494), whose pivots take their least similar
    tokens one after another.

    Examples
    --------
    >>> import torch, pruneops
    >>> scores = torch.tensor([[0.3, 0.1, 0.2, 0.9], [0.0, -1.0, 0.5, 0.5]])
    >>> pruneops.exclusive_bottomk(scores, [2, 1])
    tensor([1, 2, 0])
    """
    check_types("exclusive_bottomk", scores=(scores, Tensor), taken=(taken, OPTIONAL_TENSOR))
    _check_quotas_type("exclusive_bottomk", quotas)
    return torch.ops.pruneops.exclusive_bottomk(scores, quotas, taken=taken)


def pivot_bottomk(x: Tensor, pivots: Tensor, quotas: Sequence[int], *, mask: Tensor | None = None) -> Tensor:
    """Each pivot in turn takes the tokens least similar to it: DART's selection from features to indices.

    The same as ``exclusive_bottomk(pivot_cosine(x, pivots), quotas, taken=~mask)`` in one call.

    Parameters
    ----------
    x : Tensor [B, N, D] or [N, D], float32, float16 or bfloat16
        Tokens, any strides.
    pivots : Tensor [B, P] or [P], int64
        Indices into x; at most 64 a row.
    quotas : list or tuple of P int
        How many tokens each pivot takes.
    mask : Tensor [B, N] or [N], bool, optional
        True where a token may be taken. Pivots are tokens like any other: mask them out if
        they must not be taken.

    Returns
    -------
    Tensor [B, sum(quotas)] or [sum(quotas)], int64
        In the order of `exclusive_bottomk`.

    Raises
    ------
    ValueError
        On bad shapes and values, as in `pivot_cosine` and `exclusive_bottomk`.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Not differentiable.

    Source: DART (arXiv:2502.11494).

    Examples
    --------
    >>> import torch, pruneops
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    >>> pruneops.pivot_bottomk(x, torch.tensor([0]), [2])
    tensor([2, 1])
    """
    check_types("pivot_bottomk", x=(x, Tensor), pivots=(pivots, Tensor), mask=(mask, OPTIONAL_TENSOR))
    _check_quotas_type("pivot_bottomk", quotas)
    return torch.ops.pruneops.pivot_bottomk(x, pivots, quotas, mask=mask)


def _check_quotas_type(op, quotas):
    check_types(op, quotas=(quotas, (list, tuple)))
    for p, quota in enumerate(quotas):
        check_types(op, **{f"quotas[{p}]": (quota, INT)})


def _check_quotas(op, quotas, rows, tokens, free):
    """Values of quotas.

    `rows` and `tokens` are (argument that has them, count); `free` is (bool tensor, whether True means free) or None.
    """
    (rows_of, rows), (tokens_of, tokens) = rows, tokens
    check(rows <= MAX_ROWS, op, rows_of, f"{rows} rows", f"at most {MAX_ROWS} rows")
    check(len(quotas) == rows, op, "quotas", f"{len(quotas)} of them", f"one for each of the {rows} rows of {rows_of}")
    for p, quota in enumerate(quotas):
        check(quota >= 0, op, f"quotas[{p}]", quota, "at least 0")
    total = sum(quotas)
    check(total <= tokens, op, "sum(quotas)", total, f"at most the {tokens} tokens of {tokens_of}")
    if free is not None and has_values(free[0]) and free[0].numel():
        count = free[0].sum(-1)
        fewest = int(count.min()) if free[1] else tokens - int(count.max())
        check(total <= fewest, op, "sum(quotas)", total, f"at most the {fewest} tokens that are free in every row")


def _check_bottomk(scores, quotas, *, taken=None):
    op = "exclusive_bottomk"
    check_float_tensor(op, "scores", scores, ranks=(2, 3), last="token")
    tokens = scores.shape[-1]
    if taken is not None:
        check_tensor(op, "taken", taken, ("scores", scores), (torch.bool,), (*scores.shape[:-2], tokens))
    rows, free = scores.shape[-2], None if taken is None else (taken, False)
    _check_quotas(op, quotas, ("scores", rows), ("scores", tokens), free)


def _check_pivot_bottomk(x, pivots, quotas, *, mask=None):
    op = "pivot_bottomk"
    check_float_tensor(op, "x", x, ranks=(2, 3))
    batch, tokens = tuple(x.shape[:-2]), x.shape[-2]
    check_tensor(op, "pivots", pivots, ("x", x), (torch.int64,), (*batch, None))
    if mask is not None:
        check_tensor(op, "mask", mask, ("x", x), (torch.bool,), (*batch, tokens))
    free = None if mask is None else (mask, True)
    _check_quotas(op, quotas, ("pivots", pivots.shape[-1]), ("x", tokens), free)
    if has_values(pivots):
        check_indices(op, "pivots", pivots, 0, tokens)


def _fake_bottomk(scores, quotas, *, taken=None):
    return scores.new_empty((*scores.shape[:-2], sum(quotas)), dtype=torch.int64)


def _fake_pivot_bottomk(x, pivots, quotas, *, mask=None):
    return x.new_empty((*x.shape[:-2], sum(quotas)), dtype=torch.int64)


def _batched_bottomk(run):
    def call(scores, quotas, *, taken=None):
        scores = last_dim_contiguous(scores)
        if scores.dim() == 3:
            return run(scores, quotas, taken)
        return run(scores[None], quotas, None if taken is None else taken[None])[0]

    return call


def _batched_pivot_bottomk(run):
    def call(x, pivots, quotas, *, mask=None):
        x = last_dim_contiguous(x)
        if x.dim() == 3:
            return run(x, pivots, quotas, mask)
        return run(x[None], pivots[None], quotas, None if mask is None else mask[None])[0]

    return call


def _native_bottomk(scores, quotas, taken):
    return torch.ops.pruneops_native.exclusive_bottomk(scores, quotas, taken)


def _native_pivot_bottomk(x, pivots, quotas, mask):
    return torch.ops.pruneops_native.pivot_bottomk(x, pivots, quotas, mask)


def _triton_bottomk(scores, quotas, taken):
    from ..triton_kernels import exclusive_bottomk as kernels

    return kernels.exclusive_bottomk(scores, quotas, taken)


def _triton_pivot_bottomk(x, pivots, quotas, mask):
    from ..triton_kernels import exclusive_bottomk as kernels

    return kernels.pivot_bottomk(x, pivots, quotas, mask)


define(
    "exclusive_bottomk(Tensor scores, int[] quotas, *, Tensor? taken=None) -> Tensor",
    _check_bottomk,
    _fake_bottomk,
    {
        "reference": reference.exclusive_bottomk,
        "cpu": _batched_bottomk(_native_bottomk),
        "triton": _batched_bottomk(_triton_bottomk),
        "cuda": _batched_bottomk(_native_bottomk),
    },
)
define(
    "pivot_bottomk(Tensor x, Tensor pivots, int[] quotas, *, Tensor? mask=None) -> Tensor",
    _check_pivot_bottomk,
    _fake_pivot_bottomk,
    {
        "reference": reference.pivot_bottomk,
        "cpu": _batched_pivot_bottomk(_native_pivot_bottomk),
        "triton": _batched_pivot_bottomk(_triton_pivot_bottomk),
        "cuda": _batched_pivot_bottomk(_native_pivot_bottomk),
    },
)
