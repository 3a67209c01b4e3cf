"""Trials of the operators that score tokens against pivots."""

import torch

from .draws import Call, Soak
from .oracles import first, inaccurate, unequal


def pivots_in(random, shape, count):
    """int64 [.., count]: tokens of [.., N], perhaps the same more than once."""
    return random.laid_out(random.integers(0, shape[-1], (*shape[:-1], count)))


def float64_cosines(x, pivots, mask=None):
    """[.., P, N] of x [.., N, D]; 0 for zero vectors of float32, NaN for what has no length there."""
    x = x.double()
    square = x.square().sum(-1, keepdim=True)
    direction = (x / square.sqrt()).where(square >= torch.finfo(torch.float32).tiny, 0.0)
    direction = direction.where(square <= torch.finfo(torch.float32).max / 4, torch.nan)
    cosines = torch.take_along_dim(direction, pivots[..., None], -2) @ direction.mT
    return cosines if mask is None else cosines.where(mask[..., None, :], torch.inf)


def reduced(cosines, reduce):
    if reduce is None:
        return cosines
    if reduce == "mean":  # of an exact sum, in float32
        return (cosines.sum(-2).float() / cosines.shape[-2]).double()
    return cosines.amax(-2) if reduce == "max" else cosines.sum(-2)


def draw_batch(random, reduces):
    exact = random.chance(0.5)
    x = random.tokens((*random.batch(), random.size(300, 6000, 40), random.size(300, 200, 70)), exact)
    arguments = {"x": x, "pivots": pivots_in(random, x.shape[:-1], pivot_count(random, reduces))}
    return Call(with_options(random, arguments, x.shape[:-1], reduces), exact)


def draw_packed(random, reduces):
    """Pivots of empty sequences are anything."""
    exact, count = random.chance(0.5), random.of(random.between(0, 6), random.between(0, 40))
    lengths = [random.of(0, random.size(100, 400, 20), random.size(100, 400, 20)) for _ in range(count)]
    x = random.tokens((sum(lengths), random.size(200, 200, 70)), exact)
    bounds, P = random.bounds(lengths), pivot_count(random, reduces)
    pivots = torch.full((count, P), random.of(-1, 2**40))
    for own, start, n in zip(pivots, bounds.tolist(), lengths):
        own.copy_(start + random.integers(0, n, (P,)) if n else own)
    arguments = {"x": x, "cu_seqlens": bounds, "pivots": random.laid_out(pivots, own=True)}
    return Call(with_options(random, arguments, x.shape[:1], reduces), exact)


def pivot_count(random, reduces):
    return random.of(random.between(int(reduces), 8), 16, 17, 64, 65, 100)


def with_options(random, arguments, shape, reduces):
    mask = random.laid_out(random.rand(*shape) < random.of(0.0, 0.5, 0.9)) if random.chance(0.5) else None
    return {**arguments, "mask": mask} | ({"reduce": random.of("max", "mean", "sum")} if reduces else {})


def verify(call, results, reference):
    x, pivots, mask = (call.arguments[name] for name in ("x", "pivots", "mask"))
    bounds = call.arguments["cu_seqlens"].tolist() if "cu_seqlens" in call.arguments else None
    if bounds is None:
        return scores_problem(call, x, pivots, mask, results[0], reference[0])

    def problems():
        for own, start, end in zip(pivots, bounds, bounds[1:]):
            tokens = None if mask is None else mask[start:end]
            scores = (t[..., start:end] for t in (results[0], reference[0]))
            yield scores_problem(call, x[start:end], own - start, tokens, *scores) if start < end else None

    return first(problems())


def scores_problem(call, x, pivots, mask, scores, reference):
    reduce = call.arguments.get("reduce")
    truth = reduced(float64_cosines(x, pivots, mask), reduce)
    if call.exact:
        return unequal(scores, truth.float(), reference)
    scale = pivots.shape[-1] if reduce == "sum" else 1
    return inaccurate(scores, truth, reference, scale, 4 + x.shape[-1] ** 0.5 / 4)


SOAKS = {
    "pivot_cosine": Soak(lambda random: draw_batch(random, False), verify),
    "duplication": Soak(lambda random: draw_batch(random, True), verify),
    "pivot_cosine_varlen": Soak(lambda random: draw_packed(random, False), verify),
    "duplication_varlen": Soak(lambda random: draw_packed(random, True), verify),
}
