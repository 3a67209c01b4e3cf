"""Benchmarks: `python -m benchmarks ops kcenter`, `python -m benchmarks.gpu`, `pytest benchmarks --benchmark-only`."""

from pathlib import Path

import tests  # noqa: F401, finds the Triton kernels of a source tree that was never installed

ROOT = Path(__file__).resolve().parents[1]
