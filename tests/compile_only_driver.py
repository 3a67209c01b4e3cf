"""A card that loads every kernel and runs none, so that launchers can be tried and timed whole without a GPU.

Import it in a process of its own, outside of Triton's interpreter. Compilation, Triton's driver and its launchers are
the real ones, over a libcuda that only counts (stub_libcuda.c); tensors lie on the CPU.
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


class Card(CudaDriver):
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


_card = Card()
_card.get_current_device = lambda: 0
_card.get_current_stream = lambda device: 0
_card.get_device_capability = lambda device=0: (9, 0)
driver.set_active(_card)

launches = []  # kernel and form of every launch
compilations = []  # kernel and form of every compilation
_compile, _call = _launch.Kernel.compile, _launch.Kernel.__call__


def _counted_compile(kernel, form, target=None):
    compilations.append((kernel.__name__, form))
    return _compile(kernel, form, target)


def _counted_call(kernel, form, grid, *args):
    before = launched()
    _call(kernel, form, grid, *args)
    assert launched() == before + 1, f"{kernel.__name__} with grid {grid} did not reach the card"
    launches.append((kernel.__name__, form))


def launched():
    """How many kernels the card was told to run."""
    return ctypes.c_long.in_dll(_stub, "stub_launches").value


def count():
    """From now on launches and compilations are written down; it costs the host a few us a launch."""
    _launch.Kernel.compile, _launch.Kernel.__call__ = _counted_compile, _counted_call
