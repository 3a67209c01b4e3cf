"""Attention that every key receives from marked queries: cases, cost model, check of a result, baselines.

Minimum cost of a case: the marked queries and the keys read once, a number a head and key written once; a dot product,
2 D operations, for every head and pair of a marked query and a key visible to it.
"""

import itertools

import torch

import pruneops

from .. import common
from ..baselines import attention as baselines
from ..registry import Baseline
from . import attention_mass as mass
from .attention_mass import attention_case

GPU_TIME_SHARE = 3


def _cases(dtype):
    """FastV's last row, the [CLS] row of a vision tower, SparseVLM's text rows, all rows."""
    for lse in (False, True):
        end = "-lse" if lse else ""
        yield attention_case(f"last-s3072{end}", 32, 32, 3072, 3072, dtype, rows=1, lse=lse)
        yield attention_case(f"cls-s577{end}", 16, 16, 577, 577, dtype, D=64, rows=1, causal=False, lse=lse)
        yield attention_case(f"text-s3072{end}", 32, 32, 3072, 3072, dtype, rows=mass.TEXT, lse=lse)
        yield attention_case(f"all-s1088{end}", 32, 32, 1088, 1088, dtype, lse=lse)


CASES = (
    attention_case("last-s130", 4, 2, 130, 130, torch.float32, D=32, rows=1),
    attention_case("all-s130-lse", 4, 2, 130, 130, torch.float32, D=32, lse=True),
    *itertools.chain.from_iterable(map(_cases, common.DTYPES)),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=2,
        quick="last-s3072-float32 cls-s577-float32 text-s3072-float32 text-s3072-lse-float32 all-s1088-float32",
        full=lambda case: case.dtype == torch.float32,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="last-s3072-bfloat16 text-s3072-lse-bfloat16",
        goals="last-s3072-bfloat16 cls-s577-bfloat16 text-s3072-bfloat16 text-s3072-lse-bfloat16",
        full=common.every,
    ),
}


def arguments(case, device):
    """A mask of the queries only if some are not marked."""
    options, marked = mass.attention_inputs(case, device)
    return options if case.sizes["rows"] == case.sizes["Sq"] else options | {"query_mask": marked}


def call(arguments):
    return pruneops.attention_received(**arguments)


def check(case, arguments, result, expected, precision):
    """Sampled heads within tolerance of float64, relative to the most that a key receives; sums of all heads."""
    sizes = case.sizes
    if result.shape != (sizes["B"], sizes["H"], sizes["Sk"]):
        return common.wrong(f"of shape {list(result.shape)}")
    errors = [(result.double().sum(-1) / sizes["rows"] - 1).flatten()]
    for b, h in mass.sampled_heads(sizes):
        truth = sum(logits.softmax(-1).sum(0) for _, logits in mass.logit_blocks(case, arguments, b, h))
        errors.append((result[b, h] - truth) / truth.amax())
    return common.check_error(torch.cat(errors), 2 * common.TOLERANCE[precision])  # a single row averages no rounding


def cost(case):
    return mass.attention_cost(case, case.sizes["Sk"])


reference_seconds = mass.reference_seconds


def _prepare_column_sum(case, arguments):
    inputs = mass.counted_inputs(case, arguments)
    return lambda: baselines.column_sum(*inputs)


_COLUMN_SUM = Baseline(_prepare_column_sum, mass.materialised_seconds)
BASELINES = {
    "materialised": _COLUMN_SUM,
    "graph": common.captured(_COLUMN_SUM),
    "sdpa forward": mass.FORWARD,
}
