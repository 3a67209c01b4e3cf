"""The detector of host synchronisations reports them, and nothing else."""

import pytest
import torch

from tests import host_sync
from tests.host_sync import host_syncs, no_host_sync

X = torch.arange(6.0)
ONE, MASK = torch.tensor(3), X > 2

WAITS = {
    "item": "x[0].item()",
    "tolist": "x.tolist()",
    "bool": "bool(mask.any())",
    "if": "1 if mask.any() else 0",
    "int": "int(one)",
    "float": "float(one)",
    "index": "[0] * one",
    "range": "range(one)",
    "slice": "x[:one]",
    "position": "x[one]",
    "contains": "3.0 in x",
    "nonzero": "mask.nonzero()",
    "torch.nonzero": "torch.nonzero(mask)",
    "where": "torch.where(mask)",
    "mask": "x[mask]",
    "store": "x.clone().__setitem__(mask, x[:3])",
    "masked_select": "torch.masked_select(x, mask)",
    "equal": "torch.equal(x, x)",
    "unique": "x.unique()",
    "repeat_interleave": "x.repeat_interleave(torch.arange(6))",
    "upload": "torch.tensor([1, 2], device=x.device)",
    "new_tensor": "x.new_tensor([1, 2])",
}
PASSES = {
    "cpu": "x.cpu().tolist(), int(one.cpu())",
    "numpy": "x.numpy().tolist()",
    "positions": "x[torch.arange(3)]",
    "fill": "x.clone().__setitem__(mask, 0.0)",
    "static": "torch.nonzero_static(mask, size=3), x.repeat_interleave(torch.arange(6), output_size=15)",
    "host": "torch.tensor([1, 2]).to(x.device, non_blocking=True), torch.tensor([1], device='cpu')",
    "shape": "len(x), x.shape[0], x.unbind(), x.topk(2)",
}
METHODS = str(host_sync.ROOT / "pruneops" / "methods" / "made_up.py")


def run(code, file=METHODS):
    exec(compile("\n" * 6 + code, file, "exec"), {"x": X, "one": ONE, "mask": MASK, "torch": torch})


@pytest.mark.parametrize("code", WAITS.values(), ids=WAITS)
def test_waits(code):
    with pytest.raises(AssertionError, match=r"pruneops/methods/made_up\.py:7: "), no_host_sync("pruneops/methods"):
        run(code)
    with host_syncs("pruneops/adapters", "pruneops/methods/made_up.py") as places:
        run(code)
    assert len(places) == 1


@pytest.mark.parametrize("code", PASSES.values(), ids=PASSES)
def test_passes(code):
    with no_host_sync("pruneops/methods"):
        run(code)


@pytest.mark.parametrize("file", ["pruneops/ops/made_up.py", "pruneops/methods_of_others.py", "tests/made_up.py"])
def test_other_folders(file):
    with no_host_sync("pruneops/methods"):
        for code in WAITS.values():
            run(code, str(host_sync.ROOT / file))


def test_nearest_frame():
    """A read inside an operator that a method calls counts for the operator."""
    above = "exec(compile(code, file, 'exec'), {'x': x})"
    names = {"x": X, "code": "x.tolist()", "file": str(host_sync.ROOT / "pruneops" / "ops" / "made_up.py")}
    with no_host_sync("pruneops/methods"):
        exec(compile(above, METHODS, "exec"), names)
    with pytest.raises(AssertionError), no_host_sync("pruneops/ops"):
        exec(compile(above, METHODS, "exec"), names)


def test_nothing_is_left_behind():
    before = {name: getattr(torch.Tensor, name) for name in (*host_sync.READS, "cpu", "new_tensor")}
    with pytest.raises(KeyError), no_host_sync("pruneops/methods"):
        raise KeyError
    assert before == {name: getattr(torch.Tensor, name) for name in before}
    assert "item" not in torch.Tensor.__dict__ and torch.tensor.__module__ != __name__
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()
