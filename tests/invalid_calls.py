"""Calls that an operator must refuse, and how: tables of `Bad` calls, and checks for every way in.

The words are the same everywhere; the error is ValueError or TypeError from `pruneops.<op>` and
RuntimeError from `torch.ops`.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pruneops

DTYPE_NAMES = "one of float32, float16, bfloat16"


class InvalidCall:
    """A call that must be refused, and the words of the refusal.

    `good` holds the positional arguments of a call that would be accepted, `changes` spoils it;
    with `values` the fault lies in values, which fake tensors do not have.
    """

    def __init__(self, op, good, error, argument, was, expected, values=False, **changes):
        self.op, self.error, self.argument, self.values = op, error, argument, values
        self.kwargs = {**good, **changes}
        self.args = [self.kwargs.pop(name) for name in good]
        self.message = f"pruneops.{op}: {argument} must be {expected}, got {was}"
        self.id = f"{op}-{argument}-{was}"

    def assert_raises(self):
        """Before any backend is asked: the one forced here would refuse CPU tensors."""
        with pruneops.backend("cuda"):
            with pytest.raises(self.error) as python:
                getattr(pruneops, self.op)(*self.args, **self.kwargs)
            with pytest.raises(RuntimeError) as torch_ops:
                getattr(torch.ops.pruneops, self.op)(*self.args, **self.kwargs)
        assert str(python.value) == self.message
        assert str(torch_ops.value).startswith(self.message)

    def assert_raises_on_fake_tensors(self):
        """When shapes are all there is: fake tensors, and so torch.compile and torch.export."""
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (self.args, self.kwargs))
            for door in (pruneops, torch.ops.pruneops):
                with pytest.raises(RuntimeError) as error:
                    getattr(door, self.op)(*args, **kwargs)
                assert self.message in str(error.value)

    def assert_raises_under_compile(self):
        torch._dynamo.reset()
        compiled = torch.compile(getattr(pruneops, self.op), backend="eager", fullgraph=True)
        with pytest.raises(Exception) as error:
            compiled(*self.args, **self.kwargs)
        assert self.message in str(error.value)


def invalid(calls):
    """Parametrise a test over `Bad` calls."""
    return pytest.mark.parametrize("bad", calls, ids=[bad.id for bad in calls])


def assert_type_error(op, arguments, words):
    """TypeError in this package's words, where torch's schema would refuse in its own."""
    with pytest.raises(TypeError) as error:
        getattr(pruneops, op)(**arguments)
    assert str(error.value) == f"pruneops.{op}: {words}"
    with pytest.raises((RuntimeError, TypeError)):
        getattr(torch.ops.pruneops, op)(**arguments)


def ints(*values, **options):
    return torch.tensor(values, **options)


def bools(*shape, **options):
    return torch.ones(shape, dtype=torch.bool, **options)
