"""Gathering tokens: schema, argument checks, fake kernel, gradient, choice of backend."""

import torch
from torch import Tensor

from .. import reference
from ..checks import INT, ArgumentTypeError, check, check_indices, check_types, has_values
from ._library import define
from .kv_compact import _check_types, check_same_device

MAX_DIMS = 6  # of a tensor that is read where it lies, whatever its strides


def gather_tokens(tensors, keep, dim=1):
    """Keep some of the tokens of any number of tensors: hidden states, positions, masks, in one launch.

    For a tensor [B, S, ...], result[b, r] = tensor[b, keep[b, r]].

    Parameters
    ----------
    tensors : list of Tensor, any dtype
        Of any shapes and strides. Where keep has rows the batch stands right before the tokens, [..., B, S, ...], and
        may be 1: then all rows share it.
    keep : Tensor [B, K] or [K], int64
        Tokens to keep, in any order, repetitions allowed; [K] where there is no batch.
    dim : int or list of int
        Where the tokens are: of all tensors, or of each. Hidden states [B, S, D] and masks [B, S]: 1; mRoPE positions
        [3, B, S] or [4, B, S]: 2, or -1.

    Returns
    -------
    list of Tensor [..., B, K, ...]
        Contiguous, of the tensors' dtypes.

    Raises
    ------
    ValueError, TypeError
        On bad arguments, before anything is launched. Values of keep are checked on CPU always, on CUDA when
        PRUNEOPS_DEBUG=1; unchecked ones outside a tensor read memory that is not its own.

    Notes
    -----
    Differentiable with respect to floating-point tensors; gradients of a token kept twice add up in a fixed order.

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
    try:
        return torch.ops.pruneops.gather_tokens(tensors, keep, dim)
    except (RuntimeError, TypeError):  # checked when something is wrong
        _check_types("gather_tokens", "tensors", tensors, keep=(keep, Tensor), dim=(dim, (INT[0], list, tuple)))
        for i, one in enumerate(dim if isinstance(dim, (list, tuple)) else ()):
            check_types("gather_tokens", **{f"dim[{i}]": (one, INT)})
        raise


def _dims(tensors, dim):
    """The token dimension of every tensor, counted from the first."""
    dims, count = [dim] if isinstance(dim, int) else list(dim), len(tensors)
    wanted = f"one, or one for each of {count} tensors"
    check(len(dims) in (1, count), "gather_tokens", "dim", f"{len(dims)} of them", wanted)
    dims = dims * len(tensors) if len(dims) == 1 else dims
    return [own + tensor.dim() if own < 0 else own for tensor, own in zip(tensors, dims)]


def _check(tensors, keep, dim=1):
    op = "gather_tokens"
    check(len(tensors) > 0, op, "tensors", "an empty list", "at least one tensor")
    check_same_device(op, "tensors", tensors)
    check(keep.dtype == torch.int64, op, "keep", keep.dtype, "int64", ArgumentTypeError)
    check(keep.dim() in (1, 2), op, "keep", f"of shape {list(keep.shape)}", "[K] or [B, K]")
    there = f"the device of tensors[0], {tensors[0].device}"
    check(keep.device == tensors[0].device, op, "keep", f"on {keep.device}", f"on {there}")
    batched = keep.dim() == 2
    for i, (tensor, own) in enumerate(zip(tensors, _dims(tensors, dim))):
        shape = f"of shape {list(tensor.shape)}"
        least = "1 (the batch stands before it)" if batched else "0"
        fits = int(batched) <= own < tensor.dim()
        check(fits, op, "dim", f"{own} for tensors[{i}] {shape}", f"{least} to {tensor.dim() - 1}")
        if batched:
            wanted = f"with {keep.shape[0]} rows, as keep, or 1, in dimension {own - 1}"
            check(tensor.shape[own - 1] in (1, keep.shape[0]), op, f"tensors[{i}]", shape, wanted)
    if has_values(keep) and keep.numel():
        fewest = min(tensor.shape[own] for tensor, own in zip(tensors, _dims(tensors, dim)))
        check_indices(op, "keep", keep, 0, fewest)


def _fake(tensors, keep, dim=1):
    results = []
    for tensor, own in zip(tensors, _dims(tensors, dim)):
        before = (*tensor.shape[: own - 1], keep.shape[0]) if keep.dim() == 2 else tensor.shape[:own]
        results.append(tensor.new_empty((*before, keep.shape[-1], *tensor.shape[own + 1 :])))
    return results


def _native(tensors, keep, dim=1):
    dims = _dims(tensors, dim)
    tensors = [tensor.contiguous() if tensor.dim() > MAX_DIMS else tensor for tensor in tensors]
    return torch.ops.pruneops_native.gather_tokens(tensors, keep, dims)


def _triton(tensors, keep, dim=1):
    from ..triton_kernels import gather_tokens as kernels

    if not keep.is_cuda:  # in its interpreter
        _check(tensors, keep, dim)
    return kernels.gather_tokens(tensors, keep, _dims(tensors, dim))


def _remember(ctx, inputs, output):
    tensors, keep, dim = inputs
    ctx.save_for_backward(keep)
    ctx.shapes, ctx.dims = [tensor.shape for tensor in tensors], _dims(tensors, dim)


def _gradients(ctx, gradients):
    (keep,) = ctx.saved_tensors
    found = [
        None if gradient is None else _scattered(gradient, keep, shape, dim)
        for gradient, shape, dim in zip(gradients, ctx.shapes, ctx.dims)
    ]
    return found, *[None] * (len(ctx.needs_input_grad) - 1)  # torch leaves out arguments that equal their defaults


def _scattered(gradient, keep, shape, dim):
    """The transpose of gathering: every token's gradients added up, in a fixed order."""
    if keep.dim() == 1:
        tokens = gradient.movedim(dim, 0)
        total = tokens.new_zeros(shape[dim], *tokens.shape[1:])
        return total.index_put((keep,), tokens, accumulate=True).movedim(0, dim)
    tokens = gradient.movedim((dim - 1, dim), (0, 1))
    batch = torch.arange(keep.shape[0], device=keep.device)[:, None]
    batch = batch if shape[dim - 1] == keep.shape[0] else batch * 0  # one row that all share
    total = tokens.new_zeros(shape[dim - 1], shape[dim], *tokens.shape[2:])
    return total.index_put((batch, keep), tokens, accumulate=True).movedim((0, 1), (dim - 1, dim))


define(
    "gather_tokens(Tensor[] tensors, Tensor keep, int[1] dim=1) -> Tensor[]",
    _check,
    _fake,
    {"reference": reference.gather_tokens, "cpu": _native, "triton": _triton, "cuda": _native},
    own_checks=("cpu", "triton", "cuda"),
    gradient=(_gradients, _remember),
)
