"""Random tokens, a baseline. Drawn on the CPU, so the same on every device."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check
from .base import Budgeted, is_int, to_device_async


@dataclass(frozen=True, kw_only=True)
class Random(Budgeted):
    """Random tokens after the projector.

    Parameters
    ----------
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int).
    seed : int
        At least 0. The chosen tokens depend only on the seed, the image's number (`Image.index`) and its size.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_setting("seed", is_int(self.seed) and self.seed >= 0, "an int of at least 0")

    @property
    def after_projector(self) -> bool:
        return True

    def _select(self, image, k):
        *batch, n, _ = image.features.shape
        if batch:
            drawn = [random_select(n, k, seed=self.seed, index=image.index + b) for b in range(batch[0])]
            drawn = torch.stack(drawn) if drawn else torch.empty(0, k, dtype=torch.int64)
        else:
            drawn = random_select(n, k, seed=self.seed, index=image.index)
        return to_device_async(drawn, image.features.device)


def random_select(tokens: int, k: int, *, seed: int = 0, index: int = 0) -> Tensor:
    """k of `tokens` tokens, uniformly at random.

    Parameters
    ----------
    tokens : int
        Tokens of the image.
    k : int
        0 <= k <= tokens
    seed : int
        Of the run.
    index : int
        Number of the image. The generator's seed is the first 4 bytes, big-endian, of the SHA-256 digest of
        the text "seed,index"; the tokens are the first k of its ``torch.randperm(tokens)``.

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
