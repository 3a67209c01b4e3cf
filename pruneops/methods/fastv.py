"""FastV: the visual tokens that receive most attention in an early decoder layer.

One row of attention, or all of them summed on the fly (`pruneops.attention_received`); nothing of size S x S.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..autocast import without_autocast
from ..checks import check
from ..ops import attention_received
from ._base import Budgeted, largest

ROWS = ("all", "last")


@dataclass(frozen=True, kw_only=True)
class FastV(Budgeted):
    """FastV before a decoder layer.

    Parameters
    ----------
    keep : float or int
        Of every image; the paper's R is 1 - keep.
    layer : int
        K, at least 1: prunes the input of layer K (from 0) by the attention of layer K - 1.
    rows : {"all", "last"}
        Whose attention counts: the mean over all tokens, as in the paper, or the last token's, as in the public code.

    Notes
    -----
    Source: arXiv:2403.06764, section 4.1.
    """

    name: ClassVar[str] = "fastv"

    layer: int = 2
    rows: str = "all"

    def __post_init__(self):
        super().__post_init__()
        self._check_layer()
        self._check_setting("rows", self.rows in ROWS, f"one of {ROWS}")

    @property
    def needs(self):
        return frozenset({"query", "key"})

    def _layers(self, count):
        return self._one_layer(count)

    def _at_layer(self, row):
        if all(self.budget(size) >= end - start for (start, end), size in zip(row.images, row.sizes)):
            return None
        scores = fastv_scores(row.query, row.key, rows=self.rows)[row.visual]
        return self._per_image(row, lambda start, end, k, size: fastv_select(scores[start:end], k))


@without_autocast
def fastv_scores(query, key, *, rows="all"):
    """Attention that every token receives, averaged over heads.

    Parameters
    ----------
    query : Tensor [.., H, S, Dh], float32, float16 or bfloat16
        After rotary embedding.
    key : Tensor [.., Hk, S, Dh]
    rows : {"all", "last"}
        Summed over all queries (S times the paper's mean, which ranks alike) or from the last query.

    Returns
    -------
    Tensor [.., S], float32

    Raises
    ------
    ValueError, TypeError
        As `pruneops.attention_received`.
    """
    check(rows in ROWS, "methods.fastv_scores", "rows", repr(rows), f"one of {ROWS}")
    query = query[..., -1:, :] if rows == "last" else query
    return attention_received(query, key).mean(-2)


@without_autocast
def fastv_select(scores, k):
    """The k tokens [.., k] of greatest score [.., n], ascending; ties to the lowest index, non-finite scores last."""
    return largest(scores, k)
