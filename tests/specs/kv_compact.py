"""Calls of `kv_compact` and `kv_compact_`."""

import functools
import itertools

import torch

import pruneops
from tests.inputs import PLACES, any_bits, ascending
from tests.invalid_calls import InvalidCall, TypeErrorCall, ints

from ._small import as_bytes, as_reference, laid_out, name_of


def small_calls():
    """New and in place: one token to many, layouts, odd widths and addresses, heads, lengths, mixtures.

    Caches hold any bits, NaN too, and are compared as bytes, in place with all memory around them. Positions past a
    length are garbage.
    """
    generator = torch.Generator().manual_seed(6)
    half, full, byte = torch.bfloat16, torch.float32, torch.uint8
    for B, S, K, heads, lengths, layouts in (
        (1, 1, 1, False, None, [(1, 1, full, "plain")]),
        (2, 97, 31, False, [31, 7], [(4, 64, half, "plain"), (4, 64, half, "heads inside")]),
        (2, 130, 117, True, None, [(3, 128, half, "heads inside"), (3, 33, byte, "odd address")]),
        (3, 70, 9, True, [9, 0, 4], [(2, 80, full, "plain"), (2, 5, half, "strided")]),
        (1, 700, 630, False, None, [(2, 128, half, "plain")] * 5),
        (1, 300, 40, False, None, [(8, 128, half, "plain"), (1, 576, half, "odd address"), (2, 24, full, "strided")]),
    ):
        caches = [laid_out(how, (B, Hk, S, D), dtype, generator) for Hk, D, dtype, how in layouts]
        order = torch.rand(B, *([layouts[0][0]] if heads else []), S, generator=generator).argsort(-1)
        keep, lengths = order[..., :K].sort(-1).values, lengths and torch.tensor(lengths)
        if lengths is not None:
            past = torch.arange(K) >= lengths.reshape(B, *[1] * (keep.dim() - 1))
            keep = keep.where(~past, torch.iinfo(torch.int64).max)

        def run(to, caches=caches, keep=keep, lengths=lengths):
            options = {} if lengths is None else {"lengths": lengths.to(to)}
            return as_bytes(pruneops.kv_compact([cache(to)[1] for cache in caches], keep.to(to), **options))

        def run_in_place(to, caches=caches, keep=keep, lengths=lengths):
            options = {} if lengths is None else {"lengths": lengths.to(to)}
            memory, own = zip(*(cache(to) for cache in caches))
            pruneops.kv_compact_(own, keep.to(to), **options)
            return as_bytes(memory)

        kinds = dict.fromkeys(f"Hk {Hk} D {D} {name_of(dtype)} {how}" for Hk, D, dtype, how in layouts)
        label = f"{len(layouts)} caches B {B} S {S} -> {K}{' per head' if heads else ''}"
        label += f"{'' if lengths is None else ' lengths'}: {', '.join(kinds)}"
        yield label, as_reference(run)
        yield f"in place, {label}", as_reference(run_in_place)


CACHE, KEEP = torch.zeros(2, 3, 5, 4), ints([0, 2, 4], [1, 2, 3])
VALID = {"caches": [CACHE], "keep": KEEP}
ONE = torch.zeros(1, 1, 1, 1)
new, in_place = (functools.partial(InvalidCall, op, VALID) for op in ("kv_compact", "kv_compact_"))


def both(*args, **kwargs):
    return [new(*args, **kwargs), in_place(*args, **kwargs)]


INVALID = [
    *both(ValueError, "caches", "an empty list", "at least one cache", caches=[]),
    *both(ValueError, "caches[1]", "of shape [3, 5, 4]", "of rank 4: [B, Hk, S, D]", caches=[CACHE, CACHE[0]]),
    *both(ValueError, "keep", "of shape [3]", "[B, K] or [B, Hk, K]", keep=KEEP[0]),
    *both(ValueError, "keep", "of shape [1, 3]", "of shape [2, K]", keep=KEEP[:1]),
    *both(ValueError, "keep", "of shape [2, 1, 3]", "of shape [2, 3, K]", keep=KEEP[:, None]),
    *both(TypeError, "keep", "torch.int32", "int64", keep=KEEP.int()),
    *both(TypeError, "lengths", "torch.float32", "int64 or int32", lengths=torch.ones(2)),
    *both(ValueError, "lengths", "of shape [3]", "of shape [2]", lengths=ints(1, 1, 1)),
    *both(
        ValueError, "caches[1]", "of shape [1, 1, 1, 1]", "[2, Hk, S, D], as caches[0] and keep say",
        caches=[CACHE, ONE],
    ),
    *both(
        ValueError, "caches[1]", "of shape [2, 1, 5, 4]", "[2, 3, S, D], as caches[0] and keep say",
        caches=[CACHE, torch.zeros(2, 1, 5, 4)], keep=KEEP[:, None].expand(2, 3, 3),
    ),
    *both(ValueError, "keep", "5 at one place", "in [0, 5)", values=True, keep=ints([0, 2, 4], [1, 2, 5])),
    *both(ValueError, "keep", "-1 at one place", "in [0, 5)", values=True, keep=ints([-1, 2, 4], [1, 2, 3])),
    *both(ValueError, "lengths", "4", "0 to the 3 entries of keep", values=True, lengths=ints(1, 4)),
    *both(ValueError, "lengths", "-1", "0 to the 3 entries of keep", values=True, lengths=ints(-1, 1)),
    in_place(
        ValueError, "keep", "6 entries a row", "at most the 5 positions of caches[0]",
        keep=torch.arange(6).repeat(2, 1),
    ),
    in_place(
        ValueError, "caches[0]", "expanded", "memory of its own for every element",
        caches=[CACHE[:1].expand(2, 3, 5, 4)],
    ),
    in_place(
        ValueError, "caches[1]", "the same memory as caches[0]", "passed once", values=True, caches=[CACHE, CACHE]
    ),
    in_place(
        ValueError, "keep", "2 after 2 at [1, 1]", "strictly ascending in every row", values=True,
        keep=ints([0, 2, 4], [1, 2, 2]),
    ),
]  # fmt: skip
TYPE_ERRORS = [
    TypeErrorCall(op, VALID, message, **changes)
    for op in ("kv_compact", "kv_compact_")
    for message, changes in (
        ("caches must be list or tuple, got Tensor", {"caches": CACHE}),
        ("caches[1] must be Tensor, got NoneType", {"caches": [CACHE, None]}),
        ("keep must be Tensor, got list", {"keep": [[0, 1]]}),
        ("lengths must be Tensor or NoneType, got list", {"lengths": [1, 2]}),
    )
]


def samples():
    """Keep shared by heads, per head, with lengths, caches with tokens before heads."""
    caches = [torch.randn(2, 3, 6, 4), torch.randn(2, 3, 7, 2).half()]
    outside = [PLACES["tokens outside"](cache) for cache in caches]
    keep, lengths = torch.tensor([[0, 2, 5], [1, 2, 3]]), torch.tensor([3, 1])
    calls = (
        ((caches, keep), {"lengths": None}),
        ((caches, keep[:, None].repeat(1, 3, 1)), {"lengths": None}),
        ((caches, keep), {"lengths": lengths}),
        ((outside, keep), {"lengths": None}),
    )
    return [(op, *call) for op in ("kv_compact", "kv_compact_") for call in calls]


def model(key, value, keep):
    new = pruneops.kv_compact([key, value], keep)
    own = [key * 2, value + 1]
    pruneops.kv_compact_(own, keep)
    return new[0] * 2, new[1], own[0][:, :, : keep.shape[1]] + 1, own[1]


def model_inputs():
    sizes = (2, 3, 12, 8, 5), (3, 2, 20, 4, 7)
    return [
        (torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.arange(K).expand(B, -1) * 2) for B, H, S, D, K in sizes
    ]


def every_form(key, value, keep, lengths):
    own = [key.clone(), value.clone()]
    pruneops.kv_compact_(own, keep, lengths=lengths)
    return *pruneops.kv_compact([key, value], keep), *own


def form_inputs(seed, small=False):
    S, K, D, dtype = (300, 100, 64, torch.float32) if small else (2000, 1500, 128, torch.bfloat16)
    caches = [any_bits((2, 2, S, D), dtype, seed + i) for i in range(2)]
    keep = ascending((2,), K, S, torch.Generator().manual_seed(seed))
    return [*caches, keep, torch.tensor([K - seed, K // 4 + seed])]


def triton_launches():
    from pruneops.triton_kernels import kv_compact as kernels

    for B, (S, K), count in itertools.product((1, 3), ((5, 3), (300, 256), (1000, 1)), (1, 8, 200)):
        caches = [torch.zeros(B, 2, S, 64, dtype=torch.bfloat16) for _ in range(count)]
        keep = torch.arange(K).expand(B, -1)
        results = kernels.kv_compact(caches, keep, None)
        assert len({result.untyped_storage().data_ptr() for result in results}) == count
        kernels.kv_compact_(caches, keep, None)


LAUNCHES = 2 * 2 * 3 * (1 + 1 + 2), 2 * 2  # 200 caches: 192 and 8; kernels, lengths of the lists
