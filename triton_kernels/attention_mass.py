"""attention_mass: attention from every query group to every key group, and lse. One pass over the keys with online
softmax: a running max and G running sums per row.

Cost: 2 B H Sq Sk D operations, half of that if causal, and B H Sq Sk exponentials; K is read once per query tile, once
in decode. Workspace: (G + 1) floats per row and split. Three launches in prefill, two in decode:
    list    (prefill) compacts the counted rows into a list and the key blocks into runs of one group.
    sums    a program holds a query tile of BLOCK_M of the Sq H / Hk rows of a key head and streams a split of its
            visible keys (split-KV); few counted rows are split further, so that they occupy the whole GPU.
    reduce  merges the splits and adds up rows by query group in a fixed order; no stride, batch or head changes a bit.
docs/kernels/attention.md
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._launch import INTERPRETED, TYPES, Specialization, cdiv, device_guard, kernel, next_power_of_2, tuned, workspace
from ._shared import INF

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIXED = tl.constexpr(-1)  # group of a block of keys with several groups or masked keys
EMPTY = tl.constexpr(-2)  # of a block of masked keys
CONTROL = tl.constexpr(5)  # integers per batch row: counted rows, splits, first and last unmasked block + 1, runs
DECODE_ROWS = 16  # decode: at most this many rows per key head
PROGRAMS = 256  # target per batch row; depending on the batch size would change bits
PREFILL_SPLITS, DECODE_SPLITS = 16, 64  # most splits of the keys
SPLIT_BLOCKS = 2  # fewest key blocks per split
LIST = {"BLOCK_S": 2048}, {"num_warps": 16, "maxnreg": 128}
REDUCE = {"BLOCK_S": 1024}, {"num_warps": 8}
REDUCE_DECODE = {"BLOCK_S": DECODE_ROWS}, {"num_warps": 4}
REGISTERS = {2: 255, 4: 255, (90, 2): 128}  # per thread, by bytes per element: 128 let two programs share a processor
DEPENDENT = {"any": False, (90, "any"): True}  # a kernel starts while the one before it still runs (PDL)
SMALLEST_SCALE = 2.0**-126  # instead of 0, so that masked products of -inf remain what they are
SPLIT_ROWS = 32  # rows per step of a reduction over splits

# Types of the arguments with these names in every kernel.
STRIDES = ("query_b", "query_h", "query_s", "key_b", "key_h", "key_s")
ROW_STRIDES = ("lse_b", "lse_h", "lse_s", "group_b", "group_s", "key_group_b", "key_group_s")
LISTS = ("rows", "row_groups", "runs", "control")
ARGS = dict.fromkeys(("lse", "sums", "split_max", "lse_out", "mass", "received"), "*fp32") | {"scale": "fp32"}
ARGS |= dict.fromkeys(LISTS, "*i32") | dict.fromkeys((*STRIDES, *ROW_STRIDES, "cells"), "i64")


@functools.cache
def tiles(element, D, prefill, few=False):
    """Tile sizes and launch options of the sums by bytes per element. FULL_D: all features in one block, else in steps
    of BLOCK_D. few: made for few counted rows."""
    if element == 2:
        width = max(16, next_power_of_2(D))
        rows = 128 if width <= 128 and not few else 64
        rows = 16 if not prefill else rows if D % 16 == 0 else min(64, 8192 // width)  # more spills
        keys = 64 if width <= 128 and (prefill or D % 16 == 0) else 32
        tile = {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_D": width, "FULL_D": True}
        warps = 4 if not prefill or (few and width <= 128 and D % 16 == 0) else 8
        return tile, {"num_warps": warps, "num_stages": 2 if D % 16 else 3 if prefill else 4}
    tile = {"BLOCK_M": 64 if prefill else 16, "BLOCK_N": 32 if prefill else 64, "BLOCK_D": 16, "FULL_D": False}
    return tile, {"num_warps": 8, "num_stages": 2}


def dependent(options, waits=True):
    """Flag and launch options of a kernel that others of the call depend on or, if it waits, that depends on others."""
    flag = tuned(DEPENDENT, "any")
    return {"PDL": flag}, options | ({"launch_pdl": True} if flag and waits else {})


def qk_types(dtype, D):
    """Types of query and key, and names of arguments divisible by 16: after `aligned_rows` these depend on D alone."""
    return {"query": TYPES[dtype], "key": TYPES[dtype]}, () if D % 16 else ("query", "key", *STRIDES)


def group_types(group, key_group):
    """Types and kinds (0 none, 1 groups, 2 mask) of groups by dtype; dtype None: all tokens are of group 0."""
    dtypes = ("QUERY_KIND", group), ("KEY_KIND", key_group)
    kinds = {name: int(dtype is not None) + (dtype == torch.bool) for name, dtype in dtypes}
    return {"group": TYPES.get(group), "key_group": TYPES.get(key_group)}, kinds


def _specialize_list(block, fill, group, key_group):
    """fill: 0 leaves lse_out, 1 fills it with -inf, 2 with lse."""
    types, kinds = group_types(group, key_group)
    types |= ({} if fill else {"lse_out": None, "row_groups": None}) | ({} if fill == 2 else {"lse": None})
    flag, options = dependent(LIST[1], waits=False)
    return Specialization(types, {**kinds, **flag, "FILL": fill, "BLOCK_N": block, **LIST[0]}, options)


def _specialize_sums(dtype, D, causal, G, prefill, has_lse, keep, key_group):
    """keep: the products of an only row are stored in `received`."""
    types, kinds = group_types(None, key_group)
    tensors, divisible = qk_types(dtype, D)
    types = {"key_group": types["key_group"], **tensors}
    types |= {} if prefill else dict.fromkeys(("rows", "runs", "control"))
    types |= ({"split_max": None} if has_lse else {"lse": None}) | ({} if keep else {"received": None})
    tile, options = tiles(dtype.itemsize, D, prefill, keep)
    if prefill and options["num_warps"] >= 8 and G <= 5 and not D % 16:
        options = options | {"maxnreg": tuned(REGISTERS, dtype.itemsize)}
    flags, options = dependent(options, prefill)
    flags |= {"CAUSAL": causal, "HAS_LSE": has_lse, "PREFILL": prefill, "KEEP": keep, "KEY_KIND": kinds["KEY_KIND"]}
    return Specialization(types, {"G": G, "G_PAD": next_power_of_2(G), "D": D, **flags, **tile}, options, divisible)


def _specialize_reduce(G, prefill, has_lse, splits, group):
    types, kinds = group_types(group, None)
    types = dict.fromkeys(("group", "lse")) if prefill else {"group": types["group"], **dict.fromkeys(LISTS)}
    types |= {"split_max": None} if has_lse else {"lse": None}
    types |= {"lse_out": None} if prefill and has_lse else {}
    types.pop("runs", None)
    tile, options = REDUCE if prefill else REDUCE_DECODE
    constants, options = dependent(options)
    constants |= {"HAS_LSE": has_lse, "PREFILL": prefill, "QUERY_KIND": kinds["QUERY_KIND"]}
    constants |= {"SPLITS": splits, "SPLIT_ROWS": SPLIT_ROWS if prefill else DECODE_ROWS}
    return Specialization(types, {"G": G, "G_PAD": next_power_of_2(G), **constants, **tile}, options)


@triton.jit
def group_of(group, offset, inside, G, KIND: tl.constexpr):
    """Groups at offsets; -1 if outside or not below G. KIND: 0 none, all are of group 0; 1 groups; 2 mask."""
    if KIND == 0:
        ids = tl.where(inside, 0, -1)
    else:
        ids = tl.load(group + offset, mask=inside, other=0).to(tl.int32)
        if KIND == 2:
            ids = tl.where(ids != 0, 0, -1)
        ids = tl.where(inside & (ids < G), ids, -1)
    return ids


@triton.jit
def _list_rows(
    group, rows, row_groups, control, b, group_b, group_s, Sq, R, programs, most_splits, tile_rows, groups,
    QUERY_KIND: tl.constexpr, FILL: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Counted rows ascending, their groups and number, and how many splits fill the GPU."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, Sq, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        ids = group_of(group, b * group_b + s.to(tl.int64) * group_s, s < Sq, groups, QUERY_KIND)
        counted = ids >= 0
        place = b * Sq + count - 1 + tl.cumsum(counted.to(tl.int32), 0)
        tl.store(rows + place, s, mask=counted)
        if FILL > 0:
            tl.store(row_groups + place, ids, mask=counted)
        count += tl.sum(counted.to(tl.int32), 0)
    splits = programs // tl.maximum(tl.cdiv(count * R, tile_rows), 1)
    tl.store(control + b * CONTROL, count)
    tl.store(control + b * CONTROL + 1, tl.maximum(tl.minimum(splits, most_splits), 1))


@triton.jit
def _block_group(key_group, b, block, key_group_b, key_group_s, Sk, groups, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """Group of all keys of each block, MIXED or EMPTY; neither before the first block."""
    s = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    ids = group_of(key_group, b * key_group_b + s.to(tl.int64) * key_group_s, (s >= 0) & (s < Sk), groups, KIND)
    low, high = tl.min(ids, 1), tl.max(ids, 1)
    found = tl.where(high < 0, EMPTY, tl.where(low == high, high, MIXED))
    return tl.where(block < 0, EMPTY - 1, found)


@triton.jit
def _list_runs(
    key_group, runs, control, b, key_group_b, key_group_s, Sk, groups,
    KEY_KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Runs of key blocks of one group: (first block, group) of each, and (blocks, any) in the end."""
    blocks = tl.cdiv(Sk, BLOCK_N)
    runs += b * (blocks + 1) * 2
    TILE: tl.constexpr = BLOCK_S // BLOCK_N  # blocks per step
    count, first, end = tl.full([], 0, tl.int32), blocks, tl.full([], 0, tl.int32)
    for start in range(0, blocks, TILE):
        block = start + tl.arange(0, TILE)
        own = _block_group(key_group, b, block, key_group_b, key_group_s, Sk, groups, KEY_KIND, BLOCK_N)
        before = _block_group(key_group, b, block - 1, key_group_b, key_group_s, Sk, groups, KEY_KIND, BLOCK_N)
        begins = (block < blocks) & (own != before)
        place = count - 1 + tl.cumsum(begins.to(tl.int32), 0)
        tl.store(runs + place * 2, block, mask=begins)
        tl.store(runs + place * 2 + 1, own, mask=begins)
        count += tl.sum(begins.to(tl.int32), 0)
        first = tl.minimum(first, tl.min(tl.where(own == EMPTY, blocks, block), 0))
        end = tl.maximum(end, tl.max(tl.where(own == EMPTY, 0, block + 1), 0))
    tl.store(runs + count * 2, blocks)
    control += b * CONTROL
    tl.store(control + 2, first)
    tl.store(control + 3, end)
    tl.store(control + 4, count)


@kernel(_specialize_list, **ARGS)
def _attention_list_kernel(
    group, key_group, lse, rows, row_groups, runs, control, lse_out,
    lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s, B, H, R, Sq, Sk, programs, most_splits, tile_rows,
    groups, QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr, FILL: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Programs: B list rows, B list runs, the others fill lse_out. rows, row_groups [B, Sq]; runs [B, blocks + 1, 2];
    control [B, CONTROL]. programs: target per key head."""
    if PDL:
        gdc_launch_dependents()
    b = (tl.program_id(0) % B).to(tl.int64)
    part = tl.program_id(0) // B
    if part == 0:
        _list_rows(
            group, rows, row_groups, control, b, group_b, group_s, Sq, R, programs, most_splits, tile_rows, groups,
            QUERY_KIND, FILL, BLOCK_S,
        )  # fmt: skip
    elif part == 1:
        _list_runs(key_group, runs, control, b, key_group_b, key_group_s, Sk, groups, KEY_KIND, BLOCK_N, BLOCK_S)
    elif FILL > 0:
        h = (part - 2) % H
        s = (part - 2) // H * BLOCK_S + tl.arange(0, BLOCK_S)
        value = tl.full([BLOCK_S], -INF, tl.float32)
        if FILL == 2:
            value = tl.load(lse + b * lse_b + h.to(tl.int64) * lse_h + s.to(tl.int64) * lse_s, mask=s < Sq)
        tl.store(lse_out + (b * H + h) * Sq + s, value, mask=s < Sq)


@triton.jit
def products(
    queries, keys, row_ok, key_ok, q, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL_D: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Dot products [M, N]. queries and keys: pointers to first features. FULL_D: q holds the rows. MASK_KEYS: some
    keys may lie outside (key_ok)."""
    offs_d = tl.arange(0, BLOCK_D)
    if FULL_D:
        k = load_keys(keys, key_ok, D, BLOCK_D, MASK_KEYS)
        dots = tl.dot(q, k, input_precision="ieee")
    else:
        dots = tl.zeros([M, N], tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = d + offs_d < D
            q_d = tl.load(queries[:, None] + (d + offs_d)[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
            k = tl.load(keys[None, :] + (d + offs_d)[:, None], mask=key_ok[None, :] & inside[:, None], other=0.0)
            dots = tl.dot(q_d, k, dots, input_precision="ieee")
    return dots


@triton.jit
def load_features(pointers, rows_ok, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Features of tokens; 0 outside. No mask where none is needed."""
    if MASK_ROWS and D == BLOCK_D:
        x = tl.load(pointers, mask=rows_ok, other=0.0)
    elif MASK_ROWS:
        x = tl.load(pointers, mask=rows_ok & inside, other=0.0)
    elif D == BLOCK_D:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=inside, other=0.0)
    return x


@triton.jit
def load_keys(keys, ok, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_KEYS: tl.constexpr = True):
    """Keys [BLOCK_D, N]."""
    offs_d = tl.arange(0, BLOCK_D)
    return load_features(keys[None, :] + offs_d[:, None], ok[None, :], (offs_d < D)[:, None], D, BLOCK_D, MASK_KEYS)


@triton.jit
def load_queries(queries, ok, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr):
    """Rows [M, BLOCK_D]. Without FULL_D they are read step by step instead."""
    q = tl.zeros([queries.shape[0], 1], tl.float32)
    if FULL_D:
        offs_d = tl.arange(0, BLOCK_D)
        q = load_features(
            queries[:, None] + offs_d[None, :], ok[:, None], (offs_d < D)[None, :], D, BLOCK_D, True
        )  # fmt: skip
    return q


@triton.jit
def finite_max(row_max):
    """What is subtracted from logits before exp2: their max; 0 if all are -inf."""
    return tl.where(row_max == -INF, 0.0, row_max)


@triton.jit
def updated_max(row_max, dots, factor, EXACT: tl.constexpr):
    """Running max after some more products: of the products if EXACT, else of the logits in base 2."""
    block_max = tl.max(dots, 1)
    if not EXACT:
        block_max = tl.fma(block_max, factor, 0.0)  # explicit: rounded as it is stored
    return tl.maximum(row_max, block_max)


@triton.jit
def exp_shifted(dots, row_max, factor, EXACT: tl.constexpr):
    """exp2 of logits minus their max. EXACT: exactly 1 for the max itself, for an instruction more."""
    shift = finite_max(row_max)[:, None]
    return tl.exp2((dots - shift) * factor) if EXACT else tl.exp2(tl.fma(dots, factor, -shift))


@triton.jit
def rescale(old_max, new_max, factor, EXACT: tl.constexpr):
    """What sums relative to old_max are multiplied by."""
    difference = old_max - finite_max(new_max)
    return tl.where(old_max == -INF, 0.0, tl.exp2(difference * factor if EXACT else difference))


@triton.jit
def add_masked(
    total, row_max, dots, row_lse, visible, n_group, scale,
    G: tl.constexpr, G_PAD: tl.constexpr, HAS_LSE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """total and row_max after a block of keys of several groups, n_group."""
    factor = scale * LOG2E
    g = tl.arange(0, G_PAD)
    if HAS_LSE:
        p = tl.exp2(tl.fma(dots, scale, -row_lse[:, None]) * LOG2E)
        p = tl.where(visible, p, 0.0)
    else:
        dots = tl.where(visible, dots, -INF)
        new_max = updated_max(row_max, dots, factor, EXACT)
        p = exp_shifted(dots, new_max, factor, EXACT)
        total *= rescale(row_max, new_max, factor, EXACT)[:, None]
        row_max = new_max
    if G == 1:
        total += tl.sum(p, 1)[:, None]
    else:
        for i in tl.static_range(G):
            part = tl.sum(tl.where((n_group == i)[None, :], p, 0.0), 1)
            total += tl.where((g == i)[None, :], part[:, None], 0.0)
    return total, row_max


@triton.jit
def keep_row(received, dots, m, n, Sk):
    """Stores row 0 of dots [M, N]. A store of the tile would need another layout."""
    tl.store(received + n, tl.sum(tl.where((m == 0)[:, None], dots, 0.0), 0), mask=n < Sk)


@kernel(_specialize_sums, **ARGS)
def _attention_sums_kernel(
    query, key, lse, key_group, rows, runs, control, sums, split_max, received,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, key_group_b, key_group_s,
    cells, batch_heads, H, R, Sq, Sk, splits, scale,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr,
    PREFILL: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr, KEY_KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    """sums [B, H / R, cells, G] per key group of exp2(logit - lse) if lse is given, else of exp2(logit - max) and
    split_max [B, H / R, cells]: max of the logits in base 2, with KEEP of the products. Cells: [splits, counted
    queries, R], R = H / Hk.

    Row m of a key head is query head m % R of the (m // R)-th counted query. G_PAD: G rounded up to a power of two.
    KEEP: the products of an only row are stored in received [B, H, Sk]. scale > 0: the max logit is the max product.
    """
    if PDL:
        if PREFILL:
            gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0) % batch_heads
    slot = tl.program_id(0) // batch_heads
    b = (head // (H // R)).to(tl.int64)
    key_head = (head % (H // R)).to(tl.int64)
    blocks = tl.cdiv(Sk, BLOCK_N)
    count, lo, hi = Sq, 0, blocks
    if PREFILL:
        count = tl.load(control + b * CONTROL)
        splits = tl.load(control + b * CONTROL + 1)
        lo = tl.load(control + b * CONTROL + 2)
        hi = tl.load(control + b * CONTROL + 3)
        run_count = tl.load(control + b * CONTROL + 4)
    items = tl.cdiv(count * R, BLOCK_M) * splits
    if slot >= items:
        return
    tile = (items - 1 - slot) // splits  # the longest rows first
    split = (items - 1 - slot) % splits
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = m // R
    ok = t < count
    h = key_head * R + m % R
    position = t
    if PREFILL:
        position = tl.load(rows + b * Sq + t, mask=ok, other=0)
    queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
    q = load_queries(queries, ok, D, BLOCK_D, FULL_D)
    factor = scale * LOG2E
    row_lse = tl.full([BLOCK_M], -INF, tl.float32)
    if HAS_LSE:
        row_lse = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
        row_lse = tl.where(row_lse == -INF, INF, row_lse)  # no visible key: every exp2 is 0
    last_key = tl.where(ok, Sk - 1, -1)  # last visible key of a row
    if CAUSAL:
        last_key = tl.where(ok, position + Sk - Sq, -1)
    hi = tl.minimum(hi, tl.max(last_key, 0) // BLOCK_N + 1)
    full_blocks = (tl.min(tl.where(ok, last_key, Sk - 1), 0) + 1) // BLOCK_N  # fully visible to all rows
    per_split = tl.cdiv(tl.maximum(hi - lo, 0), splits)
    lo += split * per_split
    hi = tl.minimum(hi, lo + per_split)

    offs_n = tl.arange(0, BLOCK_N)
    keys = key + b * key_b + key_head * key_h + offs_n.to(tl.int64) * key_s
    block_stride = key_s * BLOCK_N
    key_groups = b * key_group_b + offs_n.to(tl.int64) * key_group_s
    kept = count * R == 1
    g = tl.arange(0, G_PAD)
    row_max = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M, G_PAD], tl.float32)
    if PREFILL:
        MASKED_N: tl.constexpr = min(BLOCK_N, 32)
        PARTS: tl.constexpr = BLOCK_N // MASKED_N
        for run in range(run_count):
            start = tl.maximum(tl.load(runs + (b * (blocks + 1) + run) * 2), lo)
            group = tl.load(runs + (b * (blocks + 1) + run) * 2 + 1)
            stop = tl.minimum(tl.load(runs + (b * (blocks + 1) + run) * 2 + 2), hi)
            stop = tl.where(group == EMPTY, start, stop)
            pure = tl.where(group < 0, start, stop)
            before_max = row_max
            run_sum = tl.zeros([BLOCK_M], tl.float32)
            for block in range(start, pure):  # of one group
                n = block * BLOCK_N + offs_n
                dots = products(
                    queries, keys + block * block_stride, ok, n < Sk, q,
                    D, BLOCK_M, BLOCK_N, BLOCK_D, FULL_D, False,
                )  # fmt: skip
                if KEEP and kept:
                    keep_row(received + (b * H + key_head) * Sk, dots, m, n, Sk)
                if HAS_LSE:
                    p = tl.exp2(tl.fma(dots, scale, -row_lse[:, None]) * LOG2E)
                    if CAUSAL and block >= full_blocks:
                        p = tl.where(n[None, :] <= last_key[:, None], p, 0.0)
                    run_sum += tl.sum(p, 1)
                else:
                    if CAUSAL and block >= full_blocks:
                        dots = tl.where(n[None, :] <= last_key[:, None], dots, -INF)
                    new_max = updated_max(row_max, dots, factor, KEEP)
                    p = exp_shifted(dots, new_max, factor, KEEP)
                    run_sum = run_sum * rescale(row_max, new_max, factor, KEEP) + tl.sum(p, 1)
                    row_max = new_max
            if not HAS_LSE:
                total *= rescale(before_max, row_max, factor, KEEP)[:, None]
            total += tl.where((g == group)[None, :], run_sum[:, None], 0.0)
            # blocks of several groups, fewer keys at a time to save registers
            for part in tl.range(pure * PARTS, stop * PARTS, num_stages=2 if G <= 4 else 1):
                n = part * MASKED_N + tl.arange(0, MASKED_N)
                n_group = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, G, KEY_KIND)
                n_keys = key + b * key_b + key_head * key_h + n.to(tl.int64) * key_s
                dots = products(queries, n_keys, ok, n < Sk, q, D, BLOCK_M, MASKED_N, BLOCK_D, FULL_D, True)
                visible = (n_group >= 0)[None, :] & (n[None, :] <= last_key[:, None])
                total, row_max = add_masked(
                    total, row_max, dots, row_lse, visible, n_group, scale, G, G_PAD, HAS_LSE, KEEP
                )
                if KEEP and kept:
                    keep_row(received + (b * H + key_head) * Sk, dots, m, n, Sk)
    else:
        n_group = group_of(key_group, key_groups + lo * key_group_s * BLOCK_N, lo * BLOCK_N + offs_n < Sk, G, KEY_KIND)
        for block in range(lo, hi):
            n = block * BLOCK_N + offs_n
            next_groups = key_groups + (block + 1) * key_group_s * BLOCK_N
            next_group = group_of(key_group, next_groups, n + BLOCK_N < Sk, G, KEY_KIND)  # loaded a step ahead
            dots = products(
                queries, keys + block * block_stride, ok, n < Sk, q, D, BLOCK_M, BLOCK_N, BLOCK_D, FULL_D, True
            )
            visible = (n_group >= 0)[None, :] & (n[None, :] <= last_key[:, None])
            total, row_max = add_masked(total, row_max, dots, row_lse, visible, n_group, scale, G, G_PAD, HAS_LSE, KEEP)
            n_group = next_group
            if KEEP and kept:
                keep_row(received + (b * H + key_head) * Sk, dots, m, n, Sk)
    cell = (head.to(tl.int64) * cells) + split * count * R + m
    if not HAS_LSE:
        tl.store(split_max + cell, row_max, mask=ok)
    tl.store(sums + cell[:, None] * G + g[None, :], total, mask=ok[:, None] & (g < G)[None, :])


@triton.jit
def split_weights(split_max, offset, mask, factor, EXACT: tl.constexpr):
    """Max of rows [M], and the factors [M, SPLITS] of the sums of their splits."""
    maxima = tl.load(split_max + offset, mask=mask, other=-INF)
    row_max = tl.max(maxima, 1)
    return row_max, rescale(maxima, row_max[:, None], factor, EXACT)


@triton.jit
def _add_rows(
    acc, sums, split_max, lse, lse_out, group, rows, row_groups, start, count, cell, R, splits,
    group_s, lse_s, G: tl.constexpr, G_PAD: tl.constexpr, HAS_LSE: tl.constexpr, PREFILL: tl.constexpr,
    QUERY_KIND: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """acc [G, G] after counted rows start to start + M of a head, whose first cell is given. Pointers: of the head."""
    t = start + tl.arange(0, M)
    g = tl.arange(0, G_PAD)
    split = tl.arange(0, SPLITS)
    position = t
    if PREFILL:
        t_group = tl.load(row_groups + t, mask=t < count, other=-1)
        if not HAS_LSE:
            position = tl.load(rows + t, mask=t < count, other=0)
    else:
        t_group = group_of(group, t.to(tl.int64) * group_s, t < count, G, QUERY_KIND)
        if HAS_LSE:
            tl.store(lse_out + t, tl.load(lse + t.to(tl.int64) * lse_s, mask=t < count), mask=t < count)
    mask = (t < count)[:, None] & (split < splits)[None, :]
    offset = cell + t.to(tl.int64)[:, None] * R + split.to(tl.int64)[None, :] * count * R
    part_mask = mask[:, :, None] & (g < G)[None, None, :]
    total = tl.load(sums + offset[:, :, None] * G + g[None, None, :], mask=part_mask, other=0.0)
    if HAS_LSE:
        total = tl.sum(total, 1)
    else:
        row_max, weights = split_weights(split_max, offset, mask, 1.0, False)
        total = tl.sum(total * weights[:, :, None], 1)
        row_sum = tl.sum(total, 1)
        log = tl.where((row_sum == 0.0) | (t_group < 0), -INF, (row_max + tl.log2(row_sum)) * LN2)
        tl.store(lse_out + position, log, mask=t < count)
        total = tl.div_rn(total, tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
    for i in tl.static_range(G):
        part = tl.sum(tl.where((t_group == i)[:, None], total, 0.0), 0)
        acc += tl.where((g == i)[:, None], part[None, :], 0.0)
    return acc


@kernel(_specialize_reduce, **ARGS)
def _attention_reduce_kernel(
    sums, split_max, group, lse, rows, row_groups, control, mass, lse_out,
    group_b, group_s, lse_b, lse_h, lse_s, cells, H, R, Sq, splits,
    G: tl.constexpr, G_PAD: tl.constexpr, HAS_LSE: tl.constexpr, PREFILL: tl.constexpr, PDL: tl.constexpr,
    QUERY_KIND: tl.constexpr, SPLITS: tl.constexpr, SPLIT_ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """mass [B, H, G, G] and lse_out [B, H, Sq]: of the counted rows if PREFILL, else of all. One program per head."""
    if PDL:
        gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    cell = head // R * cells + head % H % R
    count = Sq
    if PREFILL:
        count = tl.load(control + b * CONTROL)
        splits = tl.load(control + b * CONTROL + 1)
        rows += b * Sq
        row_groups += b * Sq
    else:
        group += b * group_b
        if HAS_LSE:
            lse += b * lse_b + head % H * lse_h
    if not (PREFILL and HAS_LSE):
        lse_out += head * Sq
    acc = tl.zeros([G_PAD, G_PAD], tl.float32)
    if PREFILL and splits == 1:
        for start in range(0, count, BLOCK_S):
            acc = _add_rows(
                acc, sums, split_max, lse, lse_out, group, rows, row_groups, start, count, cell, R, splits,
                group_s, lse_s, G, G_PAD, HAS_LSE, PREFILL, QUERY_KIND, 1, BLOCK_S,
            )  # fmt: skip
    else:
        for start in range(0, count, SPLIT_ROWS):
            acc = _add_rows(
                acc, sums, split_max, lse, lse_out, group, rows, row_groups, start, count, cell, R, splits,
                group_s, lse_s, G, G_PAD, HAS_LSE, PREFILL, QUERY_KIND, SPLITS, SPLIT_ROWS,
            )  # fmt: skip
    g = tl.arange(0, G_PAD)
    offset = head * G * G + g[:, None] * G + g[None, :]
    tl.store(mass + offset, acc, mask=(g < G)[:, None] & (g < G)[None, :])


def attention_mass(query, key, query_group, key_group, groups, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], contiguous features. pruneops.ops has checked the arguments."""
    (B, H, Sq, D), (_, Hk, Sk, _), device = query.shape, key.shape, query.device
    mass = torch.empty((B, H, groups, groups), dtype=torch.float32, device=device)
    lse_out = torch.empty((B, H, Sq), dtype=torch.float32, device=device)
    if not (B and H and Sq and Sk):
        return mass.zero_(), lse_out.fill_(-torch.inf) if lse is None else lse_out.copy_(lse)
    prefill = Sq * H > DECODE_ROWS * Hk
    with device_guard(query):
        call = Call(
            query, key, query_group, key_group, scale, lse, (B, H, Hk, Sq, Sk, D), device, prefill, groups, True
        )  # fmt: skip
        if prefill:
            call.launch_list(lse_out)
        call.launch_sums(causal, None)
        _attention_reduce_kernel(
            (groups, prefill, lse is not None, call.split_pad, query_group.dtype), (B * H, 1, 1),
            call.sums, call.split_max, query_group, lse, call.rows, call.row_groups, call.control, mass, lse_out,
            *call.group_strides[:2], *call.lse_strides, call.cells, H, H // Hk, Sq, call.splits,
        )  # fmt: skip
    return mass, lse_out


def aligned_rows(x):
    """x [B, H, S, D] and its strides. If 16 divides D, rows start at multiples of 16 elements and 16 bytes: x is copied
    if they do not."""
    x = x.float() if INTERPRETED else x  # the interpreter's bfloat16 products are wrong
    b, h, s, _ = x.stride()
    if (b | h | s | x.data_ptr()) & 15 and x.shape[-1] % 16 == 0:
        x = x.clone(memory_format=torch.contiguous_format)
        b, h, s, _ = x.stride()
    return x, b, h, s


class Call:
    """Shared by the launches of one call: tensors, strides, and one workspace for lists and sums.

    Parameters
    ----------
    scale : float
        If negative, the query is negated instead: the kernels expect a positive one.
    lse : Tensor or None
    sizes : (B, H, Hk, Sq, Sk, D)
    prefill : bool
        Lists the counted rows, whose number decides the splits of the keys; decode splits them by sizes.
    G : int
        Key groups; 0: no sums.
    with_groups : bool
        Lists the groups of the counted rows too.
    """

    def __init__(self, query, key, group, key_group, scale, lse, sizes, device, prefill, G, with_groups):
        B, H, Hk, Sq, Sk, D = self.sizes = sizes
        self.query, *query_strides = aligned_rows(-query if scale < 0 else query)
        self.scale = abs(float(scale)) or SMALLEST_SCALE
        self.key, *key_strides = aligned_rows(key)
        self.strides = *query_strides, *key_strides
        self.group, group_dtype, group_strides = _group_args(group)
        self.key_group, key_group_dtype, key_group_strides = _group_args(key_group)
        self.dtypes = group_dtype, key_group_dtype
        self.group_strides = *group_strides, *key_group_strides
        self.lse, self.lse_strides = lse, (0, 0, 0) if lse is None else lse.stride()
        self.prefill, self.G = prefill, G
        self.tile = tiles(self.query.dtype.itemsize, D, prefill, not with_groups)[0]
        rows, self.blocks = Sq * (H // Hk), cdiv(Sk, self.tile["BLOCK_N"])
        self.programs = max(1, PROGRAMS // Hk)
        most_splits = min(self.programs, PREFILL_SPLITS if prefill else DECODE_SPLITS)
        self.split_pad = next_power_of_2(most_splits)  # no length decides what is compiled
        self.most_splits = min(most_splits, cdiv(self.blocks, SPLIT_BLOCKS))
        self.splits = 1 if prefill else self.most_splits
        row_tiles = cdiv(rows, self.tile["BLOCK_M"])
        split_tiles = min(self.programs, row_tiles * self.most_splits)  # tiles and splits of few counted rows
        self.slots = max(row_tiles, split_tiles) if prefill else self.splits
        self.cells = max(rows, split_tiles * self.tile["BLOCK_M"]) if prefill else rows * self.splits
        cells = B * Hk * self.cells if G else 0
        parts = (torch.float32, G * cells), (torch.float32, 0 if lse is not None else cells)
        self.rows = self.row_groups = self.runs = self.control = None
        if not prefill:
            self.memory, self.sums, self.split_max = workspace(device, *parts) if G else (None, None, None)
            return
        lists = B * Sq, B * Sq * with_groups, B * 2 * (self.blocks + 1), B * CONTROL.value
        parts += tuple((torch.int32, count) for count in lists)
        self.memory, self.sums, self.split_max, *lists = workspace(device, *parts)
        self.rows, self.row_groups, self.runs, self.control = lists

    def launch_list(self, lse_out):
        """Lists rows, and runs of keys if there are sums; fills lse_out, unless it is None, with lse or -inf."""
        B, H, Hk, Sq, Sk, _ = self.sizes
        fill = 0 if lse_out is None else 1 if self.lse is None else 2
        parts = (2 if self.G else 1) + (H * cdiv(Sq, LIST[0]["BLOCK_S"]) if fill else 0)
        _attention_list_kernel(
            (self.tile["BLOCK_N"], fill, *self.dtypes), (B * parts, 1, 1),
            self.group, self.key_group, self.lse, self.rows, self.row_groups, self.runs, self.control, lse_out,
            *self.lse_strides, *self.group_strides,
            B, H, H // Hk, Sq, Sk, self.programs, self.most_splits, self.tile["BLOCK_M"], max(self.G, 1),
        )  # fmt: skip

    def launch_sums(self, causal, received):
        """Writes sums, and split_max without lse. received [B, H, Sk] or None: gets the products of an only row."""
        B, H, Hk, Sq, Sk, D = self.sizes
        keep = received is not None
        _attention_sums_kernel(
            (self.query.dtype, D, causal, self.G, self.prefill, self.lse is not None, keep, self.dtypes[1]),
            (B * Hk * self.slots, 1, 1),
            self.query, self.key, self.lse, self.key_group, self.rows, self.runs, self.control,
            self.sums, self.split_max, received,
            *self.strides, *self.lse_strides, *self.group_strides[2:], self.cells,
            B * Hk, H, H // Hk, Sq, Sk, self.splits, self.scale,
        )  # fmt: skip


def _group_args(group):
    """(groups, dtype, strides)"""
    return (None, None, (0, 0)) if group is None else (group, group.dtype, group.stride())


def specializations():
    """(kernel, spec) of every kind that the launchers above can ask for, to be compiled without a GPU."""
    fp16, bf16, fp32, groups, mask = torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool
    for block, fill in itertools.product((32, 64), (0, 1, 2)):
        yield _attention_list_kernel, (block, fill, *((groups, groups) if fill else (mask, mask)))
    for G, prefill, has_lse in itertools.product((1, 8), (True, False), (True, False)):
        splits = PREFILL_SPLITS if prefill else DECODE_SPLITS
        yield _attention_reduce_kernel, (G, prefill, has_lse, splits, torch.int32 if G == 1 else groups)
    yield _attention_reduce_kernel, (4, True, False, 8, groups)
    tensors = (bf16, 128), (fp16, 64), (bf16, 256), (fp16, 80), (bf16, 72), (fp16, 200), (fp32, 128), (fp32, 33)
    variants = (8, True, False), (8, False, False), (4, True, True), (4, False, True), (4, True, False)
    for dtype, D in tensors:
        for G, prefill, has_lse in variants if D in (64, 128, 256) else variants[:2]:
            yield _attention_sums_kernel, (dtype, D, True, G, prefill, has_lse, False, groups)
        yield _attention_sums_kernel, (dtype, D, True, 1, D % 64 == 0, False, True, None)  # attention_received
