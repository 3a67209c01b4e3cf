"""FastV: the visual tokens that receive most attention in an early decoder layer.

One row of attention, or the sum of all (`pruneops.attention_received`); no matrix of S x S is stored.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..ops import attention_received
from .base import SingleLayer, top_indices

ROWS = ("all", "last")


@dataclass(frozen=True, kw_only=True)
class FastV(SingleLayer):
    """FastV before a decoder layer.

    Parameters
    ----------
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int). The paper's R is 1 - keep.
    layer : int
        K, at least 1: prunes the input of layer K (from 0) by the attention of layer K - 1.
    rows : {"all", "last"}
        Queries whose attention counts: all tokens (their mean), as in the paper, or the last, as in the public code.

    Notes
    -----
    Source: arXiv:2403.06764, section 4.1.
    """

    name: ClassVar[str] = "fastv"

    rows: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_setting("rows", self.rows in ROWS, f"one of {ROWS}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"query", "key"})

    def _at_layer(self, row):
        if all(self.budget(size) >= end - start for (start, end), size in zip(row.images, row.sizes)):
            return None
        scores = fastv_scores(row.query, row.key, rows=self.rows)[row.visual]
        return self._per_image(row, lambda start, end, k, size: fastv_select(scores[start:end], k))


@without_autocast
def fastv_scores(query: Tensor, key: Tensor, *, rows: Literal["all", "last"] = "all") -> Tensor:
    """Attention that every token receives, averaged over heads.

    Parameters
    ----------
    query : Tensor [.., H, S, Dh], float32, float16 or bfloat16
        After rotary embedding; at most one batch dimension.
    key : Tensor [.., Hk, S, Dh], dtype of query
        After rotary embedding.
    rows : {"all", "last"}
        Summed over all queries (S times the paper's mean, which ranks alike) or from the last query.

    Returns
    -------
    Tensor [.., S], float32
        A score per token.

    Raises
    ------
    ValueError
        As `pruneops.attention_received`, and on another value of `rows`.
    TypeError
        As `pruneops.attention_received`.

    Notes
    -----
    Source: arXiv:2403.06764, section 4.1.
    """
    check(rows in ROWS, "methods.fastv_scores", "rows", repr(rows), f"one of {ROWS}")
    query = query[..., -1:, :] if rows == "last" else query
    return attention_received(query, key).mean(-2)


@without_autocast
def fastv_select(scores: Tensor, k: int) -> Tensor:
    """The k tokens of highest score.

    Parameters
    ----------
    scores : Tensor [.., n], float
        From `fastv_scores`; at most one batch dimension. Compared in float32.
    k : int
        0 <= k <= n

    Returns
    -------
    Tensor [.., k], int64
        Ascending. Ties go to the lowest index; scores that are not finite come last, in index order.

    Raises
    ------
    ValueError
        On a bad shape, or if k is out of range.
    """
    return top_indices(scores, k)
