"""Adaptive selection: a small transformer, trained to keep the tokens from which the others can be rebuilt.

The network reads an image's tokens once; the k largest scores are chosen over n numbers (`pruneops.exclusive_bottomk`).
"""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..networks import SelectorNetwork, load
from .base import Budgeted, Image, check_features, check_image, is_int, top_indices


@dataclass(frozen=True, kw_only=True)
class Selector(Budgeted):
    """A trained selector after the projector.

    Parameters
    ----------
    weights : path
        A file that `python -m pruneops.training selector` wrote.
    keep : float, int or None
        Of every image: a share (float) in (0, 1] or a count (int), those of the largest logits; None: the selector's
        own mask, which keeps more of some images than of others, at least one token.

    Notes
    -----
    Source: "Adaptive vision token selection for multi-modal inference", section 4.1. There the selector reads the
    vision tower's output, crop by crop; here it reads what the decoder will get, an image as a whole. With
    ``keep=None`` the host waits for the mask, since shapes depend on it.
    """

    name: ClassVar[str] = "selector"

    weights: str | os.PathLike[str]
    keep: float | int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._check_path("weights")
        if self.keep is not None:
            super().__post_init__()

    @property
    def after_projector(self) -> bool:
        return True

    def budget(self, tokens: int) -> int:
        """As `Budgeted.budget`; without `keep` all tokens, the most that its mask can keep."""
        if self.keep is not None:
            return super().budget(tokens)
        check(is_int(tokens) and tokens >= 0, self._label, "tokens", repr(tokens), "an int of at least 0")
        return tokens

    def _select(self, image, k):
        return top_indices(self._scores(image.features), k)

    @without_autocast
    def select(self, image: Image) -> Tensor:
        if self.keep is not None:
            return super().select(image)
        check_image(self._label, image)
        if image.features.shape[-2] == 0:
            return super().select(image)
        check(
            image.features.dim() == 2, self._label, "image.features", "a batch", "of shape [n, D]: masks differ in size"
        )
        return selector_mask(self._scores(image.features)).nonzero().flatten()

    def _scores(self, features):
        network = load(SelectorNetwork, self.weights, features.device, features.dtype)
        return selector_scores(network, features)


@without_autocast
@torch.no_grad()
def selector_scores(network: SelectorNetwork, features: Tensor) -> Tensor:
    """Logit of keeping a token minus that of dropping it.

    Parameters
    ----------
    network : SelectorNetwork
        On the device and in the dtype of the features.
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Tokens; at most one batch dimension.

    Returns
    -------
    Tensor [.., n], float32

    Raises
    ------
    ValueError
        On features of another width than the network's.
    """
    op, width = "methods.selector_scores", network.config["features"]
    check_features(op, features)
    check(features.shape[-1] == width, op, "features", f"{features.shape[-1]} wide", f"{width} wide, as its weights")
    batch = features if features.dim() == 3 else features[None]
    drop, keep = network(batch).float().unbind(-1)
    return keep - drop if features.dim() == 3 else (keep - drop)[0]


@without_autocast
def selector_mask(scores: Tensor) -> Tensor:
    """The hard mask: tokens that are likelier kept than dropped, or the likeliest if there is none.

    Parameters
    ----------
    scores : Tensor [.., n], float
        From `selector_scores`.

    Returns
    -------
    Tensor [.., n], bool
    """
    first = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
    return (scores > 0) | first
