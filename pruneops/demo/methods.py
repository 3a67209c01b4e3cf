"""The methods of the demo: how each chooses tokens, what it says of that and which picture shows it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import ops
from ..ops.kcenter import METRICS

PIVOTS = 8  # of DART


@dataclass(frozen=True)
class Method:
    """A method as the demo runs it.

    Parameters
    ----------
    summary : str
        What it keeps, after "288 (10 %) by".
    metrics : tuple of str
        Distances it can use.
    pivots : callable
        (tokens [N, D], [CLS] attention of the thumbnail, k, seed) -> int64 [P], where the choice starts.
    choose : callable
        (operators, tokens, pivots, k, metric) -> Tensors, first the kept tokens int64 [k] in order of
        choice. What is timed; `operators` is pruneops.ops or pruneops.reference.
    outcome : callable
        (tokens, pivots, what `choose` returned) -> entries of the record, arguments of the picture.
    start : callable
        (record, tokens along a side of the thumbnail) -> (name, words) for the table.
    picture : str
        Function of plots.py that draws it.
    """

    summary: str
    metrics: tuple
    pivots: Callable
    choose: Callable
    outcome: Callable
    start: Callable
    picture: str


# ToDRE, stage 1 (arXiv:2505.18757): the pivot is the thumbnail's token of greatest [CLS] attention, the
# others follow by greedy k-center.


def _most_attended(tokens, attention, k, seed):
    return attention.argmax()[None]  # the thumbnail's tokens come first


def _farthest(operators, tokens, pivots, k, metric):
    return operators.kcenter(tokens, k, seeds=pivots, metric=metric)


def _distances(tokens, pivots, chosen):
    order, radii = (tensor.tolist() for tensor in chosen)
    return {"pivot": order[0], "order": order, "radii": _rounded(radii)}, {"order": order, "radii": radii}


def _thumbnail_pivot(record, side):
    row, column = divmod(record["pivot"], side)
    return "pivot", f"thumbnail row {row}, column {column}: greatest [CLS] attention"


# DART (arXiv:2502.11494): a few pivots, and pivot after pivot the tokens least similar to it that nobody has
# taken yet. DART does this inside the decoder, on the hidden states before layer K, with pivots of greatest key
# norm in layer K - 1. Here it is done before the decoder, on the projected tokens, and the pivots are drawn at
# random, which the paper puts within 1.2 % of its best choice: norms of a random tower say nothing of a token
# (with seed 0 the eight greatest all lie in one crop).


def _drawn(tokens, attention, k, seed):
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return order[: min(PIVOTS, k)].to(tokens.device)


def _least_similar(operators, tokens, pivots, k, metric):
    quotas = _quotas(k - len(pivots), len(pivots))
    others = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device).index_fill_(0, pivots, False)
    return (torch.cat([pivots, operators.pivot_bottomk(tokens, pivots, quotas, mask=others)]),)


def _quotas(total, rows):
    """`total` tokens shared among `rows` pivots, the first of them one more where it does not divide."""
    return [total // rows + (row < total % rows) for row in range(rows)]


def _duplication(tokens, pivots, chosen):
    order, quotas = chosen[0].tolist(), _quotas(len(chosen[0]) - len(pivots), len(pivots))
    scores = ops.duplication(tokens, pivots).tolist()
    record = {
        "pivots": pivots.tolist(),
        "quotas": quotas,
        "order": order,
        "duplication": _rounded(scores[token] for token in order),
    }
    return record, {"order": order, "quotas": quotas, "scores": scores, "note": "pivots (dots):\ndrawn at random"}


def _random_pivots(record, side):
    fewest, most = min(record["quotas"]), max(record["quotas"])
    share = most if fewest == most else f"{fewest} or {most}"
    return "pivots", f"{len(record['pivots'])} drawn at random, kept; tokens taken by each: {share}"


def _rounded(values):
    return [round(value, 6) if abs(value) < float("inf") else None for value in values]


METHODS = {
    "todre": Method(
        summary="greedy k-center",
        metrics=METRICS,
        pivots=_most_attended,
        choose=_farthest,
        outcome=_distances,
        start=_thumbnail_pivot,
        picture="selection",
    ),
    "dart": Method(
        summary="least duplication of a few pivots",
        metrics=("cosine",),
        pivots=_drawn,
        choose=_least_similar,
        outcome=_duplication,
        start=_random_pivots,
        picture="duplication",
    ),
}
