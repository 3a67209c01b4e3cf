"""Attention between groups of tokens: schema, argument checks, fake kernel, backends; ratios of the result."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..autocast import without_autocast
from ..checks import (
    INT,
    OPTIONAL_TENSOR,
    ArgumentTypeError,
    check,
    check_float_tensor,
    check_indices,
    check_tensor,
    check_types,
    has_values,
)
from ._library import define, last_dim_contiguous

MAX_GROUPS = 8
MAX_HEAD_DIM = 256
INTEGERS = (torch.int64, torch.int32)
SCALE = (float, int, type(None))


class AttentionMass(NamedTuple):
    """Attention from every query group to every key group, and the log-sum-exp of every row."""

    mass: Tensor
    lse: Tensor


def attention_mass(
    query: Tensor,
    key: Tensor,
    query_group: Tensor,
    key_group: Tensor,
    groups: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> AttentionMass:
    """How much attention the queries of each group pay to the keys of each group.

    ``mass[b, h, p, q]`` is the sum of ``softmax(query @ key.T * scale)[i, j]`` over queries i of group p and keys j
    of group q. The attention matrix is never stored: one pass over the keys keeps a running sum per group.

    Parameters
    ----------
    query : Tensor [B, H, Sq, D] or [H, Sq, D], float32, float16 or bfloat16
        After rotary embedding. Any strides: [B, S, H, D] is ``.transpose(1, 2)``. D at most 256.
    key : Tensor [B, Hk, Sk, D] or [Hk, Sk, D], dtype of query
        Grouped-query attention: query head h attends to key head ``h // (H / Hk)``.
    query_group : Tensor [B, Sq] or [Sq], int64 or int32
        Group of every query, 0 .. groups - 1; -1 for one that is not counted (padding).
    key_group : Tensor [B, Sk] or [Sk], int64 or int32
        Group of every key; -1 for one that is masked out (padding, on either side).
    groups : int
        G, at most 8.
    causal : bool
        The last query sees the last key: query i sees the keys j <= i + Sk - Sq.
    scale : float, optional
        Factor of the logits; ``D ** -0.5`` by default.
    lse : Tensor [B, H, Sq] or [H, Sq], float32, optional
        Log-sum-exp of each row, as flash attention returns it (natural logarithm, scaled logits).
        With it only the rows of counted queries are computed, and nothing is rescaled.

    Returns
    -------
    mass : Tensor [B, H, G, G] or [H, G, G], float32
        Row p sums to the number of queries of group p that see a key.
    lse : Tensor [B, H, Sq] or [H, Sq], float32
        A copy of `lse` if given, else that of the counted queries; -inf for the others and for queries that see
        no key.

    Raises
    ------
    ValueError
        On bad shapes and values, before anything is launched. Group values are checked on CPU always, on
        CUDA when PRUNEOPS_DEBUG=1; an unchecked group beyond the last counts as -1.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Extra memory: (G + 2) floats per row of attention, B H Sq rows. Not differentiable.

    Source: ToDRE (arXiv:2505.18757), Eq. 7; DyRate, section III (attention distribution v_t).

    Examples
    --------
    With zero queries every visible key gets the same attention.

    >>> import torch, pruneops
    >>> query, key, group = torch.zeros(1, 4, 8), torch.ones(1, 4, 8), torch.tensor([0, 0, 1, 1])
    >>> pruneops.attention_mass(query, key, group, group, 2, causal=False).mass
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    types_ok = isinstance(query_group, Tensor) and isinstance(key_group, Tensor) and isinstance(groups, INT)
    if not (types_ok and softmax_types(query, key, causal, scale, lse)):
        check_types("attention_mass", query=(query, Tensor), key=(key, Tensor), groups=(groups, INT))
        check_types("attention_mass", query_group=(query_group, Tensor), key_group=(key_group, Tensor))
        check_softmax_types("attention_mass", causal, scale, lse)
    return AttentionMass(
        *torch.ops.pruneops.attention_mass(
            query, key, query_group, key_group, groups, causal=causal, scale=scale, lse=lse
        )
    )


@without_autocast
def cross_modal_ratio(mass: Tensor, *, text: int, vision: int) -> tuple[Tensor, Tensor]:
    """Shares of attention between text and vision, ToDRE's Eq. 7.

    alpha(t -> v) is the sum over text queries i and vision keys j of A_ij, divided by the sum over text
    queries and all keys; alpha(v -> t) the reverse. Sums run over heads and tokens.

    Parameters
    ----------
    mass : Tensor [B, H, G, G] or [H, G, G]
        From `attention_mass`.
    text : int
        Group of the text tokens.
    vision : int
        Group of the visual tokens.

    Returns
    -------
    tuple of Tensor [B] or []
        (alpha text -> vision, alpha vision -> text); 0 where there is no such query. Under a causal mask
        with the text after the image the second is exactly 0.

    Raises
    ------
    ValueError
        If `text` or `vision` is no group of `mass`.
    """
    groups = mass.shape[-1]
    for name, group in (("text", text), ("vision", vision)):
        check(0 <= group < groups, "cross_modal_ratio", name, group, f"a group of mass, 0 to {groups - 1}")
    total = mass.sum(-3)  # over heads
    share = total / total.sum(-1, keepdim=True)
    share = torch.where(total == 0, 0.0, share)
    return share[..., text, vision], share[..., vision, text]


@without_autocast
def group_distribution(mass: Tensor, *, query: int) -> Tensor:
    """How the queries of one group spread their attention over the key groups, per head: DyRate's v_t.

    With the new token alone in group `query`, entry g of head h is the sum of A_hj over the keys j of
    group g (system, image, instruction, response).

    Parameters
    ----------
    mass : Tensor [B, H, G, G] or [H, G, G]
        From `attention_mass`.
    query : int
        Group of the queries.

    Returns
    -------
    Tensor [B, H, G] or [H, G]
        Rows sum to 1; 0 where no query of the group sees a key.

    Raises
    ------
    ValueError
        If `query` is no group of `mass`.
    """
    groups = mass.shape[-1]
    check(0 <= query < groups, "group_distribution", "query", query, f"a group of mass, 0 to {groups - 1}")
    row = mass[..., query, :]
    return torch.where(row == 0, 0.0, row / row.sum(-1, keepdim=True))


def softmax_types(query: Any, key: Any, causal: Any, scale: Any, lse: Any) -> bool:
    """Whether the arguments shared by both attention operators have the right types."""
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(lse, OPTIONAL_TENSOR)
    return tensors and isinstance(causal, bool) and isinstance(scale, SCALE)


def check_softmax_types(op: str, causal: Any, scale: Any, lse: Any) -> None:
    """Types of the options shared by both attention operators."""
    check_types(op, causal=(causal, bool), scale=(scale, SCALE), lse=(lse, OPTIONAL_TENSOR))


def check_heads(op: str, query: Tensor, key: Tensor, lse: Tensor | None) -> None:
    """query [B, H, Sq, D], key [B, Hk, Sk, D], lse [B, H, Sq] or None; unbatched without B."""
    check_float_tensor(op, "query", query, ranks=(3, 4))
    if key.dtype != query.dtype:
        check(False, op, "key", key.dtype, f"the dtype of query, {query.dtype}", ArgumentTypeError)
    batch, (heads, rows, width) = tuple(query.shape[:-3]), query.shape[-3:]
    check_tensor(op, "key", key, ("query", query), (query.dtype,), (*batch, None, None, width), "Hk, Sk")
    if width > MAX_HEAD_DIM:
        check(False, op, "query", f"{width} features a head", f"at most {MAX_HEAD_DIM} features a head")
    key_heads = key.shape[-3]
    if key_heads == 0 or heads % key_heads:
        check(False, op, "key", f"of {key_heads} heads", f"of a number of heads that divides the {heads} of query")
    if lse is not None:
        check_tensor(op, "lse", lse, ("query", query), (torch.float32,), (*batch, heads, rows))


def _check(query, key, query_group, key_group, groups, *, causal=True, scale=None, lse=None):
    op = "attention_mass"
    check_heads(op, query, key, lse)
    batch = tuple(query.shape[:-3])
    check(1 <= groups <= MAX_GROUPS, op, "groups", groups, f"1 to {MAX_GROUPS}")
    for name, group, tensor in (("query_group", query_group, query), ("key_group", key_group, key)):
        check_tensor(op, name, group, ("query", query), INTEGERS, (*batch, tensor.shape[-2]))
        if has_values(group):
            check_indices(op, name, group, -1, groups)


def _fake(query, key, query_group, key_group, groups, *, causal=True, scale=None, lse=None):
    batch, heads = query.shape[:-3], query.shape[-3]
    mass = query.new_empty((*batch, heads, groups, groups), dtype=torch.float32)
    return mass, query.new_empty((*batch, heads, query.shape[-2]), dtype=torch.float32)


def _batched(run):
    def call(query, key, query_group, key_group, groups, *, causal=True, scale=None, lse=None):
        query, key = last_dim_contiguous(query), last_dim_contiguous(key)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if query.dim() == 4:
            return run(query, key, query_group, key_group, groups, causal, scale, lse)
        batched = (t[None] for t in (query, key, query_group, key_group))
        mass, lse = run(*batched, groups, causal, scale, None if lse is None else lse[None])
        return mass[0], lse[0]

    return call


def rows_class(query: Tensor, key: Tensor, *_: Any, **__: Any) -> str | None:
    """Shape class by the rows of attention that share a key head: few are bound by memory, many by arithmetic."""
    return "many rows" if _rows(query, key) > 16 else None


def _mass_class(query: Tensor, key: Tensor, *_: Any, lse: Tensor | None = None, **__: Any) -> str | None:
    """As `rows_class`, but many rows that the wgmma kernel of CUDA C++ takes (attention_prefill.cu) are no class."""
    shapes = query.element_size() == 2 and query.shape[-1] in (64, 128) and _rows(query, key) >= 256
    return None if shapes and lse is None and is_hopper(query.device) else rows_class(query, key)


def _rows(query, key):
    return query.shape[-2] * (query.shape[-3] // max(key.shape[-3], 1))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device has compute capability 9.0, for which CUDA C++ has kernels of its own."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


def _native(query, key, query_group, key_group, groups, causal, scale, lse):
    query_group, key_group = query_group.to(torch.int64), key_group.to(torch.int64)
    return torch.ops.pruneops_native.attention_mass(query, key, query_group, key_group, groups, causal, scale, lse)


def _cuda(query, key, query_group, key_group, groups, causal, scale, lse):
    return torch.ops.pruneops_native.attention_mass(query, key, query_group, key_group, groups, causal, scale, lse)


def _triton(query, key, query_group, key_group, groups, causal, scale, lse):
    from ..triton_kernels import attention_mass as kernels

    return kernels.attention_mass(query, key, query_group, key_group, groups, causal, scale, lse)


define(
    "attention_mass(Tensor query, Tensor key, Tensor query_group, Tensor key_group, int groups, *, bool causal=True,"
    " float? scale=None, Tensor? lse=None) -> (Tensor mass, Tensor lse)",
    _check,
    _fake,
    {
        "reference": reference.attention_mass,
        "cpu": _batched(_native),
        "triton": _batched(_triton),
        "cuda": _batched(_cuda),
    },
    self_checking=("cuda",),
    shape_class=_mass_class,
)
