"""Conflict-free rank assignment in Triton: one launch, one program per batch row.

    softmax  a pass over N (J + 1) logits: the order of every log-probability to scratch memory [j, N], and the best
             token of each of the j ranks;
    assign   rank after rank takes its best token; where an earlier rank has it already, a pass over the N
             orders of that rank finds the next.
N 576, J 32 on an H200: about 4 us for the softmax, 0.1 us a rank, 0.5 us a conflict, all latency of one
multiprocessor. N 65536, J 64: 17 MB read and written by one multiprocessor, about 0.3 ms.
"""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, TYPES, Specialization, device_guard, kernel, workspace
from ._shared import INF, LAST_KEY
from .exclusive_bottomk import score_order

CLASSES = (16, 32, 64, 128)  # widths that a token's logits are filled up to
TILE = 4096  # logits a tile


def _form(dtype, width):
    constants = {"BLOCK_N": TILE // width, "BLOCK_C": width, "BLOCK_S": 1024}
    return Specialization({"logits": TYPES[dtype]}, constants, {"num_warps": 8})


@triton.jit
def _best_unmarked(orders, marks, N, BLOCK_S: tl.constexpr):
    """Least key (order, index) among the tokens that are not marked."""
    lane = tl.arange(0, BLOCK_S)
    best = tl.full([], LAST_KEY, tl.int64)
    for start in range(0, N, BLOCK_S):
        n = start + lane
        order = tl.load(orders + n, mask=n < N, other=0)
        free = tl.load(marks + n, mask=n < N, other=1) == 0
        key = (order.to(tl.int64) << 32) | n.to(tl.int64)
        best = tl.minimum(best, tl.min(tl.where(free, key, LAST_KEY), 0))
    return best


@kernel(_form, orders="*i32", marks="*u8", indices="*i64", stride_b="i64", stride_n="i64")
def _assign_ranks_kernel(
    logits, orders, marks, indices, stride_b, stride_n, N, C, j,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """indices [B, j] from logits [B, N, C]; orders [B, j, N] and marks [B, N] are scratch memory."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    logits += b * stride_b
    orders += b * j * N
    marks += b * N
    best = tl.full([BLOCK_C], LAST_KEY, tl.int64)
    for start in range(0, N, BLOCK_N):
        n = (start + lane).to(tl.int64)
        inside = n < N
        there = inside[:, None] & (c < C)[None, :]
        v = tl.load(logits + n[:, None] * stride_n + c[None, :], mask=there, other=-INF).to(tl.float32)
        shifted = v - tl.max(v, 1)[:, None]  # NaN somewhere in a token's row makes all its sum NaN, as does an infinity
        log_probability = shifted - tl.log(tl.sum(tl.exp(shifted), 1))[:, None]
        order = score_order(-log_probability)
        tl.store(orders + c[None, :].to(tl.int64) * N + n[:, None], order, mask=inside[:, None] & (c < j)[None, :])
        tl.store(marks + n, tl.zeros([BLOCK_N], tl.uint8), mask=inside)
        key = (order.to(tl.int64) << 32) | n[:, None]
        best = tl.minimum(best, tl.min(tl.where(inside[:, None], key, LAST_KEY), 0))
    for p in range(j):
        tl.debug_barrier()
        key = tl.min(tl.where(c == p, best, LAST_KEY), 0)
        marked = tl.load(marks + (key & 0x7FFFFFFF)) != 0
        tl.debug_barrier()  # every warp has looked before one marks
        if marked:
            key = _best_unmarked(orders + tl.cast(p, tl.int64) * N, marks, N, BLOCK_S)
        token = key & 0x7FFFFFFF
        tl.store(indices + b * j + p, token)
        tl.store(marks + token, tl.full([], 1, tl.uint8))


def assign_ranks(logits, j):
    """logits [B, N, J + 1] with classes side by side; the arguments are checked by pruneops.ops."""
    B, N, C = logits.shape
    indices = torch.empty((B, j), dtype=torch.int64, device=logits.device)
    if B == 0:
        return indices
    logits = logits.float() if INTERPRETED else logits  # the interpreter loses the least bfloat16 numbers
    _memory, orders, marks = workspace(logits.device, (torch.int32, B * j * N), (torch.uint8, B * N))
    width = next(width for width in CLASSES if width >= C)
    with device_guard(logits):
        _assign_ranks_kernel(
            (logits.dtype, width), (B, 1, 1),
            logits, orders, marks, indices, logits.stride(0), logits.stride(1), N, C, j,
        )  # fmt: skip
    return indices


def specializations():
    """(kernel, form) of every configuration that the launcher above can ask for, to be compiled without a GPU."""
    for width in CLASSES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield _assign_ranks_kernel, (dtype, width)
