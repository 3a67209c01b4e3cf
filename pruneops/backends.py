"""Choice of the backend that runs an operator, and why a backend cannot run.

An operator registers one function per backend, all of the same signature. `auto` takes the
first that can run on the given tensors; ``with pruneops.backend("triton"):`` forces one.
"""

import contextlib
import contextvars
import functools
import importlib
import json
import os
import warnings
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any, Literal

import torch

BackendName = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS = ("reference", "cpu", "triton", "cuda")
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # order of preference
# (operator, shape class) for which Triton is preferred on CUDA: CUDA C++ is not made for these shapes, or a record
# shows Triton to be faster, host time included. The operators' files define their shape classes. Shapes without a
# record run in CUDA C++, because a Triton launch costs more host time.
TRITON_FIRST = {
    ("attention_mass", "many rows"),
    ("attention_received", "many rows"),
}

_forced: contextvars.ContextVar[str] = contextvars.ContextVar("pruneops_backend", default="auto")


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why."""


@contextlib.contextmanager
def backend(name: BackendName) -> Generator[None, None, None]:
    """Force one backend for every pruneops operator called inside the block.

    Parameters
    ----------
    name : {"auto", "reference", "cpu", "triton", "cuda"}
        "auto" restores the automatic choice.

    Raises
    ------
    ValueError
        If `name` is no backend.
    BackendUnavailable
        When an operator is called on tensors that the backend cannot run on; the message says why.

    Notes
    -----
    A context manager for this thread or task. Blocks can be nested; the innermost counts.

    Examples
    --------
    >>> import torch, pruneops
    >>> with pruneops.backend("reference"):
    ...     pruneops.kcenter(torch.eye(3), 2).indices
    tensor([0, 1])
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"pruneops.backend: name must be one of {('auto', *BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(
    device_type: str,
    operator: str = "this",
    implementations: Collection[str] = BACKENDS,
    shape_class: str | None = None,
) -> str:
    """Name of the backend that runs an operator on a device, honouring `backend`.

    Parameters
    ----------
    device_type : str
        As ``torch.device.type``.
    operator : str
    implementations : collection of str
        Backends that implement the operator; all by default.
    shape_class : str, optional
        Of the arguments, as in `TRITON_FIRST`.

    Raises
    ------
    BackendUnavailable
        If the forced backend cannot run here.
    """
    name = _forced.get()
    if name != "auto":
        reason = why_not(name, device_type)
        if reason is None and name not in implementations:
            reason = f"{operator} has no such kernel; it has {', '.join(implementations)}"
        if reason:
            raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")
        return name
    order = AUTO.get(device_type, ("reference",))
    if shape_class and device_type == "cuda" and (operator, shape_class) in TRITON_FIRST:
        order = ("triton", "cuda", "reference")
    name = next(name for name in order if name in implementations and why_not(name, device_type) is None)
    if name == "reference" and device_type in AUTO:
        reasons = (f"{n}: {why_not(n, device_type)}" for n in order if n in implementations and n != name)
        _warn_reference(device_type, "; ".join(reasons))
    return name


@functools.cache
def _warn_reference(device_type: str, reasons: str) -> None:
    if not reasons:
        return
    warnings.warn(
        f"pruneops: {device_type.upper()} tensors run on the slow PyTorch reference ({reasons}). "
        "`pruneops info` says more.",
        stacklevel=2,
    )


def why_not(name: str, device_type: str) -> str | None:
    """None if backend `name` can run on tensors of `device_type`, else the reason as a text."""
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


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


@functools.cache
def build_record() -> dict[str, Any]:
    """The record of the build: ``{"cpu": {...}, "cuda": {...}, "archs": [...]}``; empty without a build step."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _not_built(part):
    reason = build_record().get(part, {}).get("reason", "the package was installed without a build step")
    return f"not built: {reason}"


@functools.cache
def native_problem() -> str | None:
    """None if the C++ kernels are loaded, else the reason."""
    if not list(Path(__file__).parent.glob("_C.*")):
        return _not_built("cpu")
    try:
        importlib.import_module("pruneops._C")
    except ImportError as error:
        return f"built, but it does not load: {error}"
    return None


@functools.cache
def triton_problem() -> str | None:
    """None if Triton imports, else the reason."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


@functools.cache
def cuda_problem() -> str | None:
    """None if the CUDA kernels are loaded, else the reason."""
    problem = native_problem()  # _C defines the operators that the CUDA library implements
    if problem:
        return problem if problem.startswith("not built") else _unusable("C++", problem)
    library = next(Path(__file__).parent.glob("_cuda.*"), None)
    if library is None:
        return _not_built("cuda")
    if torch.version.cuda is None:
        return "built, but this PyTorch is a CPU build"
    if not torch.cuda.is_available():
        return "built, but PyTorch sees no GPU"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # the message of torch names the file, that of the loader the cause
        return _unusable("CUDA", f"built, but it does not load: {error.__cause__ or error}")
    return _no_kernel_image(build_record().get("archs", []))


def _no_kernel_image(archs):
    """None if the library has code for every GPU that PyTorch sees, else how to build it.

    Code for sm_XY runs on sm_XZ with Z >= Y.
    """
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if archs and not any(int(arch) // 10 == major and int(arch) % 10 <= minor for arch in archs):
            built = ", ".join(f"sm_{arch}" for arch in archs)
            lacking = f"built for {built}, not for the sm_{major}{minor} of {torch.cuda.get_device_name(index)}"
            setting = f'PRUNEOPS_CUDA_ARCHS="{";".join(archs)};{major}{minor}"'
            return _unusable("CUDA", f"{lacking}: install again with {setting}")
    return None


def _unusable(kind: str, problem: str) -> str:
    """The problem, after a warning: kernels that were built are expected to run, and others would replace them
    silently."""
    warnings.warn(f"pruneops: {kind} kernels {problem}. Slower ones take their place.", stacklevel=4)
    return problem
