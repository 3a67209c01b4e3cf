"""Pivot cosines and their reduction, duplication: cases, cost model, check of a result, baselines.

Minimum cost of a case: x read once, scores written once; the dot product of every token with every pivot and itself,
2 (P + 1) B N D operations.
"""

import itertools

import torch

import pruneops

from .. import common
from ..baselines import pivot_cosine as baselines
from ..harness import compiled
from ..registry import Baseline, Cost

GPU_TIME_SHARE = 4


def _batched(B, N, D, P, dtype, reduce=None):
    name, shape = ("duplication-", "{reduce} over P, ") if reduce else ("", "")
    name, shape = f"{name}b{{B}}-n{{N}}-d{{D}}-p{{P}}", f"{shape}B {{B}} N {{N}} D {{D}} P {{P}}"
    return common.case(name, shape, dtype, B=B, N=N, D=D, P=P, reduce=reduce)


def _varlen(D, P, dtype):
    shape = f"{len(common.VARLEN)} images T {sum(common.VARLEN)} D {D} P {P}"
    return common.case("varlen-d{D}-p{P}", shape, dtype, lengths=list(common.VARLEN), D=D, P=P, reduce=None)


CASES = (
    _batched(1, 96, 64, 4, torch.float32),
    _batched(1, 96, 64, 4, torch.float32, "max"),
    *(
        _batched(B, N, D, 8, dtype)
        for N, B, D, dtype in itertools.product((576, 2880, 9216, 23328), (1, 8), (1024, 4096), common.DTYPES)
    ),
    *(_batched(1, 2880, 4096, 64, dtype) for dtype in common.DTYPES),
    *(_batched(1, N, 4096, 8, dtype, "max") for N, dtype in itertools.product((2880, 23328), common.DTYPES)),
    *(_varlen(D, 8, dtype) for D, dtype in itertools.product((1024, 4096), common.DTYPES)),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=2,
        quick="b1-n576-d1024-p8-float32 b1-n2880-d4096-p8-float32 b8-n2880-d1024-p8-float32 "
        "b1-n2880-d4096-p64-float32 duplication-b1-n2880-d4096-p8-float32 varlen-d1024-p8-float32",
        full=common.small_on_cpu,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="b1-n576-d1024-p8-bfloat16 b1-n2880-d4096-p8-bfloat16 varlen-d1024-p8-bfloat16",
        goals="b1-n576-d1024-p8-bfloat16 b1-n2880-d4096-p8-bfloat16 b8-n2880-d4096-p8-bfloat16 "
        "b1-n2880-d4096-p64-bfloat16 duplication-b1-n2880-d4096-p8-bfloat16 varlen-d4096-p8-bfloat16",
        full=common.every,
    ),
}


def arguments(case, device):
    """Features, and P tokens of each image as its pivots."""
    generator, sizes = torch.Generator(device).manual_seed(0), case.sizes
    x = common.image_tokens(case, generator)
    if "lengths" in sizes:
        starts = common.offsets(case)
        pivots = [start + pivot_tokens(n, sizes["P"], generator) for start, n in zip(starts, sizes["lengths"])]
        return {"x": x, "cu_seqlens": torch.tensor(starts, device=device), "pivots": torch.stack(pivots)}
    pivots = torch.stack([pivot_tokens(sizes["N"], sizes["P"], generator) for _ in range(sizes["B"])])
    return {"x": x, "pivots": pivots, **({"reduce": sizes["reduce"]} if sizes["reduce"] else {})}


def pivot_tokens(N, P, generator):
    return torch.randperm(N, generator=generator, device=generator.device)[:P]


def call(arguments):
    if "reduce" in arguments:
        return pruneops.duplication(**arguments)
    return (pruneops.pivot_cosine_varlen if "cu_seqlens" in arguments else pruneops.pivot_cosine)(**arguments)


def cosines(x, pivots):
    """[P, N] in float64 of one image x [N, D] with pivots [P]."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit[pivots] @ unit.T


def _joined(scores):
    """Scores of common.blocks of images, as the operator returns them: packed images have no dimension B."""
    return scores[0] if len(scores) == 1 else torch.cat([score[0] for score in scores], -1)


def check(case, arguments, result, expected, precision):
    """Every score within tolerance of float64."""
    truth = []
    for _, x, pivots in common.blocks(case, arguments["x"], arguments["pivots"]):
        scores = torch.stack([cosines(*image) for image in zip(x, pivots)])
        truth.append(scores.amax(1) if case.sizes["reduce"] else scores)
    truth = _joined(truth)
    if result.shape != truth.shape:
        return common.wrong(f"of shape {list(result.shape)}")
    return common.check_error(result - truth, common.TOLERANCE[precision])


def _tokens(case):
    return sum(case.sizes["lengths"]) if "lengths" in case.sizes else case.sizes["B"] * case.sizes["N"]


def cost(case):
    T, D, P = _tokens(case), case.sizes["D"], case.sizes["P"]
    return Cost(T * D * case.dtype.itemsize, 4 * T * (1 if case.sizes["reduce"] else P), 2 * (P + 1) * T * D)


def _normalized_seconds(case, rates):
    return 4 * cost(case).read / rates.copy + cost(case).operations / rates.matmul[case.dtype]


def _per_pivot_seconds(case, rates):
    return 12 * case.sizes["P"] * cost(case).read / rates.copy


def reference_seconds(case, rates):
    return 8 * 4 / case.dtype.itemsize * cost(case).read / rates.copy


def _prepare(function):
    def prepare(case, arguments):
        blocks, reduce = common.blocks(case, arguments["x"], arguments["pivots"]), case.sizes["reduce"]
        return lambda: _joined([function(x, pivots, reduce) for _, x, pivots in blocks])

    return prepare


def _prepare_compiled(case, arguments):
    return _prepare(compiled(baselines.normalized))(case, arguments)


_NORMALIZED = Baseline(_prepare(baselines.normalized), _normalized_seconds)
BASELINES = {
    "normalized": _NORMALIZED,
    "per_pivot": Baseline(_prepare(baselines.per_pivot), _per_pivot_seconds),
    "graph": common.captured(_NORMALIZED),
    "compiled": Baseline(_prepare_compiled, _normalized_seconds, compiles=True),
}
