"""Functions whose arithmetic autocast does not change."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

DEVICE_TYPES = ("cpu", "cuda")  # of the operators

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function runs with autocast disabled, so that its results are the same inside `torch.autocast`.

    For functions of PyTorch operations. The operators of this package disable autocast themselves.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in DEVICE_TYPES:  # the test costs 0.1 us, disabling ten times as much
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call
