"""What every operator shares: its schema, its errors, its dispatch."""

import os

import torch

from .. import backends

_library = torch.library.Library("pruneops", "DEF")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ArgumentValueError(ValueError, RuntimeError):
    """A bad argument: ValueError for users of `pruneops.<op>`, RuntimeError through `torch.ops`."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type: TypeError from `pruneops.<op>`, RuntimeError through `torch.ops`."""


def define(schema, check, fake, implementations):
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
    """
    name = schema.partition("(")[0]
    qualified = f"pruneops::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @torch.no_grad()
    def run(first, *args, **kwargs):
        check(first, *args, **kwargs)
        return implementations[backends.choose(first.device.type)](first, *args, **kwargs)

    def run_fake(*args, **kwargs):
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(qualified, run_fake, lib=_library)
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # selections have no gradient


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
        names = getattr(types, "__name__", None) or " or ".join(t.__name__ for t in types)
        expect(isinstance(value, types), op, argument, type(value).__name__, names, ArgumentTypeError)
