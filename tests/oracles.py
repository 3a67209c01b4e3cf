"""Right answers of the operators in float64 or bit by bit, and judgements of an answer. Needs torch alone.

A judgement returns None, or a message that says what is wrong.
"""

import torch

from tests.inputs import as_integers, copied

EPS = torch.finfo(torch.float32).eps
MAX_SQUARE = torch.finfo(torch.float32).max / 4  # of a token that is a vector
MIN_SQUARE = torch.finfo(torch.float32).tiny  # of one that is no zero vector


# Tokens


def directions(x):
    """Tokens divided by their length, in float64; 0 for a zero vector of float32, NaN for a non-finite one."""
    x = x.double()
    square = x.square().sum(-1, keepdim=True)
    direction = (x / square.sqrt()).where(square >= MIN_SQUARE, 0.0)
    return direction.where(square <= MAX_SQUARE, torch.nan)


def cosines(x, pivots, mask=None):
    """Cosines [.., P, N] of x [.., N, D] with its tokens `pivots`, in float64; +inf where mask is False."""
    direction = directions(x)
    similarity = torch.take_along_dim(direction, pivots[..., None], -2) @ direction.mT
    return similarity if mask is None else similarity.where(mask[..., None, :], torch.inf)


def reduced(cosines, reduce):
    """[.., N] from cosines [.., P, N]; a mean is divided in float32, as it must be."""
    if reduce is None:
        return cosines
    if reduce == "mean":
        return (cosines.sum(-2).float() / cosines.shape[-2]).double()
    return cosines.amax(-2) if reduce == "max" else cosines.sum(-2)


def kcenter_scores(x, indices, metric):
    """float64 [K, N]: the scores that choices [K] among x [N, D] minimise, row i before choice i."""
    x = x.double()
    square = x.square().sum(-1)
    finite = square <= MAX_SQUARE
    vector = finite & (square >= MIN_SQUARE)  # the others have no length in float32
    x, square = x.where(vector[:, None], 0), square.where(vector, 0)
    similarity = x @ x[indices].T  # [N, K]
    if metric == "cosine":
        inverse = square.sqrt().reciprocal().where(vector, 0)
        similarity *= inverse[:, None] * inverse[indices]
    else:
        similarity = 2 * similarity - square[:, None] - square[indices]
    similarity[:, ~finite[indices]] = -torch.inf
    before = torch.full_like(similarity[:, :1], -torch.inf)
    nearest = torch.cat([before, similarity[:, :-1]], 1).cummax(1).values
    nearest[~finite] = torch.inf
    return nearest.T


def similarity_scale(x, metric):
    """Magnitude of the terms that a similarity is summed from."""
    square = x.double().square().sum(-1)
    return 1.0 if metric == "cosine" else 4 * float(square.where(square <= MAX_SQUARE, 0).max())


def similarity_errors(radii, scores, indices, metric):
    """Errors of the similarities that finite radii [K] state, against scores [K, N] of the choices [K]."""
    cosine = metric == "cosine"
    score = scores.gather(1, indices[:, None])[:, 0]
    stated = 1 - radii.double() if cosine else -radii.double().square()
    return (stated - score.clamp(max=1.0 if cosine else 0.0))[radii.isfinite() & score.isfinite()].abs()


def negative_log_probabilities(logits):
    """[.., J, N] in float64 of logits [.., N, J + 1]; NaN where float32 cannot hold it."""
    scores = -logits.double().log_softmax(-1)[..., :-1].mT
    return scores.where(scores.float().isfinite(), torch.nan)


def lowest(scores, quotas, free):
    """int64: row after row of scores [P, N] takes its lowest tokens among those free [N] and left."""
    order = scores.where(scores.isfinite(), torch.inf).argsort(dim=-1, stable=True)
    free, chosen = free.clone(), [torch.empty(0, dtype=torch.int64)]
    for row, quota in zip(order, quotas):
        chosen.append(row[free[row]][:quota])
        free[chosen[-1]] = False
    return torch.cat(chosen)


# Attention


def attention(query, key, counted, seen, causal=True, scale=None, lse=None):
    """(probabilities [.., H, Sq, Sk], lse [.., H, Sq]) in float64; 0 and -inf where nothing is counted or seen."""
    (heads, queries, width), keys = query.shape[-3:], key.shape[-2]
    key = key.double().repeat_interleave(heads // key.shape[-3], -3)
    logits = query.double() @ key.mT * (width**-0.5 if scale is None else scale)
    visible = counted[..., None, :, None] & seen[..., None, None, :]
    if causal:
        visible = visible & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    logits = logits.where(visible, -torch.inf)
    lse = logits.logsumexp(-1) if lse is None else lse.double()
    return (logits - lse[..., None]).exp().where(visible & (lse != -torch.inf)[..., None], 0.0), lse


def attention_mass(query, key, query_group, key_group, groups, **options):
    """(mass, lse) in float64; a group that is not one of `groups` is counted nowhere, as a key it is seen."""
    probability, lse = attention(query, key, query_group >= 0, key_group >= 0, **options)
    rows, columns = (group[..., None, :, None] == torch.arange(groups) for group in (query_group, key_group))
    return rows.double().mT @ probability @ columns.double(), lse


def masked_attention(query, key, query_mask=None, key_mask=None, **options):
    """`attention` of tokens that masks mark, all where there is no mask."""
    masks = ((query, query_mask), (key, key_mask))
    marked = (torch.ones(*t.shape[:-3], t.shape[-2], dtype=torch.bool) if m is None else m for t, m in masks)
    return attention(query, key, *marked, **options)


# Copies of tokens, bit by bit


def _kept(keep, lengths, B, Hk):
    """(b, h, positions) of every head."""
    for b in range(B):
        for h in range(Hk):
            positions = keep[b, h] if keep.dim() == 3 else keep[b]
            yield b, h, positions if lengths is None else positions[: int(lengths[b])]


def kv_compact(cache, keep, lengths=None):
    """A new cache of the kept tokens, 0 past the lengths."""
    result = torch.zeros(*cache.shape[:2], keep.shape[-1], cache.shape[3], dtype=cache.dtype)
    for b, h, positions in _kept(keep, lengths, *cache.shape[:2]):
        as_integers(result)[b, h, : len(positions)] = as_integers(cache)[b, h, positions]
    return result


def kv_compact_(cache, keep, lengths=None):
    """The cache after compaction in place, in the same place of another storage."""
    result = copied(cache)
    bits = as_integers(result)
    before = bits.clone()
    for b, h, positions in _kept(keep, lengths, *cache.shape[:2]):
        bits[b, h, : len(positions)] = before[b, h, positions]
    return result


def paged_kv_compact_(tensors, table, keep, lengths, layout="NHD"):
    """The tensors after compaction in place, in the same places of other storages; token by token."""
    results = copied(list(tensors))
    for tensor in map(as_integers, results):
        for part in tensor.unbind(1) if tensor.dim() == 5 else [tensor]:
            part = part if layout == "NHD" else part.transpose(1, 2)  # [pages, page, Hk, D]
            before, page = part.clone(), part.shape[1]
            for b, h, positions in _kept(keep, lengths, len(table), part.shape[2]):
                for r, position in enumerate(positions.tolist()):
                    target, source = int(table[b, r // page]), int(table[b, position // page])
                    part[target, r % page, h] = before[source, position % page, h]
    return results


def gather_tokens(tensor, keep, dim):
    """The tensor's tokens `keep`, [K] or [B, K], along a dimension."""
    dim, bits = dim % tensor.dim(), as_integers(tensor)
    if keep.dim() == 1:
        return bits.index_select(dim, keep).view(tensor.dtype)
    rows = bits.movedim(dim - 1, 0).expand(len(keep), *[-1] * (tensor.dim() - 1))
    result = bits.new_empty([*rows.shape[:dim], keep.shape[1], *rows.shape[dim + 1 :]])
    for row, positions, target in zip(rows, keep, result):
        target.copy_(row.index_select(dim - 1, positions))
    return result.movedim(0, dim - 1).contiguous().view(tensor.dtype)


# Judgements


def first(problems):
    """The first message, or None."""
    return next(filter(None, problems), None)


def differ(left, right, what="the answer"):
    """Shape, dtype and bits of two tensors; NaN equals a NaN of the same bits."""
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
    """The largest error against float64 exceeds twice the reference's and so many float32 ulps of `scale`."""
    non_finite = unequal(*(t.double().where(~t.isfinite(), 0.0) for t in (result, truth)))
    if non_finite:
        return f"not finite: {non_finite}"
    error, reference_error = ((t.double() - truth).nan_to_num(0, 0, 0).abs() for t in (result, reference))
    return too_far(error, reference_error, scale, ulps)


def too_far(error, reference_error, scale, ulps):
    """The same, from tensors of errors."""
    if not error.numel():
        return None
    error, reference_error = float(error.max()), float(reference_error.max())
    bound = 2 * reference_error + ulps * EPS * scale
    wrong = f"error {error:.3g} against float64, the reference's is {reference_error:.3g}, bound {bound:.3g}"
    return None if error <= bound else wrong


def not_tokens(choices, allowed):
    """Choices [K] are different tokens, of those that allowed [N] marks."""
    if ((choices < 0) | (choices >= len(allowed))).any():
        return f"{choices[(choices < 0) | (choices >= len(allowed))][0]} is no token of {len(allowed)}"
    if not allowed[choices].all():
        return f"token {choices[~allowed[choices]][0]} is not allowed"
    tokens, counts = choices.unique(return_counts=True)
    return f"token {tokens[counts > 1][0]} occurs twice" if (counts > 1).any() else None


def not_greedy(choices, scores, allowed, tolerance=0.0):
    """Each choice [K] is within tolerance of the minimum of its row of scores [K, N] over the tokens left.

    Row i holds the scores at choice i, given the earlier ones. Scores that are not finite rank last, except -inf,
    which all have before the first choice. Ties go to the lowest index: where tolerance is 0, and among scores that
    are not finite in any case.
    """
    problem = not_tokens(choices, allowed)
    if problem or not len(choices):
        return problem
    last = torch.finfo(torch.float64).max
    steps = torch.arange(len(choices))
    taken = torch.full((len(allowed),), len(choices)).index_put((choices,), steps)
    scores, left = scores.nan_to_num(nan=last, posinf=last, neginf=-torch.inf), allowed & (taken >= steps[:, None])
    minimum = scores.where(left, torch.inf).min(1).values
    best = ((scores == minimum[:, None]) & left).int().argmax(1)
    score = scores.gather(1, choices[:, None])[:, 0]
    tied = (tolerance == 0) | (minimum == last) | (minimum == -torch.inf)
    wrong = ((score > minimum + tolerance) | (tied & (choices != best))).nonzero()[:, 0]
    if not len(wrong):
        return None
    at = int(wrong[0])
    return f"choice {at} is token {choices[at]} of {score[at]:.9g}, token {best[at]} has {minimum[at]:.9g}"
