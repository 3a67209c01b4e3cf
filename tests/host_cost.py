"""Host cost of a call of a Triton operator: launches, allocations, microseconds, without a GPU.

    python -m tests.host_cost

prints a line for each case below, or JSON with --json. Triton's launcher is the real one over a stub libcuda
(compile_only_driver), so times exclude the driver's part of a launch and torch's dispatch of the operator.
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import compile_only_driver

from pruneops.triton_kernels import (  # isort: skip
    assign_ranks,
    attention_mass,
    attention_received,
    exclusive_bottomk,
    gather_tokens,
    kcenter,
    kv_compact,
    paged_kv_compact,
    pivot_cosine,
)


class Allocations(TorchDispatchMode):
    """Counts tensors that torch allocates; views are not counted."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += all(value.alias_info is None for value in function._schema.returns)
        return result


def cases():
    """{label: call}; shapes of one image of LLaVA, bfloat16."""
    kcenter.multiprocessors = lambda device: 132
    half = {"dtype": torch.bfloat16}
    small, large = torch.ones(1, 576, 1024, **half), torch.ones(1, 9216, 64, **half)
    pivots, scores = torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, 2880)
    logits = torch.ones(1, 576, 33, **half)
    starts, ks = torch.tensor([0, 300, 576]), [30, 28]

    query, key = torch.ones(1, 32, 3072, 128, **half), torch.ones(1, 32, 3072, 128, **half)
    last, group = query[:, :, -1:], torch.zeros(1, 3072, dtype=torch.int64)
    lse, mask = torch.ones(1, 32, 3072), torch.zeros(1, 3072, dtype=torch.bool)
    mass, received = attention_mass.attention_mass, attention_received.attention_received

    caches = [torch.ones(1, 32, 320, 16, **half) for _ in range(64)]
    keep = torch.arange(32)[None]
    pages = [torch.ones(24, 2, 16, 8, 16, **half) for _ in range(32)]
    table, lengths = torch.arange(20, dtype=torch.int32)[None], torch.tensor([32])
    return {
        "kcenter N 576": lambda: kcenter.kcenter(small, 58, None, None, "cosine"),
        "kcenter N 9216": lambda: kcenter.kcenter(large, 922, None, None, "cosine"),
        "kcenter_varlen": lambda: kcenter.kcenter_varlen(small[0], starts, ks, None, "cosine"),
        "pivot_cosine": lambda: pivot_cosine.pivot_cosine(small, None, pivots, None, None),
        "exclusive_bottomk": lambda: exclusive_bottomk.exclusive_bottomk(scores, [36] * 8, None),
        "pivot_bottomk": lambda: exclusive_bottomk.pivot_bottomk(small, pivots, [7] * 8, None),
        "assign_ranks": lambda: assign_ranks.assign_ranks(logits, 32),
        "attention_mass": lambda: mass(query, key, group, group, 3, True, 0.1, None),
        "attention_mass, lse given": lambda: mass(query, key, group, group, 3, True, 0.1, lse),
        "attention_mass, decode": lambda: mass(last, key, group[:, -1:], group, 3, True, 0.1, None),
        "attention_mass, decode, lse given": lambda: mass(
            last, key, group[:, -1:], group, 3, True, 0.1, lse[:, :, -1:]
        ),
        "attention_received, rows": lambda: received(query, key, mask, None, True, 0.1, None),
        "attention_received, rows, lse given": lambda: received(query, key, mask, None, True, 0.1, lse),
        "attention_received, last row": lambda: received(last, key, None, None, True, 0.1, None),
        "attention_received, last row, lse given": lambda: received(last, key, None, None, True, 0.1, lse[:, :, -1:]),
        "kv_compact, 64 caches": lambda: kv_compact.kv_compact(caches, keep, None),
        "kv_compact_, 64 caches": lambda: kv_compact.kv_compact_(caches, keep, None),
        "paged_kv_compact_, 32 tensors": lambda: paged_kv_compact.paged_kv_compact_(pages, table, keep, lengths, "NHD"),
        "gather_tokens": lambda: gather_tokens.gather_tokens([small, logits], keep, [1, 1]),
    }


def counts(call):
    """(launches, allocations) of one call."""
    call()
    before, allocations = compile_only_driver.launch_count(), Allocations()
    with allocations:
        call()
    return compile_only_driver.launch_count() - before, allocations.count


def microseconds(call, blocks=30, calls=200):
    """Median over blocks of consecutive calls."""
    times = []
    for _ in range(blocks):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.host_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="[launches, allocations] of each case, without times")
    if parser.parse_args().json:
        print(json.dumps({label: counts(call) for label, call in cases().items()}))
        return
    torch.set_num_threads(1)
    print(f"{'':<38} launches allocations    us")
    for label, call in cases().items():
        launches, allocations = counts(call)
        print(f"{label:<38} {launches:>8} {allocations:>11} {microseconds(call):>5.0f}", flush=True)


if __name__ == "__main__":
    main()
