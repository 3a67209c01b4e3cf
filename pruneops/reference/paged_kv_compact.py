"""Compaction of paged caches in place: the specification.

Cost: per request and tensor an index, one read and one write of the tokens that move. The host reads `lengths`, and how
many tokens move.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kv_compact import bits


def paged_kv_compact_(
    pages: Sequence[Tensor], block_table: Tensor, keep: Tensor, lengths: Tensor, *, layout: str = "NHD"
) -> None:
    """See `pruneops.paged_kv_compact_` for the contract."""
    for tensor in pages:
        for part in bits(tensor).unbind(1) if tensor.dim() == 5 else [bits(tensor)]:
            part = part if layout == "NHD" else part.transpose(1, 2)  # [pages, page, Hk, D]
            for table, row, length in zip(block_table.long(), keep, lengths.tolist()):
                _compact_request(part, table, row[..., :length])


def _compact_request(part, table, keep):
    """table [blocks], keep [n] or [Hk, n]. Tokens that stay are not written: their page may be shared."""
    page, Hk = part.shape[1:3]
    keep = keep.expand(Hk, keep.shape[-1])
    head, place = (keep != torch.arange(keep.shape[-1], device=keep.device)).nonzero(as_tuple=True)
    source = keep[head, place]
    part[table[place // page], place % page, head] = part[table[source // page], source % page, head]
