"""Inputs of the operators that move tokens: caches of any bits in any place of memory, positions to keep."""

import torch
from hypothesis import strategies as st

from tests import strategies

BITS = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8,
    torch.int64, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
GARBAGE = 2**60, -1, -(2**60)  # entries that nobody may use


def any_bits(shape, dtype=torch.float32, seed=0):
    """Every pattern of bits: NaN payloads, -0.0, denormals."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(shape)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def among_others(tensor, step, margin=3):
    """The tensor inside a larger one of other bits, its entries `step` apart in each dimension."""
    shape = [margin + s * max(size, 1) for s, size in zip(step, tensor.shape)]
    big = any_bits(shape, tensor.dtype, seed=99)
    return big[tuple(slice(margin, margin + s * size, s) for s, size in zip(step, tensor.shape))].copy_(tensor)


# Where a tensor [.., S, D] or [B, Hk, S, D] may lie. Values stay.
PLACES = {
    "contiguous": lambda t: t.contiguous(),
    "tokens outside": lambda t: t.movedim(-2, 1).contiguous().movedim(1, -2) if t.dim() > 2 else t.contiguous(),
    "among others": lambda t: among_others(t, [1] * t.dim()),
    "every other token": lambda t: among_others(t, [1] * (t.dim() - 2) + [2, 1], margin=0),
    "off by one": lambda t: among_others(t.flatten(), [1], margin=1).view(t.shape),
    "features apart": lambda t: among_others(t, [1] * (t.dim() - 1) + [2]),
    "features outside": lambda t: t.mT.contiguous().mT,
}


def ascending(rows, K, S, generator):
    """Positions [*rows, K], strictly ascending in [0, S)."""
    order = torch.rand(*rows, S, generator=generator).argsort(-1)
    return order[..., :K].sort(-1).values


@st.composite
def positions(draw, B, Hk, S, in_place):
    """(keep, lengths or None): garbage in keep past the lengths."""
    generator = draw(strategies.generators)
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


def with_garbage(keep, lengths):
    """keep with entries past the lengths that are no positions."""
    keep = keep.clone()
    for b, length in enumerate(lengths.tolist()):
        keep[b, ..., length:] = GARBAGE[b % len(GARBAGE)]
    return keep


def storage(tensor):
    """All bytes of the memory that a tensor is part of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).cpu()
