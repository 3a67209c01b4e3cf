"""Argument checks for operators, methods and adapters. Every error names the operator, the argument, what was expected
and what was given."""

import itertools
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT = (int, torch.SymInt)
OPTIONAL_TENSOR = (Tensor, type(None))


class ArgumentValueError(ValueError, RuntimeError):
    """A bad argument: ValueError for users of `pruneops.<op>`, RuntimeError through `torch.ops`."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type: TypeError from `pruneops.<op>`, RuntimeError through `torch.ops`."""


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be read for a check: CPU always, CUDA under PRUNEOPS_DEBUG=1."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or checking_values()


def checking_values() -> bool:
    """Whether index values are checked on CUDA too, at the price of a host synchronisation."""
    return os.environ.get("PRUNEOPS_DEBUG", "0") == "1"


def check(
    condition: object, op: str, argument: str, got: object, expected: str, error: type[Exception] = ArgumentValueError
) -> None:
    """Raise `error` with the message "pruneops.<op>: <argument> must be <expected>, got <got>" if the condition is
    false."""
    if not condition:
        raise error(f"pruneops.{op}: {argument} must be {expected}, got {got}")


def check_types(op: str, **arguments: tuple[Any, Any]) -> None:
    """Raise ArgumentTypeError for arguments that torch's schema matching would refuse, with this package's message.

    Each argument is a pair (value, type or tuple of types).
    """
    for argument, (value, types) in arguments.items():
        if not isinstance(value, types):
            names = getattr(types, "__name__", None) or " or ".join(t.__name__ for t in types)
            check(False, op, argument, type(value).__name__, names, ArgumentTypeError)


def check_tensor_list(op: str, argument: str, tensors: Any) -> None:
    """A list or tuple of tensors."""
    check_types(op, **{argument: (tensors, (list, tuple))})
    for i, tensor in enumerate(tensors):
        check_types(op, **{f"{argument}[{i}]": (tensor, Tensor)})


# The next two run in every call. A message costs more than the check, so it is formatted only after a failure.


def check_float_tensor(op: str, argument: str, tensor: Tensor, ranks: Sequence[int], last: str = "feature") -> None:
    """A tensor of scores or features: rank, dtype, and a last dimension that is not empty."""
    if tensor.dim() not in ranks:
        check(False, op, argument, f"of shape {list(tensor.shape)}", f"of rank {' or '.join(map(str, ranks))}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        check(False, op, argument, tensor.dtype, f"one of {names}", ArgumentTypeError)
    if tensor.shape[-1] == 0:
        check(False, op, argument, f"of shape {list(tensor.shape)}", f"at least one {last} wide")


def check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    main: tuple[str, Tensor],
    dtypes: Collection[torch.dtype],
    shape: tuple[int | None, ...],
    free: str = "P",
) -> None:
    """Dtype and shape of a tensor, and that it is on the device of the main one, `main` = (name, tensor).

    `shape` holds None where any size is allowed; `free` names these sizes in the message.
    """
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


def check_same_device(op: str, argument: str, tensors: Sequence[Tensor]) -> None:
    """All tensors of a list are on one device."""
    for i, tensor in enumerate(tensors):
        there = f"the device of {argument}[0], {tensors[0].device}"
        check(tensor.device == tensors[0].device, op, f"{argument}[{i}]", f"on {tensor.device}", f"on {there}")


def check_no_overlap(op: str, argument: str, tensors: Sequence[Tensor]) -> None:
    """No tensor of a list is passed twice, and none is expanded."""
    seen: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
        check(not expanded, op, f"{argument}[{i}]", "expanded", "memory of its own for every element")
        if tensor.numel() and not isinstance(tensor, torch._subclasses.FakeTensor) and not tensor.is_meta:
            other = seen.setdefault(tensor.data_ptr(), i)
            check(other == i, op, f"{argument}[{i}]", f"the same memory as {argument}[{other}]", "passed once")


def check_cu_seqlens(op: str, bounds: Sequence[int], total: int) -> None:
    """The values of cu_seqlens rise from 0 to the number of tokens."""
    check(bounds[0] == 0, op, "cu_seqlens[0]", bounds[0], "0")
    check(bounds[-1] == total, op, "cu_seqlens[-1]", bounds[-1], f"the {total} tokens of x")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        check(start <= end, op, "cu_seqlens", f"falling from {start} to {end} at {i}", "non-decreasing")


def check_indices(op: str, argument: str, indices: Tensor, start: int, end: int) -> None:
    """All values lie in [start, end)."""
    if indices.numel():
        low, high = (int(extreme) for extreme in indices.aminmax())
        outside = low if low < start else high
        check(start <= low and high < end, op, argument, f"{outside} at one place", f"in [{start}, {end})")
