"""Attention that every key receives: schema, argument checks, fake kernel, backends."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import OPTIONAL_TENSOR, check_tensor, check_types
from ._library import define, last_dim_contiguous
from .attention_mass import check_heads, check_softmax_types, is_hopper, rows_class, softmax_types


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """How much attention every key receives, summed over the selected queries.

    ``received[b, h, j]`` is the sum of ``softmax(query @ key.T * scale)[i, j]`` over the queries i that `query_mask`
    selects. The attention matrix is never stored, and rows that are not selected are not computed.

    Parameters
    ----------
    query : Tensor [B, H, Sq, D] or [H, Sq, D], float32, float16 or bfloat16
        After rotary embedding. Any strides: [B, S, H, D] is ``.transpose(1, 2)``. D at most 256.
    key : Tensor [B, Hk, Sk, D] or [Hk, Sk, D], dtype of query
        Grouped-query attention: query head h attends to key head ``h // (H / Hk)``.
    query_mask : Tensor [B, Sq] or [Sq], bool, optional
        True for the queries that are summed over; all by default. FastV: the last row; FasterVLM and
        VisionZip: the [CLS] row, without causal; SparseVLM: text rows.
    key_mask : Tensor [B, Sk] or [Sk], bool, optional
        False for keys that are masked out (padding); they receive 0.
    causal : bool
        The last query sees the last key: query i sees the keys j <= i + Sk - Sq.
    scale : float, optional
        Factor of the logits; ``D ** -0.5`` by default.
    lse : Tensor [B, H, Sq] or [H, Sq], float32, optional
        Log-sum-exp of each row, as flash attention returns it (natural logarithm, scaled logits). Computed in a
        first pass over the selected rows if not given.

    Returns
    -------
    Tensor [B, H, Sk] or [H, Sk], float32
        The sum over all keys is the number of selected queries that see a key.

    Raises
    ------
    ValueError
        On bad shapes, before anything is launched.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Extra memory: a few floats per row of attention, B H Sq rows. Not differentiable.

    Source: FastV (arXiv:2403.06764) and its successors.

    Examples
    --------
    With zero queries every visible key gets the same attention.

    >>> import torch, pruneops
    >>> query, key = torch.zeros(1, 2, 8), torch.ones(1, 2, 8)
    >>> pruneops.attention_received(query, key)
    tensor([[1.5000, 0.5000]])
    """
    op = "attention_received"
    types_ok = isinstance(query_mask, OPTIONAL_TENSOR) and isinstance(key_mask, OPTIONAL_TENSOR)
    if not (types_ok and softmax_types(query, key, causal, scale, lse)):
        check_types(op, query=(query, Tensor), key=(key, Tensor))
        check_types(op, query_mask=(query_mask, OPTIONAL_TENSOR), key_mask=(key_mask, OPTIONAL_TENSOR))
        check_softmax_types(op, causal, scale, lse)
    return torch.ops.pruneops.attention_received(
        query, key, query_mask=query_mask, key_mask=key_mask, causal=causal, scale=scale, lse=lse
    )


def _check(query, key, *, query_mask=None, key_mask=None, causal=True, scale=None, lse=None):
    op = "attention_received"
    check_heads(op, query, key, lse)
    for name, mask, tensor in (("query_mask", query_mask, query), ("key_mask", key_mask, key)):
        if mask is not None:
            check_tensor(op, name, mask, ("query", query), (torch.bool,), (*query.shape[:-3], tensor.shape[-2]))


def _fake(query, key, *, query_mask=None, key_mask=None, causal=True, scale=None, lse=None):
    return query.new_empty((*query.shape[:-2], key.shape[-2]), dtype=torch.float32)


def _batched(run):
    def call(query, key, *, query_mask=None, key_mask=None, causal=True, scale=None, lse=None):
        query, key = last_dim_contiguous(query), last_dim_contiguous(key)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if query.dim() == 4:
            return run(query, key, query_mask, key_mask, causal, scale, lse)
        optional = (None if t is None else t[None] for t in (query_mask, key_mask))
        return run(query[None], key[None], *optional, causal, scale, None if lse is None else lse[None])[0]

    return call


def _native(query, key, query_mask, key_mask, causal, scale, lse):
    return torch.ops.pruneops_native.attention_received(query, key, query_mask, key_mask, causal, scale, lse)


def _triton(query, key, query_mask, key_mask, causal, scale, lse):
    from ..triton_kernels import attention_received as kernels

    return kernels.attention_received(query, key, query_mask, key_mask, causal, scale, lse)


def _received_class(query: Tensor, key: Tensor, *_: Any, query_mask: Tensor | None = None, **__: Any) -> str | None:
    """As `rows_class`, but rows that a mask selects, mostly few, are no class where attention_decode.cu takes them."""
    shapes = query.element_size() == 2 and query.shape[-1] in (64, 128) and 32 < key.shape[-2] <= 6144
    return None if shapes and query_mask is not None and is_hopper(query.device) else rows_class(query, key)


define(
    "attention_received(Tensor query, Tensor key, *, Tensor? query_mask=None, Tensor? key_mask=None,"
    " bool causal=True, float? scale=None, Tensor? lse=None) -> Tensor",
    _check,
    _fake,
    {
        "reference": reference.attention_received,
        "cpu": _batched(_native),
        "triton": _batched(_triton),
        "cuda": _batched(_native),
    },
    self_checking=("cuda",),
    shape_class=_received_class,
)
