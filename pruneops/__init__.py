"""pruneops: fused operators for visual-token pruning in vision-language models."""

from importlib.metadata import PackageNotFoundError, version

from . import ops
from .backends import BackendUnavailable, backend
from .ops import *  # noqa: F403, the operators that ops.__all__ names

try:
    __version__ = version("pruneops")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["BackendUnavailable", "backend", *ops.__all__]
