"""Launches and allocations of every Triton operator, with Triton's real launcher and a driver that executes nothing."""

import json

import pytest

from tests import contract

pytest.importorskip("triton")

# [launches, allocations]: of results, and of one workspace where a launch has output for the next.
EXPECTED = {
    "kcenter N 576": [3, 3],
    "kcenter N 9216": [2, 3],
    "kcenter_varlen": [2, 3],
    "pivot_cosine": [1, 1],
    "exclusive_bottomk": [1, 2],
    "pivot_bottomk": [2, 3],
    "assign_ranks": [1, 2],
    "attention_mass": [3, 3],
    "attention_mass, lse given": [3, 3],
    "attention_mass, decode": [2, 3],
    "attention_mass, decode, lse given": [2, 3],
    "attention_received, rows": [3, 2],
    "attention_received, rows, lse given": [2, 2],
    "attention_received, last row": [2, 2],
    "attention_received, last row, lse given": [1, 1],
    "kv_compact, 64 caches": [1, 64],
    "kv_compact_, 64 caches": [1, 0],
    "paged_kv_compact_, 32 tensors": [1, 0],
    "gather_tokens": [2, 2],  # two specializations
}


def test_launches_and_allocations():
    code = "import sys; sys.argv.append('--json'); from tests.host_cost import main; main()"
    assert json.loads(contract.run_compile_only(code)) == EXPECTED
