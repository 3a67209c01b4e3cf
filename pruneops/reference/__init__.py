"""The specification: one plain PyTorch program per operator, float32 arithmetic, any device."""

from .kcenter import kcenter, kcenter_varlen

__all__ = ["kcenter", "kcenter_varlen"]
