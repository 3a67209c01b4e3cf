"""Pruning inside transformers models, release 5.0 and later. docs/adapters.md draws it on one page.

The rooms are imported when they are asked for, so that `prepare`, which needs no hooks, brings none.
"""

from importlib import import_module

_ROOMS = {
    "Handle": "handle",
    "patch": "handle",
    "PrunedLayer": "cache",
    "Stats": "cache",
    "FAMILIES": "models",
    "UnsupportedError": "models",
}
__all__ = list(_ROOMS)


def __getattr__(name):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
