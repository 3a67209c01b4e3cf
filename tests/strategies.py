"""Hypothesis strategies for operator inputs: shapes, dtypes, memory layouts, masks, seeds, packings.

Values come from a drawn generator seed: shapes and choices shrink, values stay typical.
"""

import torch
from hypothesis import strategies as st

from tests import inputs
from tests.inputs import DTYPES, LAYOUTS, SPECIAL, ascending, with_garbage

dtypes = st.sampled_from(DTYPES)
generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def shapes(draw, batch=3, tokens=40, width=70):
    """[B, N, D], or [N, D] in one case of four."""
    shape = (draw(st.integers(1, tokens)), draw(st.integers(1, width)))
    return shape if draw(st.integers(0, 3)) == 0 else (draw(st.integers(0, batch)), *shape)


def laid_out(tensor, expand=True):
    """The tensor in a drawn layout; with `expand`, perhaps one slice in all places of the first dimension."""
    names = [name for name in LAYOUTS if expand or name != "expanded"]
    return st.sampled_from(names).map(lambda name: LAYOUTS[name](tensor))


@st.composite
def exact_tokens(draw, shape, generator, values=inputs.signs):
    """[..., N, D] of any dtype, values exact in float32 arithmetic, many tokens equal, some of them special."""
    x = inputs.with_copies(values(shape, generator), generator).to(draw(dtypes))
    return inputs.with_special_tokens(x, generator, draw(st.lists(st.sampled_from(list(SPECIAL)), max_size=3)))


@st.composite
def masks(draw, shape, generator):
    """bool [..., N] that allows at least one token in every row."""
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.9, 1.0]))
    always = torch.rand(shape, generator=generator).argsort(-1) == 0
    return mask | always


@st.composite
def seeds(draw, shape, generator, limit=5):
    """int64 [..., P] of different tokens in every row of [..., N], P from 0."""
    count = draw(st.integers(0, min(limit, shape[-1])))
    return torch.rand(shape, generator=generator).argsort(-1)[..., :count]


@st.composite
def packings(draw, sequences=4, tokens=20):
    """(lengths, budgets) of sequences packed into one tensor; in half the cases some are 0."""
    minimum = draw(st.integers(0, 1))
    lengths = draw(st.lists(st.integers(minimum, tokens), max_size=sequences))
    return lengths, [draw(st.integers(minimum, length)) for length in lengths]


@st.composite
def bounds(draw, lengths):
    """cu_seqlens of sequences of these lengths, int32 or int64."""
    return torch.tensor([0, *lengths]).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def positions(draw, B, Hk, S, in_place):
    """(keep, lengths or None); keep holds garbage past the lengths."""
    generator = draw(generators)
    rows = draw(st.sampled_from([(B,), (B, Hk)]))
    K = draw(st.integers(0, S) | st.just(S) if in_place else st.integers(0, 2 * S if S else 0))
    if in_place:
        keep = ascending(rows, K, S, generator)
    else:
        keep = torch.randint(0, max(S, 1), (*rows, K), generator=generator)
    lengths = None
    if draw(st.booleans()):
        lengths = torch.randint(0, K + 1, (B,), generator=generator)
        keep = with_garbage(keep, lengths)
        lengths = lengths.to(draw(st.sampled_from([torch.int32, torch.int64])))
    if draw(st.booleans()):
        keep = keep.mT.contiguous().mT
    return keep, lengths
