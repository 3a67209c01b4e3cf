"""pruneops: fused operators for visual-token pruning in vision-language models."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from . import ops
from .backends import BackendUnavailable, backend
from .ops import *  # noqa: F403, the operators in ops.__all__

try:
    __version__ = version("pruneops")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_ADAPTERS = {"patch": "transformers", "prepare": "prepare", "UnsupportedError": "transformers"}
__all__ = ["BackendUnavailable", "backend", *ops.__all__]

if TYPE_CHECKING:
    from . import methods as methods
    from .adapters.prepare import prepare as prepare
    from .adapters.transformers.handle import patch as patch
    from .adapters.transformers.models import UnsupportedError as UnsupportedError
else:

    def __getattr__(name):
        """Import the methods, and what needs transformers, on first use."""
        if name == "methods":
            return import_module(".methods", __name__)
        if name not in _ADAPTERS:
            raise AttributeError(f"module 'pruneops' has no attribute {name!r}")
        try:
            return getattr(import_module(f".adapters.{_ADAPTERS[name]}", __name__), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            raise ImportError(
                f"pruneops.{name} needs transformers 5.0 or later: pip install 'pruneops[transformers]'"
            ) from None
