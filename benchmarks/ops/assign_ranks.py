"""Rank assignment: cases, inputs, cost model, check of a result, peers.

Least cost of a case: the logits read once and the indices written once; an exponential and a
comparison per logit.
"""

import functools
import itertools

import torch

import pruneops

from ..baselines import assign_ranks as baselines
from ..common import NAMES, TOLERANCE, as_reference
from ..harness import capture, compiled
from ..registry import Case, Cost, Operator, Peer
from .exclusive_bottomk import replay


def _case(B, N, J, dtype):
    name = f"b{B}-n{N}-j{J}-{NAMES[dtype]}"
    return Case(name, f"B {B} N {N} J {J} {NAMES[dtype]}", dtype, {"B": B, "N": N, "J": J})


CASES = (
    _case(1, 96, 8, torch.float32),
    *(
        _case(B, N, J, dtype)
        for (N, J), B, dtype in itertools.product(((576, 32), (2880, 64), (65536, 64)), (1, 8), NAMES)
    ),
)
TINY = (CASES[0].name,)
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": ("b1-n576-j32-float32", "b8-n576-j32-float32", "b1-n2880-j64-float32", "b1-n65536-j64-float32"),
        "full": tuple(case.name for case in CASES if case.dtype == torch.float32),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("b1-n576-j32-bfloat16", "b1-n65536-j64-bfloat16"),
        "goals": ("b1-n576-j32-bfloat16", "b8-n576-j32-bfloat16", "b1-n2880-j64-bfloat16", "b1-n65536-j64-bfloat16"),
        "full": tuple(case.name for case in CASES),
    },
}


def arguments(case, device):
    """Logits [B, N, J + 1] in which the same tokens stand out for every rank, so that ranks meet taken tokens."""
    generator = torch.Generator(device).manual_seed(0)
    B, N, J = (case.sizes[key] for key in ("B", "N", "J"))
    logits = torch.randn(B, N, J + 1, generator=generator, device=device)
    logits[..., :J] += 3 * torch.randn(B, N, 1, generator=generator, device=device)
    return {"logits": logits.to(case.dtype), "j": J}


def call(arguments):
    """The documented Python face."""
    return pruneops.assign_ranks(**arguments)


def check(case, arguments, result, expected, precision):
    """Replay the choices in float64, in the logarithm of the probabilities."""
    logits, j = arguments["logits"], arguments["j"]
    scores = -logits.double().log_softmax(-1)[..., :j].mT
    free = torch.ones_like(logits[..., 0], dtype=torch.bool)
    return replay(scores, [1] * j, free, result, expected, TOLERANCE[precision])


def cost(case):
    B, N, J = (case.sizes[key] for key in ("B", "N", "J"))
    logits = B * N * (J + 1)
    return Cost(logits * case.dtype.itemsize, 8 * B * J, 2 * logits)


def _seconds(case, ceilings, launches=3, batched=True, per_token=2e-9):
    """Five passes over the logits, then small kernels and a look at all tokens per rank."""
    B, N, J = (case.sizes[key] for key in ("B", "N", "J"))
    steps = J * (1 if batched else B)
    return 5 * cost(case).read / ceilings.copy + steps * launches * 1e-5 + B * J * N * per_token


def _reference_seconds(case, ceilings):
    """A sort of all tokens per rank."""
    return _seconds(case, ceilings, launches=12, per_token=1e-7)


def _item_seconds(case, ceilings):
    return _seconds(case, ceilings, launches=4, batched=False)


def _prepare(form):
    return lambda case, arguments: lambda: form(**arguments)


def _prepare_compiled(case, arguments):
    return _prepare(functools.partial(baselines.loop, step=compiled(baselines.step, dynamic=False)))(case, arguments)


def _prepare_graph(case, arguments):
    return capture(_prepare(baselines.loop)(case, arguments))


def sanitize(device):
    """Small shapes to the largest: one token, all tokens ranked, odd widths and strides, halves, ties, NaN.

    A token's logits are multiples of 32, all different: the greatest is all of its softmax's denominator, so that
    logarithms are exact and ties are ties on every backend.
    """
    generator = torch.Generator().manual_seed(4)
    for B, N, J, j, dtype in (
        (1, 1, 1, 1, torch.float32),
        (2, 31, 31, 31, torch.float32),
        (3, 577, 32, 32, torch.bfloat16),
        (1, 2880, 64, 64, torch.float16),
        (1, 65536, 64, 3, torch.float32),
    ):
        order = torch.rand(B, N, J + 1, generator=generator).argsort(-1)
        wide = 32 * torch.cat([order, order[..., :2]], -1).to(dtype)
        wide[:, N // 2 + 1 :: 7] = torch.nan

        def run(to, wide=wide, J=J, j=j):
            return pruneops.assign_ranks(wide.to(to)[..., 1 : J + 2], j)

        yield f"B {B} N {N} J {J} j {j} {str(dtype).removeprefix('torch.')}", as_reference(run, device)


OPERATOR = Operator(
    name="assign_ranks",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=_reference_seconds,
    peers={
        "loop": Peer(_prepare(baselines.loop), _seconds),
        "loop_item": Peer(_prepare(baselines.loop_item), _item_seconds),
        "graph": Peer(_prepare_graph, _seconds, devices=("cuda",)),
        "compiled": Peer(_prepare_compiled, _seconds, compiles=True),
    },
    sanitize=sanitize,
)
