"""Attention between groups of tokens in Triton: one pass over the keys, G running sums beside the running maximum.

    list    (prefill) the rows whose queries count, in ascending order, then the others; the keys' range; which blocks
            of keys are of one group: one program a batch row, B (Sq + Sk / BLOCK_N) integers.
    sums    a program takes BLOCK_M of the Sq H / Hk rows that share a key head and streams the keys they see: one
            product by tensor cores (float32: fused multiply-adds), one exp2 and one sum per pair, a masked sum per
            group only in blocks of several groups. Decode splits the keys over programs, so that the whole card
            reads K once.
    reduce  splits are combined, rows summed by the group of their query, in a fixed order.
Cost: 2 B H Sq Sk D operations, half of that where causal: half of a flash forward's, which has V too. With lse given
there is no maximum to keep. Memory: (G + 1) floats a row and split.
    S 3072, H 32, D 128, causal, bf16 on an H200: 39 GFLOP is 49 us at 790 TFLOP/s, 151 M exponentials are 36 us at 16 a
    clock and multiprocessor; they overlap in part. Decode, Sk 3072: 25 MB of K is 5.9 us at 4.3 TB/s.

The order of summation depends on sizes and on which rows count: strides, batch and other heads change no bit.
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
MIXED = tl.constexpr(-1)  # code of a block of keys that is not of one group
DECODE_ROWS = 16  # up to this many rows a key head, keys are split over programs
DECODE_PROGRAMS = 256  # of a batch row, if it has that many keys; the batch's size would change bits
DECODE_SPLITS = 64
LIST = {"BLOCK_S": 1024}, {"num_warps": 8}
REDUCE = {"BLOCK_S": 512}, {"num_warps": 8}
REDUCE_DECODE = {"BLOCK_S": DECODE_ROWS}, {"num_warps": 4}

# Types of arguments that have these names in any kernel, if they are there at all.
STRIDES = ("query_b", "query_h", "query_s", "key_b", "key_h", "key_s")
SIDE_STRIDES = ("lse_b", "lse_h", "lse_s", "group_b", "group_s", "key_group_b", "key_group_s")
LISTS = ("rows", "codes", "control")
ARGS = dict.fromkeys(("lse", "sums", "tops", "found", "mass", "received"), "*fp32") | {"scale": "fp32"}
ARGS |= dict.fromkeys(LISTS, "*i32") | dict.fromkeys((*STRIDES, *SIDE_STRIDES), "i64")


@functools.cache
def tiles(element, D, prefill):
    """Tile sizes and launch options of the sums by bytes of an element; WHOLE: a row's features at once, else in steps
    of BLOCK_D."""
    if element == 2:
        width = max(16, next_power_of_2(D))
        rows = 128 if width == 128 else 64
        rows = 16 if not prefill else rows if D % 16 == 0 else min(64, 8192 // width)  # more would spill
        tile = {"BLOCK_M": rows, "BLOCK_N": 64 if width <= 128 else 32, "BLOCK_D": width, "WHOLE": True}
        return tile, {"num_warps": 8 if prefill else 4, "num_stages": 2 if D % 16 else 3}
    tile = {"BLOCK_M": 64 if prefill else 16, "BLOCK_N": 32 if prefill else 64, "BLOCK_D": 16, "WHOLE": False}
    return tile, {"num_warps": 8, "num_stages": 2}


def read(dtype, D):
    """Types and multiples of 16 of query and key: `readable` leaves one layout for each D."""
    return {"query": TYPES[dtype], "key": TYPES[dtype]}, () if D % 16 else ("query", "key", *STRIDES)


def sides(group, key_group):
    """Types and kinds (0 none, 1 groups, 2 a mask) of groups by their dtypes, None where all tokens are of group 0."""
    kinds = {name: int(own is not None) + (own == torch.bool) for name, own in (("QUERY", group), ("KEY", key_group))}
    return {"group": TYPES.get(group), "key_group": TYPES.get(key_group)}, kinds


def _list_form(block, group, key_group):
    types, kinds = sides(group, key_group)
    return Specialization(types, {**kinds, "BLOCK_N": block, **LIST[0]}, LIST[1])


def _sums_form(dtype, D, causal, G, listed, has_lse, split, group, key_group):
    types, kinds = sides(group, key_group)
    tensors, divisible = read(dtype, D)
    types |= tensors | ({} if listed else dict.fromkeys(LISTS))
    types |= ({} if has_lse else {"lse": None}) | ({"found": None} if split else {"tops": None})
    tile, options = tiles(dtype.itemsize, D, listed)
    forms = {"CAUSAL": causal, "HAS_LSE": has_lse, "LISTED": listed, "SPLIT": split, **kinds}
    return Specialization(types, {"G": G, "GROUPS": next_power_of_2(G), "D": D, **forms, **tile}, options, divisible)


def _reduce_form(G, listed, combine, group):
    types, kinds = sides(group, None)
    types = {"group": types["group"], **({} if listed else {"rows": None, "control": None})}
    types |= {} if combine else {"tops": None, "found": None}
    tile, options = REDUCE if listed else REDUCE_DECODE
    forms = {"COMBINE": combine, "LISTED": listed, "QUERY": kinds["QUERY"], "SPLITS": 1 if listed else DECODE_SPLITS}
    return Specialization(types, {"G": G, "GROUPS": next_power_of_2(G), **forms, **tile}, options)


@triton.jit
def group_of(group, offset, inside, G, KIND: tl.constexpr):
    """Groups behind a pointer; -1 outside and past G. KIND: 0 none, all are of group 0; 1 groups; 2 a mask."""
    if KIND == 0:
        found = tl.where(inside, 0, -1)
    else:
        found = tl.load(group + offset, mask=inside, other=0).to(tl.int32)
        if KIND == 2:
            found = tl.where(found != 0, 0, -1)
        found = tl.where(inside & (found < G), found, -1)
    return found


@kernel(_list_form, **ARGS)
def _attention_list_kernel(
    group, key_group, rows, codes, control, group_b, group_s, key_group_b, key_group_s, Sq, Sk, groups,
    QUERY: tl.constexpr, KEY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """rows [B, Sq]: the counted ones, then the others from behind; codes [B, blocks]; control [B, 3]: how many rows
    count, first and last block with a key."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_S)
    count = tl.full([], 0, tl.int32)
    for start in range(0, Sq, BLOCK_S):
        s = start + lane
        live = group_of(group, b * group_b + s.to(tl.int64) * group_s, s < Sq, groups, QUERY) >= 0
        before = count + tl.cumsum(live.to(tl.int32), 0)  # itself too
        tl.store(rows + b * Sq + tl.where(live, before - 1, Sq - 1 - s + before), s, mask=s < Sq)
        count += tl.sum(live.to(tl.int32), 0)
    tl.store(control + b * 3, count)
    blocks = tl.cdiv(Sk, BLOCK_N)
    TILE: tl.constexpr = BLOCK_S // BLOCK_N  # blocks a step
    first = blocks
    last = tl.full([], -1, tl.int32)
    for start in range(0, blocks, TILE):
        block = start + tl.arange(0, TILE)
        s = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        found = group_of(key_group, b * key_group_b + s.to(tl.int64) * key_group_s, s < Sk, groups, KEY)
        low, high = tl.min(found, 1), tl.max(found, 1)
        tl.store(codes + b * blocks + block, tl.where(low == high, high, MIXED), mask=block < blocks)
        first = tl.minimum(first, tl.min(tl.where(high >= 0, block, blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(high >= 0, block, -1), 0))
    tl.store(control + b * 3 + 1, first)
    tl.store(control + b * 3 + 2, last)


@triton.jit
def logits(
    queries, keys, row_ok, key_ok, q, given, scale, HAS_LSE: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Logits [M, N] of rows and keys, less the lse given, in base 2. Rows and keys are pointers to first features;
    WHOLE: the rows are in q already."""
    lane = tl.arange(0, BLOCK_D)
    if WHOLE:
        k = tl.load(keys[None, :] + lane[:, None], mask=key_ok[None, :] & (lane < D)[:, None], other=0.0)
        dots = tl.dot(q, k, input_precision="ieee")
    else:
        dots = tl.zeros([M, N], tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = d + lane < D
            own = tl.load(queries[:, None] + (d + lane)[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
            k = tl.load(keys[None, :] + (d + lane)[:, None], mask=key_ok[None, :] & inside[:, None], other=0.0)
            dots = tl.dot(own, k, dots, input_precision="ieee")
    s = tl.fma(dots, scale * LOG2E, 0.0)  # a plain product would be fused in one kernel and rounded in another
    if HAS_LSE:
        s = tl.fma(dots, scale, -given[:, None]) * LOG2E
    return s


@kernel(_sums_form, **ARGS)
def _attention_sums_kernel(
    query, key, lse, group, key_group, rows, codes, control, sums, tops, found,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    H, R, Sq, Sk, tiles, splits, scale,
    G: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr,
    LISTED: tl.constexpr, SPLIT: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """sums [B, H, Sq, splits, G]: of exp2(logit - top) by key group. R = H / Hk.

    SPLIT: tops [B, H, Sq, splits]. Else the top is lse, given or of the row's only split, and found [B, H, Sq] is lse.
    Row m of a key head is query head m % R of the (m // R)-th counted query. GROUPS: G rounded up to a power of two.
    """
    split = tl.program_id(0) % splits
    tile = tiles - 1 - tl.program_id(0) // splits % tiles  # the longest rows first
    key_head = tl.program_id(0) // (splits * tiles)
    b = (key_head // (H // R)).to(tl.int64)
    key_head = (key_head % (H // R)).to(tl.int64)
    blocks = tl.cdiv(Sk, BLOCK_N)
    count, lo, hi = Sq, 0, blocks
    if LISTED:
        count = tl.load(control + b * 3)
        lo = tl.load(control + b * 3 + 1)
        hi = tl.load(control + b * 3 + 2) + 1
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = m // R
    ok = t < count
    h = key_head * R + m % R
    position = t
    if LISTED:
        position = tl.load(rows + b * Sq + t, mask=t < Sq, other=0)
    else:
        ok = group_of(group, b * group_b + t.to(tl.int64) * group_s, ok, G, QUERY) >= 0
    given = tl.full([BLOCK_M], -INF, tl.float32)
    top = given
    if HAS_LSE:
        given = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=t < Sq, other=-INF)
        if split == 0:
            tl.store(found + (b * H + h) * Sq + position, given, mask=t < Sq)
        given = tl.where(ok & (given != -INF), given, INF)  # sees nothing: every exp2 is 0
    elif not SPLIT:
        tl.store(found + (b * H + h) * Sq + position, top, mask=(t < Sq) & (t >= count))
    if tile * BLOCK_M >= count * R:
        return
    sight = tl.where(ok, Sk - 1, -1)  # last key that a row may see
    if CAUSAL:
        sight = tl.where(ok, position + Sk - Sq, -1)
    hi = tl.minimum(hi, tl.max(sight, 0) // BLOCK_N + 1)
    whole = (tl.min(tl.where(ok, sight, Sk - 1), 0) + 1) // BLOCK_N  # blocks that all rows see all of
    per_split = tl.cdiv(tl.maximum(hi - lo, 0), splits)
    lo += split * per_split
    hi = tl.minimum(hi, lo + per_split)

    lane = tl.arange(0, BLOCK_D)
    queries = query + b * query_b + h * query_h + position.to(tl.int64) * query_s
    q = tl.zeros([BLOCK_M, 1], tl.float32)
    if WHOLE:
        q = tl.load(queries[:, None] + lane[None, :], mask=ok[:, None] & (lane < D)[None, :], other=0.0)
    total = tl.zeros([BLOCK_M, GROUPS], tl.float32)
    g = tl.arange(0, GROUPS)
    for block in range(lo, hi):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = key + b * key_b + key_head * key_h + n.to(tl.int64) * key_s
        s = logits(queries, keys, ok, n < Sk, q, given, scale, HAS_LSE, D, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE)
        own = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, G, KEY)
        code = tl.full([], MIXED, tl.int32)
        if LISTED:
            code = tl.load(codes + b * blocks + block)
        if (code < 0) | (block >= whole):
            seen = (own >= 0)[None, :] & (n[None, :] <= sight[:, None])
            s = tl.where(seen, s, -INF)
        if not HAS_LSE:
            higher = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(higher == -INF, 0.0, higher)  # nothing seen yet
            total *= tl.exp2(top - safe)[:, None]
            top = higher
            p = tl.exp2(s - safe[:, None])
        else:
            p = tl.exp2(s)
        if code >= 0:
            total += tl.where((g == code)[None, :], tl.sum(p, 1)[:, None], 0.0)
        else:
            for one in range(G):
                part = tl.sum(tl.where((own == one)[None, :], p, 0.0), 1)
                total += tl.where((g == one)[None, :], part[:, None], 0.0)
    place = ((b * H + h) * Sq + t) * splits + split
    if SPLIT:
        tl.store(tops + place, top, mask=ok)
    elif not HAS_LSE:
        whole = tl.sum(total, 1)
        log = tl.where(whole == 0.0, -INF, (top + tl.log2(whole)) * LN2)
        tl.store(found + (b * H + h) * Sq + position, log, mask=ok)
        total = tl.div_rn(total, tl.where(whole == 0.0, 1.0, whole)[:, None])
    tl.store(sums + place[:, None] * G + g[None, :], total, mask=ok[:, None] & (g < G)[None, :])


@triton.jit
def weights(tops, place, there):
    """Tops [M] of rows and what their splits count [M, SPLITS]: exp2 of a split's top minus that of the row."""
    own = tl.load(tops + place, mask=there, other=-INF)
    top = tl.max(own, 1)
    return top, tl.exp2(own - tl.where(top == -INF, 0.0, top)[:, None])


@kernel(_reduce_form, **ARGS)
def _attention_reduce_kernel(
    sums, tops, group, rows, control, mass, found, group_b, group_s, H, Sq, splits,
    G: tl.constexpr, GROUPS: tl.constexpr, COMBINE: tl.constexpr, LISTED: tl.constexpr, QUERY: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """mass [B, H, G, G] and, of rows to COMBINE, lse found [B, H, Sq]; one program per head."""
    b = (tl.program_id(0) // H).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * Sq
    g = tl.arange(0, GROUPS)
    split = tl.arange(0, SPLITS)
    count = Sq
    if LISTED:
        count = tl.load(control + b * 3)
    acc = tl.zeros([GROUPS, GROUPS], tl.float32)
    for start in range(0, count, BLOCK_S):
        t = start + tl.arange(0, BLOCK_S)
        position = t
        if LISTED:
            position = tl.load(rows + b * Sq + t, mask=t < count, other=0)
        own = group_of(group, b * group_b + position.to(tl.int64) * group_s, t < count, G, QUERY)
        place = (row + t)[:, None] * splits + split[None, :]
        there = (own >= 0)[:, None] & (split < splits)[None, :]
        known = there[:, :, None] & (g < G)[None, None, :]
        parts = tl.load(sums + place[:, :, None] * G + g[None, None, :], mask=known, other=0.0)
        if COMBINE:
            top, weight = weights(tops, place, there)
            total = tl.sum(parts * weight[:, :, None], 1)
            whole = tl.sum(total, 1)
            log = tl.where(whole == 0.0, -INF, (top + tl.log2(whole)) * LN2)
            tl.store(found + row + t, log, mask=t < Sq)
            total = tl.div_rn(total, tl.where(whole == 0.0, 1.0, whole)[:, None])
        else:
            total = tl.sum(parts, 1)
        for one in range(G):
            part = tl.sum(tl.where((own == one)[:, None], total, 0.0), 0)
            acc += tl.where((g == one)[:, None], part[None, :], 0.0)
    place = tl.program_id(0).to(tl.int64) * G * G + g[:, None] * G + g[None, :]
    tl.store(mass + place, acc, mask=(g < G)[:, None] & (g < G)[None, :])


def attention_mass(query, key, query_group, key_group, groups, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], features side by side; the arguments are checked by pruneops.ops."""
    (B, H, Sq, D), (_, Hk, Sk, _), device = query.shape, key.shape, query.device
    mass = torch.empty((B, H, groups, groups), dtype=torch.float32, device=device)
    found = torch.empty((B, H, Sq), dtype=torch.float32, device=device)
    if not (B and H and Sq and Sk):
        return mass.zero_(), found.fill_(-torch.inf) if lse is None else found.copy_(lse)
    listed = Sq * H > DECODE_ROWS * Hk
    combine = lse is None and not listed
    with device_guard(query):
        call = Call(query, key, query_group, key_group, (B, H, Hk, Sq, Sk, D), device, listed, groups, combine)
        call.launch_sums(causal, scale, lse, found)
        _attention_reduce_kernel(
            (groups, listed, combine, query_group.dtype), (B * H, 1, 1),
            call.sums, call.tops, query_group, call.rows, call.control, mass, found,
            *call.group_strides[:2], H, Sq, call.splits,
        )  # fmt: skip
    return mass, found


def readable(x):
    """x [B, H, S, D] as the kernels read it, and its strides: if 16 divides D, every row starts on 16 elements and 16
    bytes."""
    x = x.float() if INTERPRETED else x  # the interpreter's bfloat16 products are wrong
    b, h, s, _ = x.stride()
    if (b | h | s | x.data_ptr()) & 15 and x.shape[-1] % 16 == 0:
        x = x.clone(memory_format=torch.contiguous_format)
        b, h, s, _ = x.stride()
    return x, b, h, s


class Call:
    """What the launches of one call share: tensors, strides, and one allocation of lists and sums.

    Parameters
    ----------
    sizes : (B, H, Hk, Sq, Sk, D)
    listed : bool
        Prefill: the rows that count are listed; their keys are split as `splits` says.
    G : int
        Groups of keys to sum over; 0: there are no sums.
    split : bool
        Sums of splits are left apart, each with its top.
    """

    def __init__(self, query, key, group, key_group, sizes, device, listed, G, split, splits=1):
        B, H, Hk, Sq, Sk, D = self.sizes = sizes
        self.query, *query_strides = readable(query)
        self.key, *key_strides = readable(key)
        self.strides = *query_strides, *key_strides
        self.group, group_dtype, group_strides = _side(group)
        self.key_group, key_group_dtype, key_group_strides = _side(key_group)
        self.dtypes = group_dtype, key_group_dtype
        self.group_strides = *group_strides, *key_group_strides
        self.listed, self.G, self.split = listed, G, split
        self.tile = tiles(self.query.dtype.itemsize, D, listed)[0]
        block = self.tile["BLOCK_N"]
        blocks = cdiv(Sk, block)
        if not listed:
            splits = min(DECODE_SPLITS, cdiv(DECODE_PROGRAMS, Hk), cdiv(blocks, 2))
        self.splits, cells = splits, B * H * Sq * splits
        parts = (torch.float32, G * cells), (torch.float32, cells if split else 0)
        if not listed:
            self.rows = self.codes = self.control = None
            self.memory, self.sums, self.tops = workspace(device, *parts) if G else (None, None, None)
            return
        parts += (torch.int32, B * Sq), (torch.int32, B * blocks), (torch.int32, 3 * B)
        self.memory, self.sums, self.tops, self.rows, self.codes, self.control = workspace(device, *parts)
        _attention_list_kernel(
            (block, group_dtype, key_group_dtype), (B, 1, 1),
            group, key_group, self.rows, self.codes, self.control, *self.group_strides, Sq, Sk, max(G, 1),
        )  # fmt: skip

    def launch_sums(self, causal, scale, lse, found):
        """Fills the sums, and found unless split."""
        B, H, Hk, Sq, Sk, D = self.sizes
        R = H // Hk
        row_tiles = cdiv(Sq * R, self.tile["BLOCK_M"])
        _attention_sums_kernel(
            (self.query.dtype, D, causal, self.G, self.listed, lse is not None, self.split, *self.dtypes),
            (B * Hk * row_tiles * self.splits, 1, 1),
            self.query, self.key, lse, self.group, self.key_group, self.rows, self.codes, self.control, self.sums,
            self.tops, found, *self.strides, *((0, 0, 0) if lse is None else lse.stride()), *self.group_strides,
            H, R, Sq, Sk, row_tiles, self.splits, float(scale),
        )  # fmt: skip


def _side(group):
    """(groups, dtype, strides)"""
    return (None, None, (0, 0)) if group is None else (group, group.dtype, group.stride())


def specializations():
    """(kernel, form) of every kind of form that the launchers above can ask for, to be compiled without a GPU."""
    half, brain, full, groups, mask = torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool
    for block, dtype in itertools.product((32, 64), (groups, mask)):
        yield _attention_list_kernel, (block, dtype, dtype)
    for G, listed, combine in ((8, True, False), (8, False, False), (8, False, True), (1, True, False)):
        yield _attention_reduce_kernel, (G, listed, combine, torch.int32 if G == 1 else groups)
    tensors = (brain, 128), (half, 64), (brain, 256), (half, 80), (brain, 72), (half, 200), (full, 128), (full, 33)
    ends = (8, True, False, False), (4, True, True, False), (8, False, False, True), (4, False, True, False)
    for dtype, D in tensors:
        for G, listed, has_lse, split in ends if D in (64, 128, 256) else ends[::2]:
            yield _attention_sums_kernel, (dtype, D, True, G, listed, has_lse, split, groups, groups)
        yield _attention_sums_kernel, (dtype, D, True, 1, D % 64 == 0, False, True, mask, None)  # attention_received
