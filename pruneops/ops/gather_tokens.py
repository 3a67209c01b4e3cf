"""Gathering tokens: schema, argument checks, fake kernel, gradient, backends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    INT,
    ArgumentTypeError,
    check,
    check_indices,
    check_same_device,
    check_tensor_list,
    check_types,
    has_values,
)
from ._library import define

MAX_DIMS = 6  # of a tensor that the C++ and CUDA kernels read in place, whatever its strides


def gather_tokens(tensors: Sequence[Tensor], keep: Tensor, dim: int | Sequence[int] = 1) -> list[Tensor]:
    """Keep some of the tokens of any number of tensors: hidden states, positions, masks, in one launch.

    For a tensor [B, S, ...], ``result[b, r] = tensor[b, keep[b, r]]``.

    Parameters
    ----------
    tensors : list of Tensor, any dtype
        Any shapes and strides. If keep is [B, K], the batch dimension comes right before the tokens,
        [..., B, S, ...], and may be 1: then all rows share it.
    keep : Tensor [B, K] or [K], int64
        Tokens to keep, in any order, repetitions allowed; [K] for tensors without a batch dimension.
    dim : int or list of int
        The token dimension of all tensors, or of each. Hidden states [B, S, D] and masks [B, S]: 1; mRoPE
        positions [3, B, S] or [4, B, S]: 2, or -1.

    Returns
    -------
    list of Tensor [..., B, K, ...]
        Contiguous, of the tensors' dtypes.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. Values of keep are checked on CPU always, on CUDA
        when PRUNEOPS_DEBUG=1; unchecked values outside a tensor read memory out of bounds.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Differentiable with respect to floating-point tensors; gradients of a token kept twice are added in a fixed order.

    Examples
    --------
    >>> import torch, pruneops
    >>> hidden, positions = torch.arange(8.0).reshape(1, 4, 2), torch.arange(4).expand(3, 1, 4)
    >>> hidden, positions = pruneops.gather_tokens([hidden, positions], torch.tensor([[0, 3]]), dim=[1, 2])
    >>> hidden
    tensor([[[0., 1.],
             [6., 7.]]])
    >>> positions[0]
    tensor([[0, 3]])
    """
    op = "gather_tokens"
    try:
        return torch.ops.pruneops.gather_tokens(tensors, keep, dim)
    except (RuntimeError, TypeError):  # types are checked after an error only: that keeps calls on many tensors fast
        check_tensor_list(op, "tensors", tensors)
        check_types(op, keep=(keep, Tensor), dim=(dim, (INT[0], list, tuple)))
        for i, one in enumerate(dim if isinstance(dim, (list, tuple)) else ()):
            check_types(op, **{f"dim[{i}]": (one, INT)})
        raise


def token_dims(tensors: Sequence[Tensor], dim: int | Sequence[int]) -> list[int]:
    """The token dimension of every tensor, as a number from 0."""
    dims, count = [dim] if isinstance(dim, int) else list(dim), len(tensors)
    wanted = f"one, or one for each of {count} tensors"
    check(len(dims) in (1, count), "gather_tokens", "dim", f"{len(dims)} of them", wanted)
    dims = dims * len(tensors) if len(dims) == 1 else dims
    return [d + tensor.dim() if d < 0 else d for tensor, d in zip(tensors, dims)]


def _check(tensors, keep, dim=1):
    op = "gather_tokens"
    check(len(tensors) > 0, op, "tensors", "an empty list", "at least one tensor")
    check_same_device(op, "tensors", tensors)
    check(keep.dtype == torch.int64, op, "keep", keep.dtype, "int64", ArgumentTypeError)
    check(keep.dim() in (1, 2), op, "keep", f"of shape {list(keep.shape)}", "[K] or [B, K]")
    there = f"the device of tensors[0], {tensors[0].device}"
    check(keep.device == tensors[0].device, op, "keep", f"on {keep.device}", f"on {there}")
    batched = keep.dim() == 2
    for i, (tensor, d) in enumerate(zip(tensors, token_dims(tensors, dim))):
        shape = f"of shape {list(tensor.shape)}"
        lowest = "1 (the batch stands before it)" if batched else "0"
        fits = int(batched) <= d < tensor.dim()
        check(fits, op, "dim", f"{d} for tensors[{i}] {shape}", f"{lowest} to {tensor.dim() - 1}")
        if batched:
            wanted = f"with {keep.shape[0]} rows, as keep, or 1, in dimension {d - 1}"
            check(tensor.shape[d - 1] in (1, keep.shape[0]), op, f"tensors[{i}]", shape, wanted)
    if has_values(keep) and keep.numel():
        fewest = min(tensor.shape[d] for tensor, d in zip(tensors, token_dims(tensors, dim)))
        check_indices(op, "keep", keep, 0, fewest)


def _fake(tensors, keep, dim=1):
    results = []
    for tensor, d in zip(tensors, token_dims(tensors, dim)):
        before = (*tensor.shape[: d - 1], keep.shape[0]) if keep.dim() == 2 else tensor.shape[:d]
        results.append(tensor.new_empty((*before, keep.shape[-1], *tensor.shape[d + 1 :])))
    return results


def _native(tensors, keep, dim=1):
    dims = token_dims(tensors, dim)
    tensors = [tensor.contiguous() if tensor.dim() > MAX_DIMS else tensor for tensor in tensors]
    return torch.ops.pruneops_native.gather_tokens(tensors, keep, dims)


def _triton(tensors, keep, dim=1):
    from ..triton_kernels import gather_tokens as kernels

    if not keep.is_cuda:  # in its interpreter
        _check(tensors, keep, dim)
    return kernels.gather_tokens(tensors, keep, token_dims(tensors, dim))


def _setup_context(ctx, inputs, output):
    tensors, keep, dim = inputs
    ctx.save_for_backward(keep)
    ctx.shapes, ctx.dims = [tensor.shape for tensor in tensors], token_dims(tensors, dim)


def _backward(ctx, gradients):
    (keep,) = ctx.saved_tensors
    results = [
        None if gradient is None else _scatter_add(gradient, keep, shape, dim)
        for gradient, shape, dim in zip(gradients, ctx.shapes, ctx.dims)
    ]
    return results, *[None] * (len(ctx.needs_input_grad) - 1)  # torch leaves out arguments that equal their defaults


def _scatter_add(gradient, keep, shape, dim):
    """The transpose of gathering: the sum of every token's gradients, in a fixed order."""
    if keep.dim() == 1:
        tokens = gradient.movedim(dim, 0)
        total = tokens.new_zeros(shape[dim], *tokens.shape[1:])
        return total.index_put((keep,), tokens, accumulate=True).movedim(0, dim)
    tokens = gradient.movedim((dim - 1, dim), (0, 1))
    batch = torch.arange(keep.shape[0], device=keep.device)[:, None]
    batch = batch if shape[dim - 1] == keep.shape[0] else batch * 0  # one row shared by all
    total = tokens.new_zeros(shape[dim - 1], shape[dim], *tokens.shape[2:])
    return total.index_put((batch, keep), tokens, accumulate=True).movedim((0, 1), (dim - 1, dim))


define(
    "gather_tokens(Tensor[] tensors, Tensor keep, int[1] dim=1) -> Tensor[]",
    _check,
    _fake,
    {"reference": reference.gather_tokens, "cpu": _native, "triton": _triton, "cuda": _native},
    self_checking=("cpu", "triton", "cuda"),
    gradient=(_backward, _setup_context),
)
