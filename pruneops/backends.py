"""Which implementation of an operator runs, and why another cannot.

An operator registers one function per backend, all of the same signature. `auto` takes the
first that can run on the given tensors; `with pruneops.backend("triton"):` forces one.
"""

import contextlib
import contextvars
import functools
import importlib
import json
import os
import warnings
from pathlib import Path

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
# Order of preference per device. CUDA C++ comes after Triton until a recorded run in
# benchmarks/results/ shows an operator right and faster on it.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

_forced = contextvars.ContextVar("pruneops_backend", default="auto")


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why."""


@contextlib.contextmanager
def backend(name):
    """Force one backend for every pruneops operator called inside the block.

    Parameters
    ----------
    name : {"auto", "reference", "cpu", "triton", "cuda"}

    Raises
    ------
    ValueError
        If `name` is no backend.
    BackendUnavailable
        When an operator is called on tensors the backend cannot serve; the message says why.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"pruneops.backend: name must be one of {('auto', *BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(device_type, operator="this", implementations=BACKENDS):
    """Name of the backend that serves an operator on a device, honouring `backend(...)`.

    `implementations` holds the names of the backends that the operator has; all by default.
    """
    name = _forced.get()
    if name != "auto":
        reason = why_not(name, device_type)
        if reason is None and name not in implementations:
            reason = f"{operator} has no such kernel; it has {', '.join(implementations)}"
        if reason:
            raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")
        return name
    order = [name for name in AUTO.get(device_type, ("reference",)) if name in implementations]
    name = next(name for name in order if why_not(name, device_type) is None)
    if name == "reference" and len(order) > 1:
        _warn_reference(device_type, "; ".join(f"{n}: {why_not(n, device_type)}" for n in order[:-1]))
    return name


@functools.cache
def _warn_reference(device_type, reasons):
    warnings.warn(
        f"pruneops: {device_type.upper()} tensors run on the slow PyTorch reference ({reasons}). "
        "`pruneops info` says more.",
        stacklevel=2,
    )


def why_not(name, device_type):
    """None if backend `name` can serve tensors on `device_type`, else the reason in words."""
    if name == "reference":
        return None
    if name == "cpu":
        return f"it serves CPU tensors, not {device_type.upper()}" if device_type != "cpu" else native_problem()
    if name == "triton":
        if device_type == "cpu" and not interpreting():
            return "Triton serves CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before import)"
        if device_type not in ("cpu", "cuda"):
            return f"it serves CUDA tensors, not {device_type.upper()}"
        return triton_problem()
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type.upper()}"
    return cuda_problem()


def interpreting():
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


@functools.cache
def build_record():
    """What the build wrote down about itself: {"cpu": {...}, "cuda": {...}}."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _not_built(part):
    reason = build_record().get(part, {}).get("reason", "the package was installed without a build step")
    return f"not built: {reason}"


@functools.cache
def native_problem():
    """None if the C++ kernels are loaded, else why not."""
    if not list(Path(__file__).parent.glob("_C.*")):
        return _not_built("cpu")
    try:
        importlib.import_module("pruneops._C")
    except ImportError as error:
        return f"the native module does not load: {error}"
    return None


@functools.cache
def triton_problem():
    """None if Triton imports, else why not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


@functools.cache
def cuda_problem():
    """None if the CUDA kernels are loaded, else why not."""
    problem = native_problem()  # _C defines the operators that the CUDA library implements
    if problem:
        return problem
    library = next(Path(__file__).parent.glob("_cuda.*"), None)
    if library is None:
        return _not_built("cuda")
    if torch.version.cuda is None:
        return "built, but this PyTorch is a CPU build"
    if not torch.cuda.is_available():
        return "built, but PyTorch sees no GPU"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None
