"""DART's selection, from scores (exclusive_bottomk) and from features (pivot_bottomk): cases, cost model, check, peers.

Least cost of a case: from scores, P N of them and N flags read once and compared once; from
features, x read once and 2 (P + 1) B N D operations, as in pivot_cosine. The indices are written.
"""

import itertools

import torch

import pruneops

from ..baselines import exclusive_bottomk as baselines
from ..common import NAMES, SHARE, TOLERANCE, as_reference, features, signs
from ..harness import capture, compiled
from ..registry import Case, Check, Cost, Operator, Peer
from .pivot_cosine import cosines, pivot_tokens


def _sizes(B, N, P):
    k = round(SHARE * N)
    return {"B": B, "N": N, "P": P, "quotas": [k * (p + 1) // P - k * p // P for p in range(P)]}


def _from_scores(B, N, P):
    shape = f"scores, B {B} N {N} P {P} k {round(SHARE * N)} float32"
    return Case(f"scores-b{B}-n{N}-p{P}", shape, torch.float32, _sizes(B, N, P))


def _from_features(B, N, D, P, dtype):
    shape = f"B {B} N {N} D {D} P {P} k {round(SHARE * N)} {NAMES[dtype]}"
    return Case(f"b{B}-n{N}-d{D}-p{P}-{NAMES[dtype]}", shape, dtype, {"D": D, **_sizes(B, N, P)})


CASES = (
    _from_scores(1, 96, 4),
    _from_features(1, 96, 64, 4, torch.float32),
    *(_from_scores(B, N, 8) for N, B in itertools.product((576, 2880, 9216), (1, 8))),
    *(
        _from_features(B, N, D, 8, dtype)
        for N, B, D, dtype in itertools.product((576, 2880, 9216), (1, 8), (1024, 4096), NAMES)
    ),
)
TINY = tuple(case.name for case in CASES[:2])
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": (
            "scores-b1-n2880-p8",
            "scores-b8-n2880-p8",
            "b1-n576-d1024-p8-float32",
            "b1-n2880-d4096-p8-float32",
            "b8-n2880-d1024-p8-float32",
            "b1-n9216-d1024-p8-float32",
        ),
        "full": tuple(
            case.name
            for case in CASES
            if case.dtype == torch.float32 and ("D" not in case.sizes or case.sizes["N"] * case.sizes["B"] <= 23328)
        ),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("scores-b1-n2880-p8", "b1-n576-d1024-p8-bfloat16", "b1-n2880-d4096-p8-bfloat16"),
        "goals": (
            "scores-b1-n2880-p8",
            "b1-n576-d1024-p8-bfloat16",
            "b1-n2880-d4096-p8-bfloat16",
            "b8-n2880-d4096-p8-bfloat16",
            "b1-n9216-d4096-p8-bfloat16",
        ),
        "full": tuple(case.name for case in CASES),
    },
}


def arguments(case, device):
    """Scores, or features and pivots; the pivots themselves are not to be had."""
    generator = torch.Generator(device).manual_seed(0)
    B, N, P, quotas = (case.sizes[key] for key in ("B", "N", "P", "quotas"))
    D = case.sizes.get("D", 256)
    x = torch.stack([features(N, D, generator) for _ in range(B)]).to(case.dtype)
    pivots = torch.stack([pivot_tokens(N, P, generator) for _ in range(B)])
    free = torch.ones(B, N, dtype=torch.bool, device=device).scatter(1, pivots, False)
    if "D" in case.sizes:
        return {"x": x, "pivots": pivots, "quotas": quotas, "mask": free}
    scores = torch.stack([cosines(*image) for image in zip(x, pivots)]).float()
    return {"scores": scores, "quotas": quotas, "taken": ~free}


def call(arguments):
    """The documented Python face."""
    return (pruneops.pivot_bottomk if "x" in arguments else pruneops.exclusive_bottomk)(**arguments)


def _two_calls(arguments):
    scores = pruneops.pivot_cosine(arguments["x"], arguments["pivots"])
    return pruneops.exclusive_bottomk(scores, arguments["quotas"], taken=~arguments["mask"])


def variants(case):
    """The two operators one after the other, with the scores in memory between them: what fusing saves."""
    return {"two calls": _two_calls} if "D" in case.sizes else {}


def check(case, arguments, result, expected, precision):
    """Replay the choices on float64 scores; given scores are compared as they are, so nothing may be off."""
    if "scores" in arguments:
        scores, free, tolerance = arguments["scores"], ~arguments["taken"], 0.0
    else:
        scores = torch.stack([cosines(*image) for image in zip(arguments["x"], arguments["pivots"])])
        free, tolerance = arguments["mask"], TOLERANCE[precision]
    return replay(scores, case.sizes["quotas"], free, result, expected, tolerance)


def replay(scores, quotas, free, choices, expected, tolerance):
    """Check of choices [B, sum(quotas)]: all different, free [B, N], each within tolerance of the least score left.

    Paths part at the first near-tie, so two right answers may differ; how many places agree with
    the reference is reported, not judged.
    """
    B, _, N = scores.shape
    if choices.shape != (B, sum(quotas)):
        return Check(False, f"WRONG: of shape {list(choices.shape)}")
    if choices.min() < 0 or choices.max() >= N or not free.gather(1, choices).all():
        return Check(False, "WRONG: not tokens that are free")
    if not choices.sort(-1).values.diff().all():
        return Check(False, "WRONG: not all different")
    excess = 0.0
    for score, tokens in zip(scores.unbind(1), choices.split(quotas, -1)):
        free = free.scatter(-1, tokens, False)
        own = score.gather(-1, tokens)  # [B, quota]
        others = score.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
        least = own.flip(-1).cummin(-1).values.flip(-1).minimum(others)  # left at each choice
        excess = max(excess, float((own - least).amax()))
    agree = None if expected is None else int((choices == expected).sum())
    numbers = {"excess": excess, "tolerance": tolerance, "agree_with_reference": agree, "choices": choices.numel()}
    if excess > tolerance:
        return Check(False, f"WRONG: off by {excess:.2g}", numbers)
    return Check(True, "ok" if agree is None else f"ok, {agree}/{choices.numel()}", numbers)


def cost(case):
    B, N, P = (case.sizes[key] for key in ("B", "N", "P"))
    written = 8 * B * sum(case.sizes["quotas"])
    if "D" not in case.sizes:
        return Cost(B * N * (P * 4 + 1), written, B * P * N)
    D = case.sizes["D"]
    return Cost(B * N * (D * case.dtype.itemsize + 1), written, 2 * (P + 1) * B * N * D)


def _seconds(case, ceilings, passes=4, rows=1, per_row=1e-4):
    """Passes over the input, then per pivot some small kernels and a look at all tokens."""
    B, N, P = (case.sizes[key] for key in ("B", "N", "P"))
    ranking = P * (rows * per_row + B * N * 1e-8)
    return passes * cost(case).read / ceilings.copy + ranking


def _host_seconds(case, ceilings):
    passes = 14 * case.sizes["P"] if "D" in case.sizes else 3
    return _seconds(case, ceilings, passes, rows=case.sizes["B"], per_row=5e-4)


def _reference_seconds(case, ceilings):
    """A sort of all tokens per pivot."""
    B, N, P = (case.sizes[key] for key in ("B", "N", "P"))
    return _seconds(case, ceilings, passes=8 * 4 // case.dtype.itemsize) + P * B * N * 1e-7


def _prepare(from_scores, from_features):
    def prepare(case, arguments):
        if "scores" in arguments:
            return lambda: from_scores(arguments["scores"], arguments["quotas"], ~arguments["taken"])
        return lambda: from_features(*(arguments[key] for key in ("x", "pivots", "quotas", "mask")))

    return prepare


_prepare_eager = _prepare(baselines.choose, baselines.features_choose)


def _prepare_compiled(case, arguments):
    return _prepare(compiled(baselines.choose), compiled(baselines.features_choose))(case, arguments)


def _prepare_graph(case, arguments):
    return capture(_prepare_eager(case, arguments))


def sanitize(device):
    """Both forms on one token to many: quotas of none and of all, ties, NaN, tokens taken or not, odd strides, halves.

    Scores are integers, features 1 or -1 in widths that are powers of four, so choices are the reference's to the tie.
    """
    generator = torch.Generator().manual_seed(3)
    for B, N, dtype, quotas in (
        (1, 1, torch.float32, [1]),
        (2, 33, torch.float16, [0, 5, 20, 0, 1]),
        (3, 577, torch.float32, [8, 7, 7, 7, 7, 7, 7, 7]),
        (1, 1030, torch.bfloat16, [64] * 4 + [1] * 60),
        (2, 9216, torch.float32, [900, 22]),
        (1, 70001, torch.float32, [3000, 0, 1]),
    ):
        P, words = len(quotas), f"B {B} N {N} {str(dtype).removeprefix('torch.')} quotas {_short(quotas)}"
        wide = torch.randint(-99, 99, (B, P, N + 3), generator=generator).to(dtype)
        wide[torch.rand(wide.shape, generator=generator) < 0.01] = torch.nan
        taken = _taken(B, N, sum(quotas), generator)

        def run_scores(to, wide=wide, taken=taken, quotas=quotas, N=N):
            return pruneops.exclusive_bottomk(wide.to(to)[..., 2 : N + 2], quotas, taken=taken.to(to))

        yield f"scores {words}", as_reference(run_scores, device)
        D = 64 if N <= 9216 else 16
        tokens = signs((B, N, D + 1), generator).to(dtype)
        pivots = torch.randint(N, (B, P), generator=generator)

        def run_features(to, tokens=tokens, pivots=pivots, quotas=quotas):
            return pruneops.pivot_bottomk(tokens.to(to)[..., 1:], pivots.to(to), quotas)

        yield f"features {words} D {D}", as_reference(run_features, device)


def _taken(B, N, needed, generator):
    """A tenth of the tokens, but never so many that those needed are not there."""
    order = torch.rand(B, N, generator=generator).argsort(-1)
    return order < min(N // 10, N - needed)


def _short(quotas):
    return f"{len(quotas)} of {min(quotas)} to {max(quotas)}"


OPERATOR = Operator(
    name="exclusive_bottomk",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    variants=variants,
    check=check,
    cost=cost,
    reference_seconds=_reference_seconds,
    peers={
        "topk": Peer(_prepare_eager, _seconds),
        "host_loop": Peer(_prepare(baselines.host_choose, baselines.host_features_choose), _host_seconds),
        "graph": Peer(_prepare_graph, _seconds, devices=("cuda",)),
        "compiled": Peer(_prepare_compiled, _seconds, compiles=True),
    },
    sanitize=sanitize,
)
