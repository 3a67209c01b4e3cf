"""Compile every specialization of Triton kernel modules for one architecture, without a GPU.

    python -m tests.triton_compile_worker CAPABILITY MODULE...

writes a JSON list of {kernel, label, shared, local, registers, float_sums, chained_dots} or {kernel, label, error}:
bytes of shared memory a block, bytes of local memory a thread (spills and stack), registers a thread, number of float
sums whose order follows a layout, and number of dots that accumulate inside the tensor core.

A module lists its kernels in `specializations()`, as pairs (kernel, spec).
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_spec(kernel, spec, capability):
    """Resources of one specialization."""
    compiled = kernel.compile(spec, GPUTarget("cuda", capability, 32))
    return {
        "shared": compiled.metadata.shared,
        **usage(compiled.asm["cubin"]),
        "float_sums": sum(
            "arith.addf" in body for body in re.findall(r'"tt\.reduce".*?\}\)', compiled.asm["ttgir"], re.S)
        ),
        "chained_dots": len(re.findall(r"(?:tt\.dot|warp_group_dot) %\S+, %\S+, %(?!cst)", compiled.asm["ttgir"])),
    }


def usage(cubin):
    """Registers and local memory of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    [(registers, stack, local)] = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    return {"registers": int(registers), "local": int(stack) + int(local)}


def main(capability, *names):
    results = []
    for module in map(importlib.import_module, names):
        for kernel, spec in module.specializations():
            try:
                result = compile_spec(kernel, spec, int(capability))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            label = "-".join([kernel.__name__, *(str(value).removeprefix("torch.") for value in spec)])
            results.append({"kernel": kernel.__name__, "label": label, **result})
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
