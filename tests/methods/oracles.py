"""Specifications of the methods as plain loops in float64, and inputs shared by the tests."""

import math

import torch

from pruneops.methods import Row
from tests.inputs import signs, with_copies


def finite(vector):
    return sum(value * value for value in vector) <= torch.finfo(torch.float32).max / 4  # False for NaN


def cosine(a, b):
    """Of two lists; 0 with a zero vector."""
    dot = sum(x * y for x, y in zip(a, b))
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return dot / length if length else 0.0


def descending(scores, count):
    """The first `count` indices by score: equals in order, those that are not finite at the end."""
    scores = scores.tolist()
    rank = sorted(range(len(scores)), key=lambda i: (not math.isfinite(scores[i]), -_or_zero(scores[i]), i))
    return rank[:count]


def _or_zero(score):
    return score if math.isfinite(score) else 0.0


def farthest_first(features, k, start):
    """Greedy k-center by cosine from `start`, ascending; tokens that are not finite come last and are near to none."""
    x = features.double().tolist()
    chosen = [start]
    while len(chosen) < k:
        best = None
        for token in range(len(x)):
            if token in chosen:
                continue
            near = [cosine(x[token], x[c]) for c in chosen if finite(x[c])] if finite(x[token]) else []
            key = (0, max(near, default=-math.inf)) if finite(x[token]) else (1, 0)
            if best is None or key < best[0]:
                best = key, token
        chosen.append(best[1])
    return sorted(chosen)


def attention(query, key, causal=True, hidden=()):
    """[H, Sq, Sk] softmax in float64; `hidden` keys are masked out."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(len(query) // len(key), 0)
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    rows, columns = logits.shape[-2:]
    for i in range(rows):
        for j in range(columns):
            if (causal and j > i + columns - rows) or j in hidden:
                logits[:, i, j] = -math.inf
    return logits.softmax(-1)


def assert_highest(chosen, scores, k, tolerance=1e-6):
    """`chosen` are k different ascending indices, each at least as high as all others within the tolerance."""
    chosen = chosen.tolist()
    assert len(chosen) == k and chosen == sorted(set(chosen))
    left = [score for i, score in enumerate(scores.tolist()) if i not in chosen]
    assert min(scores[chosen].tolist(), default=math.inf) >= max(left, default=-math.inf) - tolerance


def hard_tokens(shape, seed=0):
    """Tokens with exact cosines: many copies, zero vectors, and in each image of a batch one NaN and one infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = with_copies(signs(shape, generator), generator)
    tokens = shape[-2]
    x[..., torch.rand(tokens, generator=generator) < 0.15, :] = 0
    if tokens > 4:
        x[..., tokens // 2, 0] = torch.nan
        x[..., 1, -1] = torch.inf
    return x


def prompt(images, *, before=3, between=1, after=5, width=16, heads=4, key_heads=2, seed=0, sizes=None):
    """A Row: `before` tokens, images of these sizes with `between` tokens between them, `after` tokens."""
    generator = torch.Generator().manual_seed(seed)
    visual, ranges, position = [], [], before
    for size in images:
        ranges.append((len(visual), len(visual) + size))
        visual += range(position, position + size)
        position += size + between
    length = position - between + after if images else before + after
    hidden = torch.randint(-3, 4, (length, width), generator=generator).float()
    query = torch.randn(heads, length, 8, generator=generator)
    key = torch.randint(-3, 4, (key_heads, length, 8), generator=generator).float()
    visual = torch.tensor(visual, dtype=torch.int64)
    return Row(hidden, query, key, None, visual, tuple(ranges), tuple(sizes or images))
