"""FasterVLM: the tokens that [CLS] attends to most; also the dominant part of VisionZip.

Selection over n scores, which are one row of attention per head (`pruneops.attention_received`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..ops import attention_received
from .base import Budgeted, top_indices


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Budgeted):
    """FasterVLM after the projector.

    Parameters
    ----------
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int). Images must have `cls_attention`.

    Notes
    -----
    Source: arXiv:2412.01818. A tower without [CLS] needs a substitute there, such as `mean_attention`.
    """

    name: ClassVar[str] = "fastervlm"

    @property
    def after_projector(self) -> bool:
        return True

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"cls_attention"})

    def _select(self, image, k):
        given = image.cls_attention is not None
        check(given, self._label, "image.cls_attention", None, "given: this method chooses by it")
        return fastervlm_select(image.cls_attention, k)


@without_autocast
def fastervlm_select(attention: Tensor, k: int) -> Tensor:
    """The k tokens of highest attention.

    Parameters
    ----------
    attention : Tensor [.., n], float
        From `cls_attention`; at most one batch dimension. Compared in float32.
    k : int
        0 <= k <= n

    Returns
    -------
    Tensor [.., k], int64
        Ascending. Ties go to the lowest index; values that are not finite come last, in index order.

    Raises
    ------
    ValueError
        On a bad shape, or if k is out of range.

    Notes
    -----
    Source: arXiv:2412.01818.
    """
    return top_indices(attention, k)


@without_autocast
def cls_attention(query: Tensor, key: Tensor, *, cls: int = 0, scale: float | None = None) -> Tensor:
    """Attention from [CLS] to every other token in a layer of a vision tower, averaged over heads.

    Parameters
    ----------
    query : Tensor [.., H, n + 1, Dh], float32, float16 or bfloat16
        At most one batch dimension.
    key : Tensor [.., Hk, n + 1, Dh], dtype of query
    cls : int
        Position of [CLS], negative from the end.
    scale : float, optional
        Factor of the logits; ``Dh ** -0.5`` by default.

    Returns
    -------
    Tensor [.., n], float32
        In the order of the tokens, without [CLS].

    Raises
    ------
    ValueError
        As `pruneops.attention_received`, and if `cls` is no position.
    TypeError
        As `pruneops.attention_received`.
    """
    tokens = query.shape[-2]
    check(-tokens <= cls < tokens, "methods.cls_attention", "cls", cls, f"one of the {tokens} positions")
    cls %= tokens
    received = attention_received(query[..., cls : cls + 1, :], key, causal=False, scale=scale).mean(-2)
    return torch.cat([received[..., :cls], received[..., cls + 1 :]], -1)


@without_autocast
def mean_attention(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention that every token receives from all of them in a layer of a vision tower without [CLS].

    Parameters
    ----------
    query : Tensor [.., H, n, Dh], float32, float16 or bfloat16
        At most one batch dimension.
    key : Tensor [.., Hk, n, Dh], dtype of query
    scale : float, optional
        Factor of the logits; ``Dh ** -0.5`` by default.

    Returns
    -------
    Tensor [.., n], float32
        Mean over heads and queries; sums to 1.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.attention_received`.
    """
    return attention_received(query, key, causal=False, scale=scale).mean(-2) / query.shape[-2]
