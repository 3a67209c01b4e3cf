"""Exclusive bottom-k selection in Triton: one launch, one program per batch row.

Row after row, the program takes its quota in helpings of at most HELPING tokens:
    threshold  radix select over the 32 bits of the score's order, 8 at a time, stopped as soon as the tokens up
               to it are enough for the helping and fit CANDIDATES; ties at the last bit by index;
    gather     candidates as (order, index) keys, in any order;
    rank       a candidate's place is the number of smaller keys; the first ones are written and marked as taken.
Each of the two or three passes reads N scores and N marks, from L1 or L2. At N 2880, P 8, quotas 36 on an H200 about
5000 cycles a row, 22 us in all, nearly all of it latency of one multiprocessor. Memory: N bytes of marks and 4 KB of
keys a batch row.

Quotas travel as arguments of the launch, so nothing is copied from the host.
"""

import itertools

import torch
import triton
import triton.language as tl

from . import pivot_cosine as scoring
from ._launch import INTERPRETED, TYPES, Specialization, device_guard, kernel, workspace
from ._shared import LAST_KEY, ordered_bits

HELPING = tl.constexpr(256)
CANDIDATES = tl.constexpr(512)
RANKED = tl.constexpr(64)  # keys a side of a tile of comparisons
ROWS = (8, 16, 32, 64)  # lengths that a list of quotas is filled up to
WIDTHS = {1024: 4, 4096: 8}  # tile of the scores, by warps

TAKEN = tl.constexpr(0x7FFFFFFF)  # order of a token that is not to be had
NOT_FINITE = tl.constexpr(0x7FFFFFFE)  # comes last among those that are

_STRIDES = dict.fromkeys(("stride_b", "stride_p", "taken_b", "taken_n"), "i64")


def _form(dtype, width, rows, has_taken, free):
    types = {"scores": TYPES[dtype], "taken": "*u8" if has_taken else None, "quotas": ("i32",) * rows}
    constants = {"HAS_TAKEN": has_taken, "FREE": free, "ROWS": rows, "BLOCK_N": width}
    return Specialization(types, constants, {"num_warps": WIDTHS[width]})


@triton.jit
def score_order(s):
    """int32 order of scores: finite ones as numbers, the others all alike after them."""
    finite = (s.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    return tl.where(finite, ordered_bits(s), NOT_FINITE)


@triton.jit
def _orders(row, marks, n, N):
    """int32 orders of the tokens n of a row; TAKEN where one is marked or past the end."""
    s = tl.load(row + n, mask=n < N, other=0.0).to(tl.float32)
    marked = tl.load(marks + n, mask=n < N, other=1) != 0
    return tl.where(marked, TAKEN, score_order(s))


@triton.jit
def _threshold(row, marks, N, want, BLOCK_N: tl.constexpr):
    """(last, below, ties): the candidates are the `below` tokens of order <= last, and `ties` of order last + 1.

    At least `want` and at most CANDIDATES in all, or all there are if those are fewer than `want`.
    """
    lane = tl.arange(0, BLOCK_N)
    prefix = tl.full([], 0, tl.uint32)  # leading digits of the threshold, ordered as unsigned numbers
    shift = tl.full([], 24, tl.uint32)
    smaller = tl.full([], 0, tl.int32)  # tokens of smaller prefix
    last = tl.full([], NOT_FINITE, tl.int32)
    below = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    going = want > 0
    while going:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, N, BLOCK_N):
            order = _orders(row, marks, start + lane, N)
            digits = order.to(tl.uint32, bitcast=True) ^ 0x80000000
            here = (order != TAKEN) & (((digits >> shift) >> 8) == prefix)
            counts += tl.histogram(((digits >> shift) & 255).to(tl.int32), 256, mask=here)
        upto = smaller + tl.cumsum(counts, 0)  # [256] tokens up to and including a digit
        digit = tl.sum((upto < want).to(tl.int32), 0)
        below = tl.max(upto, 0)
        going = digit < 256  # else, in the first pass only, all tokens are too few
        if going:
            below = tl.min(tl.where(upto < want, 0x7FFFFFFF, upto), 0)
            smaller = tl.maximum(smaller, tl.max(tl.where(upto < want, upto, 0), 0))
            prefix = (prefix << 8) | digit.to(tl.uint32)
            last = (((prefix << shift) + ((1 << shift) - 1)) ^ 0x80000000).to(tl.int32, bitcast=True)
            last = tl.minimum(last, NOT_FINITE)
            going = below > CANDIDATES
            if going & (shift == 0):  # one score, and more tokens that have it than fit
                last -= 1
                below = smaller
                ties = want - smaller
            going = going & (shift > 0)
        shift = tl.where(shift > 0, shift - 8, 0)
    return last, below, ties


@triton.jit
def _gather(row, marks, keys, N, last, below, ties, BLOCK_N: tl.constexpr):
    """Write the candidates' keys: those of order <= last from 0 on, ties in index order from `below` on."""
    lane = tl.arange(0, BLOCK_N)
    lower_seen = tl.full([], 0, tl.int32)
    ties_seen = tl.full([], 0, tl.int32)
    for start in range(0, N, BLOCK_N):
        order = _orders(row, marks, start + lane, N)
        lower = order <= last
        tie = order == last + 1
        upto = tl.cumsum(lower.to(tl.int32) + (tie.to(tl.int32) << 16), 0)  # both counts: BLOCK_N < 2^16
        tie_rank = ties_seen + (upto >> 16)
        slot = tl.where(lower, lower_seen + (upto & 0xFFFF), below + tie_rank) - 1
        key = (order.to(tl.int64) << 32) | (start + lane).to(tl.int64)
        tl.store(keys + slot, key, mask=lower | (tie & (tie_rank <= ties)))
        lower_seen += tl.sum(lower.to(tl.int32), 0)
        ties_seen += tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _take_least(keys, marks, indices, count, want):
    """Write the `want` least of `count` keys' tokens in order, -1 for those that are missing, and mark them."""
    lane = tl.arange(0, RANKED)
    for i in range(0, count, RANKED):
        own = tl.load(keys + i + lane, mask=i + lane < count, other=LAST_KEY)
        rank = tl.zeros([RANKED], tl.int32)
        for j in range(0, count, RANKED):
            other = tl.load(keys + j + lane, mask=j + lane < count, other=LAST_KEY)
            rank += tl.sum((other[None, :] < own[:, None]).to(tl.int32), 1)
        token = own & 0x7FFFFFFF
        first = (i + lane < count) & (rank < want)
        tl.store(indices + rank, token, mask=first)
        tl.store(marks + token, tl.full([RANKED], 1, tl.uint8), mask=first)
    for i in range(0, want, RANKED):
        tl.store(indices + i + lane, tl.full([RANKED], -1, tl.int64), mask=(i + lane >= count) & (i + lane < want))


@kernel(_form, marks="*u8", keys="*i64", indices="*i64", **_STRIDES)
def _exclusive_bottomk_kernel(
    scores, taken, marks, keys, indices, quotas, stride_b, stride_p, taken_b, taken_n, N, P, K,
    HAS_TAKEN: tl.constexpr, FREE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """indices [B, K] from scores [B, P, N]; marks [B, N] and keys [B, CANDIDATES] are scratch memory.

    quotas: ROWS integers. FREE: what `taken` holds for a token that may be had.
    """
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    r = tl.arange(0, ROWS)
    all_quotas = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(ROWS):
        all_quotas = tl.where(r == i, quotas[i], all_quotas)
    marks += b * N
    keys += b * CANDIDATES
    indices += b * K
    for start in range(0, N, BLOCK_N):
        n = start + lane
        mark = tl.zeros([BLOCK_N], tl.uint8)
        if HAS_TAKEN:
            given = tl.load(taken + b * taken_b + n.to(tl.int64) * taken_n, mask=n < N, other=0)
            mark = ((given != 0) != (FREE != 0)).to(tl.uint8)
        tl.store(marks + n, mark, mask=n < N)
    tl.debug_barrier()
    for p in range(P):
        row = scores + b * stride_b + tl.cast(p, tl.int64) * stride_p
        left = tl.sum(tl.where(r == p, all_quotas, 0), 0)
        while left > 0:
            want = tl.minimum(left, HELPING)
            last, below, ties = _threshold(row, marks, N, want, BLOCK_N)
            _gather(row, marks, keys, N, last, below, ties, BLOCK_N)
            tl.debug_barrier()
            _take_least(keys, marks, indices, below + ties, want)
            tl.debug_barrier()
            indices += want
            left -= want


def exclusive_bottomk(scores, quotas, taken, free=False):
    """scores [B, P, N] with tokens side by side; the arguments are checked by pruneops.ops.

    `free` is what `taken` holds for a token that may be had.
    """
    B, P, N = scores.shape
    K = sum(quotas)
    scores = scores.float() if INTERPRETED else scores  # the interpreter loses the least bfloat16 numbers
    indices = torch.empty((B, K), dtype=torch.int64, device=scores.device)
    if B == 0 or K == 0:
        return indices
    _memory, marks, keys = workspace(scores.device, (torch.uint8, B * N), (torch.int64, B * CANDIDATES.value))
    rows = next(rows for rows in ROWS if rows >= P)
    width = next(
        (width for width in WIDTHS if width >= N), max(WIDTHS)
    )  # the narrowest that holds a row, or the widest
    with device_guard(scores):
        _exclusive_bottomk_kernel(
            (scores.dtype, width, rows, taken is not None, free), (B, 1, 1),
            scores, taken, marks, keys, indices, (*quotas, *[0] * (rows - P)),
            scores.stride(0), scores.stride(1), *((0, 0) if taken is None else taken.stride()), N, P, K,
        )  # fmt: skip
    return indices


def pivot_bottomk(x, pivots, quotas, mask):
    """x [B, N, D] with features side by side: the scoring pass, then one launch that selects."""
    return exclusive_bottomk(scoring.pivot_cosine(x, None, pivots, None, None), quotas, mask, free=True)


def specializations():
    """(kernel, form) of every configuration that the launcher above can ask for, to be compiled without a GPU."""
    for width, rows in itertools.product(WIDTHS, ROWS):
        yield _exclusive_bottomk_kernel, (torch.float32, width, rows, rows != ROWS[1], rows == ROWS[2])
    for width, dtype in itertools.product(WIDTHS, (torch.bfloat16, torch.float16)):  # halves differ in one load
        yield _exclusive_bottomk_kernel, (dtype, width, ROWS[0], True, False)
