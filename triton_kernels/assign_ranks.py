"""Conflict-free rank assignment in Triton: each rank in turn takes the most probable token of its column that is free.

One launch, one program per batch row:
    softmax  one pass over N (J + 1) logits writes the ordered bits of all negative log-probabilities [j, N] to the
             workspace and finds the best token of each of the j ranks;
    assign   each rank in turn takes its best token; if an earlier rank has it, a pass over the N scores of the rank
             finds the best free one.
Cost: N (J + 1) logits read once, 4 N j bytes written, 4 N bytes read per conflict.
Details: docs/kernels/assign_ranks.md
"""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, TYPES, Specialization, device_guard, kernel, workspace
from ._shared import INF, LAST_KEY
from .exclusive_bottomk import ordered_score

CLASSES = (16, 32, 64, 128)  # the logits of a token are padded to one of these widths
TILE_LOGITS = 4096


def _specialize(dtype, width):
    constants = {"BLOCK_N": TILE_LOGITS // width, "BLOCK_C": width, "BLOCK_S": 1024}
    return Specialization({"logits": TYPES[dtype]}, constants, {"num_warps": 8})


@triton.jit
def _best_free(scores, marks, N, BLOCK_S: tl.constexpr):
    """Minimum key (score bits, index) of the tokens that are not marked."""
    lane = tl.arange(0, BLOCK_S)
    best = tl.full([], LAST_KEY, tl.int64)
    for start in range(0, N, BLOCK_S):
        n = start + lane
        bits = tl.load(scores + n, mask=n < N, other=0)
        free = tl.load(marks + n, mask=n < N, other=1) == 0
        key = (bits.to(tl.int64) << 32) | n.to(tl.int64)
        best = tl.minimum(best, tl.min(tl.where(free, key, LAST_KEY), 0))
    return best


@kernel(_specialize, scores="*i32", marks="*u8", indices="*i64", stride_b="i64", stride_n="i64")
def _assign_ranks_kernel(
    logits, scores, marks, indices, stride_b, stride_n, N, C, j,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """indices [B, j] from logits [B, N, C]; scores [B, j, N] and marks [B, N] are workspace."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    logits += b * stride_b
    scores += b * j * N
    marks += b * N
    best = tl.full([BLOCK_C], LAST_KEY, tl.int64)
    for start in range(0, N, BLOCK_N):
        n = (start + lane).to(tl.int64)
        in_range = n < N
        in_bounds = in_range[:, None] & (c < C)[None, :]
        logit = tl.load(logits + n[:, None] * stride_n + c[None, :], mask=in_bounds, other=-INF).to(tl.float32)
        shifted = logit - tl.max(logit, 1)[:, None]  # a NaN or +inf logit makes all of its token NaN
        log_probability = shifted - tl.log(tl.sum(tl.exp(shifted), 1))[:, None]
        bits = ordered_score(-log_probability)
        tl.store(scores + c[None, :].to(tl.int64) * N + n[:, None], bits, mask=in_range[:, None] & (c < j)[None, :])
        tl.store(marks + n, tl.zeros([BLOCK_N], tl.uint8), mask=in_range)
        key = (bits.to(tl.int64) << 32) | n[:, None]
        best = tl.minimum(best, tl.min(tl.where(in_range[:, None], key, LAST_KEY), 0))
    for p in range(j):
        tl.debug_barrier()
        key = tl.min(tl.where(c == p, best, LAST_KEY), 0)
        marked = tl.load(marks + (key & 0x7FFFFFFF)) != 0
        tl.debug_barrier()  # all warps have read the mark before one sets it
        if marked:
            key = _best_free(scores + tl.cast(p, tl.int64) * N, marks, N, BLOCK_S)
        token = key & 0x7FFFFFFF
        tl.store(indices + b * j + p, token)
        tl.store(marks + token, tl.full([], 1, tl.uint8))


def assign_ranks(logits, j):
    """logits [B, N, J + 1], contiguous in classes; pruneops.ops checks the arguments."""
    B, N, C = logits.shape
    indices = torch.empty((B, j), dtype=torch.int64, device=logits.device)
    if B == 0:
        return indices
    logits = logits.float() if INTERPRETED else logits  # the interpreter mishandles bfloat16 subnormals
    _memory, scores, marks = workspace(logits.device, (torch.int32, B * j * N), (torch.uint8, B * N))
    width = next(width for width in CLASSES if width >= C)
    with device_guard(logits):
        _assign_ranks_kernel(
            (logits.dtype, width), (B, 1, 1),
            logits, scores, marks, indices, logits.stride(0), logits.stride(1), N, C, j,
        )  # fmt: skip
    return indices


def specializations():
    """(kernel, spec) of every configuration that the launcher can use, for compilation without a GPU."""
    for width in CLASSES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield _assign_ranks_kernel, (dtype, width)
