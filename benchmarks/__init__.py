"""Benchmarks: `python -m benchmarks ops kcenter`, `python -m benchmarks.gpu`, `pytest benchmarks --benchmark-only`."""

import importlib.util
from pathlib import Path

import pruneops

ROOT = Path(__file__).resolve().parents[1]

# In a source tree that was built in place but never installed, the Triton kernels lie beside the package.
if importlib.util.find_spec("pruneops.triton_kernels") is None:
    pruneops.__path__.append(str(ROOT))
