"""Conflict-free ranked list from rank probabilities: the specification.

Cost: a softmax over N (J + 1) logits, then one pass over N probabilities per rank.
"""

from torch import Tensor

from .exclusive_bottomk import exclusive_bottomk


def assign_ranks(logits: Tensor, j: int) -> Tensor:
    """Tokens [B, j] of logits [B, N, J + 1] by rank; see `pruneops.assign_ranks` for the contract."""
    # logarithms still differ where probabilities underflow to 0 in float32
    log_probability = logits.float().log_softmax(-1)[..., :j]
    return exclusive_bottomk(-log_probability.mT, [1] * j)
