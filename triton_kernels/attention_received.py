"""attention_received: attention that every key receives from the queries of a mask.

Cost: 2 B H M Sk D operations per pass for M queries of the mask; one pass with lse given, else two. A step takes all
R = H / Hk query heads of a key head, so K is read once for them.
Without lse, the kernels of attention_mass first compute the softmax sums of the rows. Then a program holds BLOCK_N keys
and streams the rows that attend to them, gathered from the compacted list: one product, one exp2 and one sum per pair.
The softmax denominator of a row is merged from the sums of its splits without a logarithm, which would cost an ulp of
the logit.
docs/kernels/attention.md
"""

import functools

import torch
import triton.language as tl

from ._launch import Specialization, cdiv, device_guard, kernel, next_power_of_2
from ._shared import INF
from .attention_mass import (
    ARGS,
    DECODE_ROWS,
    DECODE_SPLITS,
    Call,
    group_of,
    group_types,
    logits,
    qk_types,
    split_weights,
)

ROWS = 64  # per step
PREFILL_SPLITS = 8  # of the keys with a query mask: the host does not know the number of rows


@functools.cache
def tiles(element, D, ratio, prefill):
    """Tile sizes and launch options by bytes per element. FULL_D: all features in one block, else in steps of
    BLOCK_D."""
    heads, width = next_power_of_2(ratio), max(16, next_power_of_2(D))
    max_rows = DECODE_ROWS if not prefill else ROWS if width <= 128 else ROWS // 2
    tile = {"BLOCK_T": max(1, max_rows // heads), "R_PAD": heads, "BLOCK_N": 64}
    if element == 2:
        tile |= {"BLOCK_D": width, "FULL_D": True}
        return tile, {"num_warps": 8, "num_stages": 2} if D % 16 else {"num_warps": 4, "num_stages": 3}
    return tile | {"BLOCK_D": 16, "FULL_D": False}, {"num_warps": 8, "num_stages": 2}


def _specialize(dtype, D, ratio, causal, prefill, has_lse, group, key_group):
    types, kinds = group_types(group, key_group)
    tensors, divisible = qk_types(dtype, D)
    types |= tensors | ({} if prefill else {"rows": None, "control": None})
    types |= {"sums": None, "split_max": None} if has_lse else {"lse": None}
    splits = DECODE_SPLITS if not prefill else PREFILL_SPLITS if kinds["QUERY_KIND"] else 1
    flags = {"CAUSAL": causal, "HAS_LSE": has_lse, "PREFILL": prefill, "SPLITS": splits, **kinds}
    tile, options = tiles(dtype.itemsize, D, ratio, prefill)
    return Specialization(types, {"D": D, **flags, **tile}, options, divisible)


@kernel(_specialize, **ARGS)
def _attention_received_kernel(
    query, key, lse, group, key_group, rows, control, sums, split_max, received,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    H, R, Sq, Sk, splits, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr, PREFILL: tl.constexpr, SPLITS: tl.constexpr,
    QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr,
    BLOCK_T: tl.constexpr, R_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    """received [B, H, Sk]. BLOCK_T queries of R_PAD heads per step. Without lse: sums, split_max [B, H, Sq, splits]."""
    blocks = tl.cdiv(Sk, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    key_head = (tl.program_id(0) // blocks % (H // R)).to(tl.int64)
    b = (tl.program_id(0) // blocks // (H // R)).to(tl.int64)
    keys = key + b * key_b + key_head * key_h + n.to(tl.int64) * key_s
    attended = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, 1, KEY_KIND) >= 0
    m = tl.arange(0, BLOCK_T * R_PAD)
    h = key_head * R + m % R_PAD
    offs_d = tl.arange(0, BLOCK_D)
    count = Sq
    first = 0
    if PREFILL:
        count = tl.load(control + b * 3)
        if CAUSAL:  # earlier rows do not attend to any of these keys
            for start in range(0, count, 1024):
                t = start + tl.arange(0, 1024)
                position = tl.load(rows + b * Sq + t, mask=t < count, other=Sq)
                hidden = (t < count) & (position + Sk - Sq < tl.min(n, 0))
                first += tl.sum(hidden.to(tl.int32), 0)
    acc = tl.zeros([R_PAD, BLOCK_N], tl.float32)
    for start in range(first, count, BLOCK_T):
        t = start + m // R_PAD
        ok = (t < count) & (m % R_PAD < R)
        position = t
        if PREFILL:
            position = tl.load(rows + b * Sq + t, mask=ok, other=0)
        else:
            ok = group_of(group, b * group_b + t.to(tl.int64) * group_s, ok, 1, QUERY_KIND) >= 0
        queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
        q = tl.zeros([BLOCK_T * R_PAD, 1], tl.float32)
        if FULL_D:
            q = tl.load(queries[:, None] + offs_d[None, :], mask=ok[:, None] & (offs_d < D)[None, :], other=0.0)
        shift = tl.full([BLOCK_T * R_PAD], -INF, tl.float32)  # lse or the row's max
        if HAS_LSE:
            shift = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
        else:
            split = tl.arange(0, SPLITS)
            offset = ((b * H + h) * Sq + t)[:, None] * splits + split[None, :]
            mask = ok[:, None] & (split < splits)[None, :]
            shift, weight = split_weights(split_max, offset, mask)
            row_sum = tl.sum(tl.load(sums + offset, mask=mask, other=0.0) * weight, 1)
        shift = tl.where(shift == -INF, INF, shift)  # no visible key: every exp2 is 0
        s = logits(queries, keys, ok, n < Sk, q, shift, scale, HAS_LSE, D, BLOCK_T * R_PAD, BLOCK_N, BLOCK_D, FULL_D)
        visible = ok[:, None] & attended[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= (position + Sk - Sq)[:, None])
        if HAS_LSE:
            p = tl.exp2(s)
        else:
            p = tl.exp2(s - shift[:, None]) * tl.div_rn(1.0, tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
        p = tl.where(visible, p, 0.0)
        acc += tl.sum(tl.reshape(p, [BLOCK_T, R_PAD, BLOCK_N]), 0)
    r = tl.arange(0, R_PAD)
    offset = received + (b * H + key_head * R + r)[:, None] * Sk + n[None, :]
    tl.store(offset, acc, mask=(r < R)[:, None] & (n < Sk)[None, :])


def attention_received(query, key, query_mask, key_mask, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], contiguous features. pruneops.ops has checked the arguments."""
    (B, H, Sq, D), (_, Hk, Sk, _), device = query.shape, key.shape, query.device
    received = torch.empty((B, H, Sk), dtype=torch.float32, device=device)
    if not (B and H and Sq and Sk):
        return received.zero_()
    R, prefill, has_lse = H // Hk, Sq * H > DECODE_ROWS * Hk, lse is not None
    splits = 1 if query_mask is None else min(PREFILL_SPLITS, cdiv(Sk, 512))
    sizes, G = (B, H, Hk, Sq, Sk, D), 0 if has_lse else 1
    with device_guard(query):
        call = Call(query, key, query_mask, key_mask, sizes, device, prefill, G, not has_lse, splits)
        if not has_lse:
            call.launch_sums(causal, scale, None, None)
        query = call.query
        block = tiles(query.dtype.itemsize, D, R, prefill)[0]["BLOCK_N"]
        _attention_received_kernel(
            (query.dtype, D, R, causal, prefill, has_lse, *call.dtypes), (B * Hk * cdiv(Sk, block), 1, 1),
            query, call.key, lse, query_mask, key_mask, call.rows, call.control, call.sums, call.split_max, received,
            *call.strides, *(lse.stride() if has_lse else (0, 0, 0)), *call.group_strides,
            H, R, Sq, Sk, call.splits, float(scale),
        )  # fmt: skip
    return received


def specializations():
    """(kernel, spec) of every kind that the launcher above can ask for, to be compiled without a GPU."""
    fp16, bf16, fp32, mask = torch.float16, torch.bfloat16, torch.float32, torch.bool
    for dtype, D, ratio, prefill, kind in (
        (bf16, 128, 1, True, mask), (bf16, 128, 1, True, None), (fp16, 64, 7, True, mask),
        (bf16, 256, 1, True, None), (bf16, 128, 1, False, None), (fp16, 128, 8, False, mask),
        (bf16, 72, 4, True, mask), (bf16, 72, 4, False, mask), (fp32, 128, 1, True, mask),
        (fp32, 33, 7, False, mask), (fp32, 256, 64, True, mask),
    ):  # fmt: skip
        for has_lse in (False, True):
            yield _attention_received_kernel, (dtype, D, ratio, prefill, prefill, has_lse, kind, kind)
