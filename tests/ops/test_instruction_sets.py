"""The CPU kernels of the instruction sets below this machine's best, which the other tests leave aside."""

import os
import subprocess
import sys

import pytest

from tests.contract import NATIVE, ROOT, run_python

ARITHMETIC = "known or exact or hard or real_values or many_tiles or close_calls or special"


@pytest.mark.skipif(bool(NATIVE.problem), reason=f"{NATIVE}: {NATIVE.problem}")
@pytest.mark.parametrize("name", ["avx2", "default"])
def test_operators(name):
    lowered = {"PRUNEOPS_CPU_CAPABILITY": name}
    if run_python("import pruneops._C as c; print(c.cpu_capability())", **lowered).strip() != name:
        pytest.skip("not on this machine")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-k", f"cpu-cpu and ({ARITHMETIC})"]
    done = subprocess.run(
        [*command, "tests/ops"], env={**os.environ, **lowered}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
