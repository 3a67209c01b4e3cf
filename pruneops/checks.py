"""Checks of arguments, for operators, methods and adapters: errors that name the argument and the fix."""

import itertools
import os

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT = (int, torch.SymInt)
OPTIONAL_TENSOR = (torch.Tensor, type(None))


class ArgumentValueError(ValueError, RuntimeError):
    """A bad argument: ValueError for users of `pruneops.<op>`, RuntimeError through `torch.ops`."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type: TypeError from `pruneops.<op>`, RuntimeError through `torch.ops`."""


def has_values(tensor):
    """Whether the values of a tensor may be read for a check: CPU always, CUDA under PRUNEOPS_DEBUG=1."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or checking_values()


def checking_values():
    """Whether index values are checked on CUDA too, at the price of a host synchronisation."""
    return os.environ.get("PRUNEOPS_DEBUG", "0") == "1"


def check(condition, op, argument, was, expected, error=ArgumentValueError):
    """Raise `error` naming operator, argument, what it was and what was expected."""
    if not condition:
        raise error(f"pruneops.{op}: {argument} must be {expected}, got {was}")


def check_types(op, **arguments):
    """Refuse what torch's schema matching would refuse, in this package's words.

    Each argument is a pair (value, type or tuple of types).
    """
    for argument, (value, types) in arguments.items():
        if not isinstance(value, types):
            names = getattr(types, "__name__", None) or " or ".join(t.__name__ for t in types)
            check(False, op, argument, type(value).__name__, names, ArgumentTypeError)


# These two look at every call's arguments; words cost more than looking, so they are found when something is wrong.


def check_float_tensor(op, argument, tensor, ranks, last="feature"):
    """A tensor of scores or features: rank, dtype, and something in its last dimension."""
    if tensor.dim() not in ranks:
        check(False, op, argument, f"of shape {list(tensor.shape)}", f"of rank {' or '.join(map(str, ranks))}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        check(False, op, argument, tensor.dtype, f"one of {names}", ArgumentTypeError)
    if tensor.shape[-1] == 0:
        check(False, op, argument, f"of shape {list(tensor.shape)}", f"at least one {last} wide")


def check_tensor(op, argument, tensor, main, dtypes, shape, free="P"):
    """A tensor beside the main one, `main` = (name, tensor); `shape` holds None where any size is allowed, whose names
    are those in `free`."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        check(False, op, argument, tensor.dtype, names, ArgumentTypeError)
    device = main[1].device
    if tensor.device != device:
        check(False, op, argument, f"on {tensor.device}", f"on the device of {main[0]}, {device}")
    if tensor.shape != shape and (
        tensor.dim() != len(shape) or any(w is not None and w != have for w, have in zip(shape, tensor.shape))
    ):
        names = iter(free.split(", "))
        wanted = ", ".join(next(names) if size is None else str(size) for size in shape)
        check(False, op, argument, f"of shape {list(tensor.shape)}", f"of shape [{wanted}]")


def check_cu_seqlens(op, bounds, total):
    """cu_seqlens as a list: rises from 0 to the number of tokens."""
    check(bounds[0] == 0, op, "cu_seqlens[0]", bounds[0], "0")
    check(bounds[-1] == total, op, "cu_seqlens[-1]", bounds[-1], f"the {total} tokens of x")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        check(start <= end, op, "cu_seqlens", f"falling from {start} to {end} at {i}", "non-decreasing")


def check_indices(op, argument, indices, start, end):
    """All values in [start, end)."""
    if indices.numel():
        low, high = (int(extreme) for extreme in indices.aminmax())
        outside = low if low < start else high
        check(start <= low and high < end, op, argument, f"{outside} at one place", f"in [{start}, {end})")
