"""DART's selection, from scores (exclusive_bottomk) and features (pivot_bottomk): cases, cost model, check, baselines.

Minimum cost of a case: from scores, P N of them and N flags read once and compared once; from features, x read once and
2 (P + 1) B N D operations, as in pivot_cosine. The indices are written.
"""

import itertools

import torch

import pruneops

from .. import common
from ..baselines import exclusive_bottomk as baselines
from ..harness import compiled
from ..registry import Baseline, Case, Cost
from .pivot_cosine import cosines, pivot_tokens

GPU_TIME_SHARE = 4


def _sizes(B, N, P):
    k = round(common.KEEP * N)
    return {"B": B, "N": N, "P": P, "quotas": [k * (p + 1) // P - k * p // P for p in range(P)]}


def _from_scores(B, N, P):
    shape = f"scores, B {B} N {N} P {P} k {round(common.KEEP * N)} float32"
    return Case(f"scores-b{B}-n{N}-p{P}", shape, torch.float32, _sizes(B, N, P))


def _from_features(B, N, D, P, dtype):
    shape = f"B {B} N {N} D {D} P {P} k {round(common.KEEP * N)}"
    return common.case("b{B}-n{N}-d{D}-p{P}", shape, dtype, D=D, **_sizes(B, N, P))


CASES = (
    _from_scores(1, 96, 4),
    _from_features(1, 96, 64, 4, torch.float32),
    *(_from_scores(B, N, 8) for N, B in itertools.product((576, 2880, 9216), (1, 8))),
    *(
        _from_features(B, N, D, 8, dtype)
        for N, B, D, dtype in itertools.product((576, 2880, 9216), (1, 8), (1024, 4096), common.DTYPES)
    ),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=2,
        quick="scores-b1-n2880-p8 scores-b8-n2880-p8 b1-n576-d1024-p8-float32 b1-n2880-d4096-p8-float32 "
        "b8-n2880-d1024-p8-float32 b1-n9216-d1024-p8-float32",
        full=lambda case: "D" not in case.sizes or common.small_on_cpu(case),
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="scores-b1-n2880-p8 b1-n576-d1024-p8-bfloat16 b1-n2880-d4096-p8-bfloat16",
        goals="scores-b1-n2880-p8 b1-n576-d1024-p8-bfloat16 b1-n2880-d4096-p8-bfloat16 b8-n2880-d4096-p8-bfloat16 "
        "b1-n9216-d4096-p8-bfloat16",
        full=common.every,
    ),
}


def arguments(case, device):
    """Scores, or features and pivots; the pivots themselves are excluded."""
    generator = torch.Generator(device).manual_seed(0)
    B, N, P, quotas = (case.sizes[key] for key in ("B", "N", "P", "quotas"))
    D = case.sizes.get("D", 256)
    x = torch.stack([common.features(N, D, generator) for _ in range(B)]).to(case.dtype)
    pivots = torch.stack([pivot_tokens(N, P, generator) for _ in range(B)])
    free = torch.ones(B, N, dtype=torch.bool, device=device).scatter(1, pivots, False)
    if "D" in case.sizes:
        return {"x": x, "pivots": pivots, "quotas": quotas, "mask": free}
    scores = torch.stack([cosines(*image) for image in zip(x, pivots)]).float()
    return {"scores": scores, "quotas": quotas, "taken": ~free}


def call(arguments):
    return (pruneops.pivot_bottomk if "x" in arguments else pruneops.exclusive_bottomk)(**arguments)


def _two_calls(arguments):
    scores = pruneops.pivot_cosine(arguments["x"], arguments["pivots"])
    return pruneops.exclusive_bottomk(scores, arguments["quotas"], taken=~arguments["mask"])


def variants(case):
    """The two operators one after the other, with the scores in memory between them: what fusing saves."""
    return {"two calls": _two_calls} if "D" in case.sizes else {}


def check(case, arguments, result, expected, precision):
    """Replay the choices on float64 scores; given scores are compared as they are, without tolerance."""
    if "scores" in arguments:
        scores, free, tolerance = arguments["scores"], ~arguments["taken"], 0.0
    else:
        scores = torch.stack([cosines(*image) for image in zip(arguments["x"], arguments["pivots"])])
        free, tolerance = arguments["mask"], common.TOLERANCE[precision]
    return replay(scores, case.sizes["quotas"], free, result, expected, tolerance)


def replay(scores, quotas, free, choices, expected, tolerance):
    """Check of choices [B, sum(quotas)]: all different, free [B, N], each within tolerance of the lowest score left.

    Paths diverge at the first near-tie, so two right results may differ: agreement with the reference is reported, not
    judged.
    """
    B, _, N = scores.shape
    if choices.shape != (B, sum(quotas)):
        return common.wrong(f"of shape {list(choices.shape)}")
    if choices.min() < 0 or choices.max() >= N or not free.gather(1, choices).all():
        return common.wrong("not tokens that are free")
    if not choices.sort(-1).values.diff().all():
        return common.wrong("not all different")
    excess = 0.0
    for score, tokens in zip(scores.unbind(1), choices.split(quotas, -1)):
        free = free.scatter(-1, tokens, False)
        picked = score.gather(-1, tokens)  # [B, quota]
        others = score.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
        lowest = picked.flip(-1).cummin(-1).values.flip(-1).minimum(others)  # of those left at each choice
        excess = max(excess, float((picked - lowest).amax()))
    return common.check_choices(excess, tolerance, choices, expected, excess=excess)


def cost(case):
    B, N, P = (case.sizes[key] for key in ("B", "N", "P"))
    written = 8 * B * sum(case.sizes["quotas"])
    if "D" not in case.sizes:
        return Cost(B * N * (P * 4 + 1), written, B * P * N)
    D = case.sizes["D"]
    return Cost(B * N * (D * case.dtype.itemsize + 1), written, 2 * (P + 1) * B * N * D)


def _seconds(case, rates, passes=4, rows=1, per_row=1e-4, per_token=1e-8):
    """Passes over the input, then per pivot some small kernels and passes over all tokens."""
    B, N, P = (case.sizes[key] for key in ("B", "N", "P"))
    return passes * cost(case).read / rates.copy + P * (rows * per_row + B * N * per_token)


def _host_seconds(case, rates):
    passes = 14 * case.sizes["P"] if "D" in case.sizes else 3
    return _seconds(case, rates, passes, rows=case.sizes["B"], per_row=5e-4)


def reference_seconds(case, rates):
    """A sort of all tokens per pivot."""
    return _seconds(case, rates, passes=8 * 4 // case.dtype.itemsize, per_token=1.1e-7)


def _prepare(from_scores, from_features):
    def prepare(case, arguments):
        if "scores" in arguments:
            return lambda: from_scores(arguments["scores"], arguments["quotas"], ~arguments["taken"])
        return lambda: from_features(*(arguments[key] for key in ("x", "pivots", "quotas", "mask")))

    return prepare


def _prepare_compiled(case, arguments):
    return _prepare(compiled(baselines.choose), compiled(baselines.features_choose))(case, arguments)


_TOPK = Baseline(_prepare(baselines.choose, baselines.features_choose), _seconds)
BASELINES = {
    "topk": _TOPK,
    "host_loop": Baseline(_prepare(baselines.host_choose, baselines.host_features_choose), _host_seconds),
    "graph": common.captured(_TOPK),
    "compiled": Baseline(_prepare_compiled, _seconds, compiles=True),
}
