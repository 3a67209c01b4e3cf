"""Pruning inside transformers models, release 5.0 and later; docs/adapters.md describes the design.

Submodules are imported on first use, so that `prepare`, which needs no hooks, loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_MODULES = {
    "Handle": "handle",
    "patch": "handle",
    "PrunedLayer": "cache",
    "Stats": "cache",
    "FAMILIES": "models",
    "UnsupportedError": "models",
}
__all__ = ["FAMILIES", "Handle", "PrunedLayer", "Stats", "UnsupportedError", "patch"]

if TYPE_CHECKING:
    from .cache import PrunedLayer, Stats
    from .handle import Handle, patch
    from .models import FAMILIES, UnsupportedError
else:

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
