"""Detection of host synchronisations in the package's code, on the CPU, where none takes place.

    with no_host_sync("pruneops/methods"):   # AssertionError with file and line
    with host_syncs("pruneops/methods") as places:   # a list of them

A call counts if the nearest frame of the package on the stack is in one of the folders, so reads inside an operator (on
the CPU argument checks read values) count for `pruneops/ops`. Reading the result of `.cpu()` or `.numpy()` does not
count: these mark an intended synchronisation.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pruneops", ROOT / "triton_kernels"
READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__complex__", "__index__")

aten = torch.ops.aten
# Operators whose results or shapes depend on values, which a CUDA tensor has to copy to the host first.
READ_INSIDE = {
    aten._local_scalar_dense.default: "a value read",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
}
STORES = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


@contextlib.contextmanager
def no_host_sync(*folders):
    """Fail at the first call that makes the host wait.

    Parameters
    ----------
    folders : str
        Folders or files, from the root of the checkout: "pruneops/methods".

    Raises
    ------
    AssertionError
        "pruneops/methods/dart.py:83: item"
    """
    with _detect(folders, _fail):
        yield


@contextlib.contextmanager
def host_syncs(*folders):
    """The same calls as a list of "file:line: call", which grows while they run."""
    places = []
    with _detect(folders, places.append):
        yield places


def _fail(place):
    raise AssertionError(f"the host waits for the device at {place}")


def _detect(folders, report):
    stack = contextlib.ExitStack()
    detector = _Detector([str(ROOT / folder) for folder in folders], report)
    for name in READS:
        stack.enter_context(mock.patch.object(torch.Tensor, name, detector.read(name, getattr(torch.Tensor, name))))
    stack.enter_context(mock.patch.object(torch.Tensor, "cpu", _marked(torch.Tensor.cpu)))
    uploads = (torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")
    for owner, name in uploads:
        stack.enter_context(mock.patch.object(owner, name, detector.upload(name, getattr(owner, name))))
    stack.enter_context(detector)
    return stack


class _Detector(TorchDispatchMode):
    """Sees reads by C++ code as dispatched operators; patched tensor methods see reads by Python code."""

    def __init__(self, folders, report):
        super().__init__()
        self.folders, self.report, self.quiet = folders, report, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = _synchronisation(function, args, kwargs)
        if call and not self.quiet:
            self.record(call)
        return function(*args, **kwargs)

    def record(self, call):
        place = _nearest(sys._getframe(1))
        if place and any(place[0] == folder or place[0].startswith(f"{folder}/") for folder in self.folders):
            self.report(f"{Path(place[0]).relative_to(ROOT)}:{place[1]}: {call}")

    def read(self, name, original):
        def call(tensor, *args, **kwargs):
            if not self.quiet and not getattr(tensor, "_from_cpu", False):
                self.record(name)
            before, self.quiet = self.quiet, True  # reads by C++ inside are the same read
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self.quiet = before

        return call

    def upload(self, name, original):
        """A tensor made of Python numbers on a device, for which the host waits; a literal "cpu" is no device."""

        def call(*args, **kwargs):
            device = kwargs.get("device")
            here = device is None or (isinstance(device, str) and device == "cpu")
            if name == "new_tensor" or not here:
                self.record(f"{name} on a device")
            return original(*args, **kwargs)

        return call


def _synchronisation(function, args, kwargs):
    """The name of a synchronisation in a call of a torch operator, or None."""
    if function is aten.index.Tensor and _masks(args[1]):
        return "an index by a mask"
    if function in STORES and _masks(args[1]) and args[2].numel() != 1:
        return "a store by a mask"
    if function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    return READ_INSIDE.get(function)


def _masks(indices):
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _nearest(frame):
    """(file, line) of the nearest frame of the package."""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/transformers/" in file and not file.startswith(f"{ROOT}/pruneops/"):
            return None  # the model's code inside a pass of the adapters does not count
        if any(file.startswith(f"{folder}/") for folder in PACKAGE):
            return file, frame.f_lineno
        frame = frame.f_back
    return None


def _marked(original):
    """`Tensor.cpu` whose result may be read; the result is a new tensor on the CPU too."""

    def call(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        result = result.view_as(result) if result is tensor else result
        result._from_cpu = True
        return result

    return call
