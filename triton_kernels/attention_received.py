"""attention_received: attention that every key receives from the queries of a mask.

Cost: 2 B H M Sk D operations per pass for M queries of the mask; one pass with lse given or for one row, else two. A
step takes all R = H / Hk query heads of a key head, so K is read once for them.
Without lse, the kernels of attention_mass first compute the softmax sums of the rows. Then a program holds
    few rows   all of them and streams a part of the keys,
    more rows  BLOCK_N keys and streams the rows that attend to them, gathered from the compacted list:
one product, one exp2 and one sum per pair. The products of an only row are kept by the first pass and normalised here.
The softmax denominator of a row is merged from the sums of its splits without a logarithm, which would cost an ulp of
the logit.
docs/kernels/attention.md
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ._launch import Specialization, cdiv, device_guard, kernel, next_power_of_2
from ._shared import INF
from .attention_mass import (
    ARGS,
    CONTROL,
    DECODE_ROWS,
    DECODE_SPLITS,
    LOG2E,
    PREFILL_SPLITS,
    Call,
    dependent,
    finite_max,
    group_of,
    group_types,
    load_keys,
    load_queries,
    products,
    qk_types,
    split_weights,
)

ROWS = 64  # per step
PROGRAMS = 264  # target where few rows stream the keys, whose results do not depend on it
NORMALISED = tl.constexpr(512)  # keys of an only row per program


@functools.cache
def tiles(element, D, ratio, prefill):
    """Tile sizes and launch options by bytes per element. FULL_D: all features in one block, else in steps of
    BLOCK_D."""
    heads, width = next_power_of_2(ratio), max(16, next_power_of_2(D))
    max_rows = DECODE_ROWS if not prefill else ROWS if width <= 128 else ROWS // 2
    tile = {"BLOCK_T": max(1, max_rows // heads), "R_PAD": heads, "BLOCK_N": 64 if width <= 128 else 32}
    if element == 2:
        tile |= {"BLOCK_D": width, "FULL_D": True}
        return tile, {"num_warps": 8, "num_stages": 2} if D % 16 else {"num_warps": 4, "num_stages": 3}
    return tile | {"BLOCK_D": 16, "FULL_D": False}, {"num_warps": 8, "num_stages": 2}


def _specialize(dtype, D, ratio, causal, prefill, has_lse, splits, group, key_group):
    types, kinds = group_types(group, key_group)
    tensors, divisible = qk_types(dtype, D)
    types |= tensors | ({} if prefill else {"rows": None, "control": None})
    types |= {"sums": None, "split_max": None} if has_lse else {"lse": None}
    tile, options = tiles(dtype.itemsize, D, ratio, prefill)
    flags, options = dependent(options, prefill or not has_lse)
    flags |= {"CAUSAL": causal, "HAS_LSE": has_lse, "PREFILL": prefill, "SPLITS": splits, **kinds}
    return Specialization(types, {"D": D, **flags, **tile}, options, divisible)


@triton.jit
def _denominators(sums, split_max, cell, pitch, ok, splits, factor, SPLITS: tl.constexpr):
    """Max of the products of rows, and 1 / sum of exp2(logit - max). pitch: between the cells of a row's splits."""
    split = tl.arange(0, SPLITS)
    offset = cell[:, None] + split.to(tl.int64)[None, :] * pitch
    mask = ok[:, None] & (split < splits)[None, :]
    row_max, weights = split_weights(split_max, offset, mask, factor, True)
    row_sum = tl.sum(tl.load(sums + offset, mask=mask, other=0.0) * weights, 1)
    return finite_max(row_max), tl.div_rn(1.0, tl.where(row_sum == 0.0, 1.0, row_sum))


@triton.jit
def _probabilities(dots, shift, weight, scale, HAS_LSE: tl.constexpr):
    """Softmax probabilities of products. shift: lse or the max of the row; weight: 1 / sum."""
    if HAS_LSE:
        p = tl.exp2(tl.fma(dots, scale, -shift[:, None]) * LOG2E)
    else:
        p = tl.exp2((dots - shift[:, None]) * (scale * LOG2E)) * weight[:, None]
    return p


@triton.jit
def _normalise(
    group, key_group, position, sums, split_max, received, group_b, key_group_b, key_group_s,
    b, head, part, pitch, first_cell, Sq, Sk, splits, scale,
    CAUSAL: tl.constexpr, SPLITS: tl.constexpr, QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Turns the products of an only row into probabilities, N keys at a time. QUERY_KIND 0: the row counts."""
    n = part * N + tl.arange(0, N)
    row = tl.zeros([1], tl.int32)
    ok = group_of(group, b * group_b + row.to(tl.int64), row == 0, 1, QUERY_KIND) >= 0
    attended = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, 1, KEY_KIND) >= 0
    at = received + head.to(tl.int64) * Sk + n
    dots = tl.load(at, mask=n < Sk, other=0.0)
    shift, weight = _denominators(
        sums, split_max, first_cell + row, pitch, ok, splits, scale * LOG2E, SPLITS
    )  # fmt: skip
    visible = attended & (tl.max(ok.to(tl.int32), 0) > 0)
    if CAUSAL:
        visible = visible & (n <= position + Sk - Sq)
    p = _probabilities(dots[None, :], shift, weight, scale, False)
    tl.store(at, tl.where(visible, tl.sum(p, 0), 0.0), mask=n < Sk)


@kernel(_specialize, **ARGS)
def _attention_received_kernel(
    query, key, lse, group, key_group, rows, control, sums, split_max, received,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    cells, batch_heads, H, R, Sq, Sk, splits, parts, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr, PREFILL: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr, QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr,
    BLOCK_T: tl.constexpr, R_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    """received [B, H, Sk]. BLOCK_T queries of R_PAD heads per step. Without lse: sums, split_max [B, H / R, cells], and
    of an only row the products, in received. parts: programs per key head that stream the keys of few rows."""
    if PDL:
        gdc_wait()
    head = tl.program_id(0) % batch_heads
    part = tl.program_id(0) // batch_heads
    key_head = (head % (H // R)).to(tl.int64)
    b = (head // (H // R)).to(tl.int64)
    blocks = tl.cdiv(Sk, BLOCK_N)
    count = Sq
    if PREFILL:
        count = tl.load(control + b * CONTROL)
        if not HAS_LSE:
            splits = tl.load(control + b * CONTROL + 1)
        rows += b * Sq
    first_cell = head.to(tl.int64) * cells
    pitch = tl.cast(count, tl.int64) * R
    m = tl.arange(0, BLOCK_T * R_PAD)
    h = key_head * R + m % R_PAD
    r = tl.arange(0, R_PAD)
    result = received + (b * H + key_head * R + r)[:, None] * Sk
    keys = key + b * key_b + key_head * key_h
    key_groups = b * key_group_b
    weight = tl.full([BLOCK_T * R_PAD], 1.0, tl.float32)
    if R_PAD == 1 and not HAS_LSE and count == 1:
        if part * NORMALISED < Sk:
            position = 0
            if PREFILL:
                position = tl.load(rows)
            _normalise(
                group, key_group, position, sums, split_max, received, group_b, key_group_b, key_group_s,
                b, head, part, pitch, first_cell, Sq, Sk, splits, scale,
                CAUSAL, SPLITS, 0 if PREFILL else QUERY_KIND, KEY_KIND, NORMALISED,
            )  # fmt: skip
    elif not PREFILL or count <= BLOCK_T:
        if part < parts:
            t = m // R_PAD
            ok = (t < count) & (m % R_PAD < R)
            position = t
            if PREFILL:
                position = tl.load(rows + t, mask=ok, other=0)
            else:
                ok = group_of(group, b * group_b + t.to(tl.int64) * group_s, ok, 1, QUERY_KIND) >= 0
            queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
            q = load_queries(queries, ok, D, BLOCK_D, FULL_D)
            if HAS_LSE:
                shift = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
                shift = tl.where(shift == -INF, INF, shift)  # no visible key: every exp2 is 0
            else:
                cell = first_cell + t.to(tl.int64) * R + m % R_PAD
                shift, weight = _denominators(
                    sums, split_max, cell, pitch, ok, splits, scale * LOG2E, SPLITS
                )  # fmt: skip
            last_key = tl.where(ok, Sk - 1, -1)  # last visible key of a row
            if CAUSAL:
                last_key = tl.where(ok, position + Sk - Sq, -1)
            per_part = tl.cdiv(blocks, parts)
            lo, hi = part * per_part, tl.minimum((part + 1) * per_part, blocks)
            visible_blocks = tl.minimum(tl.maximum(tl.max(last_key, 0) // BLOCK_N + 1, lo), hi)
            offs_n = tl.arange(0, BLOCK_N)
            n = lo * BLOCK_N + offs_n
            n_group = group_of(key_group, key_groups + n.to(tl.int64) * key_group_s, n < Sk, 1, KEY_KIND)
            for block in range(lo, visible_blocks):
                n = block * BLOCK_N + offs_n
                after = n + BLOCK_N
                next_group = group_of(  # loaded a step ahead
                    key_group, key_groups + after.to(tl.int64) * key_group_s, after < Sk, 1, KEY_KIND
                )  # fmt: skip
                dots = products(
                    queries, keys + n.to(tl.int64) * key_s, ok, n < Sk, q,
                    D, BLOCK_T * R_PAD, BLOCK_N, BLOCK_D, FULL_D, True,
                )  # fmt: skip
                visible = (n_group >= 0)[None, :] & (n[None, :] <= last_key[:, None])
                p = tl.where(visible, _probabilities(dots, shift, weight, scale, HAS_LSE), 0.0)
                total = tl.sum(tl.reshape(p, [BLOCK_T, R_PAD, BLOCK_N]), 0)
                tl.store(result + n[None, :], total, mask=(r < R)[:, None] & (n < Sk)[None, :])
                n_group = next_group
            for block in range(visible_blocks, hi):
                n = block * BLOCK_N + offs_n
                total = tl.zeros([R_PAD, BLOCK_N], tl.float32)
                tl.store(result + n[None, :], total, mask=(r < R)[:, None] & (n < Sk)[None, :])
    else:
        n = part * BLOCK_N + tl.arange(0, BLOCK_N)
        attended = group_of(key_group, key_groups + n.to(tl.int64) * key_group_s, n < Sk, 1, KEY_KIND) >= 0
        first = 0
        if CAUSAL:  # earlier rows do not attend to any of these keys
            for start in range(0, count, 1024):
                t = start + tl.arange(0, 1024)
                position = tl.load(rows + t, mask=t < count, other=Sq)
                hidden = (t < count) & (position + Sk - Sq < tl.min(n, 0))
                first += tl.sum(hidden.to(tl.int32), 0)
        acc = tl.zeros([BLOCK_T * R_PAD, BLOCK_N], tl.float32)
        k = tl.zeros([1, BLOCK_N], tl.float32)
        if FULL_D:
            k = load_keys(keys + n.to(tl.int64) * key_s, n < Sk, D, BLOCK_D)
        for start in range(first, count, BLOCK_T):
            t = start + m // R_PAD
            ok = (t < count) & (m % R_PAD < R)
            position = tl.load(rows + t, mask=ok, other=0)
            queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
            q = load_queries(queries, ok, D, BLOCK_D, FULL_D)
            if FULL_D:
                dots = tl.dot(q, k, input_precision="ieee")
            else:
                dots = products(
                    queries, keys + n.to(tl.int64) * key_s, ok, n < Sk, q,
                    D, BLOCK_T * R_PAD, BLOCK_N, BLOCK_D, FULL_D, True,
                )  # fmt: skip
            if HAS_LSE:
                shift = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
                shift = tl.where(shift == -INF, INF, shift)
            else:
                cell = first_cell + t.to(tl.int64) * R + m % R_PAD
                shift, weight = _denominators(
                    sums, split_max, cell, pitch, ok, splits, scale * LOG2E, SPLITS
                )  # fmt: skip
            visible = ok[:, None] & attended[None, :]
            if CAUSAL:
                visible = visible & (n[None, :] <= (position + Sk - Sq)[:, None])
            acc += tl.where(visible, _probabilities(dots, shift, weight, scale, HAS_LSE), 0.0)
        total = tl.sum(tl.reshape(acc, [BLOCK_T, R_PAD, BLOCK_N]), 0)
        tl.store(result + n[None, :], total, mask=(r < R)[:, None] & (n < Sk)[None, :])


def attention_received(query, key, query_mask, key_mask, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], contiguous features. pruneops.ops has checked the arguments."""
    (B, H, Sq, D), (_, Hk, Sk, _), device = query.shape, key.shape, query.device
    received = torch.empty((B, H, Sk), dtype=torch.float32, device=device)
    if not (B and H and Sq and Sk):
        return received.zero_()
    R, prefill, has_lse = H // Hk, Sq * H > DECODE_ROWS * Hk, lse is not None
    sizes, G = (B, H, Hk, Sq, Sk, D), 0 if has_lse else 1
    with device_guard(query):
        call = Call(query, key, query_mask, key_mask, scale, lse, sizes, device, prefill, G, False)
        if prefill:
            call.launch_list(None)
        if not has_lse:
            call.launch_sums(causal, received)
        query = call.query
        block = tiles(query.dtype.itemsize, D, R, prefill)[0]["BLOCK_N"]
        blocks = cdiv(Sk, block)
        parts = min(blocks, max(1, PROGRAMS // (B * Hk)))
        programs = blocks if prefill else max(parts, cdiv(Sk, NORMALISED.value))
        _attention_received_kernel(
            (query.dtype, D, R, causal, prefill, has_lse, 1 if has_lse else call.split_pad, *call.dtypes),
            (B * Hk * programs, 1, 1),
            query, call.key, lse, query_mask, key_mask, call.rows, call.control, call.sums, call.split_max, received,
            *call.strides, *call.lse_strides, *call.group_strides, call.cells,
            B * Hk, H, R, Sq, Sk, call.splits, parts, call.scale,
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
            splits = 1 if has_lse else PREFILL_SPLITS if prefill else DECODE_SPLITS
            yield _attention_received_kernel, (dtype, D, ratio, prefill, prefill, has_lse, splits, kind, kind)
    yield _attention_received_kernel, (bf16, 128, 1, True, True, False, 8, mask, None)
