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
        Of every image: a share (float) in (0, 1] or a count (int). Beyond the J ranks of the model they are assigned
        again, to the tokens that are left.

    Notes
    -----
    Source: DTR, "Towards optimal token compression with data-driven token ranking", sections 3.3 and 3.4; pruned at the
    input of the decoder, as there. Images of a prompt are ranked together by the model, and chosen from one by one.
    """

    name: ClassVar[str] = "dtr"

    weights: str | os.PathLike[str]

    def __post_init__(self) -> None:
        self._check_path("weights")
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
        In rounds of J: `pruneops.assign_ranks` of the tokens that are left, so that each rank in turn has its likeliest
        one again. Ties go to the lowest index, tokens of logits that are not finite come last.

    Raises
    ------
    ValueError
        On a bad shape, or if k is out of range.
    """
    tokens, classes = logits.shape[-2:]
    check(1 <= k <= tokens, "methods.dtr_ranked", "k", k, f"1 to the {tokens} tokens")
    if classes == 2:
        return torch.argsort(_odds(logits), dim=-1, descending=True, stable=True)[..., :k]
    left = torch.arange(tokens, device=logits.device).expand(logits.shape[:-1])
    chosen, ranks = [], classes - 1
    for first in range(0, k, ranks):
        best = assign_ranks(logits, min(ranks, k - first))
        chosen.append(left.gather(-1, best))
        taken = torch.zeros_like(left, dtype=torch.bool).scatter(-1, best, True)
        rest = torch.argsort(taken.byte(), dim=-1, stable=True)[..., : left.shape[-1] - best.shape[-1]]
        left, logits = left.gather(-1, rest), logits.gather(-2, rest[..., None].expand(*rest.shape, classes))
    return torch.cat(chosen, -1)


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
        return top_indices(_odds(logits), k)
    return dtr_ranked(logits, k).sort(-1).values


def _odds(logits):
    """Of two classes, the log-odds of the first [.., n]; -inf where they are not finite."""
    odds = logits[..., 0].float() - logits[..., 1].float()
    return torch.where(odds.isfinite(), odds, -torch.inf)
