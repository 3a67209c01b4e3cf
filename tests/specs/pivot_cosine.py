"""Calls of `pivot_cosine`, `duplication` and their packed kin."""

import functools
import itertools

import torch

import pruneops
from tests.inputs import clustered, seeds_and_mask
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, TypeErrorCall, bools, ints

from ._small import TOLERANCE, as_reference, name_of, plus_minus_one

REDUCTIONS = ("max", "mean", "sum")


def small_calls():
    """Few and many pivots, repeated ones, masks, odd and even widths and strides, packed images.

    Entries are 1 or -1: where D is a power of four, cosines and their sums are those of the reference to the bit.
    """
    generator = torch.Generator().manual_seed(2)
    for B, N, D, P, dtype, reduce in (
        (1, 1, 1, 1, torch.float32, "sum"),
        (2, 33, 64, 8, torch.float16, "max"),
        (1, 130, 1031, 3, torch.bfloat16, "mean"),
        (2, 301, 256, 64, torch.float32, "mean"),
        (1, 77, 48, 70, torch.bfloat16, "max"),
        (1, 20011, 16, 8, torch.bfloat16, "sum"),
    ):
        pivots = torch.randint(N, (B, P), generator=generator)
        mask = torch.rand(B, N, generator=generator) < 0.9
        label = f"B {B} N {N} D {D} P {P} {name_of(dtype)}"
        odd, even = (plus_minus_one((B, N, D + margin), generator).to(dtype) for margin in (3, 16))
        tolerance = 0.0 if D in (1, 16, 64, 256) else P * TOLERANCE  # a sum over pivots adds up their errors

        def run(to, x=odd, pivots=pivots, mask=mask, D=D):
            return pruneops.pivot_cosine(x.to(to)[..., 1 : D + 1], pivots.to(to), mask=mask.to(to))

        def run_reduced(to, x=even, pivots=pivots, reduce=reduce, D=D):
            return pruneops.duplication(x.to(to)[..., :D], pivots.to(to), reduce=reduce)

        yield label, as_reference(run, tolerance)
        yield f"{label} {reduce}", as_reference(run_reduced, tolerance)
    lengths, D, P = (70, 0, 5200, 33), 64, 5
    packed = plus_minus_one((sum(lengths), D), generator)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    pivots = torch.stack(
        [start + torch.randint(max(n, 1), (P,), generator=generator) for start, n in zip(starts, lengths)]
    )
    mask = torch.rand(sum(lengths), generator=generator) < 0.9
    for function in (pruneops.pivot_cosine_varlen, pruneops.duplication_varlen):

        def run_packed(to, function=function):
            return function(packed.to(to), starts.to(to), pivots.to(to), mask=mask.to(to))

        yield f"images {lengths} D {D} P {P} {function.__name__}", as_reference(run_packed)


X, PIVOTS = torch.ones(2, 6, 4), ints([0, 1], [5, 5])
VALID = {"x": X, "pivots": PIVOTS}
PACKED_VALID = {"x": X[0], "cu_seqlens": ints(0, 2, 6), "pivots": ints([0], [5])}
HERE = "on the device of x, cpu"


def _batched(op):
    invalid = functools.partial(InvalidCall, op, VALID)
    return [
        invalid(ValueError, "x", "of shape [4]", "of rank 2 or 3", x=X[0, 0]),
        invalid(ValueError, "x", "of shape [1, 2, 6, 4]", "of rank 2 or 3", x=X[None]),
        invalid(ValueError, "x", "of shape [2, 6, 0]", "at least one feature wide", x=X[..., :0]),
        invalid(TypeError, "x", "torch.int64", DTYPE_NAMES, x=X.long()),
        invalid(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X.double()),
        invalid(TypeError, "pivots", "torch.int32", "int64", pivots=PIVOTS.int()),
        invalid(ValueError, "pivots", "of shape [2]", "of shape [2, P]", pivots=ints(1, 2)),
        invalid(ValueError, "pivots", "of shape [3, 1]", "of shape [2, P]", pivots=ints([0], [0], [0])),
        invalid(ValueError, "pivots", "of shape [2, 2]", "of shape [P]", x=X[0]),
        invalid(ValueError, "pivots", "on meta", HERE, pivots=PIVOTS.to("meta")),
        invalid(ValueError, "pivots", "6 at one place", "in [0, 6)", pivots=ints([0, 1], [0, 6]), values=True),
        invalid(ValueError, "pivots", "-1 at one place", "in [0, 6)", pivots=ints([0, -1], [0, 6]), values=True),
        invalid(ValueError, "pivots", "0 at one place", "in [0, 0)", x=X[:, :0], pivots=ints([0], [0]), values=True),
        invalid(TypeError, "mask", "torch.uint8", "bool", mask=bools(2, 6).byte()),
        invalid(ValueError, "mask", "of shape [2, 5]", "of shape [2, 6]", mask=bools(2, 5)),
        invalid(ValueError, "mask", "of shape [6]", "of shape [2, 6]", mask=bools(6)),
        invalid(ValueError, "mask", "on meta", HERE, mask=bools(2, 6, device="meta")),
    ]


def _packed(op):
    invalid = functools.partial(InvalidCall, op, PACKED_VALID)
    falling = {"cu_seqlens": ints(0, 7, 6), "pivots": ints([0], [5])}
    return [
        invalid(ValueError, "x", "of shape [2, 6, 4]", "of rank 2", x=X),
        invalid(ValueError, "x", "of shape [6, 0]", "at least one feature wide", x=X[0, :, :0]),
        invalid(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X[0].double()),
        invalid(TypeError, "cu_seqlens", "torch.float32", "int32 or int64", cu_seqlens=ints(0.0, 2.0, 6.0)),
        invalid(ValueError, "cu_seqlens", "of shape [1, 3]", "of rank 1", cu_seqlens=ints([0, 2, 6])),
        invalid(ValueError, "cu_seqlens", "empty", "of at least one entry", cu_seqlens=ints(dtype=torch.int64)),
        invalid(ValueError, "cu_seqlens", "on meta", HERE, cu_seqlens=ints(0, 2, 6, device="meta")),
        invalid(ValueError, "cu_seqlens[0]", "1", "0", cu_seqlens=ints(1, 2, 6), values=True),
        invalid(ValueError, "cu_seqlens[-1]", "5", "the 6 tokens of x", cu_seqlens=ints(0, 2, 5), values=True),
        invalid(ValueError, "cu_seqlens", "falling from 7 to 6 at 1", "non-decreasing", **falling, values=True),
        invalid(TypeError, "pivots", "torch.int32", "int64", pivots=PACKED_VALID["pivots"].int()),
        invalid(ValueError, "pivots", "of shape [2]", "of shape [2, P]", pivots=ints(0, 5)),
        invalid(ValueError, "pivots", "of shape [1, 1]", "of shape [2, P]", pivots=ints([0])),
        invalid(ValueError, "pivots", "on meta", HERE, pivots=PACKED_VALID["pivots"].to("meta")),
        invalid(ValueError, "pivots", "2 at one place", "in [0, 2)", pivots=ints([2], [3]), values=True),
        invalid(ValueError, "pivots", "1 at one place", "in [2, 6)", pivots=ints([0], [1]), values=True),
        invalid(TypeError, "mask", "torch.uint8", "bool", mask=bools(6).byte()),
        invalid(ValueError, "mask", "of shape [5]", "of shape [6]", mask=bools(5)),
        invalid(ValueError, "mask", "on meta", HERE, mask=bools(6, device="meta")),
    ]


def _reduced(op, valid):
    invalid, none = functools.partial(InvalidCall, op, valid), torch.empty(2, 0, dtype=torch.int64)
    return [
        invalid(ValueError, "reduce", "'median'", f"one of {REDUCTIONS}", reduce="median"),
        invalid(ValueError, "pivots", "of shape [2, 0]", "at least one a row", pivots=none),
    ]


INVALID = [
    *(call for op in ("pivot_cosine", "duplication") for call in (*_batched(op), *_packed(f"{op}_varlen"))),
    *_reduced("duplication", VALID),
    *_reduced("duplication_varlen", PACKED_VALID),
]
TYPE_ERRORS = [
    TypeErrorCall(op + kind, valid, message, **changes)
    for kind, valid in (("", VALID), ("_varlen", PACKED_VALID))
    for op, message, changes in (
        ("pivot_cosine", "x must be Tensor, got list", {"x": [[1.0]]}),
        ("pivot_cosine", "pivots must be Tensor, got list", {"pivots": [0]}),
        ("pivot_cosine", "mask must be Tensor or NoneType, got int", {"mask": 1}),
        ("duplication", "x must be Tensor, got float", {"x": 1.0}),
        ("duplication", "pivots must be Tensor, got int", {"pivots": 0}),
        ("duplication", "mask must be Tensor or NoneType, got list", {"mask": [True]}),
        ("duplication", "reduce must be str, got int", {"reduce": 1}),
        ("duplication", "reduce must be str, got NoneType", {"reduce": None}),
    )
] + [
    TypeErrorCall(f"{op}_varlen", PACKED_VALID, "cu_seqlens must be Tensor, got list", cu_seqlens=[0])
    for op in ("pivot_cosine", "duplication")
]


def samples():
    x = torch.randn(2, 9, 5)
    pivots, mask = seeds_and_mask((2, 9))
    bounds, own = torch.tensor([0, 4, 9]), torch.tensor([[0, 3], [4, 8]])
    return [
        ("pivot_cosine", (x, pivots), {}),
        ("pivot_cosine", (x[0].mT.contiguous().mT.half(), pivots[0]), {"mask": mask[0]}),
        ("duplication", (x.bfloat16(), pivots), {"mask": mask, "reduce": "mean"}),
        ("pivot_cosine_varlen", (x[0], bounds, own), {}),
        ("duplication_varlen", (x[0], bounds.int(), own), {"mask": mask[0], "reduce": "sum"}),
    ]


def model(x, pivots, k):
    """Prepare features, score, keep the least similar."""
    features = x - x.mean(1, keepdim=True)
    mask = features.abs().sum(-1) > 0
    kept = pruneops.duplication(features, pivots, mask=mask).topk(k, largest=False).indices.sort().values
    flat = features.flatten(0, 1)
    bounds = torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)
    packed = pruneops.duplication_varlen(flat, bounds, pivots + bounds[:-1, None], reduce="sum")
    cosines = pruneops.pivot_cosine(features, pivots), pruneops.pivot_cosine_varlen(flat, bounds[[0, -1]], pivots[:1])
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, packed, *cosines


def model_inputs():
    sizes = (12, 8, 3, 2), (20, 5, 7, 3), (31, 16, 4, 8)
    return [(torch.randn(2, N, D), torch.arange(2 * P).view(2, P) % N, k) for N, D, k, P in sizes]


def every_form(x, pivots, mask, bounds):
    """All operators on tensors x [B, N, D], batched and packed."""
    flat, own = x.flatten(0, 1), bounds[:-1, None] + torch.arange(3, device=x.device)
    mean = {"mask": mask.flatten(), "reduce": "mean"}
    return (
        pruneops.pivot_cosine(x, pivots, mask=mask),
        pruneops.duplication(x, pivots),
        pruneops.pivot_cosine_varlen(flat, bounds, own),
        pruneops.duplication_varlen(flat, bounds, own, **mean),
    )


def form_inputs(seed, small=False):
    shape, dtype = ((3, 150, 33), torch.float32) if small else ((3, 900, 130), torch.bfloat16)
    total = shape[0] * shape[1]
    bounds = torch.tensor([0, total // 3 + seed, total // 2, total])
    return [clustered(shape, seed, dtype=dtype), *seeds_and_mask(shape[:-1], 8, seed=seed), bounds]


def triton_launches():
    from pruneops.triton_kernels import pivot_cosine as kernels

    for dtype, width in ((torch.bfloat16, 64), (torch.float32, 33)):
        for tokens in (50, 51, 64, 9000, 9001):
            x, mask = torch.ones(3, tokens, width, dtype=dtype), torch.ones(3, tokens, dtype=torch.bool)
            for count in (1, 3, 16, 17, 64, 100):
                pivots = torch.zeros(3, count, dtype=torch.int64)
                kernels.pivot_cosine(x, None, pivots, None, None)
                kernels.pivot_cosine(x[:1], None, pivots[:1], None, None)
                if dtype == torch.bfloat16:
                    kernels.pivot_cosine(x, None, pivots, mask, "max")
                    kernels.pivot_cosine(x[:1], torch.tensor([0, 7, tokens]), pivots[:2], mask[:1], "mean")
                    kernels.pivot_cosine(x[:1], torch.tensor([0, tokens]), pivots[:1], mask[:1], "mean")


# Kernels: few or many pivots, few or many tokens: as a batch, reduced, packed (with few tokens here).
LAUNCHES = 5 * 6 * (5 + 2), (4 + 4 + 2) + 4
