"""Rank assignment: cases, cost model, check of a result, baselines.

Minimum cost of a case: the logits read once, the indices written once; an exponential and a comparison per logit.
"""

import functools
import itertools

import torch

import pruneops

from .. import common
from ..baselines import assign_ranks as baselines
from ..harness import compiled
from ..registry import Baseline, Cost
from .exclusive_bottomk import replay


def _case(B, N, J, dtype):
    return common.case("b{B}-n{N}-j{J}", "B {B} N {N} J {J}", dtype, B=B, N=N, J=J)


CASES = (
    _case(1, 96, 8, torch.float32),
    *(
        _case(B, N, J, dtype)
        for (N, J), B, dtype in itertools.product(((576, 32), (2880, 64), (65536, 64)), (1, 8), common.DTYPES)
    ),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=1,
        quick="b1-n576-j32-float32 b8-n576-j32-float32 b1-n2880-j64-float32 b1-n65536-j64-float32",
        full=lambda case: case.dtype == torch.float32,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=1,
        quick="b1-n576-j32-bfloat16 b1-n65536-j64-bfloat16",
        goals="b1-n576-j32-bfloat16 b8-n576-j32-bfloat16 b1-n2880-j64-bfloat16 b1-n65536-j64-bfloat16",
        full=common.every,
    ),
}


def arguments(case, device):
    """Logits [B, N, J + 1] in which the same tokens score high for every rank, so that ranks compete for them."""
    generator = torch.Generator(device).manual_seed(0)
    B, N, J = (case.sizes[key] for key in ("B", "N", "J"))
    logits = torch.randn(B, N, J + 1, generator=generator, device=device)
    logits[..., :J] += 3 * torch.randn(B, N, 1, generator=generator, device=device)
    return {"logits": logits.to(case.dtype), "j": J}


def call(arguments):
    return pruneops.assign_ranks(**arguments)


def check(case, arguments, result, expected, precision):
    """Replay the choices in float64, on the logarithm of the probabilities."""
    logits, j = arguments["logits"], arguments["j"]
    scores = -logits.double().log_softmax(-1)[..., :j].mT
    free = torch.ones_like(logits[..., 0], dtype=torch.bool)
    return replay(scores, [1] * j, free, result, expected, common.TOLERANCE[precision])


def cost(case):
    B, N, J = (case.sizes[key] for key in ("B", "N", "J"))
    logits = B * N * (J + 1)
    return Cost(logits * case.dtype.itemsize, 8 * B * J, 2 * logits)


def _seconds(case, rates, launches=3, batched=True, per_token=2e-9):
    """Five passes over the logits, then small kernels and a pass over all tokens per rank."""
    B, N, J = (case.sizes[key] for key in ("B", "N", "J"))
    steps = J * (1 if batched else B)
    return 5 * cost(case).read / rates.copy + steps * launches * 1e-5 + B * J * N * per_token


def _item_seconds(case, rates):
    return _seconds(case, rates, launches=4, batched=False)


def reference_seconds(case, rates):
    """A sort of all tokens per rank."""
    return _seconds(case, rates, launches=12, per_token=1e-7)


def _prepare(function):
    return lambda case, arguments: lambda: function(**arguments)


def _prepare_compiled(case, arguments):
    return _prepare(functools.partial(baselines.loop, step=compiled(baselines.step, dynamic=False)))(case, arguments)


_LOOP = Baseline(_prepare(baselines.loop), _seconds)
BASELINES = {
    "loop": _LOOP,
    "loop_item": Baseline(_prepare(baselines.loop_item), _item_seconds),
    "graph": common.captured(_LOOP),
    "compiled": Baseline(_prepare_compiled, _seconds, compiles=True),
}
