"""Calls that an operator must reject, and its message; `tests/ops/test_errors.py` makes them."""

import torch

DTYPE_NAMES = "one of float32, float16, bfloat16"


class InvalidCall:
    """A call that must be rejected, and the message.

    `valid` holds the positional arguments of a call that would be accepted, `changes` replaces or adds some;
    with `values` the error lies in values, which fake tensors do not have.
    """

    def __init__(self, op, valid, error, argument, was, expected, values=False, **changes):
        self.op, self.error, self.argument, self.values = op, error, argument, values
        self.kwargs = {**valid, **changes}
        self.args = [self.kwargs.pop(name) for name in valid]
        self.message = f"pruneops.{op}: {argument} must be {expected}, got {was}"
        self.id = f"{op}-{argument}-{was}"


class TypeErrorCall:
    """A call with a value of a wrong type, which torch's schema would reject with a message of its own."""

    def __init__(self, op, valid, message, **changes):
        self.op, self.arguments = op, {**valid, **changes}
        self.message = f"pruneops.{op}: {message}"
        self.id = f"{op}-{message}"


def ints(*values, **options):
    return torch.tensor(values, **options)


def bools(*shape, **options):
    return torch.ones(shape, dtype=torch.bool, **options)
