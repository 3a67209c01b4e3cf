"""pruneops: fused operators for visual-token pruning in vision-language models."""

from importlib.metadata import PackageNotFoundError, version

from .backends import BackendUnavailable, backend
from .ops import kcenter, kcenter_varlen

try:
    __version__ = version("pruneops")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["BackendUnavailable", "backend", "kcenter", "kcenter_varlen"]
