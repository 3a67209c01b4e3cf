"""The operators: schema, argument checks, fake kernel and choice of backend."""

from .assign_ranks import assign_ranks
from .exclusive_bottomk import exclusive_bottomk, pivot_bottomk
from .kcenter import kcenter, kcenter_varlen
from .pivot_cosine import duplication, duplication_varlen, pivot_cosine, pivot_cosine_varlen

__all__ = [
    "assign_ranks",
    "duplication",
    "duplication_varlen",
    "exclusive_bottomk",
    "kcenter",
    "kcenter_varlen",
    "pivot_bottomk",
    "pivot_cosine",
    "pivot_cosine_varlen",
]
