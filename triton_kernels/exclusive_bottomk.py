"""Exclusive bottom-k selection in Triton: each row of scores in turn selects its quota of lowest-scoring free tokens.

One launch, one program per batch row. A row is selected in chunks of at most MAX_CHUNK tokens, in three steps:
    threshold  radix select over the ordered score bits, 8 bits a pass, until the tokens up to the threshold are enough
               for the chunk and fit CANDIDATE_CAPACITY; ties at the last bit by index;
    gather     the candidates as (score bits, index) keys, unordered;
    select     the rank of a candidate is the number of smaller keys.
Each of the two or three passes reads N scores and N marks, from L1 or L2. Workspace per batch row: N bytes of marks and
4 KB of keys. Quotas are passed by value; nothing is copied from the host. Details: docs/kernels/exclusive_bottomk.md
"""

import itertools

import torch
import triton
import triton.language as tl

from . import pivot_cosine as scoring
from ._launch import INTERPRETED, TYPES, Specialization, device_guard, kernel, workspace
from ._shared import LAST_KEY, ordered_bits

MAX_CHUNK = tl.constexpr(256)
CANDIDATE_CAPACITY = tl.constexpr(512)
RANK_TILE = tl.constexpr(64)  # keys are compared in tiles of RANK_TILE x RANK_TILE
ROWS = (8, 16, 32, 64)  # the list of quotas is padded to one of these lengths
NUM_WARPS = {1024: 4, 4096: 8}  # by BLOCK_N

TAKEN = tl.constexpr(0x7FFFFFFF)  # score bits of a taken token
NON_FINITE = tl.constexpr(0x7FFFFFFE)  # score bits of a non-finite score, after all finite ones

_STRIDES = dict.fromkeys(("stride_b", "stride_p", "taken_b", "taken_n"), "i64")


def _specialize(dtype, width, rows, has_taken, free):
    types = {"scores": TYPES[dtype], "taken": "*u8" if has_taken else None, "quotas": ("i32",) * rows}
    constants = {"HAS_TAKEN": has_taken, "FREE": free, "ROWS": rows, "BLOCK_N": width}
    return Specialization(types, constants, {"num_warps": NUM_WARPS[width]})


@triton.jit
def ordered_score(s):
    """Scores as int32 that sort alike; NON_FINITE for all non-finite scores."""
    finite = (s.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    return tl.where(finite, ordered_bits(s), NON_FINITE)


@triton.jit
def _ordered_row(row, marks, n, N):
    """Ordered score bits of tokens n of a row; TAKEN where marked or past the end."""
    s = tl.load(row + n, mask=n < N, other=0.0).to(tl.float32)
    marked = tl.load(marks + n, mask=n < N, other=1) != 0
    return tl.where(marked, TAKEN, ordered_score(s))


@triton.jit
def _threshold(row, marks, N, need, BLOCK_N: tl.constexpr):
    """(last, below, ties): the candidates are `below` tokens with bits <= last and `ties` tokens with bits last + 1.

    They are at least `need` and at most CANDIDATE_CAPACITY, or all free tokens if those are fewer than `need`.
    """
    lane = tl.arange(0, BLOCK_N)
    prefix = tl.full([], 0, tl.uint32)  # leading digits of the threshold, in unsigned order
    shift = tl.full([], 24, tl.uint32)
    preceding = tl.full([], 0, tl.int32)  # tokens with a smaller prefix
    last = tl.full([], NON_FINITE, tl.int32)
    below = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    searching = need > 0
    while searching:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, N, BLOCK_N):
            bits = _ordered_row(row, marks, start + lane, N)
            digits = bits.to(tl.uint32, bitcast=True) ^ 0x80000000
            in_prefix = (bits != TAKEN) & (((digits >> shift) >> 8) == prefix)
            counts += tl.histogram(((digits >> shift) & 255).to(tl.int32), 256, mask=in_prefix)
        cumulative = preceding + tl.cumsum(counts, 0)  # [256] tokens up to and including each digit
        digit = tl.sum((cumulative < need).to(tl.int32), 0)
        below = tl.max(cumulative, 0)
        searching = digit < 256  # else (first pass only) the row has fewer than `need`
        if searching:
            below = tl.min(tl.where(cumulative < need, 0x7FFFFFFF, cumulative), 0)
            preceding = tl.maximum(preceding, tl.max(tl.where(cumulative < need, cumulative, 0), 0))
            prefix = (prefix << 8) | digit.to(tl.uint32)
            last = (((prefix << shift) + ((1 << shift) - 1)) ^ 0x80000000).to(tl.int32, bitcast=True)
            last = tl.minimum(last, NON_FINITE)
            searching = below > CANDIDATE_CAPACITY
            if searching & (shift == 0):  # one score whose tokens exceed the capacity
                last -= 1
                below = preceding
                ties = need - preceding
            searching = searching & (shift > 0)
        shift = tl.where(shift > 0, shift - 8, 0)
    return last, below, ties


@triton.jit
def _gather(row, marks, keys, N, last, below, ties, BLOCK_N: tl.constexpr):
    """Write the candidates' keys: those with bits <= last from 0 on, ties in index order from `below` on."""
    lane = tl.arange(0, BLOCK_N)
    lower_seen = tl.full([], 0, tl.int32)
    ties_seen = tl.full([], 0, tl.int32)
    for start in range(0, N, BLOCK_N):
        bits = _ordered_row(row, marks, start + lane, N)
        lower = bits <= last
        tie = bits == last + 1
        cumulative = tl.cumsum(lower.to(tl.int32) + (tie.to(tl.int32) << 16), 0)  # two 16-bit counts: BLOCK_N < 2^16
        tie_rank = ties_seen + (cumulative >> 16)
        slot = tl.where(lower, lower_seen + (cumulative & 0xFFFF), below + tie_rank) - 1
        key = (bits.to(tl.int64) << 32) | (start + lane).to(tl.int64)
        tl.store(keys + slot, key, mask=lower | (tie & (tie_rank <= ties)))
        lower_seen += tl.sum(lower.to(tl.int32), 0)
        ties_seen += tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _select_smallest(keys, marks, indices, count, need):
    """Write the tokens of the `need` smallest of `count` keys in order, -1 past `count`, and mark them as taken."""
    lane = tl.arange(0, RANK_TILE)
    for i in range(0, count, RANK_TILE):
        key = tl.load(keys + i + lane, mask=i + lane < count, other=LAST_KEY)
        rank = tl.zeros([RANK_TILE], tl.int32)
        for j in range(0, count, RANK_TILE):
            other = tl.load(keys + j + lane, mask=j + lane < count, other=LAST_KEY)
            rank += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
        token = key & 0x7FFFFFFF
        selected = (i + lane < count) & (rank < need)
        tl.store(indices + rank, token, mask=selected)
        tl.store(marks + token, tl.full([RANK_TILE], 1, tl.uint8), mask=selected)
    for i in range(0, need, RANK_TILE):
        tl.store(indices + i + lane, tl.full([RANK_TILE], -1, tl.int64), mask=(i + lane >= count) & (i + lane < need))


@kernel(_specialize, marks="*u8", keys="*i64", indices="*i64", **_STRIDES)
def _exclusive_bottomk_kernel(
    scores, taken, marks, keys, indices, quotas, stride_b, stride_p, taken_b, taken_n, N, P, K,
    HAS_TAKEN: tl.constexpr, FREE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """indices [B, K] from scores [B, P, N]; marks [B, N] and keys [B, CANDIDATE_CAPACITY] are workspace.

    quotas: ROWS integers. FREE: the value of `taken` for a free token.
    """
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    r = tl.arange(0, ROWS)
    all_quotas = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(ROWS):
        all_quotas = tl.where(r == i, quotas[i], all_quotas)
    marks += b * N
    keys += b * CANDIDATE_CAPACITY
    indices += b * K
    for start in range(0, N, BLOCK_N):
        n = start + lane
        mark = tl.zeros([BLOCK_N], tl.uint8)
        if HAS_TAKEN:
            flag = tl.load(taken + b * taken_b + n.to(tl.int64) * taken_n, mask=n < N, other=0)
            mark = ((flag != 0) != (FREE != 0)).to(tl.uint8)
        tl.store(marks + n, mark, mask=n < N)
    tl.debug_barrier()
    for p in range(P):
        row = scores + b * stride_b + tl.cast(p, tl.int64) * stride_p
        remaining = tl.sum(tl.where(r == p, all_quotas, 0), 0)
        while remaining > 0:
            need = tl.minimum(remaining, MAX_CHUNK)
            last, below, ties = _threshold(row, marks, N, need, BLOCK_N)
            _gather(row, marks, keys, N, last, below, ties, BLOCK_N)
            tl.debug_barrier()
            _select_smallest(keys, marks, indices, below + ties, need)
            tl.debug_barrier()
            indices += need
            remaining -= need


def exclusive_bottomk(scores, quotas, taken, free=False):
    """scores [B, P, N], contiguous in N; pruneops.ops checks the arguments.

    `free`: the value of `taken` for a free token.
    """
    B, P, N = scores.shape
    K = sum(quotas)
    scores = scores.float() if INTERPRETED else scores  # the interpreter mishandles bfloat16 subnormals
    indices = torch.empty((B, K), dtype=torch.int64, device=scores.device)
    if B == 0 or K == 0:
        return indices
    _memory, marks, keys = workspace(scores.device, (torch.uint8, B * N), (torch.int64, B * CANDIDATE_CAPACITY.value))
    rows = next(rows for rows in ROWS if rows >= P)
    width = next((width for width in NUM_WARPS if width >= N), max(NUM_WARPS))
    with device_guard(scores):
        _exclusive_bottomk_kernel(
            (scores.dtype, width, rows, taken is not None, free), (B, 1, 1),
            scores, taken, marks, keys, indices, (*quotas, *[0] * (rows - P)),
            scores.stride(0), scores.stride(1), *((0, 0) if taken is None else taken.stride()), N, P, K,
        )  # fmt: skip
    return indices


def pivot_bottomk(x, pivots, quotas, mask):
    """x [B, N, D], contiguous in D: the launches of pivot_cosine, then one launch that selects."""
    return exclusive_bottomk(scoring.pivot_cosine(x, None, pivots, None, None), quotas, mask, free=True)


def specializations():
    """(kernel, spec) of every configuration that the launcher can use, for compilation without a GPU."""
    for width, rows in itertools.product(NUM_WARPS, ROWS):
        yield _exclusive_bottomk_kernel, (torch.float32, width, rows, rows != ROWS[1], rows == ROWS[2])
    for width, dtype in itertools.product(NUM_WARPS, (torch.bfloat16, torch.float16)):  # dtypes differ in one load
        yield _exclusive_bottomk_kernel, (dtype, width, ROWS[0], True, False)
