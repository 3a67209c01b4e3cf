"""Evenly spaced tokens, a baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check
from .base import Budgeted


@dataclass(frozen=True, kw_only=True)
class Uniform(Budgeted):
    """Evenly spaced tokens after the projector, in the order of the image's tokens.

    Parameters
    ----------
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int).
    """

    name: ClassVar[str] = "uniform"

    @property
    def after_projector(self) -> bool:
        return True

    def _select(self, image, k):
        *batch, n, _ = image.features.shape
        return uniform_select(n, k, device=image.features.device).repeat(*batch, 1).view(*batch, k)


def uniform_select(tokens: int, k: int, *, device: torch.device | str | None = None) -> Tensor:
    """Tokens ``floor((2 i + 1) tokens / 2 k)``, i = 0 .. k - 1: the middle of each of k equal parts.

    Parameters
    ----------
    tokens : int
        Tokens of the image.
    k : int
        0 <= k <= tokens
    device : torch.device or str, optional
        Of the result; the CPU by default.

    Returns
    -------
    Tensor [k], int64
        Ascending, all different.

    Raises
    ------
    ValueError
        If k is out of range.
    """
    check(0 <= k <= tokens, "methods.uniform_select", "k", k, f"0 to the {tokens} tokens")
    return (2 * torch.arange(k, device=device) + 1) * tokens // max(2 * k, 1)
