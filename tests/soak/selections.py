"""Random calls of the operators that choose tokens: k-center, exclusive bottom-k, rank assignment."""

import itertools

import torch

from tests import inputs
from tests.inputs import DTYPES
from tests.oracles import (
    EPS,
    cosines,
    first,
    kcenter_scores,
    lowest,
    negative_log_probabilities,
    not_greedy,
    not_tokens,
    similarity_errors,
    similarity_scale,
    too_far,
    unequal,
)

from .cosines import pivots_in
from .draws import Call, Soak, rows_of

METRICS = ("cosine", "euclidean")
MAX_SCORES = 4_000_000  # that an oracle holds: choices times tokens


def draw_kcenter(random):
    exact, metric, batch = random.chance(0.5), random.choice(*METRICS), random.batch()
    N, D = random.size(300, 6000, 40), random.size(200, 100, 70)
    if random.large and random.chance(0.2):
        N, D = random.between(16385, 20000), random.between(1, 20)
    x = random.tokens((*batch, N, D), exact, metric == "euclidean")
    seeds, mask, allowed = None, None, torch.zeros(x.shape[:-1], dtype=torch.bool)
    if random.chance(0.5):
        seeds = random.laid_out(random.distinct(allowed.shape, random.between(0, min(5, N))), own=not batch)
        allowed = allowed.scatter(-1, seeds, True)
    if random.chance(0.5):
        mask = (random.rand(*allowed.shape) < random.choice(0.02, 0.5, 0.9, 1)) | (
            random.rand(*allowed.shape).argsort(-1) == 0
        )
        mask = random.laid_out(mask, own=not batch)
    allowed |= True if mask is None else mask
    limit = min(int(allowed.sum(-1).min()) if allowed.numel() else N, max(1, MAX_SCORES // N))
    k = random.choice(limit, *[random.between(1, cap) for cap in (limit, min(limit, 50), min(limit, 50))])
    k = max(k, 0 if seeds is None else seeds.shape[-1])
    return Call({"x": x, "k": k, "seeds": seeds, "mask": mask, "metric": metric}, exact)


def verify_kcenter(call, results, reference):
    rows = zip(rows_of(call, results, ["x", "seeds", "mask"]), rows_of(call, reference, ["x"]))
    return first(kcenter_problem(*row, *expected[1:], call) for row, expected in rows)


def draw_kcenter_varlen(random):
    exact, metric = random.chance(0.5), random.choice(*METRICS)
    minimum = random.between(0, 1)
    lengths = [random.size(100, 400, 25) - 1 + minimum for _ in range(random.between(0, 5))]
    ks = [random.choice(length, random.between(minimum, length)) for length in lengths]
    x = random.tokens((sum(lengths), random.size(200, 100, 70)), exact, metric == "euclidean")
    bounds, seeds = random.bounds(lengths), None
    if random.chance(0.5):
        P = random.between(0, min(3, *ks)) if ks else 0
        rows = [start + random.distinct((n,), P) for start, n in zip(bounds.tolist(), lengths)]
        seeds = random.laid_out(torch.stack(rows) if rows else torch.empty(0, P, dtype=torch.int64), own=True)
    return Call({"x": x, "cu_seqlens": bounds, "ks": ks, "seeds": seeds, "metric": metric}, exact)


def verify_kcenter_varlen(call, results, reference):
    x, bounds, ks, seeds = (call.arguments[name] for name in ("x", "cu_seqlens", "ks", "seeds"))
    bounds, answers = bounds.tolist(), zip(*(t.split(ks) for t in (*results, *reference)))
    for s, (indices, radii, expected, others) in enumerate(answers):
        start, own = bounds[s], None if seeds is None else seeds[s] - bounds[s]
        row = x[start : bounds[s + 1]], own, None, indices - start, radii, expected - start, others
        problem = kcenter_problem(*row, call) if ks[s] else None
        if problem:
            return f"sequence {s}: {problem}"
    return None


def kcenter_problem(x, seeds, mask, indices, radii, expected, expected_radii, call):
    """Of one row x [N, D]; `expected` is the reference's."""
    metric, count = call.arguments["metric"], 0 if seeds is None else len(seeds)
    free = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.clone()
    if seeds is not None:
        free[seeds] = True
    problem = not_tokens(indices, free) or (unequal(indices, expected) if call.exact else None)
    if problem or (count and unequal(indices[:count], seeds)):
        return problem or "the answer does not begin with the seeds"
    if seeds is not None:
        free[seeds] = False
    scale = similarity_scale(x, metric)
    rounding = 0.0 if call.exact else (4 + x.shape[-1] ** 0.5) * EPS * scale
    scores = kcenter_scores(x, indices, metric)
    return not_greedy(indices[count:], scores[count:], free, rounding) or wrong_radii(
        (radii, scores, indices), (expected_radii, kcenter_scores(x, expected, metric), expected), count, call, scale
    )


def wrong_radii(own, reference, seeds, call, scale):
    """own, reference = (radii [K], scores [K, N], indices [K])."""
    errors = [similarity_errors(*row, call.arguments["metric"]) for row in (own, reference)]
    radii, score = own[0], own[1].gather(1, own[2][:, None])[:, 0]
    score[:seeds] = -torch.inf
    non_finite = torch.where(score == torch.inf, torch.nan, torch.where(score == -torch.inf, torch.inf, 0.0))
    problem = unequal(radii.where(~radii.isfinite(), 0.0).double(), non_finite)
    if problem:
        return f"radii: {problem}"
    known = radii[radii.isfinite()]
    if (known[1:] > known[:-1]).any():
        return "radii increase"
    ulps = 2 if call.exact else 4 + call.arguments["x"].shape[-1] ** 0.5 / 4
    problem = too_far(*errors, scale, ulps)
    return problem and f"radii: {problem}"


def quotas_and_free(random, rows, shape):
    """(quotas, free): how many of the tokens [.., N] each row takes, and which may be taken, or None."""
    free, limit = None, shape[-1]
    if random.chance(0.5):
        free = random.laid_out(random.rand(*shape) < random.choice(0.0, 0.1, 0.5, 0.9), own=True)
        limit = int(free.sum(-1).min()) if free.numel() else limit
    limit = min(limit, MAX_SCORES // shape[-1]) if rows else 0
    total = random.choice(limit, random.between(0, limit))
    cuts = [0, *random.integers(0, total + 1, (max(rows - 1, 0),)).sort().values.tolist(), total]
    return [end - start for start, end in itertools.pairwise(cuts)][:rows], free


# Scores that are hard to select from.
HARD = (
    lambda random, shape: random.randn(*shape),
    lambda random, shape: random.integers(-3, 4, shape).float(),
    lambda random, shape: random.integers(0, 2, shape).float(),
    lambda random, shape: 1 + random.integers(0, 300, shape) * EPS,
    lambda random, shape: random.integers(-300, 300, shape) * 2.0**-149,
    lambda random, shape: random.randn(*shape) * torch.exp2(random.integers(-130, 125, shape)),
    lambda random, shape: random.choice(-1, 1) * torch.arange(shape[-1]).expand(shape).float(),
    lambda random, shape: random.randn(shape[-1]).expand(shape),
)
SPECIAL_SCORES = (torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 6e-8, -1e-40, 65504.0, torch.finfo(torch.float32).max)


def with_special(random, values, special):
    """Values with a share of them replaced, perhaps all."""
    replaced = random.rand(*values.shape) < random.choice(0.0, 0.0, 0.02, 0.3, 1.0)
    return values.where(~replaced, torch.tensor(special)[random.integers(0, len(special), values.shape)])


def draw_exclusive_bottomk(random):
    batch, rows, N = random.batch(), random.choice(random.between(0, 6), 16, 64), random.size(600, 6000, 60)
    N = random.between(60000, 80000) if random.large and random.chance(0.2) else N
    scores = with_special(random, random.choice(*HARD)(random, (*batch, rows, N)), SPECIAL_SCORES)
    quotas, free = quotas_and_free(random, rows, (*batch, N))
    taken = None if free is None else random.laid_out(~free, own=True)
    return Call({"scores": random.laid_out(scores.to(random.choice(*DTYPES))), "quotas": quotas, "taken": taken})


def verify_exclusive_bottomk(call, results, reference):
    rows = rows_of(call, [*results, *reference], ["scores", "taken"])
    return first(exclusive_problem(call, *row) for row in rows)


def exclusive_problem(call, scores, taken, chosen, expected):
    """Of scores [P, N]: the one right answer."""
    free = torch.ones(scores.shape[-1], dtype=torch.bool) if taken is None else ~taken
    truth = lowest(scores.double(), call.arguments["quotas"], free)
    return not_tokens(chosen, free) or unequal(chosen, truth, expected)


def draw_pivot_bottomk(random):
    exact, batch = random.chance(0.5), random.batch()
    x = random.tokens((*batch, random.size(300, 4000, 40), random.size(200, 100, 70)), exact)
    pivots = pivots_in(random, x.shape[:-1], random.choice(random.between(0, 6), 16, 17, 64))
    quotas, mask = quotas_and_free(random, pivots.shape[-1], x.shape[:-1])
    return Call({"x": x, "pivots": pivots, "quotas": quotas, "mask": mask}, exact)


def verify_pivot_bottomk(call, results, reference):
    rows = rows_of(call, [*results, *reference], ["x", "pivots", "mask"])
    return first(pivot_bottomk_problem(call, *row) for row in rows)


def pivot_bottomk_problem(call, x, pivots, mask, chosen, expected):
    scores, quotas = cosines(x, pivots), call.arguments["quotas"]
    free = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    if call.exact:
        return not_tokens(chosen, free) or unequal(chosen, lowest(scores, quotas, free), expected)
    scores = scores.repeat_interleave(torch.tensor(quotas, dtype=torch.int64), 0)  # [K, N]
    return not_greedy(chosen, scores, free, (4 + x.shape[-1] ** 0.5) * EPS)


def draw_assign_ranks(random):
    exact, batch = random.chance(0.5), random.batch()
    N, J = random.size(300, 6000, 60), random.choice(random.between(1, 10), 15, 16, 31, 32, 63, 64)
    shape = *batch, N, J + 1
    if exact:
        logits = inputs.steep_logits(shape, random.generator)
        logits = with_special(random, logits, (torch.nan, torch.inf, -torch.inf, 3e38, -3e38))
    else:
        logits = inputs.logits(shape, random.seed())
    limit = min(N, J)
    j = random.choice(limit, random.between(1, limit))
    return Call({"logits": random.laid_out(logits.to(random.choice(*DTYPES))), "j": j}, exact)


def verify_assign_ranks(call, results, reference):
    return first(ranks_problem(call, *row) for row in rows_of(call, [*results, *reference], ["logits"]))


def ranks_problem(call, logits, ranks, expected):
    scores = negative_log_probabilities(logits)[: call.arguments["j"]]  # [j, N]
    free = torch.ones(len(logits), dtype=torch.bool)
    if call.exact:
        return not_tokens(ranks, free) or unequal(ranks, lowest(scores, [1] * len(scores), free), expected)
    problem = not_tokens(ranks, free)
    scale = 1 + float(scores.nan_to_num(0).amax())
    return problem or not_greedy(ranks, scores, free, 4 * EPS * scale)


SOAKS = {
    "kcenter": Soak(draw_kcenter, verify_kcenter),
    "kcenter_varlen": Soak(draw_kcenter_varlen, verify_kcenter_varlen),
    "exclusive_bottomk": Soak(draw_exclusive_bottomk, verify_exclusive_bottomk),
    "pivot_bottomk": Soak(draw_pivot_bottomk, verify_pivot_bottomk),
    "assign_ranks": Soak(draw_assign_ranks, verify_assign_ranks),
}
