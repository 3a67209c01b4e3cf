"""Every specialization of every Triton kernel compiles for every GPU, fits its shared memory and spills nothing.

Needs no GPU. One process an architecture, outside of Triton's interpreter.
"""

import json
from pathlib import Path

import pytest

from tests import contract

pytest.importorskip("triton")

MODULES = [
    f"pruneops.triton_kernels.{path.stem}" for path in sorted(Path(contract.ROOT, "triton_kernels").glob("[!_]*.py"))
]
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # maximum per block, by compute capability


def compiled(capability, *modules):
    code = "import sys; from tests.triton_compile_worker import main; main(*sys.argv[1:])"
    return json.loads(contract.run_python(code, capability, *modules, timeout=1200))


def problems(results, capability):
    """{label: what is wrong}"""
    found = {}
    for result in results:
        if "error" in result:
            found[result["label"]] = result["error"]
        elif result["shared"] > SHARED_KB[capability] * 1024:
            found[result["label"]] = (
                f"{result['shared']} bytes of shared memory, the GPU has {SHARED_KB[capability]} KB"
            )
        elif result["local"]:
            found[result["label"]] = (
                f"{result['local']} bytes of local memory a thread ({result['registers']} registers)"
            )
    return found


# Kernels whose float sums must not follow the layout of a tile, which depends on strides and tile sizes.
FIXED_ORDER = ("_pivot_cosine_kernel", "_kcenter_norm_factors_kernel")
# Kernels whose dots must not accumulate: one chain through all of D would be less accurate than the reference.
SHORT_CHAINS = ("_pivot_cosine_kernel",)


@pytest.mark.parametrize("capability", SHARED_KB)
def test_kernels_compile_and_fit(capability):
    results = compiled(capability, *MODULES)
    assert results, "no kernel is listed"
    found = problems(results, capability)
    for result in results:
        if result["kernel"] in FIXED_ORDER and result.get("float_sums"):
            found[result["label"]] = f"{result['float_sums']} sums in layout order"
        if result["kernel"] in SHORT_CHAINS and result.get("chained_dots"):
            found[result["label"]] = f"{result['chained_dots']} accumulating dots"
    assert not found, "\n".join(f"sm_{capability} {label}: {problem}" for label, problem in found.items())


def test_every_kernel_is_listed():
    """A kernel that specializations() does not list would not be checked."""
    code = """
import importlib, sys
for module in map(importlib.import_module, sys.argv[1:]):
    kernels = {name for name, value in vars(module).items() if type(value).__name__ == "Kernel"}
    listed = {kernel.__name__ for kernel, _ in module.specializations()}
    print(*(f"{module.__name__}.{name}" for name in kernels - listed))
"""
    assert contract.run_python(code, *MODULES).split() == []


@pytest.mark.parametrize("capability", [80, 120])
def test_checks_catch_what_does_not_fit(capability):
    results = compiled(capability, "tests.rejected_kernels")
    summing, sharing, _, chaining = results
    assert (summing["float_sums"], sharing["float_sums"], chaining["chained_dots"]) == (1, 0, 1)
    found = problems(results, capability)
    assert "bytes of local memory" in found["_spilling_kernel-32768-1"]
    assert "bytes of shared memory" in found["_sharing_kernel-256-32"]
    assert "unknown" in found["_misspelt_kernel-16-1"]
