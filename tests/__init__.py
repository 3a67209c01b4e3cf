"""Tests: `pytest`, `python -m tests.soak`, `python -m tests.sanitize`, `python -m tests.host_cost`."""

import importlib.util
from pathlib import Path

import pruneops

# In a source tree that was built in place but never installed, the Triton kernels lie beside the package.
if importlib.util.find_spec("pruneops.triton_kernels") is None:
    pruneops.__path__.append(str(Path(__file__).resolve().parents[1]))
