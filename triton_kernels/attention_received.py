"""Attention that every key receives from marked queries, in Triton.

Without lse the kernels of attention_mass first sum up the marked rows, in a pass over the keys. Then one program holds
BLOCK_N keys and streams the marked rows that see them, gathered from a list: one product, one exp2 and one sum per
pair; rows that nobody asked for cost nothing. A row's normaliser is put together from the sums of its splits, as they
are: a logarithm between would cost an ulp of the logit. A step takes all R = H / Hk heads that share the keys, so K is
read once for them.
Cost: 2 B H (marked rows) Sk D operations a pass; FastV's last row: K read once, 25 MB at S 3072, H 32, D 128, bf16.
"""

import functools

import torch
import triton.language as tl

from ._launch import Specialization, cdiv, device_guard, kernel, next_power_of_2
from ._shared import INF
from .attention_mass import ARGS, DECODE_ROWS, DECODE_SPLITS, Call, group_of, logits, read, sides, weights

ROWS = 64  # of a step
LISTED_SPLITS = 8  # of keys of marked rows; how few rows there are is not known on the host


@functools.cache
def tiles(element, D, ratio, listed):
    """Tile sizes and launch options by bytes of an element; WHOLE: a row's features at once, else in steps of
    BLOCK_D."""
    heads, width = next_power_of_2(ratio), max(16, next_power_of_2(D))
    most = DECODE_ROWS if not listed else ROWS if width <= 128 else ROWS // 2
    tile = {"BLOCK_T": max(1, most // heads), "R_PAD": heads, "BLOCK_N": 64}
    if element == 2:
        tile |= {"BLOCK_D": width, "WHOLE": True}
        return tile, {"num_warps": 8, "num_stages": 2} if D % 16 else {"num_warps": 4, "num_stages": 3}
    return tile | {"BLOCK_D": 16, "WHOLE": False}, {"num_warps": 8, "num_stages": 2}


def _form(dtype, D, ratio, causal, listed, has_lse, group, key_group):
    types, kinds = sides(group, key_group)
    tensors, divisible = read(dtype, D)
    types |= tensors | ({} if listed else {"rows": None, "control": None})
    types |= {"sums": None, "tops": None} if has_lse else {"lse": None}
    splits = DECODE_SPLITS if not listed else LISTED_SPLITS if kinds["QUERY"] else 1
    forms = {"CAUSAL": causal, "HAS_LSE": has_lse, "LISTED": listed, "SPLITS": splits, **kinds}
    tile, options = tiles(dtype.itemsize, D, ratio, listed)
    return Specialization(types, {"D": D, **forms, **tile}, options, divisible)


@kernel(_form, **ARGS)
def _attention_received_kernel(
    query, key, lse, group, key_group, rows, control, sums, tops, received,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    H, R, Sq, Sk, splits, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr,
    BLOCK_T: tl.constexpr, R_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """received [B, H, Sk]. BLOCK_T rows of R_PAD heads a step. Without lse: sums and tops [B, H, Sq, splits]."""
    blocks = tl.cdiv(Sk, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    key_head = (tl.program_id(0) // blocks % (H // R)).to(tl.int64)
    b = (tl.program_id(0) // blocks // (H // R)).to(tl.int64)
    keys = key + b * key_b + key_head * key_h + n.to(tl.int64) * key_s
    attended = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, 1, KEY) >= 0
    m = tl.arange(0, BLOCK_T * R_PAD)
    h = key_head * R + m % R_PAD
    lane = tl.arange(0, BLOCK_D)
    count = Sq
    first = 0
    if LISTED:
        count = tl.load(control + b * 3)
        if CAUSAL:  # rows before this one do not see the first of these keys
            for start in range(0, count, 1024):
                t = start + tl.arange(0, 1024)
                position = tl.load(rows + b * Sq + t, mask=t < count, other=Sq)
                blind = (t < count) & (position + Sk - Sq < tl.min(n, 0))
                first += tl.sum(blind.to(tl.int32), 0)
    acc = tl.zeros([R_PAD, BLOCK_N], tl.float32)
    for start in range(first, count, BLOCK_T):
        t = start + m // R_PAD
        ok = (t < count) & (m % R_PAD < R)
        position = t
        if LISTED:
            position = tl.load(rows + b * Sq + t, mask=ok, other=0)
        else:
            ok = group_of(group, b * group_b + t.to(tl.int64) * group_s, ok, 1, QUERY) >= 0
        queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
        q = tl.zeros([BLOCK_T * R_PAD, 1], tl.float32)
        if WHOLE:
            q = tl.load(queries[:, None] + lane[None, :], mask=ok[:, None] & (lane < D)[None, :], other=0.0)
        top = tl.full([BLOCK_T * R_PAD], -INF, tl.float32)
        if HAS_LSE:
            top = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
        else:
            split = tl.arange(0, SPLITS)
            place = ((b * H + h) * Sq + t)[:, None] * splits + split[None, :]
            there = ok[:, None] & (split < splits)[None, :]
            top, weight = weights(tops, place, there)
            whole = tl.sum(tl.load(sums + place, mask=there, other=0.0) * weight, 1)
        top = tl.where(top == -INF, INF, top)  # sees nothing: every exp2 is 0
        s = logits(queries, keys, ok, n < Sk, q, top, scale, HAS_LSE, D, BLOCK_T * R_PAD, BLOCK_N, BLOCK_D, WHOLE)
        seen = ok[:, None] & attended[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= (position + Sk - Sq)[:, None])
        if HAS_LSE:
            p = tl.exp2(s)
        else:
            p = tl.exp2(s - top[:, None]) * tl.div_rn(1.0, tl.where(whole == 0.0, 1.0, whole))[:, None]
        p = tl.where(seen, p, 0.0)
        acc += tl.sum(tl.reshape(p, [BLOCK_T, R_PAD, BLOCK_N]), 0)
    r = tl.arange(0, R_PAD)
    place = received + (b * H + key_head * R + r)[:, None] * Sk + n[None, :]
    tl.store(place, acc, mask=(r < R)[:, None] & (n < Sk)[None, :])


def attention_received(query, key, query_mask, key_mask, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], features side by side; the arguments are checked by pruneops.ops."""
    (B, H, Sq, D), (_, Hk, Sk, _), device = query.shape, key.shape, query.device
    received = torch.empty((B, H, Sk), dtype=torch.float32, device=device)
    if not (B and H and Sq and Sk):
        return received.zero_()
    R, listed, has_lse = H // Hk, Sq * H > DECODE_ROWS * Hk, lse is not None
    few = 1 if query_mask is None else min(LISTED_SPLITS, cdiv(Sk, 512))
    sizes, G = (B, H, Hk, Sq, Sk, D), 0 if has_lse else 1
    with device_guard(query):
        call = Call(query, key, query_mask, key_mask, sizes, device, listed, G, not has_lse, few)
        if not has_lse:
            call.launch_sums(causal, scale, None, None)
        query = call.query
        block = tiles(query.dtype.itemsize, D, R, listed)[0]["BLOCK_N"]
        _attention_received_kernel(
            (query.dtype, D, R, causal, listed, has_lse, *call.dtypes), (B * Hk * cdiv(Sk, block), 1, 1),
            query, call.key, lse, query_mask, key_mask, call.rows, call.control, call.sums, call.tops, received,
            *call.strides, *(lse.stride() if has_lse else (0, 0, 0)), *call.group_strides,
            H, R, Sq, Sk, call.splits, float(scale),
        )  # fmt: skip
    return received


def specializations():
    """(kernel, form) of every kind of form that the launcher above can ask for, to be compiled without a GPU."""
    half, brain, full, mask = torch.float16, torch.bfloat16, torch.float32, torch.bool
    for dtype, D, ratio, listed, kind in (
        (brain, 128, 1, True, mask), (brain, 128, 1, True, None), (half, 64, 7, True, mask),
        (brain, 256, 1, True, None), (brain, 128, 1, False, None), (half, 128, 8, False, mask),
        (brain, 72, 4, True, mask), (brain, 72, 4, False, mask), (full, 128, 1, True, mask),
        (full, 33, 7, False, mask), (full, 256, 64, True, mask),
    ):  # fmt: skip
        for has_lse in (False, True):
            yield _attention_received_kernel, (dtype, D, ratio, listed, listed, has_lse, kind, kind)
