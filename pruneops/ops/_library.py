"""Definition of the operators: schema, argument checks, dispatch to a backend, fake kernel, gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import checking_values

_library = torch.library.Library("pruneops", "DEF")
_native = torch.library.Library("pruneops_native", "IMPL")  # C++ and CUDA kernels under the names of their operators
OPERATORS: dict[str, tuple[str, ...]] = {}  # name -> backends that implement it
# Backends that launch kernels only. They do nothing that autograd would record, so `no_grad`, 3 us, is left out.
NO_AUTOGRAD = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def define(
    schema: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    implementations: Mapping[str, Callable[..., Any]],
    *,
    self_checking: tuple[str, ...] = (),
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    shape_class: Callable[..., str | None] | None = None,
) -> None:
    """Define `pruneops::<op>` from its schema.

    Parameters
    ----------
    schema : str
        Torch schema; the name before the parenthesis is the operator's.
    check : callable
        Raises ArgumentValueError or ArgumentTypeError on bad arguments; must not read
        tensor values on fake tensors.
    fake : callable
        Empty outputs of the exact shapes.
    implementations : mapping
        Backend name -> function of the operator's arguments.
    self_checking : tuple of str
        Backends that refuse bad arguments themselves, by a RuntimeError before anything is launched, and do nothing
        that autograd would record. For these `check` runs only after an error, to give its message.
    shape_class : callable, optional
        Maps the operator's arguments to their shape class in `backends.TRITON_FIRST`, or None.
    gradient : (backward, setup_context), optional
        For `torch.library.register_autograd`; without it the operator has no gradient.
    """
    name = schema.partition("(")[0]
    qualified = f"pruneops::{name}"
    OPERATORS[name] = tuple(implementations)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args, **kwargs):
        # of operators on lists of tensors, the second argument is a tensor
        device = (args[0] if isinstance(args[0], Tensor) else args[1]).device
        if torch.is_autocast_enabled(device.type):  # it would round the float32 products of PyTorch code
            with torch.autocast(device.type, enabled=False):
                return run(*args, **kwargs)
        try:
            shapes = shape_class(*args, **kwargs) if shape_class and device.type == "cuda" else None
            chosen = backends.choose(device.type, name, implementations, shapes)
            if chosen in self_checking and (chosen == "cpu" or not checking_values()):
                return implementations[chosen](*args, **kwargs)
        except Exception:  # an error about an argument takes precedence
            check(*args, **kwargs)
            raise
        if chosen in NO_AUTOGRAD[device.type]:
            check(*args, **kwargs)
            return implementations[chosen](*args, **kwargs)
        with torch.no_grad():
            check(*args, **kwargs)
            return implementations[chosen](*args, **kwargs)

    def run_fake(*args, **kwargs):
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    _native.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(qualified, run_fake, lib=_library)
    if gradient is None:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(qualified, gradient[0], setup_context=gradient[1], lib=_library)


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; `contiguous` would keep an odd stride of a dimension of size 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
