"""Cosine of every token with P pivots, or the maximum, mean or sum over the pivots, in Triton: one pass over x.

2 P N D operations, one launch. x is read once for P <= 64; more pivots take one pass per 64. Every program reads the
pivots from L2. Reductions store [B, N] only. A program takes BLOCK_N tokens of a batch row or packed sequence and
multiplies them with BLOCK_P pivots at a time by tensor cores (float32: fused multiply-adds); squared norms of both come
from the same tiles. Each step of BLOCK_D features is a product of its own, added outside the tensor core, so no chain
of sums is longer than D / BLOCK_D. The order of summation depends on D and P alone: strides, batch and packing change
no bit.
See docs/kernels/pivot_cosine.md.
"""

import itertools

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, TYPES, Specialization, cdiv, device_guard, kernel
from ._shared import INF, LARGEST_SQUARE, SMALLEST_SQUARE, alignment_class, row_sums

FEW_PIVOTS = 16  # minimum width of a tensor-core tile
FEW_TOKENS = 16384  # batch * tokens; up to it, small tiles make more programs
REDUCTIONS = (None, "max", "mean", "sum")

# Features a step by (bytes of an element, few pivots). Alignment must not change it: it determines the order of sums.
BLOCK_D = {(2, True): 64, (2, False): 64, (4, True): 32, (4, False): 16}
BLOCK_N = {True: (16, 32), False: (16, 64)}  # by few pivots: (few tokens, many tokens)
STAGES = {16: 8, 32: 6, 64: 4}  # by BLOCK_N; they fit the 99 KB of shared memory of sm_86, sm_89 and sm_120


def _block_n(aligned, few, many_tokens):
    return BLOCK_N[few][many_tokens and (few or aligned)]  # otherwise it spills


def _tiles(element, aligned, few, many_tokens):
    """Tile sizes and launch options by bytes of an element, alignment, pivots and batch * tokens."""
    block = _block_n(aligned, few, many_tokens)
    warps = 4 if element == 2 and aligned and block == 16 else 8  # without spills, of at most 255 registers a thread
    stages = STAGES[block] if aligned else 2  # cp.async needs at least 4 bytes
    width = {"BLOCK_N": block, "BLOCK_P": FEW_PIVOTS if few else 64, "BLOCK_D": BLOCK_D[element, few]}
    return width, {"num_warps": warps, "num_stages": stages}


def _specialize(dtype, aligned, few, many_tokens, reduce, has_mask, varlen):
    width, options = _tiles(dtype.itemsize, aligned, few, many_tokens)
    types = {"x": TYPES[dtype], "mask": "*u8" if has_mask else None, "bounds": "*i64" if varlen else None}
    constants = {"REDUCE": REDUCTIONS.index(reduce), "HAS_MASK": has_mask, "VARLEN": varlen, **width}
    return Specialization(types, constants, options, ("x", "stride_b", "stride_n", "D") if aligned else ())


_STRIDES = dict.fromkeys(("stride_b", "stride_n", "pivots_b", "pivots_p", "mask_b", "mask_n"), "i64")


@triton.jit
def _norm_factor(square):
    """1 / |x|, 0 for a zero vector, NaN for a non-finite one."""
    inverse = tl.where(square < SMALLEST_SQUARE, 0.0, tl.div_rn(1.0, tl.sqrt_rn(square)))
    return tl.where(square <= LARGEST_SQUARE, inverse, float("nan"))


@triton.jit
def _sequence_of(slot, bounds, sequences, BLOCK_N: tl.constexpr):
    """Sequence of a program: s has the slots from bounds[s] // BLOCK_N + s on, at least one more than it needs."""
    offs = tl.arange(0, 128)
    before = tl.full([], 0, tl.int32)
    for s in range(0, sequences, 128):
        start = tl.load(bounds + s + offs, mask=s + offs < sequences, other=0)
        begins = (start // BLOCK_N + s + offs <= slot) & (s + offs < sequences)
        before += tl.sum(begins.to(tl.int32), 0)
    return before - 1


@kernel(_specialize, pivots="*i64", out="*fp32", **_STRIDES)
def _pivot_cosine_kernel(
    x, pivots, mask, bounds, out, stride_b, stride_n, pivots_b, pivots_p, mask_b, mask_n, B, N, P, D,
    REDUCE: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, P, N], reduced [B, N]. VARLEN: sequence b is tokens bounds[b] : bounds[b + 1], out [P, N] or [N]."""
    if VARLEN:
        b = _sequence_of(tl.program_id(0), bounds, B, BLOCK_N).to(tl.int64)
        first, end = tl.load(bounds + b), tl.load(bounds + b + 1)
        n = first + (tl.program_id(0) - (first // BLOCK_N + b)) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.full([], 0, tl.int64)  # x, mask and out have one row
    else:
        tiles = tl.cdiv(N, BLOCK_N)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        n = (tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        end = tl.cast(N, tl.int64)
        row = b
    if tl.min(n, 0) >= end:  # a spare slot, maybe of an empty sequence, whose pivots are not valid
        return
    n_mask = n < end
    tokens = x + row * stride_b + n * stride_n
    offs = tl.arange(0, BLOCK_D)
    allowed = n_mask
    if HAS_MASK:
        allowed = n_mask & (tl.load(mask + row * mask_b + n * mask_n, mask=n_mask, other=0) != 0)
    maximum = tl.full([BLOCK_N], -INF, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        pivot = tl.load(pivots + b * pivots_b + p.to(tl.int64) * pivots_p, mask=p < P, other=0)
        columns = x + row * stride_b + pivot * stride_n
        dots = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        token_squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        pivot_squares = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
        for d in range(0, D, BLOCK_D):
            d_mask = d + offs < D
            v = tl.load(tokens[:, None] + (d + offs)[None, :], mask=n_mask[:, None] & d_mask[None, :], other=0.0)
            w = tl.load(columns[None, :] + (d + offs)[:, None], mask=(p < P)[None, :] & d_mask[:, None], other=0.0)
            # fma, because a plain addition would be fused into the dot
            dots = tl.fma(tl.dot(v, w, input_precision="ieee"), 1.0, dots)
            token_squares += v.to(tl.float32) * v.to(tl.float32)
            pivot_squares += w.to(tl.float32) * w.to(tl.float32)
        token_factors = _norm_factor(row_sums(token_squares, BLOCK_N, BLOCK_D))
        pivot_factors = _norm_factor(row_sums(tl.trans(pivot_squares), BLOCK_P, BLOCK_D))
        cosine = dots * token_factors[:, None] * pivot_factors[None, :]
        if REDUCE == 0:
            score = tl.where(allowed[:, None], cosine, INF)
            pointers = out + (row * P + p)[None, :] * N + n[:, None]
            tl.store(pointers, score, mask=n_mask[:, None] & (p < P)[None, :])
        else:
            p_mask = (p < P)[None, :]
            total += row_sums(tl.where(p_mask, cosine, 0.0), BLOCK_N, BLOCK_P)
            maximum = tl.maximum(maximum, tl.max(tl.where(p_mask, cosine, -INF), 1))
    if REDUCE != 0:
        score = total
        if REDUCE == 1:
            score = tl.where(total == total, maximum, total)  # a NaN cosine gives NaN
        if REDUCE == 2:
            score = tl.div_rn(total, tl.cast(P, tl.float32))
        tl.store(out + row * N + n, tl.where(allowed, score, INF), mask=n_mask)


def pivot_cosine(x, cu_seqlens, pivots, mask, reduce):
    """x [B, N, D] with contiguous features, or [1, T, D] with cu_seqlens; pruneops.ops checks the arguments."""
    rows, N, D = x.shape
    B, P = pivots.shape
    out = torch.empty((rows, N) if reduce else (rows, P, N), dtype=torch.float32, device=x.device)
    if rows == 0 or N == 0 or (P == 0 and not reduce):
        return out
    x = x.float() if INTERPRETED else x  # the interpreter's bfloat16 products are wrong
    few, many_tokens = P <= FEW_PIVOTS, rows * N > FEW_TOKENS
    aligned = alignment_class(x) != "unaligned"
    block = _block_n(aligned, few, many_tokens)
    programs = rows * cdiv(N, block) if cu_seqlens is None else N // block + B
    spec = x.dtype, aligned, few, many_tokens, reduce, mask is not None, cu_seqlens is not None
    with device_guard(x):
        _pivot_cosine_kernel(
            spec, (programs, 1, 1), x, pivots, mask, cu_seqlens, out,
            x.stride(0), x.stride(1), *pivots.stride(), *((0, 0) if mask is None else mask.stride()), B, N, P, D,
        )  # fmt: skip
    return out


def specializations():
    """(kernel, spec) of every kind of launch, to be compiled without a GPU."""
    for dtype, aligned, few, many in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), *[(True, False)] * 3
    ):
        if dtype == torch.float16 and not (aligned and many):
            continue  # same tiles as bfloat16
        for reduce, varlen in (
            (("mean", False), (None, True)) if dtype == torch.float16 else ((None, False), ("max", True))
        ):
            yield _pivot_cosine_kernel, (dtype, aligned, few, many, reduce, reduce is not None, varlen)
