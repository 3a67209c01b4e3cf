"""Attention that every key receives from marked queries, in Triton.

Without lse the kernels of attention_mass first find that of the marked rows, in a pass over the keys. Then one program
holds BLOCK_N keys and streams the marked rows that see them, gathered from a list: one product, one exp2 and one sum
per pair; rows that nobody asked for cost nothing. A step takes all R = H / Hk heads that share the keys, so K is read
once for them.
Cost: 2 B H (marked rows) Sk D operations a pass; FastV's last row: K read once, 25 MB at S 3072, H 32, D 128, bf16.

None of this has run on a GPU yet: it runs in Triton's interpreter and compiles for every architecture without spills.
"""

import torch
import triton
import triton.language as tl

from ._shared import INF, OPTIONS, access, compile_job, on
from .attention_mass import LOG2E, STRIDES, TYPES, Lists, group_of, logits, readable, row_lse

ROWS = 64  # of a step

_kernel = triton.jit(
    do_not_specialize=(
        "B", "H", "R", "Sq", "Sk", "scale",
        "group_b", "group_s", "key_group_b", "key_group_s", "lse_b", "lse_h", "lse_s",
    ),
    do_not_specialize_on_alignment=("group", "key_group", "rows", "control", "lse", "received"),
)  # fmt: skip


@_kernel
def _attention_received_kernel(
    query, key, lse, group, key_group, rows, control, received,
    query_b, query_h, query_s, key_b, key_h, key_s, lse_b, lse_h, lse_s, group_b, group_s, key_group_b, key_group_s,
    H, R, Sq, Sk, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    BLOCK_T: tl.constexpr, R_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """received [B, H, Sk]. BLOCK_T rows of R_PAD heads a step."""
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
        s = logits(queries, keys, ok, n < Sk, q, D, BLOCK_T * R_PAD, BLOCK_N, BLOCK_D, WHOLE) * (scale * LOG2E)
        given = tl.load(lse + b * lse_b + h * lse_h + position.to(tl.int64) * lse_s, mask=ok, other=-INF)
        top = tl.where(given == -INF, INF, given * LOG2E)  # sees nothing: every exp2 is 0
        seen = ok[:, None] & attended[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= (position + Sk - Sq)[:, None])
        p = tl.where(seen, tl.exp2(s - top[:, None]), 0.0)
        acc += tl.sum(tl.reshape(p, [BLOCK_T, R_PAD, BLOCK_N]), 0)
    r = tl.arange(0, R_PAD)
    place = received + (b * H + key_head * R + r)[:, None] * Sk + n[None, :]
    tl.store(place, acc, mask=(r < R)[:, None] & (n < Sk)[None, :])


def attention_received(query, key, query_mask, key_mask, causal, scale, lse):
    """query [B, H, Sq, D], key [B, Hk, Sk, D], features side by side; the arguments are checked by pruneops.ops."""
    B, H, Sq, D = query.shape
    Hk, Sk = key.shape[1:3]
    query, key = readable(query, key)
    received = torch.empty(B, H, Sk, dtype=torch.float32, device=query.device)
    if received.numel() == 0 or Sq == 0:
        return received.zero_()
    config = tiles(access(query), access(key), D, H // Hk, Sq)
    with on(query.device):
        lists = Lists(query, key, query_mask, key_mask, 1)
        lse = row_lse(query, key, lists, causal, scale) if lse is None else lse
        _attention_received_kernel[B * Hk * triton.cdiv(Sk, config["BLOCK_N"]),](
            query, key, lse, lists.group, lists.key_group, lists.rows, lists.control, received,
            *query.stride()[:3], *key.stride()[:3], *lse.stride(), *lists.strides,
            H, lists.ratio, Sq, Sk, float(scale),
            D=D, CAUSAL=causal, LISTED=lists.listed, QUERY=lists.query_kind, KEY=lists.key_kind, **config, **OPTIONS,
        )  # fmt: skip
    return received


def tiles(query_access, key_access, D, ratio, Sq):
    """Tile sizes and launch options; WHOLE: a row's features at once, else in steps of BLOCK_D."""
    half = "half" in (query_access, key_access) and "float" not in (query_access, key_access)
    heads = triton.next_power_of_2(ratio)
    width = max(16, triton.next_power_of_2(D))
    most = ROWS if width <= 128 else ROWS // 2
    rows = max(1, (most if Sq > 1 else 16) // heads)
    options = {
        "num_warps": 4 if half else 8,
        "num_stages": 3 if half and "unaligned" not in (query_access, key_access) else 2,
    }
    width = {"BLOCK_D": width, "WHOLE": True} if half else {"BLOCK_D": 16, "WHOLE": False}
    return {"BLOCK_T": rows, "R_PAD": heads, "BLOCK_N": 64, **width, **options}


def compile_jobs():
    """Every kind of configuration that the launcher above can ask for, to be compiled without a GPU."""
    jobs = []
    for dtype, D, aligned, ratio, Sq, kind in (
        ("bf16", 128, True, 1, 100, 2), ("fp16", 64, True, 7, 100, 2), ("bf16", 256, True, 1, 100, 0),
        ("bf16", 128, True, 1, 1, 0), ("fp16", 128, True, 8, 1, 2), ("bf16", 72, False, 4, 100, 2),
        ("fp32", 128, True, 1, 100, 2), ("fp32", 33, False, 7, 1, 2), ("fp32", 256, True, 64, 100, 2),
    ):  # fmt: skip
        access = "unaligned" if not aligned else "float" if dtype == "fp32" else "half"
        config = tiles(access, "float" if dtype == "fp32" else access, D, ratio, Sq)
        groups = {name: "*u8" if kind else "constexpr" for name in ("group", "key_group")}
        types = TYPES | {"query": f"*{dtype}", "key": f"*{dtype}"} | groups
        forms = {"D": D, "CAUSAL": Sq > 1, "LISTED": Sq > 1, "QUERY": kind, "KEY": kind}
        forms |= {} if kind else {"group": None, "key_group": None}
        divisible = ("query", "key", *STRIDES) if aligned else ()
        jobs.append(compile_job(_attention_received_kernel, config, types, divisible, (dtype,), **forms))
    return jobs
