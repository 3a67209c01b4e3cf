"""Cosine of every token with a few pivots, and its reduction over them, in Triton: one pass over x.

One program takes BLOCK_N tokens of a batch row (or of a packed sequence), meets them with BLOCK_P pivots at a time by
tensor cores (float32: fused multiply-adds) and sums the squares of both sides from the same tiles.
    N 2880, D 4096, P 8, bf16 on an H200: 23.6 MB of x is 5.5 us at 4.3 TB/s; 377 MFLOP with P padded to 16 is 0.5 us at
    790 TFLOP/s; 180 programs re-read the pivots, 64 KB each from L2. About 20 KB of loads in flight per
    multiprocessor cover the latency of memory: 8 stages of 2 KB of x a program.
With P <= 64 x is read once; more pivots take one pass per 64. Reduced forms store [B, N] only.

Every step of BLOCK_D features is a product of its own, so no chain of sums is longer than D / BLOCK_D and no tensor
core adds to what came before. The order of summation depends on D and P alone: strides, batch and packing change no
bit.
"""

import itertools

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, TYPES, Specialization, cdiv, device_guard, kernel
from ._shared import INF, LARGEST_SQUARE, SMALLEST_SQUARE, alignment_class, row_sums

FEW_PIVOTS = 16  # the narrowest tile of a tensor-core product
FEW_TOKENS = 16384  # up to this many in all, small tiles spread them over more programs
REDUCTIONS = (None, "max", "mean", "sum")

# Features a step by (bytes of an element, few pivots). Alignment must not change it: it orders the sums.
BLOCK_D = {(2, True): 64, (2, False): 64, (4, True): 32, (4, False): 16}
BLOCK_N = {True: (16, 32), False: (16, 64)}  # few or many pivots: few tokens, many tokens
STAGES = {16: 8, 32: 6, 64: 4}  # that fit the 99 KB of shared memory of sm_86, sm_89 and sm_120


def _block_n(aligned, few, many_tokens):
    return BLOCK_N[few][many_tokens and (few or aligned)]  # else it would spill


def _tiles(element, aligned, few, many_tokens):
    """Tile sizes and launch options by bytes of an element, access, pivots and tokens in all."""
    block = _block_n(aligned, few, many_tokens)
    warps = 4 if element == 2 and aligned and block == 16 else 8  # of 255 registers a thread at most
    stages = STAGES[block] if aligned else 2  # nothing to copy ahead in pieces of less than 4 bytes
    width = {"BLOCK_N": block, "BLOCK_P": FEW_PIVOTS if few else 64, "BLOCK_D": BLOCK_D[element, few]}
    return width, {"num_warps": warps, "num_stages": stages}


def _form(dtype, aligned, few, many_tokens, reduce, has_mask, varlen):
    width, options = _tiles(dtype.itemsize, aligned, few, many_tokens)
    types = {"x": TYPES[dtype], "mask": "*u8" if has_mask else None, "bounds": "*i64" if varlen else None}
    constants = {"REDUCE": REDUCTIONS.index(reduce), "HAS_MASK": has_mask, "VARLEN": varlen, **width}
    return Specialization(types, constants, options, ("x", "stride_b", "stride_n", "D") if aligned else ())


_STRIDES = dict.fromkeys(("stride_b", "stride_n", "pivots_b", "pivots_p", "mask_b", "mask_n"), "i64")


@triton.jit
def _inverse_norm(square):
    """1 / |x|, 0 for a zero vector, NaN for a non-finite one."""
    inverse = tl.where(square < SMALLEST_SQUARE, 0.0, tl.div_rn(1.0, tl.sqrt_rn(square)))
    return tl.where(square <= LARGEST_SQUARE, inverse, float("nan"))


@triton.jit
def _sequence_of(slot, bounds, sequences, BLOCK_N: tl.constexpr):
    """Sequence s of a slot: s has the slots from bounds[s] // BLOCK_N + s on, at least one more than it fills."""
    lane = tl.arange(0, 128)
    before = tl.full([], 0, tl.int32)
    for s in range(0, sequences, 128):
        start = tl.load(bounds + s + lane, mask=s + lane < sequences, other=0)
        begins = (start // BLOCK_N + s + lane <= slot) & (s + lane < sequences)
        before += tl.sum(begins.to(tl.int32), 0)
    return before - 1


@kernel(_form, pivots="*i64", out="*fp32", **_STRIDES)
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
        row = tl.full([], 0, tl.int64)  # of x, mask and out: they have one
    else:
        tiles = tl.cdiv(N, BLOCK_N)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        n = (tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        end = tl.cast(N, tl.int64)
        row = b
    if tl.min(n, 0) >= end:  # a slot to spare; of an empty sequence perhaps, whose pivots are no tokens
        return
    inside = n < end
    tokens = x + row * stride_b + n * stride_n
    lane = tl.arange(0, BLOCK_D)
    wanted = inside
    if HAS_MASK:
        wanted = inside & (tl.load(mask + row * mask_b + n * mask_n, mask=inside, other=0) != 0)
    greatest = tl.full([BLOCK_N], -INF, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        pivot = tl.load(pivots + b * pivots_b + p.to(tl.int64) * pivots_p, mask=p < P, other=0)
        columns = x + row * stride_b + pivot * stride_n
        dots = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        token_squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        pivot_squares = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
        for d in range(0, D, BLOCK_D):
            there = d + lane < D
            v = tl.load(tokens[:, None] + (d + lane)[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            w = tl.load(columns[None, :] + (d + lane)[:, None], mask=(p < P)[None, :] & there[:, None], other=0.0)
            dots = tl.fma(tl.dot(v, w, input_precision="ieee"), 1.0, dots)  # an addition would be folded into the dot
            token_squares += v.to(tl.float32) * v.to(tl.float32)
            pivot_squares += w.to(tl.float32) * w.to(tl.float32)
        token_inverse = _inverse_norm(row_sums(token_squares, BLOCK_N, BLOCK_D))
        pivot_inverse = _inverse_norm(row_sums(tl.trans(pivot_squares), BLOCK_P, BLOCK_D))
        cosine = dots * token_inverse[:, None] * pivot_inverse[None, :]
        if REDUCE == 0:
            score = tl.where(wanted[:, None], cosine, INF)
            place = out + (row * P + p)[None, :] * N + n[:, None]
            tl.store(place, score, mask=inside[:, None] & (p < P)[None, :])
        else:
            known = (p < P)[None, :]
            total += row_sums(tl.where(known, cosine, 0.0), BLOCK_N, BLOCK_P)
            greatest = tl.maximum(greatest, tl.max(tl.where(known, cosine, -INF), 1))
    if REDUCE != 0:
        score = total
        if REDUCE == 1:
            score = tl.where(total == total, greatest, total)  # NaN among the cosines makes NaN
        if REDUCE == 2:
            score = tl.div_rn(total, tl.cast(P, tl.float32))
        tl.store(out + row * N + n, tl.where(wanted, score, INF), mask=inside)


def pivot_cosine(x, cu_seqlens, pivots, mask, reduce):
    """x [B, N, D] with features side by side, or [1, T, D] with bounds; the arguments are checked by pruneops.ops."""
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
    form = x.dtype, aligned, few, many_tokens, reduce, mask is not None, cu_seqlens is not None
    with device_guard(x):
        _pivot_cosine_kernel(
            form, (programs, 1, 1), x, pivots, mask, cu_seqlens, out,
            x.stride(0), x.stride(1), *pivots.stride(), *((0, 0) if mask is None else mask.stride()), B, N, P, D,
        )  # fmt: skip
    return out


def specializations():
    """(kernel, form) of every configuration that the launcher above can ask for, to be compiled without a GPU."""
    for dtype, aligned, few, many in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), *[(True, False)] * 3
    ):
        if dtype == torch.float16 and not (aligned and many):
            continue  # as bfloat16
        for reduce, varlen in (
            (("mean", False), (None, True)) if dtype == torch.float16 else ((None, False), ("max", True))
        ):
            yield _pivot_cosine_kernel, (dtype, aligned, few, many, reduce, reduce is not None, varlen)
