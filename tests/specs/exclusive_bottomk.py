"""Calls of `exclusive_bottomk` and `pivot_bottomk`."""

import functools

import torch

import pruneops
from tests.inputs import clustered, seeds_and_mask
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, TypeErrorCall, bools, ints

from ._small import as_reference, name_of, plus_minus_one


def small_calls():
    """Both operators on one token to many: quotas of none and of all, ties, NaN, taken tokens, odd strides, halves.

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
        P = len(quotas)
        label = f"B {B} N {N} {name_of(dtype)} quotas {P} of {min(quotas)} to {max(quotas)}"
        wide = torch.randint(-99, 99, (B, P, N + 3), generator=generator).to(dtype)
        wide[torch.rand(wide.shape, generator=generator) < 0.01] = torch.nan
        order = torch.rand(B, N, generator=generator).argsort(-1)
        taken = order < min(N // 10, N - sum(quotas))

        def run_scores(to, wide=wide, taken=taken, quotas=quotas, N=N):
            return pruneops.exclusive_bottomk(wide.to(to)[..., 2 : N + 2], quotas, taken=taken.to(to))

        yield f"scores {label}", as_reference(run_scores)
        D = 64 if N <= 9216 else 16
        tokens = plus_minus_one((B, N, D + 1), generator).to(dtype)
        pivots = torch.randint(N, (B, P), generator=generator)

        def run_features(to, tokens=tokens, pivots=pivots, quotas=quotas):
            return pruneops.pivot_bottomk(tokens.to(to)[..., 1:], pivots.to(to), quotas)

        yield f"features {label} D {D}", as_reference(run_features)


X, SCORES, PIVOTS = torch.ones(2, 6, 4), torch.zeros(2, 3, 6), ints([0, 1, 2], [5, 5, 5])
SCORES_VALID = {"scores": SCORES, "quotas": [1, 2, 0]}
FEATURES_VALID = {"x": X, "pivots": PIVOTS, "quotas": [1, 2, 0]}
scores, scores_type = (
    functools.partial(kind, "exclusive_bottomk", SCORES_VALID) for kind in (InvalidCall, TypeErrorCall)
)
features, features_type = (
    functools.partial(kind, "pivot_bottomk", FEATURES_VALID) for kind in (InvalidCall, TypeErrorCall)
)
TWO_FREE = torch.arange(6).lt(2).expand(2, 6)
ONE_EACH = "one for each of the 3 rows of"
FEWER = "at most the 2 tokens that are free in every row"
INVALID = [
    scores(ValueError, "scores", "of shape [6]", "of rank 2 or 3", scores=SCORES[0, 0]),
    scores(ValueError, "scores", "of shape [1, 2, 3, 6]", "of rank 2 or 3", scores=SCORES[None]),
    scores(ValueError, "scores", "of shape [2, 3, 0]", "at least one token wide", scores=SCORES[..., :0]),
    scores(TypeError, "scores", "torch.int64", DTYPE_NAMES, scores=SCORES.long()),
    scores(TypeError, "scores", "torch.float64", DTYPE_NAMES, scores=SCORES.double()),
    scores(ValueError, "scores", "65 rows", "at most 64 rows", scores=torch.zeros(65, 6), quotas=[0] * 65),
    scores(TypeError, "taken", "torch.uint8", "bool", taken=bools(2, 6).byte()),
    scores(ValueError, "taken", "of shape [2, 5]", "of shape [2, 6]", taken=bools(2, 5)),
    scores(ValueError, "taken", "of shape [6]", "of shape [2, 6]", taken=bools(6)),
    scores(ValueError, "taken", "of shape [1, 6]", "of shape [6]", scores=SCORES[0], taken=bools(1, 6)),
    scores(ValueError, "taken", "on meta", "on the device of scores, cpu", taken=bools(2, 6, device="meta")),
    scores(ValueError, "quotas", "2 of them", f"{ONE_EACH} scores", quotas=[1, 2]),
    scores(ValueError, "quotas", "4 of them", f"{ONE_EACH} scores", quotas=[1, 2, 0, 0]),
    scores(ValueError, "quotas[1]", "-1", "at least 0", quotas=[1, -1, 0]),
    scores(ValueError, "sum(quotas)", "7", "at most the 6 tokens of scores", quotas=[3, 3, 1]),
    scores(ValueError, "sum(quotas)", "3", FEWER, taken=~TWO_FREE, values=True),
    scores(ValueError, "sum(quotas)", "3", FEWER, taken=~(TWO_FREE | ints([False], [True])), values=True),
    features(ValueError, "x", "of shape [4]", "of rank 2 or 3", x=X[0, 0]),
    features(ValueError, "x", "of shape [2, 6, 0]", "at least one feature wide", x=X[..., :0]),
    features(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X.double()),
    features(TypeError, "pivots", "torch.int32", "int64", pivots=PIVOTS.int()),
    features(ValueError, "pivots", "of shape [3]", "of shape [2, P]", pivots=PIVOTS[0]),
    features(ValueError, "pivots", "of shape [1, 3]", "of shape [2, P]", pivots=PIVOTS[:1]),
    features(ValueError, "pivots", "on meta", "on the device of x, cpu", pivots=PIVOTS.to("meta")),
    features(ValueError, "pivots", "65 rows", "at most 64 rows", pivots=ints(0).expand(2, 65), quotas=[0] * 65),
    features(ValueError, "pivots", "6 at one place", "in [0, 6)", pivots=PIVOTS + 1, values=True),
    features(ValueError, "pivots", "-1 at one place", "in [0, 6)", pivots=PIVOTS - 1, values=True),
    features(TypeError, "mask", "torch.uint8", "bool", mask=bools(2, 6).byte()),
    features(ValueError, "mask", "of shape [2, 5]", "of shape [2, 6]", mask=bools(2, 5)),
    features(ValueError, "mask", "on meta", "on the device of x, cpu", mask=bools(2, 6, device="meta")),
    features(ValueError, "quotas", "2 of them", f"{ONE_EACH} pivots", quotas=[1, 2]),
    features(ValueError, "quotas[2]", "-1", "at least 0", quotas=[1, 1, -1]),
    features(ValueError, "sum(quotas)", "7", "at most the 6 tokens of x", quotas=[3, 3, 1]),
    features(ValueError, "sum(quotas)", "3", FEWER, mask=TWO_FREE, values=True),
    features(ValueError, "sum(quotas)", "3", FEWER, x=X[0], pivots=PIVOTS[0], mask=TWO_FREE[0], values=True),
]
TYPE_ERRORS = [
    scores_type("scores must be Tensor, got list", scores=[[1.0]]),
    scores_type("quotas must be list or tuple, got int", quotas=3),
    scores_type("quotas must be list or tuple, got NoneType", quotas=None),
    scores_type("quotas[1] must be int or SymInt, got float", quotas=[1, 2.0, 0]),
    scores_type("taken must be Tensor or NoneType, got int", taken=1),
    features_type("x must be Tensor, got list", x=[[1.0]]),
    features_type("pivots must be Tensor, got list", pivots=[0]),
    features_type("quotas[2] must be int or SymInt, got NoneType", quotas=[1, 2, None]),
    features_type("mask must be Tensor or NoneType, got list", mask=[True]),
]


def samples():
    x = torch.randn(2, 9, 5)
    pivots, mask = seeds_and_mask((2, 9), share=0.9)
    return [
        ("exclusive_bottomk", (x.mT, [1, 0, 2, 3, 1]), {}),
        ("exclusive_bottomk", (x.mT.contiguous().bfloat16(), [1, 0, 2, 0, 1]), {"taken": ~mask}),
        ("exclusive_bottomk", (x[0].half(), [0] * 9), {}),
        ("pivot_bottomk", (x, pivots, [3, 0, 4]), {}),
        ("pivot_bottomk", (x[0].mT.contiguous().mT.half(), pivots[0], [1, 2, 1]), {"mask": mask[0]}),
    ]


def model(x, pivots, k):
    """Score, choose around the pivots, gather."""
    features = x - x.mean(1, keepdim=True)
    mask = torch.ones_like(x[..., 0], dtype=torch.bool).scatter(1, pivots, False)
    quotas = [k, 0, x.shape[1] // 4]
    kept = pruneops.exclusive_bottomk(pruneops.pivot_cosine(features, pivots), quotas, taken=~mask)
    again = pruneops.pivot_bottomk(features, pivots, quotas, mask=mask)
    kept = kept.sort().values
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, again


def model_inputs():
    pivots = torch.tensor([[1, 2, 3], [7, 0, 5]])
    return [(torch.randn(2, N, D), pivots, k) for N, D, k in ((12, 8, 3), (20, 5, 7), (31, 16, 4))]


def every_form(scores, taken, x, pivots, mask):
    """Quotas of 245 tokens in all."""
    quotas = [40, 0, 3, 200, 2]
    return (
        pruneops.exclusive_bottomk(scores, quotas, taken=taken),
        pruneops.exclusive_bottomk(scores[0], quotas),
        pruneops.pivot_bottomk(x, pivots, quotas, mask=mask),
        pruneops.pivot_bottomk(x[0], pivots[0], quotas),
    )


def form_inputs(seed, small=False):
    N = 900 if small else 9000
    generator = torch.Generator().manual_seed(seed)
    scores, taken = torch.randn(3, 5, N, generator=generator), torch.rand(3, N, generator=generator) < 0.2
    shape, dtype = ((3, 500, 33), torch.float32) if small else ((3, 900, 130), torch.bfloat16)
    x = clustered(shape, seed, dtype=dtype)
    return [scores.half(), taken, x, *seeds_and_mask(shape[:-1], 5, seed=seed)]


def triton_launches():
    from pruneops.triton_kernels import exclusive_bottomk as kernels

    for tokens in (50, 64, 1000, 1024, 1025, 70000):
        for quotas in ([1], [5, 0, 16], [1] * 8, [1, 2] * 5):
            scores, taken = torch.ones(2, len(quotas), tokens), torch.zeros(2, tokens, dtype=torch.bool)
            kernels.exclusive_bottomk(scores, quotas, None)
            kernels.exclusive_bottomk(scores[:1], quotas, None)
            kernels.exclusive_bottomk(scores, quotas, taken)
            kernels.exclusive_bottomk(scores[:, :, ::3].contiguous(), quotas, taken[:, ::3])
            kernels.exclusive_bottomk(scores.half(), quotas, None)
            x, pivots = torch.ones(2, tokens, 16), torch.zeros(2, len(quotas), dtype=torch.int64)
            kernels.pivot_bottomk(x, pivots, quotas, taken)


LAUNCHES = 6 * 4 * 7, 2 * 2 * 4 + 2  # tiles, numbers of rows, kinds; scores for few or many tokens
