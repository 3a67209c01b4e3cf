"""Compile every job of Triton kernel modules for one architecture, without a GPU.

    python -m tests.triton_compile_worker CAPABILITY MODULE...

writes a JSON list of {label, shared, local, registers} or {label, error}: bytes of shared memory a
block, bytes of local memory a thread (spills and stack), registers a thread.

A module lists its kernels in `compile_jobs()`, as dictionaries of
    kernel           name of a jitted function in the module
    signature        {argument: type}, constexprs left out
    constexprs       {argument: value}
    options          num_warps, num_stages ...
    divisible_by_16  names of arguments that are multiples of 16, optional
    capabilities     those it is for, optional; all by default
    label            how it is called in messages
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
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_job(module, job, capability):
    """Resources of one job."""
    kernel = getattr(module, job["kernel"])
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: job["signature"].get(name, "constexpr") for name in kernel.arg_names},
        constexprs={place[name]: value for name, value in job["constexprs"].items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in job.get("divisible_by_16", ())},
    )
    options = {"enable_fp_fusion": True, **job["options"]}  # said out loud, as in every launch
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": compiled.metadata.shared, **usage(compiled.asm["cubin"])}


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
        for job in module.compile_jobs():
            if int(capability) in job.get("capabilities", [int(capability)]):
                try:
                    result = compile_job(module, job, int(capability))
                except Exception as error:
                    result = {"error": f"{type(error).__name__}: {error}"}
                results.append({"label": job["label"], **result})
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
