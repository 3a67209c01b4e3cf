"""DivPrune: greedily, the tokens whose smallest pairwise distance is largest.

The first token costs n^2 D operations in blocks of rows, each pair of tokens once; the others are `pruneops.kcenter`:
k steps over n tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..ops import kcenter
from .base import Budgeted, check_features

BLOCK = 2**20  # similarities in memory at a time
# As in `kcenter`: a squared norm below the first makes a zero vector; one above the second, or NaN, is not finite.
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny
LARGEST_SQUARE = torch.finfo(torch.float32).max / 4


@dataclass(frozen=True, kw_only=True)
class DivPrune(Budgeted):
    """DivPrune after the projector.

    Parameters
    ----------
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int).

    Notes
    -----
    Source: arXiv:2503.02175, Algorithm 1. Unlike the public code it holds no n x n matrix and repeats no token.
    """

    name: ClassVar[str] = "divprune"

    @property
    def after_projector(self) -> bool:
        return True

    def _select(self, image, k):
        return divprune_select(image.features, k)


@without_autocast
@torch.no_grad()
def divprune_start(features: Tensor) -> Tensor:
    """The token that is farthest from its nearest neighbour, in cosine distance.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        n >= 1; arithmetic is float32.

    Returns
    -------
    Tensor [..], int64
        Ties go to the lowest index. A zero vector has similarity 0 to everything. A token that is not finite is
        no neighbour of others and is the start only if all are.

    Raises
    ------
    ValueError
        On a bad shape or dtype, or without a token.

    Notes
    -----
    Memory: a float32 copy of one image's tokens and 2^20 similarities, or one row if that is longer.
    """
    check_features("methods.divprune_start", features, 1)
    if features.dim() == 3:  # one by one, so that a batch gives the bits that its rows give
        starts = [divprune_start(image) for image in features]
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
        block, rest = slice(first, first + rows), slice(first, None)
        similarity = (x[block] @ x[rest].mT).add_(excluded[rest]).add_(excluded[block, None])
        similarity.fill_diagonal_(-torch.inf)
        nearest[block] = nearest[block].maximum(similarity.amax(1))
        nearest[rest] = nearest[rest].maximum(similarity.amax(0))
    return torch.where(finite, nearest, torch.inf).argmin(-1)


@without_autocast
def divprune_select(features: Tensor, k: int) -> Tensor:
    """Starting with `divprune_start`, at each step the token farthest from those chosen.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Tokens; at most one batch dimension.
    k : int
        1 <= k <= n

    Returns
    -------
    Tensor [.., k], int64
        Ascending.

    Raises
    ------
    ValueError
        On a bad shape or dtype, or if k is out of range.

    Notes
    -----
    Source: arXiv:2503.02175, Algorithm 1.
    """
    check_features("methods.divprune_select", features, k)
    return kcenter(features, k, seeds=divprune_start(features).unsqueeze(-1)).indices.sort(-1).values
