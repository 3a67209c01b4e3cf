"""Attention between groups of tokens in Triton: one pass over the keys, G running sums beside the running maximum.

    list    (prefill) the rows whose queries count, in ascending order; the keys' range; which blocks of keys are of
            one group: one program a batch row, B (Sq + Sk) integers.
    sums    a program takes BLOCK_M of the Sq H / Hk rows that share a key head and streams the keys they see: one
            product by tensor cores (float32: fused multiply-adds), one exp2 and one sum per pair, a masked sum per
            group only in blocks of several groups. Decode splits the keys over programs, so that the whole card
            reads K once.
    reduce  splits are combined, rows normalised and summed by the group of their query, in a fixed order.
Cost: 2 B H Sq Sk D operations, half of that where causal: half of a flash forward's, which has V too. With lse given
there is no maximum to keep. Memory: (G + 1) floats a row and split.
    S 3072, H 32, D 128, causal, bf16 on an H200: 39 GFLOP is 49 us at 790 TFLOP/s, 151 M exponentials are 36 us at 16 a
    clock and multiprocessor; they overlap in part. Decode, Sk 3072: 25 MB of K is 5.9 us at 4.3 TB/s.

None of this has run on a GPU yet: it runs in Triton's interpreter and compiles for every architecture without spills.
"""

import itertools

import torch
import triton
import triton.language as tl

from ..backends import interpreting
from ._shared import INF, OPTIONS, access, compile_job, multiprocessors, on

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIXED = tl.constexpr(-1)  # code of a block of keys that is not of one group
DECODE_ROWS = 16  # up to this many rows a key head, keys are split over programs
LIST = {"BLOCK_S": 1024, "num_warps": 8}
REDUCE = {"BLOCK_S": 128, "num_warps": 4}

_kernel = triton.jit(
    do_not_specialize=(
        "B", "H", "R", "Sq", "Sk", "groups", "tiles", "splits", "scale",
        "group_b", "group_s", "key_group_b", "key_group_s", "lse_b", "lse_h", "lse_s",
    ),
    do_not_specialize_on_alignment=("group", "key_group", "rows", "codes", "control", "sums", "tops", "lse", "mass"),
)  # fmt: skip


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


@_kernel
def _attention_list_kernel(
    group, key_group, rows, codes, control, group_b, group_s, key_group_b, key_group_s, Sq, Sk, groups,
    QUERY: tl.constexpr, KEY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """rows [B, Sq]: the counted ones; control [B, 3]: how many, first and last block with a key; codes [B, blocks]."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_S)
    count = tl.full([], 0, tl.int32)
    for start in range(0, Sq, BLOCK_S):
        s = start + lane
        live = group_of(group, b * group_b + s.to(tl.int64) * group_s, s < Sq, groups, QUERY) >= 0
        place = count + tl.cumsum(live.to(tl.int32), 0) - 1
        tl.store(rows + b * Sq + place, s, mask=live)
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
    queries, keys, row_ok, key_ok, q, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Products [M, N] of rows and keys, both given by pointers to first features; WHOLE: the rows are in q already."""
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
    return dots


@_kernel
def _attention_sums_kernel(
    query, key, lse, group, key_group, rows, codes, control, sums, tops,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    H, R, Sq, Sk, tiles, splits, scale,
    G: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr,
    LISTED: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """sums [B, H, Sq, splits, G]: of exp2(logit - top) by key group; tops [B, H, Sq, splits]. R = H / Hk.

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
    if tile * BLOCK_M >= count * R:
        return
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = m // R
    ok = t < count
    h = key_head * R + m % R
    position = t
    if LISTED:
        position = tl.load(rows + b * Sq + t, mask=ok, other=0)
    else:
        ok = group_of(group, b * group_b + t.to(tl.int64) * group_s, ok, G, QUERY) >= 0
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
    row = (b * H + h) * Sq + t
    top = tl.full([BLOCK_M], -INF, tl.float32)
    if HAS_LSE:
        given = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
        top = tl.where(given == -INF, INF, given * LOG2E)  # sees nothing: every exp2 is 0
    total = tl.zeros([BLOCK_M, GROUPS], tl.float32)
    g = tl.arange(0, GROUPS)
    for block in range(lo, hi):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = key + b * key_b + key_head * key_h + n.to(tl.int64) * key_s
        s = logits(queries, keys, ok, n < Sk, q, D, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE) * (scale * LOG2E)
        found = group_of(key_group, b * key_group_b + n.to(tl.int64) * key_group_s, n < Sk, G, KEY)
        code = tl.full([], MIXED, tl.int32)
        if LISTED:
            code = tl.load(codes + b * blocks + block)
        if (code < 0) | (block >= whole):
            seen = (found >= 0)[None, :] & (n[None, :] <= sight[:, None])
            s = tl.where(seen, s, -INF)
        if not HAS_LSE:
            higher = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(higher == -INF, 0.0, higher)  # nothing seen yet
            total *= tl.exp2(top - safe)[:, None]
            top = higher
            p = tl.exp2(s - safe[:, None])
        else:
            p = tl.exp2(s - top[:, None])
        if code >= 0:
            total += tl.where((g == code)[None, :], tl.sum(p, 1)[:, None], 0.0)
        else:
            for one in range(G):
                part = tl.sum(tl.where((found == one)[None, :], p, 0.0), 1)
                total += tl.where((g == one)[None, :], part[:, None], 0.0)
    place = row * splits + split
    tl.store(tops + place, top, mask=ok)
    tl.store(sums + place[:, None] * G + g[None, :], total, mask=ok[:, None] & (g < G)[None, :])


@_kernel
def _attention_reduce_kernel(
    sums, tops, group, rows, control, mass, lse, group_b, group_s, H, Sq, splits,
    G: tl.constexpr, GROUPS: tl.constexpr, HAS_LSE: tl.constexpr, LISTED: tl.constexpr, QUERY: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """mass [B, H, G, G] and, unless it was given, lse [B, H, Sq]; one program per head."""
    b = (tl.program_id(0) // H).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * Sq
    lane = tl.arange(0, BLOCK_S)
    g = tl.arange(0, GROUPS)
    if not HAS_LSE:
        for start in range(0, Sq, BLOCK_S):
            s = start + lane
            live = group_of(group, b * group_b + s.to(tl.int64) * group_s, s < Sq, G, QUERY) >= 0
            tl.store(lse + row + s, -INF, mask=(s < Sq) & (live == 0))
    count = Sq
    if LISTED:
        count = tl.load(control + b * 3)
    acc = tl.zeros([GROUPS, GROUPS], tl.float32)
    for start in range(0, count, BLOCK_S):
        t = start + lane
        position = t
        if LISTED:
            position = tl.load(rows + b * Sq + t, mask=t < count, other=0)
        found = group_of(group, b * group_b + position.to(tl.int64) * group_s, t < count, G, QUERY)
        ok = found >= 0
        top = tl.full([BLOCK_S], -INF, tl.float32)
        total = tl.zeros([BLOCK_S, GROUPS], tl.float32)
        for split in range(splits):
            place = (row + t) * splits + split
            own = tl.load(sums + place[:, None] * G + g[None, :], mask=ok[:, None] & (g < G)[None, :], other=0.0)
            if HAS_LSE:
                total += own
            else:
                own_top = tl.load(tops + place, mask=ok, other=-INF)
                higher = tl.maximum(top, own_top)
                safe = tl.where(higher == -INF, 0.0, higher)
                total = total * tl.exp2(top - safe)[:, None] + own * tl.exp2(own_top - safe)[:, None]
                top = higher
        if not HAS_LSE:
            whole = tl.sum(total, 1)
            tl.store(lse + row + position, tl.where(whole == 0.0, -INF, (top + tl.log2(whole)) * LN2), mask=ok)
            total = total / tl.where(whole == 0.0, 1.0, whole)[:, None]
        for one in range(G):
            part = tl.sum(tl.where((found == one)[:, None], total, 0.0), 0)
            acc += tl.where((g == one)[:, None], part[None, :], 0.0)
    place = tl.program_id(0).to(tl.int64) * G * G + g[:, None] * G + g[None, :]
    tl.store(mass + place, acc, mask=(g < G)[:, None] & (g < G)[None, :])


def attention_mass(query, key, query_group, key_group, groups, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], features side by side; the arguments are checked by pruneops.ops."""
    B, H, Sq, _ = query.shape
    query, key = readable(query, key)
    mass = torch.empty(B, H, groups, groups, dtype=torch.float32, device=query.device)
    if mass.numel() == 0 or Sq == 0 or key.shape[2] == 0:
        found = torch.full((B, H, Sq), -torch.inf, device=query.device) if lse is None else lse.clone()
        return mass.zero_(), found
    with on(query.device):
        lists = Lists(query, key, query_group, key_group, groups)
        found = _sums(query, key, lists, groups, causal, scale, lse, mass, 1)
    return mass, found


def readable(query, key):
    """The interpreter's bfloat16 products are wrong."""
    return (query.float(), key.float()) if interpreting() else (query, key)


class Lists:
    """Which rows and keys there are: groups, masks or None, and in prefill the lists made of them."""

    def __init__(self, query, key, query_group, key_group, groups):
        (self.group, self.query_kind), (self.key_group, self.key_kind) = _kind(query_group), _kind(key_group)
        B, H, Sq, D = query.shape
        Sk = key.shape[2]
        self.ratio = H // key.shape[1]
        self.listed = Sq * self.ratio > DECODE_ROWS
        self.tiles = tiles(access(query), access(key), D, self.listed)
        self.rows = self.codes = self.control = None
        if self.listed:
            block = self.tiles["BLOCK_N"]
            ints = {"dtype": torch.int32, "device": query.device}
            self.rows, self.control = torch.empty(B, Sq, **ints), torch.empty(B, 3, **ints)
            self.codes = torch.empty(B, triton.cdiv(Sk, block), **ints)
            _attention_list_kernel[B,](
                self.group, self.key_group, self.rows, self.codes, self.control, *self.strides, Sq, Sk, groups,
                QUERY=self.query_kind, KEY=self.key_kind, BLOCK_N=block, **LIST, **OPTIONS,
            )  # fmt: skip

    @property
    def strides(self):
        """Of the query and key groups."""
        return [s for t in (self.group, self.key_group) for s in ((0, 0) if t is None else t.stride())]


def _kind(group):
    """(tensor, 0 none / 1 groups / 2 mask)"""
    if group is None:
        return None, 0
    return (group.view(torch.uint8), 2) if group.dtype == torch.bool else (group, 1)


def row_lse(query, key, lists, causal, scale):
    """lse [B, H, Sq] of the rows that count."""
    mass = torch.empty(*query.shape[:2], 1, 1, dtype=torch.float32, device=query.device)
    few_rows = 1 if lists.group is None else min(8, triton.cdiv(key.shape[2], 512))  # how few is not known here
    return _sums(query, key, lists, 1, causal, scale, None, mass, few_rows)


def _sums(query, key, lists, G, causal, scale, lse, mass, splits):
    """Fills mass and returns lse; at least `splits` programs share the keys of a row."""
    B, H, Sq, D = query.shape
    Hk, Sk = key.shape[1:3]
    config = lists.tiles
    row_tiles = triton.cdiv(Sq * lists.ratio, config["BLOCK_M"])
    programs = B * Hk * row_tiles
    if not lists.listed:
        wanted = triton.cdiv(2 * multiprocessors(query.device), programs)
        splits = max(1, min(wanted, triton.cdiv(Sk, 2 * config["BLOCK_N"])))
    floats = {"dtype": torch.float32, "device": query.device}
    sums, tops = torch.empty(B, H, Sq, splits, G, **floats), torch.empty(B, H, Sq, splits, **floats)
    found = torch.empty(B, H, Sq, **floats) if lse is None else lse.clone()
    groups = {"G": G, "GROUPS": triton.next_power_of_2(G)}
    forms = {"HAS_LSE": lse is not None, "LISTED": lists.listed, "QUERY": lists.query_kind}
    _attention_sums_kernel[programs * splits,](
        query, key, lse, lists.group, lists.key_group, lists.rows, lists.codes, lists.control, sums, tops,
        *query.stride()[:3], *key.stride()[:3], *((0, 0, 0) if lse is None else lse.stride()), *lists.strides,
        H, lists.ratio, Sq, Sk, row_tiles, splits, float(scale),
        D=D, CAUSAL=causal, KEY=lists.key_kind, **groups, **forms, **config, **OPTIONS,
    )  # fmt: skip
    _attention_reduce_kernel[B * H,](
        sums, tops, lists.group, lists.rows, lists.control, mass, found, *lists.strides[:2], H, Sq, splits,
        **groups, **forms, **REDUCE, **OPTIONS,
    )  # fmt: skip
    return found


def tiles(query_access, key_access, D, prefill):
    """Tile sizes and launch options of the sums; WHOLE: a row's features at once, else in steps of BLOCK_D."""
    if "half" in (query_access, key_access) and "float" not in (query_access, key_access):
        width = max(16, triton.next_power_of_2(D))
        rows = 16 if not prefill else 128 if width == 128 else 64
        stages = 2 if "unaligned" in (query_access, key_access) else 3
        return {
            "BLOCK_M": rows, "BLOCK_N": 64 if width <= 128 else 32, "BLOCK_D": width, "WHOLE": True,
            "num_warps": 8 if prefill else 4, "num_stages": stages,
        }  # fmt: skip
    rows = 64 if prefill else 16
    return {
        "BLOCK_M": rows,
        "BLOCK_N": 32 if prefill else 64,
        "BLOCK_D": 16,
        "WHOLE": False,
        "num_warps": 8,
        "num_stages": 2,
    }


TYPES = {"rows": "*i32", "codes": "*i32", "control": "*i32", "scale": "fp32"}
TYPES |= {name: "*fp32" for name in ("lse", "sums", "tops", "mass", "received")}
STRIDES = ("query_b", "query_h", "query_s", "key_b", "key_h", "key_s")


def compile_jobs():
    """Every kind of configuration that the launchers above can ask for, to be compiled without a GPU."""
    jobs = []
    groups = {"group": "*i64", "key_group": "*i64"}
    masks = {"group": "*u8", "key_group": "*u8"}
    for block, (types, kind) in itertools.product((32, 64), ((groups, 1), (masks, 2))):
        forms = {"QUERY": kind, "KEY": kind, "BLOCK_N": block}
        jobs.append(compile_job(_attention_list_kernel, LIST, TYPES | types, words=(), **forms))
    for G, has_lse, listed in ((1, False, True), (4, True, False), (8, False, True), (4, False, False)):
        forms = {"G": G, "GROUPS": triton.next_power_of_2(G), "HAS_LSE": has_lse, "LISTED": listed, "QUERY": 1}
        jobs.append(compile_job(_attention_reduce_kernel, REDUCE, TYPES | groups, words=(), **forms))
        for dtype, D, aligned in (
            ("bf16", 128, True), ("fp16", 64, True), ("bf16", 256, True), ("fp16", 80, True), ("bf16", 72, False),
            ("fp32", 128, True), ("fp32", 33, False),
        ):  # fmt: skip
            kind = "unaligned" if not aligned else "float" if dtype == "fp32" else "half"
            config = tiles(kind, kind if dtype != "fp32" else "float", D, listed)
            types = TYPES | groups | {"query": f"*{dtype}", "key": f"*{dtype}"}
            divisible = ("query", "key", *STRIDES) if aligned else ()
            jobs.append(
                compile_job(
                    _attention_sums_kernel, config, types, divisible, (dtype,), D=D, CAUSAL=True, KEY=1, **forms
                )
            )
    return jobs
