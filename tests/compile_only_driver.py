"""A Triton driver that loads kernels and runs none, to test and time launchers without a GPU.

Import it in a separate process, outside of Triton's interpreter. Compilation, Triton's driver and its launchers are the
real ones, over a stub libcuda that only counts launches (stub_libcuda.c). Tensors are on the CPU.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

_folder = tempfile.TemporaryDirectory()
_library = Path(_folder.name, "libcuda.so.1")
_source = Path(__file__).with_name("stub_libcuda.c")
subprocess.run(
    [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", _source, "-o", _library],
    check=True,
)
os.environ["TRITON_LIBCUDA_PATH"] = _folder.name
_stub = ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

from pruneops.triton_kernels import _launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime import driver  # noqa: E402


class CompileOnlyDriver(CudaDriver):
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


_driver = CompileOnlyDriver()
_driver.get_current_device = lambda: 0
_driver.get_current_stream = lambda device: 0
_driver.get_device_capability = lambda device=0: (9, 0)
driver.set_active(_driver)

launches, compilations = [], []  # (kernel name, spec) of each
_compile, _call = _launch.Kernel.compile, _launch.Kernel.__call__


def _recorded_compile(kernel, spec, target=None):
    compilations.append((kernel.__name__, spec))
    return _compile(kernel, spec, target)


def _recorded_call(kernel, spec, grid, *args):
    before = launch_count()
    _call(kernel, spec, grid, *args)
    assert launch_count() == before + 1, f"{kernel.__name__} with grid {grid} did not reach the driver"
    launches.append((kernel.__name__, spec))


def launch_count():
    """Number of kernel launches so far."""
    return ctypes.c_long.in_dll(_stub, "stub_launches").value


def record():
    """Record launches and compilations from now on. Costs the host a few us a launch."""
    _launch.Kernel.compile, _launch.Kernel.__call__ = _recorded_compile, _recorded_call
