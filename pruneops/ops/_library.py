"""What every operator shares: its schema, its errors, its dispatch."""

import functools
import itertools
import os

import torch

from .. import backends

_library = torch.library.Library("pruneops", "DEF")
_native = torch.library.Library("pruneops_native", "IMPL")  # C++ and CUDA kernels under the names of their operators
OPERATORS = {}  # name -> backends that have it
# What launches kernels and nothing that autograd would record: the context that turns it off costs 3 us.
NO_AUTOGRAD = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
AUTOCAST = ("cpu", "cuda")  # device types of the operators

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT = (int, torch.SymInt)
OPTIONAL_TENSOR = (torch.Tensor, type(None))


class ArgumentValueError(ValueError, RuntimeError):
    """A bad argument: ValueError for users of `pruneops.<op>`, RuntimeError through `torch.ops`."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type: TypeError from `pruneops.<op>`, RuntimeError through `torch.ops`."""


def define(schema, check, fake, implementations, *, own_checks=(), gradient=None, shape_class=None):
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
    implementations : dict
        Backend name -> function of the operator's arguments.
    own_checks : tuple of str
        Backends that refuse bad arguments themselves, by a RuntimeError before anything is launched, and do nothing
        that autograd would record; `check` is called to say what is wrong then, and saves its time otherwise.
    shape_class : callable, optional
        Of the operator's arguments: the word for their shapes in `backends.TRITON_FIRST`.
    gradient : (backward, setup_context), optional
        For `torch.library.register_autograd`; without it the operator has no gradient.
    """
    name = schema.partition("(")[0]
    qualified = f"pruneops::{name}"
    OPERATORS[name] = tuple(implementations)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args, **kwargs):
        # of operators on lists of tensors, the second argument is a tensor
        device = (args[0] if isinstance(args[0], torch.Tensor) else args[1]).device
        if torch.is_autocast_enabled(device.type):  # it would round the float32 products of PyTorch code
            with torch.autocast(device.type, enabled=False):
                return run(*args, **kwargs)
        try:
            own_class = shape_class(*args, **kwargs) if shape_class and device.type == "cuda" else None
            chosen = backends.choose(device.type, name, implementations, own_class)
            if chosen in own_checks and (chosen == "cpu" or not debugging()):
                return implementations[chosen](*args, **kwargs)
        except Exception:  # a bad argument comes first
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


def without_autocast(function):
    """The function with autocast off inside: what it answers there is what it answers elsewhere.

    For functions beside the operators, which see to it themselves.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        for device in AUTOCAST:  # looking costs 0.1 us, turning it off ten times as much
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def is_concrete(tensor):
    """Whether the values of a tensor may be read for a check: CPU always, CUDA under PRUNEOPS_DEBUG=1."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or debugging()


def debugging():
    """Whether index values are checked on CUDA too, at the price of a host synchronisation."""
    return os.environ.get("PRUNEOPS_DEBUG", "0") == "1"


def expect(condition, op, argument, was, expected, error=ArgumentValueError):
    """Raise `error` naming operator, argument, what it was and what was expected."""
    if not condition:
        raise error(f"pruneops.{op}: {argument} must be {expected}, got {was}")


def expect_type(op, **arguments):
    """Refuse what torch's schema matching would refuse, in this package's words.

    Each argument is a pair (value, type or tuple of types).
    """
    for argument, (value, types) in arguments.items():
        if not isinstance(value, types):
            names = getattr(types, "__name__", None) or " or ".join(t.__name__ for t in types)
            expect(False, op, argument, type(value).__name__, names, ArgumentTypeError)


# These two look at every call's arguments; words cost more than looking, so they are found when something is wrong.


def expect_floats(op, argument, tensor, ranks, last="feature"):
    """A tensor of scores or features: rank, dtype, and something in its last dimension."""
    if tensor.dim() not in ranks:
        expect(False, op, argument, f"of shape {list(tensor.shape)}", f"of rank {' or '.join(map(str, ranks))}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        expect(False, op, argument, tensor.dtype, f"one of {names}", ArgumentTypeError)
    if tensor.shape[-1] == 0:
        expect(False, op, argument, f"of shape {list(tensor.shape)}", f"at least one {last} wide")


def expect_companion(op, argument, tensor, main, dtypes, shape, free="P"):
    """A tensor beside the main one, `main` = (name, tensor); `shape` holds None where any size is allowed, whose names
    are those in `free`."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        expect(False, op, argument, tensor.dtype, names, ArgumentTypeError)
    device = main[1].device
    if tensor.device != device:
        expect(False, op, argument, f"on {tensor.device}", f"on the device of {main[0]}, {device}")
    if tensor.shape != shape and (
        tensor.dim() != len(shape) or any(w is not None and w != have for w, have in zip(shape, tensor.shape))
    ):
        names = iter(free.split(", "))
        wanted = ", ".join(next(names) if size is None else str(size) for size in shape)
        expect(False, op, argument, f"of shape {list(tensor.shape)}", f"of shape [{wanted}]")


def expect_bounds(op, bounds, total):
    """cu_seqlens as a list: rises from 0 to the number of tokens."""
    expect(bounds[0] == 0, op, "cu_seqlens[0]", bounds[0], "0")
    expect(bounds[-1] == total, op, "cu_seqlens[-1]", bounds[-1], f"the {total} tokens of x")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        expect(start <= end, op, "cu_seqlens", f"falling from {start} to {end} at {i}", "non-decreasing")


def expect_indices(op, argument, indices, start, end):
    """All values in [start, end)."""
    if indices.numel():
        low, high = (int(extreme) for extreme in indices.aminmax())
        outside = low if low < start else high
        expect(start <= low and high < end, op, argument, f"{outside} at one place", f"in [{start}, {end})")


def dense(tensor):
    """The tensor with its last dimension contiguous; `contiguous` would keep an odd stride of a dimension of size 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
