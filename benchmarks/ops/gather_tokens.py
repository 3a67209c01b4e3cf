"""Gathering tokens of a layer's inputs: cases, cost model, check of a result, baselines.

Hidden states, mRoPE positions, a mask, cosines and sines. Minimum cost of a case: the kept tokens and their positions
read once, the kept tokens written once; no operations.
"""

import itertools
import math

import torch

import pruneops

from .. import common
from ..baselines import token_copy as baselines
from ..harness import compiled
from ..registry import Baseline, Check, Cost
from .kv_compact import ascending, copy_seconds, graph_on_cuda, pass_seconds

DIMS = (1, 2, 1, 1, 1)


def _case(B, S, D, rope, dtype):
    shape = "hidden states and 4 more, B {B} S {S} -> {K} D {D}"
    return common.case("b{B}-s{S}-d{D}", shape, dtype, B=B, S=S, K=round(common.KEEP * S), D=D, rope=rope)


CASES = (
    _case(1, 96, 64, 16, torch.float32),
    _case(3, 96, 64, 16, torch.float32),
    *(_case(B, 2880, 4096, 128, dtype) for B, dtype in itertools.product((1, 8), common.DTYPES)),
)


def _full(case):
    return case.sizes["S"] == 2880


SETS = {
    "cpu": common.case_sets(CASES, tiny=2, quick=_full, full=_full),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="b1-s2880-d4096-bfloat16",
        goals="b1-s2880-d4096-bfloat16 b8-s2880-d4096-bfloat16",
        full=_full,
    ),
}


def _shapes(sizes, tokens):
    """Shapes of the tensors with so many tokens."""
    B, D, rope = (sizes[key] for key in ("B", "D", "rope"))
    return (B, tokens, D), (3, B, tokens), (B, tokens), (B, tokens, rope), (B, tokens, rope)


def arguments(case, device):
    generator = torch.Generator(device).manual_seed(0)
    hidden, positions, mask, *angles = _shapes(case.sizes, case.sizes["S"])
    normal = {"generator": generator, "device": device, "dtype": case.dtype}
    tensors = [
        torch.randn(hidden, **normal),
        torch.randint(1 << 40, positions, generator=generator, device=device),
        torch.rand(mask, generator=generator, device=device) < 0.9,
        *(torch.randn(shape, **normal) for shape in angles),
    ]
    keep = ascending((case.sizes["B"],), case.sizes["S"], case.sizes["K"], device)
    return {"tensors": tensors, "keep": keep, "dim": DIMS}


def call(arguments):
    return pruneops.gather_tokens(**arguments)


def check(case, arguments, result, expected, precision):
    """All bits equal."""
    truth = baselines.tokens_gather(**arguments)
    shapes = [list(tensor.shape) for tensor in result]
    if shapes != [list(tensor.shape) for tensor in truth]:
        return common.wrong(f"of shapes {shapes}")
    unequal = [i for i, pair in enumerate(zip(result, truth)) if not torch.equal(*map(_bytes, pair))]
    if unequal:
        return common.wrong(f"other bits in tensors {unequal}", wrong_tensors=len(unequal))
    return Check(True, "ok, all bits", {"wrong_tensors": 0})


def _bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def cost(case):
    sizes = case.sizes
    hidden, positions, mask, *angles = (math.prod(shape) for shape in _shapes(sizes, sizes["K"]))
    kept = (hidden + sum(angles)) * case.dtype.itemsize + 8 * positions + mask
    return Cost(kept + 8 * sizes["B"] * sizes["K"], kept, 0)


_seconds = reference_seconds = pass_seconds(cost)


def _prepare(function):
    return lambda case, arguments: lambda: function(**arguments)


def _prepare_compiled(case, arguments):
    return _prepare(compiled(baselines.tokens_index_select, dynamic=False))(case, arguments)


def _prepare_copy(case, arguments):
    counts = map(math.prod, _shapes(case.sizes, case.sizes["K"]))
    sources = [tensor.view(-1)[:count] for tensor, count in zip(arguments["tensors"], counts)]
    return graph_on_cuda(lambda: baselines.copy(sources), sources[0])


_INDEX_SELECT = Baseline(_prepare(baselines.tokens_index_select), _seconds)
BASELINES = {
    "copy": Baseline(_prepare_copy, copy_seconds(cost)),
    "index_select": _INDEX_SELECT,
    "gather": Baseline(_prepare(baselines.tokens_gather), pass_seconds(cost, passes=4, index=2)),
    "graph": common.captured(_INDEX_SELECT),
    "compiled": Baseline(_prepare_compiled, _seconds, compiles=True),
}
