"""The operators: schema, argument checks, fake kernel and choice of backend."""

from .kcenter import kcenter, kcenter_varlen

__all__ = ["kcenter", "kcenter_varlen"]
