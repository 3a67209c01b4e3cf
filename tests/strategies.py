"""Hypothesis strategies for operator inputs: shapes, dtypes, memory layouts, masks, seeds, packings.

Values come from a drawn generator seed: shapes and choices shrink, values stay typical.
"""

import torch
from hypothesis import strategies as st

from tests import contract

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

dtypes = st.sampled_from(DTYPES)
generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def shapes(draw, batch=3, tokens=40, width=70):
    """[B, N, D], or [N, D] in one case of four."""
    own = (draw(st.integers(1, tokens)), draw(st.integers(1, width)))
    return own if draw(st.integers(0, 3)) == 0 else (draw(st.integers(0, batch)), *own)


def _surrounded(tensor, step, margin=3):
    """The tensor inside a larger one, its entries `step` apart in each dimension, poison around them."""
    integer = not tensor.is_floating_point() and tensor.dtype != torch.bool
    poison = torch.iinfo(tensor.dtype).max if integer else torch.nan  # NaN is True
    big = torch.full([margin + s * size for s, size in zip(step, tensor.shape)], poison, dtype=tensor.dtype)
    return big[tuple(slice(margin, None, s) for s in step)].copy_(tensor)


# Layouts of a tensor in memory. All but "expanded" keep its values.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "offset": lambda t: _surrounded(t.flatten(), [1]).view(t.shape),
    "sliced": lambda t: _surrounded(t, [2] * (t.dim() - 1) + [1]),
    "strided features": lambda t: _surrounded(t, [1] * (t.dim() - 1) + [2]),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def laid_out(tensor, expand=True):
    """The tensor in a drawn layout; with `expand`, perhaps one slice in all places of the first dimension."""
    names = [name for name in LAYOUTS if expand or name != "expanded"]
    return st.sampled_from(names).map(lambda name: LAYOUTS[name](tensor))


# Tokens that are no vector of ordinary numbers: (value, how many features hold it; None = all, the rest 0).
SPECIAL = {
    "nan": (torch.nan, None),
    "one nan": (torch.nan, 1),
    "inf": (torch.inf, 1),
    "-inf": (-torch.inf, None),
    "overflow": (3e38, 1),  # finite in float32 and bfloat16, its square is not
    "zero": (0.0, None),
    "underflow": (1e-30, None),  # its square is 0 in float32
}


def with_special_tokens(x, generator, names, share=0.3):
    """x [..., N, D] with a share of its tokens replaced by the named ones of SPECIAL."""
    x = x.clone()
    for name in names:
        value, count = SPECIAL[name]
        token = x.new_zeros(x.shape[-1])
        token[:count] = torch.tensor(value).to(x.dtype)
        x[torch.rand(x.shape[:-1], generator=generator) < share / len(names)] = token
    return x


@st.composite
def exact_tokens(draw, shape, generator, values=contract.signs):
    """[..., N, D] of any dtype, values exact in float32 arithmetic, many tokens equal, some of them special."""
    x = contract.with_copies(values(shape, generator), generator).to(draw(dtypes))
    return with_special_tokens(x, generator, draw(st.lists(st.sampled_from(list(SPECIAL)), max_size=3)))


@st.composite
def masks(draw, shape, generator):
    """bool [..., N] that allows at least one token in every row."""
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.9, 1.0]))
    always = torch.rand(shape, generator=generator).argsort(-1) == 0
    return mask | always


@st.composite
def seeds(draw, shape, generator, most=5):
    """int64 [..., P] of different tokens in every row of [..., N], P from 0."""
    count = draw(st.integers(0, min(most, shape[-1])))
    return torch.rand(shape, generator=generator).argsort(-1)[..., :count]


@st.composite
def packings(draw, sequences=4, tokens=20):
    """(lengths, budgets) of sequences packed into one tensor; in half the cases some are 0."""
    least = draw(st.integers(0, 1))
    lengths = draw(st.lists(st.integers(least, tokens), max_size=sequences))
    return lengths, [draw(st.integers(least, length)) for length in lengths]


@st.composite
def bounds(draw, lengths):
    """cu_seqlens of sequences of these lengths, int32 or int64."""
    return torch.tensor([0, *lengths]).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
