"""Random calls of the operators that score tokens against pivots."""

import torch

from tests.oracles import cosines, first, inaccurate, reduced, unequal

from .draws import Call, Soak


def pivots_in(random, shape, count):
    """int64 [.., count]: tokens of [.., N], perhaps the same more than once."""
    return random.laid_out(random.integers(0, shape[-1], (*shape[:-1], count)))


def draw_batch(random, reduces):
    exact = random.chance(0.5)
    x = random.tokens((*random.batch(), random.size(300, 6000, 40), random.size(300, 200, 70)), exact)
    arguments = {"x": x, "pivots": pivots_in(random, x.shape[:-1], pivot_count(random, reduces))}
    return Call(with_options(random, arguments, x.shape[:-1], reduces), exact)


def draw_packed(random, reduces):
    """Pivots of empty sequences are garbage."""
    exact, count = random.chance(0.5), random.choice(random.between(0, 6), random.between(0, 40))
    lengths = [random.choice(0, random.size(100, 400, 20), random.size(100, 400, 20)) for _ in range(count)]
    x = random.tokens((sum(lengths), random.size(200, 200, 70)), exact)
    bounds, P = random.bounds(lengths), pivot_count(random, reduces)
    pivots = torch.full((count, P), random.choice(-1, 2**40))
    for own, start, n in zip(pivots, bounds.tolist(), lengths):
        own.copy_(start + random.integers(0, n, (P,)) if n else own)
    arguments = {"x": x, "cu_seqlens": bounds, "pivots": random.laid_out(pivots, own=True)}
    return Call(with_options(random, arguments, x.shape[:1], reduces), exact)


def pivot_count(random, reduces):
    return random.choice(random.between(int(reduces), 8), 16, 17, 64, 65, 100)


def with_options(random, arguments, shape, reduces):
    mask = random.laid_out(random.rand(*shape) < random.choice(0.0, 0.5, 0.9)) if random.chance(0.5) else None
    return {**arguments, "mask": mask} | ({"reduce": random.choice("max", "mean", "sum")} if reduces else {})


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
    truth = reduced(cosines(x, pivots, mask), reduce)
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
