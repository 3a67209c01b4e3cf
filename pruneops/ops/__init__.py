"""The operators: schema, argument checks, fake kernels and dispatch to a backend."""

from ._library import OPERATORS as OPERATORS
from .assign_ranks import assign_ranks
from .attention_mass import attention_mass, cross_modal_ratio, group_distribution
from .attention_received import attention_received
from .exclusive_bottomk import exclusive_bottomk, pivot_bottomk
from .gather_tokens import gather_tokens
from .kcenter import kcenter, kcenter_varlen
from .kv_compact import kv_compact, kv_compact_
from .paged_kv_compact import paged_kv_compact_, pages_in_use
from .pivot_cosine import duplication, duplication_varlen, pivot_cosine, pivot_cosine_varlen

__all__ = [
    "assign_ranks",
    "attention_mass",
    "attention_received",
    "cross_modal_ratio",
    "duplication",
    "duplication_varlen",
    "exclusive_bottomk",
    "gather_tokens",
    "group_distribution",
    "kcenter",
    "kcenter_varlen",
    "kv_compact",
    "kv_compact_",
    "paged_kv_compact_",
    "pages_in_use",
    "pivot_bottomk",
    "pivot_cosine",
    "pivot_cosine_varlen",
]
