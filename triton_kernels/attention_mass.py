"""attention_mass: attention from every query group to every key group, and lse. One pass over the keys with online
softmax: a running max and G running sums per row.

Cost: 2 B H Sq Sk D operations, half of that if causal, and B H Sq Sk exponentials; decode reads K once. Workspace:
(G + 1) floats per row and split. Three launches in prefill, two in decode:
    list    (prefill) compacts the counted rows into a list; finds the range of key blocks that hold unmasked keys and
            the blocks of a single group.
    sums    a program holds a query tile of BLOCK_M of the Sq H / Hk rows of a key head and streams its visible keys.
            Decode splits the keys over programs (split-KV).
    reduce  merges the splits and adds up rows by query group in a fixed order; no stride, batch or head changes a bit.
docs/kernels/attention.md
"""

import functools
import itertools

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, TYPES, Specialization, cdiv, device_guard, kernel, next_power_of_2, workspace
from ._shared import INF

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIXED = tl.constexpr(-1)  # group of a block of keys with several groups or masked keys
DECODE_ROWS = 16  # decode: at most this many rows per key head
DECODE_PROGRAMS = 256  # target per batch row; depending on the batch size would change bits
DECODE_SPLITS = 64
LIST = {"BLOCK_S": 1024}, {"num_warps": 8}
REDUCE = {"BLOCK_S": 512}, {"num_warps": 8}
REDUCE_DECODE = {"BLOCK_S": DECODE_ROWS}, {"num_warps": 4}

# Types of the arguments with these names in every kernel.
STRIDES = ("query_b", "query_h", "query_s", "key_b", "key_h", "key_s")
ROW_STRIDES = ("lse_b", "lse_h", "lse_s", "group_b", "group_s", "key_group_b", "key_group_s")
LISTS = ("rows", "block_groups", "control")
ARGS = dict.fromkeys(("lse", "sums", "split_max", "lse_out", "mass", "received"), "*fp32") | {"scale": "fp32"}
ARGS |= dict.fromkeys(LISTS, "*i32") | dict.fromkeys((*STRIDES, *ROW_STRIDES), "i64")


@functools.cache
def tiles(element, D, prefill):
    """Tile sizes and launch options of the sums by bytes per element. FULL_D: all features in one block, else in steps
    of BLOCK_D."""
    if element == 2:
        width = max(16, next_power_of_2(D))
        rows = 128 if width == 128 else 64
        rows = 16 if not prefill else rows if D % 16 == 0 else min(64, 8192 // width)  # more spills
        tile = {"BLOCK_M": rows, "BLOCK_N": 64 if width <= 128 else 32, "BLOCK_D": width, "FULL_D": True}
        return tile, {"num_warps": 8 if prefill else 4, "num_stages": 2 if D % 16 else 3}
    tile = {"BLOCK_M": 64 if prefill else 16, "BLOCK_N": 32 if prefill else 64, "BLOCK_D": 16, "FULL_D": False}
    return tile, {"num_warps": 8, "num_stages": 2}


def qk_types(dtype, D):
    """Types of query and key, and names of arguments divisible by 16: after `aligned_rows` these depend on D alone."""
    return {"query": TYPES[dtype], "key": TYPES[dtype]}, () if D % 16 else ("query", "key", *STRIDES)


def group_types(group, key_group):
    """Types and kinds (0 none, 1 groups, 2 mask) of groups by dtype; dtype None: all tokens are of group 0."""
    dtypes = ("QUERY_KIND", group), ("KEY_KIND", key_group)
    kinds = {name: int(dtype is not None) + (dtype == torch.bool) for name, dtype in dtypes}
    return {"group": TYPES.get(group), "key_group": TYPES.get(key_group)}, kinds


def _specialize_list(block, group, key_group):
    types, kinds = group_types(group, key_group)
    return Specialization(types, {**kinds, "BLOCK_N": block, **LIST[0]}, LIST[1])


def _specialize_sums(dtype, D, causal, G, prefill, has_lse, split, group, key_group):
    types, kinds = group_types(group, key_group)
    tensors, divisible = qk_types(dtype, D)
    types |= tensors | ({} if prefill else dict.fromkeys(LISTS))
    types |= ({} if has_lse else {"lse": None}) | ({"lse_out": None} if split else {"split_max": None})
    tile, options = tiles(dtype.itemsize, D, prefill)
    flags = {"CAUSAL": causal, "HAS_LSE": has_lse, "PREFILL": prefill, "SPLIT": split, **kinds}
    return Specialization(types, {"G": G, "G_PAD": next_power_of_2(G), "D": D, **flags, **tile}, options, divisible)


def _specialize_reduce(G, prefill, combine, group):
    types, kinds = group_types(group, None)
    types = {"group": types["group"], **({} if prefill else {"rows": None, "control": None})}
    types |= {} if combine else {"split_max": None, "lse_out": None}
    tile, options = REDUCE if prefill else REDUCE_DECODE
    flags = {"COMBINE": combine, "PREFILL": prefill, "QUERY_KIND": kinds["QUERY_KIND"]}
    splits = 1 if prefill else DECODE_SPLITS
    return Specialization(types, {"G": G, "G_PAD": next_power_of_2(G), **flags, "SPLITS": splits, **tile}, options)


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


@kernel(_specialize_list, **ARGS)
def _attention_list_kernel(
    group, key_group, rows, block_groups, control, group_b, group_s, key_group_b, key_group_s, Sq, Sk, groups,
    QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """rows [B, Sq]: counted rows ascending, then the others descending; block_groups [B, blocks]; control [B, 3]:
    number of counted rows, first and last block with an unmasked key."""
    b = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    count = tl.full([], 0, tl.int32)
    for start in range(0, Sq, BLOCK_S):
        s = start + offs_s
        counted = group_of(group, b * group_b + s.to(tl.int64) * group_s, s < Sq, groups, QUERY_KIND) >= 0
        rank = count + tl.cumsum(counted.to(tl.int32), 0)  # inclusive
        tl.store(rows + b * Sq + tl.where(counted, rank - 1, Sq - 1 - s + rank), s, mask=s < Sq)
        count += tl.sum(counted.to(tl.int32), 0)
    tl.store(control + b * 3, count)
    blocks = tl.cdiv(Sk, BLOCK_N)
    TILE: tl.constexpr = BLOCK_S // BLOCK_N  # blocks per step
    first = blocks
    last = tl.full([], -1, tl.int32)
    for start in range(0, blocks, TILE):
        block = start + tl.arange(0, TILE)
        s = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        ids = group_of(key_group, b * key_group_b + s.to(tl.int64) * key_group_s, s < Sk, groups, KEY_KIND)
        low, high = tl.min(ids, 1), tl.max(ids, 1)
        tl.store(block_groups + b * blocks + block, tl.where(low == high, high, MIXED), mask=block < blocks)
        first = tl.minimum(first, tl.min(tl.where(high >= 0, block, blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(high >= 0, block, -1), 0))
    tl.store(control + b * 3 + 1, first)
    tl.store(control + b * 3 + 2, last)


@triton.jit
def logits(
    queries, keys, row_ok, key_ok, q, lse, scale, HAS_LSE: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    """Logits [M, N] in base 2, minus lse if given. queries and keys: pointers to first features. FULL_D: q holds the
    rows."""
    offs_d = tl.arange(0, BLOCK_D)
    if FULL_D:
        k = tl.load(keys[None, :] + offs_d[:, None], mask=key_ok[None, :] & (offs_d < D)[:, None], other=0.0)
        dots = tl.dot(q, k, input_precision="ieee")
    else:
        dots = tl.zeros([M, N], tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = d + offs_d < D
            q_d = tl.load(queries[:, None] + (d + offs_d)[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
            k = tl.load(keys[None, :] + (d + offs_d)[:, None], mask=key_ok[None, :] & inside[:, None], other=0.0)
            dots = tl.dot(q_d, k, dots, input_precision="ieee")
    s = tl.fma(dots, scale * LOG2E, 0.0)  # explicit: the compiler would fuse a product in one kernel and not in another
    if HAS_LSE:
        s = tl.fma(dots, scale, -lse[:, None]) * LOG2E
    return s


@kernel(_specialize_sums, **ARGS)
def _attention_sums_kernel(
    query, key, lse, group, key_group, rows, block_groups, control, sums, split_max, lse_out,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    H, R, Sq, Sk, tiles, splits, scale,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr,
    PREFILL: tl.constexpr, SPLIT: tl.constexpr, QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    """sums [B, H, Sq, splits, G]: of exp2(logit - max) per key group. R = H / Hk.

    SPLIT: also split_max [B, H, Sq, splits]. Else sums are relative to lse, given or of the row's only split, and
    lse_out [B, H, Sq] is written. Row m of a key head is query head m % R of the (m // R)-th counted query. G_PAD: G
    rounded up to a power of two.
    """
    split = tl.program_id(0) % splits
    tile = tiles - 1 - tl.program_id(0) // splits % tiles  # the longest rows first
    key_head = tl.program_id(0) // (splits * tiles)
    b = (key_head // (H // R)).to(tl.int64)
    key_head = (key_head % (H // R)).to(tl.int64)
    blocks = tl.cdiv(Sk, BLOCK_N)
    count, lo, hi = Sq, 0, blocks
    if PREFILL:
        count = tl.load(control + b * 3)
        lo = tl.load(control + b * 3 + 1)
        hi = tl.load(control + b * 3 + 2) + 1
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = m // R
    ok = t < count
    h = key_head * R + m % R
    position = t
    if PREFILL:
        position = tl.load(rows + b * Sq + t, mask=t < Sq, other=0)
    else:
        ok = group_of(group, b * group_b + t.to(tl.int64) * group_s, ok, G, QUERY_KIND) >= 0
    row_lse = tl.full([BLOCK_M], -INF, tl.float32)
    row_max = row_lse
    if HAS_LSE:
        row_lse = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=t < Sq, other=-INF)
        if split == 0:
            tl.store(lse_out + (b * H + h) * Sq + position, row_lse, mask=t < Sq)
        row_lse = tl.where(ok & (row_lse != -INF), row_lse, INF)  # no visible key: every exp2 is 0
    elif not SPLIT:
        tl.store(lse_out + (b * H + h) * Sq + position, row_max, mask=(t < Sq) & (t >= count))
    if tile * BLOCK_M >= count * R:
        return
    last_key = tl.where(ok, Sk - 1, -1)  # last visible key of a row
    if CAUSAL:
        last_key = tl.where(ok, position + Sk - Sq, -1)
    hi = tl.minimum(hi, tl.max(last_key, 0) // BLOCK_N + 1)
    full_blocks = (tl.min(tl.where(ok, last_key, Sk - 1), 0) + 1) // BLOCK_N  # fully visible to all rows
    per_split = tl.cdiv(tl.maximum(hi - lo, 0), splits)
    lo += split * per_split
    hi = tl.minimum(hi, lo + per_split)

    offs_d = tl.arange(0, BLOCK_D)
    queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
    q = tl.zeros([BLOCK_M, 1], tl.float32)
    if FULL_D:
        q = tl.load(queries[:, None] + offs_d[None, :], mask=ok[:, None] & (offs_d < D)[None, :], other=0.0)
    total = tl.zeros([BLOCK_M, G_PAD], tl.float32)
    g = tl.arange(0, G_PAD)
    for block in range(lo, hi):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = key + b * key_b + key_head * key_h + n.to(tl.int64) * key_s
        s = logits(queries, keys, ok, n < Sk, q, row_lse, scale, HAS_LSE, D, BLOCK_M, BLOCK_N, BLOCK_D, FULL_D)
        n_group = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, G, KEY_KIND)
        block_group = tl.full([], MIXED, tl.int32)
        if PREFILL:
            block_group = tl.load(block_groups + b * blocks + block)
        if (block_group < 0) | (block >= full_blocks):
            visible = (n_group >= 0)[None, :] & (n[None, :] <= last_key[:, None])
            s = tl.where(visible, s, -INF)
        if not HAS_LSE:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            shift = tl.where(new_max == -INF, 0.0, new_max)  # no visible key yet
            total *= tl.exp2(row_max - shift)[:, None]
            row_max = new_max
            p = tl.exp2(s - shift[:, None])
        else:
            p = tl.exp2(s)
        if block_group >= 0:
            total += tl.where((g == block_group)[None, :], tl.sum(p, 1)[:, None], 0.0)
        else:
            for i in range(G):
                part = tl.sum(tl.where((n_group == i)[None, :], p, 0.0), 1)
                total += tl.where((g == i)[None, :], part[:, None], 0.0)
    offset = ((b * H + h) * Sq + t) * splits + split
    if SPLIT:
        tl.store(split_max + offset, row_max, mask=ok)
    elif not HAS_LSE:
        row_sum = tl.sum(total, 1)
        log = tl.where(row_sum == 0.0, -INF, (row_max + tl.log2(row_sum)) * LN2)
        tl.store(lse_out + (b * H + h) * Sq + position, log, mask=ok)
        total = tl.div_rn(total, tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
    tl.store(sums + offset[:, None] * G + g[None, :], total, mask=ok[:, None] & (g < G)[None, :])


@triton.jit
def split_weights(split_max, offset, mask):
    """Row maxima [M] and the rescale factors of the splits [M, SPLITS]: exp2(split max - row max)."""
    maxima = tl.load(split_max + offset, mask=mask, other=-INF)
    row_max = tl.max(maxima, 1)
    return row_max, tl.exp2(maxima - tl.where(row_max == -INF, 0.0, row_max)[:, None])


@kernel(_specialize_reduce, **ARGS)
def _attention_reduce_kernel(
    sums, split_max, group, rows, control, mass, lse_out, group_b, group_s, H, Sq, splits,
    G: tl.constexpr, G_PAD: tl.constexpr, COMBINE: tl.constexpr, PREFILL: tl.constexpr, QUERY_KIND: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """mass [B, H, G, G]; COMBINE: merges the splits and writes lse_out [B, H, Sq]. One program per head."""
    b = (tl.program_id(0) // H).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * Sq
    g = tl.arange(0, G_PAD)
    split = tl.arange(0, SPLITS)
    count = Sq
    if PREFILL:
        count = tl.load(control + b * 3)
    acc = tl.zeros([G_PAD, G_PAD], tl.float32)
    for start in range(0, count, BLOCK_S):
        t = start + tl.arange(0, BLOCK_S)
        position = t
        if PREFILL:
            position = tl.load(rows + b * Sq + t, mask=t < count, other=0)
        t_group = group_of(group, b * group_b + position.to(tl.int64) * group_s, t < count, G, QUERY_KIND)
        offset = (row + t)[:, None] * splits + split[None, :]
        mask = (t_group >= 0)[:, None] & (split < splits)[None, :]
        part_mask = mask[:, :, None] & (g < G)[None, None, :]
        parts = tl.load(sums + offset[:, :, None] * G + g[None, None, :], mask=part_mask, other=0.0)
        if COMBINE:
            row_max, weight = split_weights(split_max, offset, mask)
            total = tl.sum(parts * weight[:, :, None], 1)
            row_sum = tl.sum(total, 1)
            log = tl.where(row_sum == 0.0, -INF, (row_max + tl.log2(row_sum)) * LN2)
            tl.store(lse_out + row + t, log, mask=t < Sq)
            total = tl.div_rn(total, tl.where(row_sum == 0.0, 1.0, row_sum)[:, None])
        else:
            total = tl.sum(parts, 1)
        for i in range(G):
            part = tl.sum(tl.where((t_group == i)[:, None], total, 0.0), 0)
            acc += tl.where((g == i)[:, None], part[None, :], 0.0)
    offset = tl.program_id(0).to(tl.int64) * G * G + g[:, None] * G + g[None, :]
    tl.store(mass + offset, acc, mask=(g < G)[:, None] & (g < G)[None, :])


def attention_mass(query, key, query_group, key_group, groups, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], contiguous features. pruneops.ops has checked the arguments."""
    (B, H, Sq, D), (_, Hk, Sk, _), device = query.shape, key.shape, query.device
    mass = torch.empty((B, H, groups, groups), dtype=torch.float32, device=device)
    lse_out = torch.empty((B, H, Sq), dtype=torch.float32, device=device)
    if not (B and H and Sq and Sk):
        return mass.zero_(), lse_out.fill_(-torch.inf) if lse is None else lse_out.copy_(lse)
    prefill = Sq * H > DECODE_ROWS * Hk
    combine = lse is None and not prefill
    with device_guard(query):
        call = Call(query, key, query_group, key_group, (B, H, Hk, Sq, Sk, D), device, prefill, groups, combine)
        call.launch_sums(causal, scale, lse, lse_out)
        _attention_reduce_kernel(
            (groups, prefill, combine, query_group.dtype), (B * H, 1, 1),
            call.sums, call.split_max, query_group, call.rows, call.control, mass, lse_out,
            *call.group_strides[:2], H, Sq, call.splits,
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
    sizes : (B, H, Hk, Sq, Sk, D)
    prefill : bool
        Compacts the counted rows into a list and takes `splits`; decode chooses its own.
    G : int
        Key groups; 0: no sums.
    split : bool
        Keeps the sums and max of every split.
    """

    def __init__(self, query, key, group, key_group, sizes, device, prefill, G, split, splits=1):
        B, H, Hk, Sq, Sk, D = self.sizes = sizes
        self.query, *query_strides = aligned_rows(query)
        self.key, *key_strides = aligned_rows(key)
        self.strides = *query_strides, *key_strides
        self.group, group_dtype, group_strides = _group_args(group)
        self.key_group, key_group_dtype, key_group_strides = _group_args(key_group)
        self.dtypes = group_dtype, key_group_dtype
        self.group_strides = *group_strides, *key_group_strides
        self.prefill, self.G, self.split = prefill, G, split
        self.tile = tiles(self.query.dtype.itemsize, D, prefill)[0]
        block = self.tile["BLOCK_N"]
        blocks = cdiv(Sk, block)
        if not prefill:
            splits = min(DECODE_SPLITS, cdiv(DECODE_PROGRAMS, Hk), cdiv(blocks, 2))
        self.splits, cells = splits, B * H * Sq * splits
        parts = (torch.float32, G * cells), (torch.float32, cells if split else 0)
        if not prefill:
            self.rows = self.block_groups = self.control = None
            self.memory, self.sums, self.split_max = workspace(device, *parts) if G else (None, None, None)
            return
        parts += (torch.int32, B * Sq), (torch.int32, B * blocks), (torch.int32, 3 * B)
        self.memory, self.sums, self.split_max, self.rows, self.block_groups, self.control = workspace(device, *parts)
        _attention_list_kernel(
            (block, group_dtype, key_group_dtype), (B, 1, 1),
            group, key_group, self.rows, self.block_groups, self.control, *self.group_strides, Sq, Sk, max(G, 1),
        )  # fmt: skip

    def launch_sums(self, causal, scale, lse, lse_out):
        """Writes the sums, and lse_out unless split."""
        B, H, Hk, Sq, Sk, D = self.sizes
        R = H // Hk
        row_tiles = cdiv(Sq * R, self.tile["BLOCK_M"])
        _attention_sums_kernel(
            (self.query.dtype, D, causal, self.G, self.prefill, lse is not None, self.split, *self.dtypes),
            (B * Hk * row_tiles * self.splits, 1, 1),
            self.query, self.key, lse, self.group, self.key_group, self.rows, self.block_groups, self.control,
            self.sums, self.split_max, lse_out,
            *self.strides, *((0, 0, 0) if lse is None else lse.stride()), *self.group_strides,
            H, R, Sq, Sk, row_tiles, self.splits, float(scale),
        )  # fmt: skip


def _group_args(group):
    """(groups, dtype, strides)"""
    return (None, None, (0, 0)) if group is None else (group, group.dtype, group.stride())


def specializations():
    """(kernel, spec) of every kind that the launchers above can ask for, to be compiled without a GPU."""
    fp16, bf16, fp32, groups, mask = torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool
    for block, dtype in itertools.product((32, 64), (groups, mask)):
        yield _attention_list_kernel, (block, dtype, dtype)
    for G, prefill, combine in ((8, True, False), (8, False, False), (8, False, True), (1, True, False)):
        yield _attention_reduce_kernel, (G, prefill, combine, torch.int32 if G == 1 else groups)
    tensors = (bf16, 128), (fp16, 64), (bf16, 256), (fp16, 80), (bf16, 72), (fp16, 200), (fp32, 128), (fp32, 33)
    variants = (8, True, False, False), (4, True, True, False), (8, False, False, True), (4, False, True, False)
    for dtype, D in tensors:
        for G, prefill, has_lse, split in variants if D in (64, 128, 256) else variants[::2]:
            yield _attention_sums_kernel, (dtype, D, True, G, prefill, has_lse, split, groups, groups)
        yield _attention_sums_kernel, (dtype, D, True, 1, D % 64 == 0, False, True, mask, None)  # attention_received
