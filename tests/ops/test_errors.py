"""Invalid calls of every operator: which error is raised, with which message, through which entry point.

The message is the same everywhere; the error is ValueError or TypeError from `pruneops.<op>` and RuntimeError from
`torch.ops`.
"""

import importlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import pruneops
from pruneops.ops.gather_tokens import token_dims
from tests import specs
from tests.contract import CPU_TARGETS, assert_same_bits, on_targets, to_device

SPECS = [specs.spec(name) for name in specs.NAMES]
INVALID = [call for spec in SPECS for call in spec.INVALID]
WITHOUT_VALUES = [call for call in INVALID if not call.values]
# Calls of these operators are checked by every backend, and must write nothing.
TOKEN_COPY = {
    "gather_tokens": lambda kernels, tensors, keep, dim=1: kernels.gather_tokens(
        tensors, keep, token_dims(tensors, dim)
    ),
    "kv_compact": lambda kernels, caches, keep, lengths=None: kernels.kv_compact(caches, keep, lengths),
    "kv_compact_": lambda kernels, caches, keep, lengths=None: kernels.kv_compact_(caches, keep, lengths),
    "paged_kv_compact_": lambda kernels, *args, layout="NHD": kernels.paged_kv_compact_(*args, layout),
}
# Arguments whose errors are raised while torch.compile traces a call.
UNDER_COMPILE = {
    "assign_ranks": ["j"],
    "attention_mass": ["groups", "lse"],
    "attention_received": ["query_mask"],
    "duplication": ["reduce"],
    "duplication_varlen": ["reduce"],
    "exclusive_bottomk": ["quotas[1]", "sum(quotas)"],
    "kcenter": ["k"],
    "kcenter_varlen": ["ks[1]"],
    "pivot_bottomk": ["sum(quotas)"],
    "pivot_cosine": ["mask"],
}


def over(calls):
    return pytest.mark.parametrize("call", calls, ids=[call.id for call in calls])


@over(INVALID)
def test_errors(call):
    """Raised before any backend is chosen: the one forced here would reject CPU tensors."""
    with pruneops.backend("cuda"):
        with pytest.raises(call.error) as python:
            getattr(pruneops, call.op)(*call.args, **call.kwargs)
        with pytest.raises(RuntimeError) as torch_ops:
            getattr(torch.ops.pruneops, call.op)(*call.args, **call.kwargs)
    assert str(python.value) == call.message
    assert str(torch_ops.value).startswith(call.message)


@over(WITHOUT_VALUES)
def test_errors_on_fake_tensors(call):
    """Without values: fake tensors, and so torch.compile and torch.export."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (call.args, call.kwargs))
        for entry_point in (pruneops, torch.ops.pruneops):
            with pytest.raises(RuntimeError) as error:
                getattr(entry_point, call.op)(*args, **kwargs)
            assert call.message in str(error.value)


@over([call for call in WITHOUT_VALUES if call.argument in UNDER_COMPILE.get(call.op, ())])
def test_errors_under_compile(call):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(pruneops, call.op), backend="eager", fullgraph=True)
    with pytest.raises(Exception) as error:
        compiled(*call.args, **call.kwargs)
    assert call.message in str(error.value)


@over([call for spec in SPECS for call in spec.TYPE_ERRORS])
def test_errors_of_type(call):
    """TypeError with this package's message, where torch's schema would raise its own."""
    with pytest.raises(TypeError) as error:
        getattr(pruneops, call.op)(**call.arguments)
    assert str(error.value) == call.message
    with pytest.raises((RuntimeError, TypeError)):
        getattr(torch.ops.pruneops, call.op)(**call.arguments)


@on_targets(*CPU_TARGETS)
@over([call for call in INVALID if call.op in TOKEN_COPY])
def test_errors_of_backends(target, call):
    """The same message from every backend, and nothing written."""
    before = [tensor.clone() for tensor in call.args[0]]
    with pruneops.backend(target.backend), pytest.raises(call.error) as error:
        getattr(pruneops, call.op)(*call.args, **call.kwargs)
    assert str(error.value) == call.message
    assert_same_bits(list(call.args[0]), before)


@over([call for call in INVALID if call.op in TOKEN_COPY and (not call.values or "same memory" in call.id)])
def test_triton_launcher_rejects(call):
    """As on a GPU, where nothing checks the arguments before the launcher does."""
    kernels = importlib.import_module(f"pruneops.triton_kernels.{call.op.rstrip('_')}")
    with pytest.raises(RuntimeError, match=r"^pruneops"):  # a launch without a GPU is a RuntimeError of Triton's
        TOKEN_COPY[call.op](kernels, *call.args, **call.kwargs)


@pytest.mark.gpu
@over([call for call in INVALID if call.values])
def test_errors_of_values_on_cuda(call, monkeypatch):
    """Values on a GPU are read under PRUNEOPS_DEBUG=1."""
    monkeypatch.setenv("PRUNEOPS_DEBUG", "1")
    args, kwargs = to_device((call.args, call.kwargs), "cuda")
    with pytest.raises(call.error) as error:
        getattr(pruneops, call.op)(*args, **kwargs)
    assert str(error.value) == call.message


@pytest.mark.gpu
@over([call for call in INVALID if call.id.endswith("-on meta")])
def test_errors_of_devices_on_cuda(call):
    """A CPU tensor among CUDA ones."""

    def moved(tensor):
        return torch.zeros_like(tensor, device="cpu" if tensor.is_meta else "cuda")

    args, kwargs = tree_map_only(torch.Tensor, moved, (call.args, call.kwargs))
    with pytest.raises(ValueError) as error:
        getattr(pruneops, call.op)(*args, **kwargs)
    assert str(error.value) == call.message.replace("cpu", "cuda:0").replace("on meta", "on cpu")
