"""Random tokens: a baseline that every comparison needs. Drawn on the CPU, so the same on every device."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check
from ._base import Budgeted, is_int, uploaded


@dataclass(frozen=True, kw_only=True)
class Random(Budgeted):
    """Random tokens after the projector.

    Parameters
    ----------
    keep : float or int
        Of every image.
    seed : int
        At least 0. An image's tokens follow from the seed, its number (`Image.index`) and its size, nothing else.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_setting("seed", is_int(self.seed) and self.seed >= 0, "an int of at least 0")

    @property
    def after_projector(self):
        return True

    def _select(self, image, k):
        *batch, n, _ = image.features.shape
        if batch:
            drawn = [random_select(n, k, seed=self.seed, index=image.index + b) for b in range(batch[0])]
            drawn = torch.stack(drawn) if drawn else torch.empty(0, k, dtype=torch.int64)
        else:
            drawn = random_select(n, k, seed=self.seed, index=image.index)
        return uploaded(drawn, image.features.device)


def random_select(tokens, k, *, seed=0, index=0):
    """k of `tokens` tokens, each set as likely as any other.

    Parameters
    ----------
    tokens, k : int
        0 <= k <= tokens
    seed, index : int
        Of the run and of the image. The generator's seed is the first 4 bytes, big-endian, of the SHA-256 digest of
        the text "seed,index"; the tokens are the first k of its `torch.randperm(tokens)`.

    Returns
    -------
    Tensor [k], int64
        Ascending, on the CPU.

    Raises
    ------
    ValueError
        If k is out of range.
    """
    check(0 <= k <= tokens, "methods.random_select", "k", k, f"0 to the {tokens} tokens")
    digest = hashlib.sha256(f"{seed},{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randperm(tokens, generator=generator)[:k].sort().values
