"""Inputs that several tests share: tokens, attention, caches, layouts in memory. Needs torch alone.

Float32 arithmetic is exact on some of them (`small_integers`, `signs`, `steep_logits`, `ranked`, `counting`): backends
must agree on these to the bit, ties included.
"""

import contextlib

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Memory


def storage(tensor):
    """All bytes of the storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def copied(value, device="cpu", copies=None):
    """A copy of a tensor, or of all those in tuples, lists and dictionaries, on a device.

    Each lies in the same place of a storage of the same size; tensors of one storage share one.
    """
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        return {name: copied(item, device, copies) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [copied(item, device, copies) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, torch.Tensor):
        return value
    key = value.untyped_storage()._cdata
    if key not in copies:
        copies[key] = storage(value).to(device, copy=True).untyped_storage()
    copy = torch.empty(0, dtype=value.dtype, device=device)
    return copy.set_(copies[key], value.storage_offset(), value.shape, value.stride())


@contextlib.contextmanager
def poisoned():
    """New memory holds NaN or the largest integer, in native code too (new_empty of the stable ABI)."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def embedded(tensor, step, margin=3):
    """A copy inside a larger tensor of NaN or largest integers, with `step` between entries in each dimension."""
    poison = torch.nan if tensor.is_floating_point() or tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    big = torch.full([margin + s * size for s, size in zip(step, tensor.shape)], poison, dtype=tensor.dtype)
    return big[tuple(slice(margin, None, s) for s in step)].copy_(tensor)


# Layouts of a tensor in memory. All but "expanded" keep its values.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "offset": lambda t: embedded(t.flatten(), [1]).view(t.shape),
    "sliced": lambda t: embedded(t, [2] * (t.dim() - 1) + [1]),
    "strided features": lambda t: embedded(t, [1] * (t.dim() - 1) + [2]),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
}
# The same of a tensor [.., heads, tokens, features]. All but "one head" keep its values.
HEAD_LAYOUTS = {
    **{name: layout for name, layout in LAYOUTS.items() if name != "expanded"},
    "tokens before heads": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
    "one head": lambda t: t[..., :1, :, :].expand(t.shape),
}


# Tokens

# Not vectors of ordinary numbers: (value, how many features hold it; None = all, the rest 0).
SPECIAL = {
    "nan": (torch.nan, None),
    "one nan": (torch.nan, 1),
    "inf": (torch.inf, 1),
    "-inf": (-torch.inf, None),
    "overflow": (3e38, 1),  # finite in float32 and bfloat16, its square is not
    "zero": (0.0, None),
    "underflow": (1e-30, None),  # its square is 0 in float32
}


def special_token(name, like):
    """A token of SPECIAL with the width and the dtype of tokens [.., D]."""
    value, count = SPECIAL[name]
    token = like.new_zeros(like.shape[-1])
    token[:count] = torch.tensor(value).to(like.dtype)
    return token


def with_special_tokens(x, generator, names, share=0.3):
    """x [..., N, D] with a share of its tokens replaced by the named ones of SPECIAL."""
    x = x.clone()
    for name in names:
        x[torch.rand(x.shape[:-1], generator=generator) < share / len(names)] = special_token(name, x)
    return x


def small_integers(shape, generator, limit=3):
    """Integers in [-limit, limit]: sums of their products are exact in float32, ties frequent."""
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def signs(shape, generator):
    """Vectors of 4^j entries +-1 (the rest 0) times a power of two: their norms and cosines are exact."""
    *rows, width = shape
    ones = 4 ** ((width.bit_length() - 1) // 2)
    entries = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    where = torch.rand(shape, generator=generator).argsort(-1) < ones
    scale = torch.exp2(torch.randint(-5, 6, (*rows, 1), generator=generator))
    return entries * where * scale


def with_copies(x, generator, share=0.5):
    """x [..., N, D] with a share of its tokens replaced by copies of others."""
    tokens = x.shape[-2]
    source = torch.where(
        torch.rand(tokens, generator=generator) < share,
        torch.randint(0, max(tokens, 1), (tokens,), generator=generator),
        torch.arange(tokens),
    )
    return x[..., source, :]


def clustered(shape, seed=0, clusters=7, spread=0.3, dtype=torch.float32):
    """Real-valued tokens in tight clusters, lengths over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(*shape[:-2], clusters, shape[-1], generator=generator)
    which = torch.randint(0, clusters, (shape[-2],), generator=generator)
    x = centers[..., which, :] + spread * torch.randn(shape, generator=generator)
    return (x * torch.exp(1.5 * torch.randn(*shape[:-1], 1, generator=generator))).to(dtype)


def seeds_and_mask(shape, count=3, share=0.7, seed=0):
    """Different tokens [..., count] of [..., N] and a mask [..., N] that forbids some of them."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.rand(shape, generator=generator).argsort(-1)[..., :count]
    return seeds, torch.rand(shape, generator=generator) < share


def logits(shape, seed=0, dtype=torch.float32):
    """Logits [.., N, J + 1] of a model that is sure of some tokens and of few ranks."""
    generator = torch.Generator().manual_seed(seed)
    certainty = torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    return (2 * certainty * torch.randn(shape, generator=generator)).to(dtype)


def steep_logits(shape, generator, steps=3):
    """Logits [.., N, J + 1] whose log probabilities are exact in float32, many of them equal.

    The maximum of a token is 0 or, where it is unique, any small integer; the others are whole steps of 128 below,
    where probabilities are 0 in float32.
    """
    step = torch.randint(0, steps + 1, shape, generator=generator)
    step -= step.amin(-1, keepdim=True)
    unique = (step == 0).sum(-1, keepdim=True) == 1
    return small_integers((*shape[:-1], 1), generator) * unique - 128.0 * step


# Attention


def real(B, H, Hk, Sq, Sk, D, seed=0, dtype=torch.float32):
    """(query, key): some rows attend to few keys, some to many."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, Sq, D, generator=generator) * torch.rand(B, H, Sq, 1, generator=generator) * 4
    return query.to(dtype), torch.randn(B, Hk, Sk, D, generator=generator).to(dtype)


def ranked(B, H, Hk, Sq, Sk, D, generator):
    """(query, key, options): for every query one logit exceeds the others by 256: its probability is exactly 1."""
    signs = torch.randint(0, 2, (D,), generator=generator) * 2.0 - 1
    query = signs * (torch.randint(0, 2, (B, H, Sq, 1), generator=generator) * 2.0 - 1)  # the last or first rank wins
    key = signs * torch.rand(B, Hk, Sk, generator=generator).argsort(-1)[..., None]
    return query, key, {"scale": 256 / D}


def counting(B, H, Hk, Sq, Sk, D, generator):
    """(query, key, options): logits are 0 or at most -256, lse is 0 or -inf: probabilities are exactly 0 or 1."""
    query = 16.0 * (torch.rand(B, H, Sq, D, generator=generator) < 2 / D)
    key = -16.0 * (torch.rand(B, Hk, Sk, D, generator=generator) < 0.5)
    lse = torch.tensor([0.0, 0.0, -torch.inf])[torch.randint(0, 3, (B, H, Sq), generator=generator)]
    return query, key, {"scale": 1, "lse": lse}


def runs(shape, groups, generator):
    """int64 [.., S]: groups in runs of random lengths, as of text and images, some of them -1."""
    run = (torch.rand(shape, generator=generator) < 0.1).cumsum(-1)
    return torch.randint(-1, groups, (*shape[:-1], shape[-1] + 1), generator=generator).gather(-1, run)


def random_groups(shape, seed=0, groups=3):
    """(query_group, key_group) for a shape (B, H, Hk, Sq, Sk, D), -1 among them."""
    generator = torch.Generator().manual_seed(seed)
    B, _, _, Sq, Sk, _ = shape
    return runs((B, Sq), groups, generator), runs((B, Sk), groups, generator)


def poison(tensor, valid, generator):
    """The tensor with NaN, infinities and huge values where it is not valid."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38]).to(tensor.dtype)
    return tensor.where(valid, values[torch.randint(0, len(values), tensor.shape, generator=generator)])


# Caches

BITS = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8,
    torch.int64, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
GARBAGE = 2**60, -1, -(2**60)  # entries past the lengths


def any_bits(shape, dtype=torch.float32, seed=0):
    """Random bytes: NaN payloads, -0.0 and denormals occur; a bool is 0 or 1. seed: a number or a generator."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    shape = tuple(shape)
    count, values = torch.Size(shape).numel() * dtype.itemsize, 2 if dtype == torch.bool else 256
    return torch.randint(0, values, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def as_integers(tensor):
    """The same memory as elements that are copied bit by bit."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return tensor.view(kinds[tensor.element_size()])


def among_others(tensor, step, margin=3):
    """A copy inside a larger tensor of other bits, with `step` between entries in each dimension."""
    shape = [margin + s * max(size, 1) for s, size in zip(step, tensor.shape)]
    big = any_bits(shape, tensor.dtype, seed=99)
    own = big[tuple(slice(margin, margin + s * size, s) for s, size in zip(step, tensor.shape))]
    as_integers(own).copy_(as_integers(tensor))
    return own


# Copies of a tensor [.., S, D] or [B, Hk, S, D] in other memory layouts.
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


def with_garbage(keep, lengths):
    """keep with invalid entries past the lengths."""
    keep = keep.clone()
    for b, length in enumerate(lengths.tolist()):
        keep[b, ..., length:] = GARBAGE[b % len(GARBAGE)]
    return keep


def block_tables(B, blocks, pages, generator):
    """int32 [B, blocks] of different pages."""
    return torch.randperm(pages, generator=generator)[: B * blocks].view(B, blocks).int()


def pages_of(pages, page, Hk, D, layout, dtype=torch.float16, together=False, seed=0):
    """Pages of any bits; with `together` keys and values in one tensor."""
    inner = (page, Hk) if layout == "NHD" else (Hk, page)
    return any_bits((pages, *([2] if together else []), *inner, D), dtype, seed)


def model_state(B, S, D, dtype=torch.bfloat16, seed=0):
    """What a decoder layer takes: hidden states, mRoPE positions, mask, cos, sin; and the dimension of their tokens."""
    positions = torch.arange(S).expand(3, B, S) + torch.arange(3)[:, None, None]
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.9
    rotary = [any_bits((1, S, 128), dtype, seed + i) for i in (1, 2)]
    return [any_bits((B, S, D), dtype, seed), positions, mask, *rotary], [1, 2, 1, 1, 1]
