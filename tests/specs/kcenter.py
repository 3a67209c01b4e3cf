"""Calls of `kcenter` and `kcenter_varlen`."""

import functools
import itertools

import torch

import pruneops
from tests.inputs import clustered, seeds_and_mask, signs
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, TypeErrorCall, bools, ints

from ._small import as_reference, name_of, plus_minus_one

POWERS_OF_FOUR = (16, 64, 256, 1024, 4096)


def small_calls():
    """Both metrics, seeds, masks, odd and even strides, packed images, few tokens and many.

    Entries are 1 or -1, so choices are those of the reference to the last tie wherever the arithmetic is exact:
    Euclidean always, cosine where D is a power of four. Elsewhere they must be different tokens.
    """
    generator = torch.Generator().manual_seed(1)
    for B, N, D, k, dtype in (
        (1, 33, 40, 9, torch.float32),
        (2, 130, 64, 40, torch.bfloat16),
        (1, 200, 1030, 30, torch.float16),
        (1, 5003, 64, 70, torch.bfloat16),  # past the maximum N of the Gram matrix
        (1, 10007, 24, 150, torch.float32),
    ):
        mask = torch.rand(B, N, generator=generator) < 0.9
        seeds = torch.randperm(N, generator=generator)[: B * 2].reshape(B, 2)
        for metric, margin in (("cosine", 16), ("euclidean", 1)):
            wide = plus_minus_one((B, N, D + 2 * margin), generator).to(dtype)
            exact = metric == "euclidean" or D in POWERS_OF_FOUR

            def run(to, wide=wide, k=k, seeds=seeds, mask=mask, metric=metric, margin=margin):
                x = wide.to(to)[..., margin:-margin]
                return pruneops.kcenter(x, k, seeds=seeds.to(to), mask=mask.to(to), metric=metric).indices

            def all_different(to, run=run):
                return all(len(row.unique()) == len(row) and row.min() >= 0 for row in run(to).cpu())

            yield f"B {B} N {N} D {D} k {k} {name_of(dtype)} {metric}", as_reference(run) if exact else all_different
    lengths, ks = (70, 0, 5200, 33), (7, 0, 40, 33)
    packed = plus_minus_one((sum(lengths), 64), generator)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])

    def run_packed(to):
        return pruneops.kcenter_varlen(packed.to(to), starts.to(to), ks).indices

    yield f"images {lengths} D 64", as_reference(run_packed)


X = torch.ones(2, 6, 4)
VALID = {"x": X, "k": 3}
PACKED_VALID = {"x": X[0], "cu_seqlens": ints(0, 2, 6), "ks": [1, 2]}
batched, batched_type = (functools.partial(kind, "kcenter", VALID) for kind in (InvalidCall, TypeErrorCall))
packed, packed_type = (functools.partial(kind, "kcenter_varlen", PACKED_VALID) for kind in (InvalidCall, TypeErrorCall))
HERE = "on the device of x, cpu"
TWO_FREE = torch.arange(6).lt(2)
FEWER = "at most the 2 tokens that mask and seeds allow"
INVALID = [
    batched(ValueError, "x", "of shape [4]", "of rank 2 or 3", x=X[0, 0]),
    batched(ValueError, "x", "of shape [1, 2, 6, 4]", "of rank 2 or 3", x=X[None]),
    batched(ValueError, "x", "of shape [2, 6, 0]", "at least one feature wide", x=X[..., :0]),
    batched(TypeError, "x", "torch.int64", DTYPE_NAMES, x=X.long()),
    batched(TypeError, "x", "torch.float64", DTYPE_NAMES, x=X.double()),
    batched(ValueError, "metric", "'manhattan'", "one of ('cosine', 'euclidean')", metric="manhattan"),
    batched(ValueError, "k", "0", "at least 1", k=0),
    batched(ValueError, "k", "-1", "at least 1", k=-1),
    batched(ValueError, "k", "7", "at most the 6 tokens of x", k=7),
    batched(ValueError, "k", "1", "at most the 0 tokens of x", k=1, x=X[:, :0]),
    batched(TypeError, "seeds", "torch.int32", "int64", seeds=ints([0], [0], dtype=torch.int32)),
    batched(ValueError, "seeds", "of shape [1]", "of shape [2, P]", seeds=ints(1)),
    batched(ValueError, "seeds", "of shape [3, 1]", "of shape [2, P]", seeds=ints([0], [0], [0])),
    batched(ValueError, "seeds", "of shape [1, 2]", "of shape [P]", x=X[0], seeds=ints([1, 2])),
    batched(ValueError, "seeds", "4 a row", "at most k = 3 a row", seeds=torch.arange(4).expand(2, 4)),
    batched(ValueError, "seeds", "on meta", HERE, seeds=ints([0], [0], device="meta")),
    batched(ValueError, "seeds", "6 at one place", "in [0, 6)", seeds=ints([0, 1], [0, 6]), values=True),
    batched(ValueError, "seeds", "-1 at one place", "in [0, 6)", seeds=ints([0, 1], [-1, 6]), values=True),
    batched(
        ValueError, "seeds", "the same token twice", "different tokens in each row", values=True,
        seeds=ints([0, 1], [5, 5]),
    ),
    batched(TypeError, "mask", "torch.uint8", "bool", mask=bools(2, 6).byte()),
    batched(ValueError, "mask", "of shape [2, 5]", "of shape [2, 6]", mask=bools(2, 5)),
    batched(ValueError, "mask", "of shape [6]", "of shape [2, 6]", mask=bools(6)),
    batched(ValueError, "mask", "on meta", HERE, mask=bools(2, 6, device="meta")),
    batched(ValueError, "k", "3", FEWER, mask=TWO_FREE.expand(2, 6), values=True),
    batched(ValueError, "k", "3", FEWER, x=X[0], mask=TWO_FREE, seeds=ints(1), values=True),
    packed(ValueError, "x", "of shape [2, 6, 4]", "of rank 2", x=X),
    packed(TypeError, "cu_seqlens", "torch.float32", "int32 or int64", cu_seqlens=ints(0.0, 2.0, 6.0)),
    packed(ValueError, "cu_seqlens", "of shape [2]", "of shape [3]", cu_seqlens=ints(0, 6)),
    packed(ValueError, "cu_seqlens", "of shape [1, 3]", "of shape [3]", cu_seqlens=ints([0, 2, 6])),
    packed(ValueError, "cu_seqlens", "on meta", HERE, cu_seqlens=ints(0, 2, 6, device="meta")),
    packed(ValueError, "cu_seqlens[0]", "1", "0", cu_seqlens=ints(1, 2, 6), values=True),
    packed(ValueError, "cu_seqlens[-1]", "5", "the 6 tokens of x", cu_seqlens=ints(0, 2, 5), values=True),
    packed(
        ValueError, "cu_seqlens", "falling from 7 to 6 at 1", "non-decreasing", cu_seqlens=ints(0, 7, 6), values=True
    ),
    packed(ValueError, "ks[1]", "-1", "at least 0", ks=[1, -1]),
    packed(ValueError, "ks[0]", "3", "at most the 2 tokens of sequence 0", ks=[3, 2], values=True),
    packed(ValueError, "seeds", "2 a sequence", "no more than the smallest of ks", seeds=ints([0, 1], [2, 3])),
    packed(ValueError, "seeds", "of shape [1, 1]", "of shape [2, P]", seeds=ints([0])),
    packed(ValueError, "seeds", "2 at one place", "in [0, 2)", seeds=ints([2], [3]), values=True),
]  # fmt: skip
TYPE_ERRORS = [
    batched_type("x must be Tensor, got list", x=[[1.0]]),
    batched_type("k must be int or SymInt, got float", k=2.0),
    batched_type("k must be int or SymInt, got NoneType", k=None),
    batched_type("metric must be str, got int", metric=1),
    batched_type("seeds must be Tensor or NoneType, got list", seeds=[0]),
    batched_type("mask must be Tensor or NoneType, got int", mask=1),
    packed_type("cu_seqlens must be Tensor, got list", cu_seqlens=[0, 2, 6]),
    packed_type("ks must be list or tuple, got int", ks=3),
    packed_type("ks[1] must be int or SymInt, got float", ks=[1, 2.0]),
]


def samples():
    x = torch.randn(2, 9, 5)
    seeds, mask = seeds_and_mask((2, 9), share=1.0)
    bounds = torch.tensor([0, 4, 9])
    return [
        ("kcenter", (x, 4), {}),
        ("kcenter", (x.mT.contiguous().mT, 4), {"seeds": seeds, "mask": mask, "metric": "euclidean"}),
        ("kcenter", (x[0].half(), 4), {"mask": mask[0]}),
        ("kcenter_varlen", (x[0], bounds, [2, 3]), {}),
        ("kcenter_varlen", (x[0], bounds.int(), [2, 3]), {"seeds": bounds[:2, None], "metric": "euclidean"}),
    ]


def model(x, seeds, k):
    """Prepare features, choose, gather."""
    features = x - x.mean(1, keepdim=True)
    kept = pruneops.kcenter(features, k, seeds=seeds, mask=features.abs().sum(-1) > 0).indices.sort().values
    flat, bounds = features.flatten(0, 1), torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)
    packed = pruneops.kcenter_varlen(flat, bounds, [k, k], metric="euclidean")
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, *packed


def model_inputs():
    seeds = torch.tensor([[1], [2]])
    return [(torch.randn(2, N, D), seeds, k) for N, D, k in ((12, 8, 3), (20, 5, 7), (31, 16, 4))]


def every_form(x, seeds, mask, bounds):
    """A batch with seeds and mask, one row, packed with an empty sequence; both metrics."""
    return (
        *pruneops.kcenter(x, x.shape[1] // 10, seeds=seeds, mask=mask),
        *pruneops.kcenter(x[0], x.shape[1] // 6),
        *pruneops.kcenter(x, x.shape[1] // 6, metric="euclidean"),
        *pruneops.kcenter_varlen(x.flatten(0, 1), bounds, [20, 0, x.shape[1] // 3, 9], metric="euclidean"),
    )


def form_inputs(seed, small=False):
    """The small ones have exact similarities: a BLAS of several threads chooses the same tokens."""
    shape = (2, 150, 33) if small else (3, 900, 130)
    x = signs(shape, torch.Generator().manual_seed(seed)).sign() if small else clustered(shape, seed).bfloat16()
    total = shape[0] * shape[1]
    starts = torch.tensor([0, 30 + seed, 30 + seed, total - 50 + seed, total])
    return [x, *seeds_and_mask(shape[:-1], seed=seed), starts]


def triton_launches():
    from pruneops.triton_kernels import kcenter as kernels

    kernels.multiprocessors = lambda device: 132
    for dtype, width in ((torch.bfloat16, 64), (torch.float32, 64), (torch.float16, 1), (torch.float32, 33)):
        for tokens in (50, 60, 5000, 5001):
            x = torch.ones(3, tokens, width, dtype=dtype)
            seeds, mask = torch.arange(6).view(3, 2), torch.ones(3, tokens, dtype=torch.bool)
            kernels.kcenter(x, 5, None, None, "cosine")
            kernels.kcenter(x[:1], 1, None, None, "cosine")
            kernels.kcenter(x, 7, seeds, mask, "cosine")
            kernels.kcenter_varlen(x[0], torch.tensor([0, 10, tokens]), [2, 3], None, "cosine")
            kernels.kcenter_varlen(x[0], torch.tensor([0, tokens]), [3], seeds[:1], "cosine")


# Kernels of a dtype: norm factors with mask and without, for the Gram matrix and for many tokens; the Gram matrix; the
# kernel for many tokens for a batch and packed, with seeds and without. The greedy kernel serves all dtypes.
LAUNCHES = 4 * (2 * 9 + 2 * 6 + 4 * 4), 4 * (4 + 1 + 4) + 2
