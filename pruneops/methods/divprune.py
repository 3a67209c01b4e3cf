"""DivPrune: the tokens with the greatest least distance between any two, greedily.

The start costs n^2 D operations in blocks of rows, each pair of tokens once; the rest is `pruneops.kcenter`: k steps
over n tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..autocast import without_autocast
from ..ops import kcenter
from ._base import Budgeted, check_features

BLOCK = 2**20  # similarities held at a time
# As in `kcenter`: a squared norm below counts as a zero vector, one above, or NaN, as not finite.
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny
LARGEST_SQUARE = torch.finfo(torch.float32).max / 4


@dataclass(frozen=True, kw_only=True)
class DivPrune(Budgeted):
    """DivPrune after the projector.

    Parameters
    ----------
    keep : float or int
        Of every image.

    Notes
    -----
    Source: arXiv:2503.02175, Algorithm 1. Unlike the public code it holds no n x n matrix and repeats no token.
    """

    name: ClassVar[str] = "divprune"

    @property
    def after_projector(self):
        return True

    def _select(self, image, k):
        return divprune_select(image.features, k)


@without_autocast
@torch.no_grad()
def divprune_start(features):
    """The token that is farthest from its nearest neighbour, in cosine distance.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        n >= 1; arithmetic is float32.

    Returns
    -------
    Tensor [..], int64
        Ties go to the lowest index. A zero vector has similarity 0 to everything. A token that is not finite is
        nobody's neighbour and opens only if there is no other.

    Notes
    -----
    Memory: a float32 copy of one image's tokens and 2^20 similarities, or one row if that is longer.
    """
    check_features("methods.divprune_start", features, 1)
    if features.dim() == 3:  # one by one, so that a batch answers as its rows do
        starts = [divprune_start(own) for own in features]
        return torch.stack(starts) if starts else features.new_empty(0, dtype=torch.int64)
    x = features.float()
    square = x.square().sum(-1)
    finite = square <= LARGEST_SQUARE
    norm = torch.where(square < SMALLEST_SQUARE, torch.inf, square.sqrt())
    x = torch.where(finite[:, None], x / norm[:, None], 0.0)
    n = len(x)
    rows, excluded = max(1, BLOCK // n), torch.where(finite, 0.0, -torch.inf)
    nearest = torch.full_like(square, -torch.inf)
    for first in range(0, n, rows):  # these tokens with themselves and those after them
        own, rest = slice(first, first + rows), slice(first, None)
        similarity = (x[own] @ x[rest].mT).add_(excluded[rest]).add_(excluded[own, None])
        similarity.fill_diagonal_(-torch.inf)
        nearest[own] = nearest[own].maximum(similarity.amax(1))
        nearest[rest] = nearest[rest].maximum(similarity.amax(0))
    return torch.where(finite, nearest, torch.inf).argmin(-1)


@without_autocast
def divprune_select(features, k):
    """From `divprune_start`, each time the token farthest from those chosen.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
    k : int
        1 <= k <= n

    Returns
    -------
    Tensor [.., k], int64
        Ascending.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.kcenter`.
    """
    check_features("methods.divprune_select", features, k)
    return kcenter(features, k, seeds=divprune_start(features).unsqueeze(-1)).indices.sort(-1).values
