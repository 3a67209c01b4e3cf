"""Gathering tokens of tensors of any shape: the specification.

Cost: per tensor one read and one write of the kept tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_tokens(tensors: Sequence[Tensor], keep: Tensor, dim: int | Sequence[int] = 1) -> list[Tensor]:
    """See `pruneops.gather_tokens` for the contract."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    dims = dims * len(tensors) if len(dims) == 1 else dims
    return [_gather(tensor, keep, dim % tensor.dim()) for tensor, dim in zip(tensors, dims)]


def _gather(tensor, keep, dim):
    """keep [K], or [B, K] where the batch dimension comes before the tokens."""
    if keep.dim() == 1:
        return tensor.index_select(dim, keep).contiguous()
    tokens = tensor.movedim((dim - 1, dim), (0, 1))  # [1 or B, S, ...]
    tokens = tokens.expand(keep.shape[0], *tokens.shape[1:])
    batch = torch.arange(keep.shape[0], device=keep.device)[:, None]
    return tokens[batch, keep].movedim((0, 1), (dim - 1, dim)).contiguous()
