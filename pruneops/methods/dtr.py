"""DTR: a trained model ranks the visual tokens for the question at hand; any number of them is a prefix of one list.

The ranking model reads the decoder's input once; ranks are assigned without conflicts by `pruneops.assign_ranks`.
"""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..networks import RankingModel, Rotary, load
from ..ops import assign_ranks
from .base import Budgeted, top_indices


@dataclass(frozen=True, kw_only=True)
class DTR(Budgeted):
    """A trained token-ranking model at the decoder's input.

    Parameters
    ----------
    weights : path
        A file that `python -m pruneops.training dtr` wrote.
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int). Beyond the J ranks of the model the tokens that are
        likeliest to have any rank follow.

    Notes
    -----
    Source: DTR, "Towards optimal token compression with data-driven token ranking", sections 3.3 and 3.4; pruned at the
    input of the decoder, as there. Images of a prompt are ranked together by the model, and chosen from one by one.
    """

    name: ClassVar[str] = "dtr"

    weights: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))
        self._check_setting("weights", isinstance(self.weights, str) and self.weights, "a path")
        super().__post_init__()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rotary"})

    def _layers(self, count: int) -> tuple[int, ...]:
        return (0,)

    def _at_layer(self, row):
        if all(self.budget(size) >= end - start for (start, end), size in zip(row.images, row.sizes)):
            return None
        network = load(RankingModel, self.weights, row.hidden.device, row.hidden.dtype)
        logits = dtr_logits(network, row.hidden, row.visual, row.rotary)
        return self._per_image(row, lambda start, end, k, size: dtr_select(logits[start:end], k))


@without_autocast
@torch.no_grad()
def dtr_logits(network: RankingModel, hidden: Tensor, visual: Tensor, rotary: Rotary | None) -> Tensor:
    """Rank logits of a prompt's visual tokens.

    Parameters
    ----------
    network : RankingModel
        On the device and in the dtype of `hidden`.
    hidden : Tensor [S, D], float32, float16 or bfloat16
        Input of the decoder, without padding.
    visual : Tensor [n], int64
        Positions of the visual tokens.
    rotary : tuple of Tensor [S, Dr], optional
        Cos and sin of the rotary embeddings; required by a model with decoder layers.

    Returns
    -------
    Tensor [n, J + 1], float32

    Raises
    ------
    ValueError
        On a prompt of another width than the network's.
    """
    op, width = "methods.dtr_logits", network.config["width"]
    check(hidden.dim() == 2, op, "hidden", f"of shape {list(hidden.shape)}", "of shape [S, D]")
    check(hidden.shape[1] == width, op, "hidden", f"{hidden.shape[1]} wide", f"{width} wide, as its weights")
    text = torch.ones_like(hidden[:, 0], dtype=torch.bool).index_fill(0, visual, False)
    batched = None if rotary is None else (rotary[0][None], rotary[1][None])
    return network(hidden[None], visual[None], text[None], batched)[0].float()


@without_autocast
def dtr_ranked(logits: Tensor, k: int) -> Tensor:
    """The first k tokens of the ranked list, the most important first; a shorter list is a prefix of a longer one.

    Parameters
    ----------
    logits : Tensor [.., n, J + 1], float
        From `dtr_logits`; at most one batch dimension. With two classes, ranked and not, tokens are sorted by them.
    k : int
        1 <= k <= n

    Returns
    -------
    Tensor [.., k], int64
        The first J by `pruneops.assign_ranks`, then those that are likeliest to have a rank. Ties go to the lowest
        index, tokens of logits that are not finite come last.

    Raises
    ------
    ValueError
        On a bad shape, or if k is out of range.
    """
    tokens, classes = logits.shape[-2:]
    check(1 <= k <= tokens, "methods.dtr_ranked", "k", k, f"1 to the {tokens} tokens")
    ranks = min(classes - 1, k) if classes > 2 else 0
    if not ranks:
        return _by_importance(logits)[..., :k]
    chosen = assign_ranks(logits, ranks)
    if k == ranks:
        return chosen
    order = _by_importance(logits)
    taken = torch.zeros_like(order, dtype=torch.bool).scatter(-1, chosen, True).gather(-1, order)
    rest = order.gather(-1, torch.argsort(taken.byte(), dim=-1, stable=True))  # those chosen already go to the end
    return torch.cat([chosen, rest[..., : k - ranks]], -1)


@without_autocast
def dtr_select(logits: Tensor, k: int) -> Tensor:
    """The same k tokens in ascending order.

    Parameters
    ----------
    logits, k
        As in `dtr_ranked`.

    Returns
    -------
    Tensor [.., k], int64
    """
    if logits.shape[-1] == 2:
        return top_indices(_important(logits), k)
    return dtr_ranked(logits, k).sort(-1).values


def _by_importance(logits):
    return torch.argsort(_important(logits), dim=-1, descending=True, stable=True)


def _important(logits):
    """Log-odds of having any rank [.., n]; -inf where they are not finite."""
    logits = logits.float()
    odds = logits[..., :-1].logsumexp(-1) - logits[..., -1]
    return torch.where(odds.isfinite(), odds, -torch.inf)
