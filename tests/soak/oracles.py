"""Judgements that know no operator. Each returns None, or in words what is wrong."""

import torch

EPS = torch.finfo(torch.float32).eps


def first(problems):
    """The first of them that there is."""
    return next(filter(None, problems), None)


def differ(left, right, what="the answer"):
    """Bits of two tensors of one shape; NaN equals a NaN of the same bits."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{what} is {left.dtype} {list(left.shape)}, not {right.dtype} {list(right.shape)}"
    # contiguous() would keep an odd stride of a dimension of size 1
    left, right = (t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (left, right))
    places = (left != right).nonzero()[:, 0]
    return f"{len(places)} bytes of {what} differ, the first at byte {int(places[0])}" if len(places) else None


def unequal(result, truth, reference=None):
    """Values of two tensors of one shape; NaN equals NaN, -0 equals 0."""
    places = ((result != truth) & ~(result.isnan() & truth.isnan())).nonzero()
    if not len(places):
        return None if reference is None else unequal(result, reference)
    at = tuple(places[0].tolist())
    return f"{result[at].item()} at {list(at)}, expected {truth[at].item()} ({len(places)} are unequal)"


def inaccurate(result, truth, reference, scale, ulps):
    """Largest error against float64 above twice the reference's and so many float32 ulps of `scale`."""
    odd = unequal(*(t.double().where(~t.isfinite(), 0.0) for t in (result, truth)))
    if odd:
        return f"not finite: {odd}"
    error, allowed = ((t.double() - truth).nan_to_num(0, 0, 0).abs() for t in (result, reference))
    return too_far(error, allowed, scale, ulps)


def too_far(error, allowed, scale, ulps):
    """The same, from the errors."""
    if not error.numel():
        return None
    error, allowed = float(error.max()), float(allowed.max())
    bound = 2 * allowed + ulps * EPS * scale
    return f"error {error:.3g}, the reference's is {allowed:.3g}, bound {bound:.3g}" if error > bound else None


def not_tokens(choices, allowed):
    """Choices [K] are different tokens, of those that allowed [N] marks."""
    if ((choices < 0) | (choices >= len(allowed))).any():
        return f"{choices[(choices < 0) | (choices >= len(allowed))][0]} is no token of {len(allowed)}"
    if not allowed[choices].all():
        return f"token {choices[~allowed[choices]][0]} is not allowed"
    tokens, counts = choices.unique(return_counts=True)
    return f"token {tokens[counts > 1][0]} comes twice" if (counts > 1).any() else None


def not_greedy(choices, scores, allowed, tolerance):
    """Each choice [K] is within tolerance of the least of its row of scores [K, N] among the tokens left.

    Scores that are not finite rank last, except -inf, which all have before the first choice. Ties go to the lowest
    index: where tolerance is 0, and among scores that are not finite in any case.
    """
    problem = not_tokens(choices, allowed)
    if problem or not len(choices):
        return problem
    last = torch.finfo(torch.float64).max
    steps = torch.arange(len(choices))
    taken = torch.full((len(allowed),), len(choices)).index_put((choices,), steps)
    scores = scores.nan_to_num(nan=last, posinf=last, neginf=-torch.inf)
    least, lowest = scores.where(allowed & (taken >= steps[:, None]), torch.inf).min(1).values, None
    left = (scores == least[:, None]) & allowed & (taken >= steps[:, None])
    lowest = left.int().argmax(1)
    own = scores.gather(1, choices[:, None])[:, 0]
    tied = (tolerance == 0) | (least == last) | (least == -torch.inf)
    wrong = ((own > least + tolerance) | (tied & (choices != lowest))).nonzero()[:, 0]
    if not len(wrong):
        return None
    at = int(wrong[0])
    return f"choice {at} is token {choices[at]} of {own[at]:.9g}, token {lowest[at]} has {least[at]:.9g}"


def lowest(scores, quotas, free):
    """int64: row after row of scores [P, N] takes its lowest tokens among those free [N] and left; the one answer."""
    order = scores.where(scores.isfinite(), torch.inf).argsort(dim=-1, stable=True)
    free, chosen = free.clone(), [torch.empty(0, dtype=torch.int64)]
    for row, quota in zip(order, quotas):
        chosen.append(row[free[row]][:quota])
        free[chosen[-1]] = False
    return torch.cat(chosen)
