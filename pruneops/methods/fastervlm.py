"""FasterVLM: the tokens that [CLS] attends to most; also the dominant part of VisionZip.

Selection over n scores. The scores themselves are one row of attention a head (`pruneops.attention_received`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..autocast import without_autocast
from ..checks import check
from ..ops import attention_received
from ._base import Budgeted, largest


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Budgeted):
    """FasterVLM after the projector.

    Parameters
    ----------
    keep : float or int
        Of every image. Images must come with `cls_attention`.

    Notes
    -----
    Source: arXiv:2412.01818. A tower without [CLS] needs a stand-in there, such as `mean_attention`.
    """

    name: ClassVar[str] = "fastervlm"

    @property
    def after_projector(self):
        return True

    @property
    def requires(self):
        return frozenset({"cls_attention"})

    def _select(self, image, k):
        given = image.cls_attention is not None
        check(given, self._who, "image.cls_attention", None, "given: this method chooses by it")
        return fastervlm_select(image.cls_attention, k)


@without_autocast
def fastervlm_select(attention, k):
    """The k tokens [.., k] of greatest attention [.., n], ascending; ties to the lowest index, non-finite ones last."""
    return largest(attention, k)


@without_autocast
def cls_attention(query, key, *, cls=0, scale=None):
    """Attention from [CLS] to every other token in a layer of a vision tower, averaged over heads.

    Parameters
    ----------
    query : Tensor [.., H, n + 1, Dh], float32, float16 or bfloat16
    key : Tensor [.., Hk, n + 1, Dh]
    cls : int
        Position of [CLS]: 0, or any other, negative ones from the end.
    scale : float, optional
        Of the logits; Dh ** -0.5 by default.

    Returns
    -------
    Tensor [.., n], float32
        Without [CLS]'s own share.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.attention_received`, and if `cls` is no position.
    """
    tokens = query.shape[-2]
    check(-tokens <= cls < tokens, "methods.cls_attention", "cls", cls, f"one of the {tokens} positions")
    cls %= tokens
    received = attention_received(query[..., cls : cls + 1, :], key, causal=False, scale=scale).mean(-2)
    return torch.cat([received[..., :cls], received[..., cls + 1 :]], -1)


@without_autocast
def mean_attention(query, key, *, scale=None):
    """Attention that every token receives from all of them in a layer of a vision tower without [CLS].

    Parameters
    ----------
    query : Tensor [.., H, n, Dh], float32, float16 or bfloat16
    key : Tensor [.., Hk, n, Dh]
    scale : float, optional
        Of the logits; Dh ** -0.5 by default.

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
