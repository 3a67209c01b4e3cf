"""Attention between groups of tokens: cases, inputs, cost model, check of a result, peers.

Least cost of a case: the queries that count and the keys read once, mass and lse written once; a dot product, 2 D
operations, for every head and pair of a query that counts and a key that it sees.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import pruneops

from ..baselines import attention as baselines
from ..common import NAMES, TOLERANCE, as_reference
from ..harness import capture, compiled
from ..registry import Case, Check, Cost, Operator, Peer

GROUPS = 3  # system prompt, image, question
SYSTEM, TEXT = 32, 64  # tokens of the first and the last
BLOCK = 512  # rows in float64 at a time
SAMPLE = 1 << 24  # pairs that a check goes over, where two heads have no more


def attention_case(name, H, Hk, Sq, Sk, dtype, D=128, B=1, rows=None, causal=True, lse=False):
    """The case of so many rows: the last ones, or the first ones where attention is not causal; all by default."""
    sizes = {"B": B, "H": H, "Hk": Hk, "Sq": Sq, "Sk": Sk, "D": D, "rows": rows or Sq, "causal": causal, "lse": lse}
    shape = f"{name.partition('-')[0]}, B {B} H {H}/{Hk} S {Sq if Sq == Sk else f'{Sq}/{Sk}'} D {D}"
    counted = f" {rows} {'row' if rows == 1 else 'rows'}" if rows else ""
    return Case(f"{name}-{NAMES[dtype]}", f"{shape}{counted}{' lse' if lse else ''} {NAMES[dtype]}", dtype, sizes)


def _cases(dtype):
    for S, (H, Hk) in itertools.product((704, 1088, 3072, 8192), ((32, 32), (28, 4))):
        yield attention_case(f"prefill-s{S}-h{H}", H, Hk, S, S, dtype)
    yield attention_case("text-s3072-h32", 32, 32, 3072, 3072, dtype, rows=TEXT, lse=True)
    for Sk, B in itertools.product((3072, 32768), (1, 16)):
        yield attention_case(f"decode-b{B}-s{Sk}", 32, 32, 1, Sk, dtype, B=B)


CASES = (
    attention_case("prefill-s130-h4", 4, 2, 130, 130, torch.float32, D=32),
    attention_case("text-s130-h4", 4, 2, 130, 130, torch.float32, D=32, rows=TEXT, lse=True),
    *itertools.chain.from_iterable(map(_cases, NAMES)),
)
TINY = tuple(case.name for case in CASES[:2])
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": (
            "prefill-s704-h32-float32",
            "prefill-s1088-h32-float32",
            "prefill-s1088-h28-float32",
            "text-s3072-h32-float32",
            "decode-b1-s3072-float32",
        ),
        "full": tuple(
            case.name
            for case in CASES
            if case.dtype == torch.float32 and case.sizes["Sq"] < 8192 and case.sizes["B"] * case.sizes["Sk"] <= 49152
        ),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("prefill-s1088-h32-bfloat16", "prefill-s3072-h32-bfloat16", "decode-b1-s3072-bfloat16"),
        "goals": (
            "prefill-s3072-h32-bfloat16",
            "prefill-s3072-h28-bfloat16",
            "text-s3072-h32-bfloat16",
            "decode-b1-s3072-bfloat16",
            "decode-b16-s3072-bfloat16",
        ),
        "full": tuple(case.name for case in CASES),
    },
}


def live(sizes):
    """First and last + 1 of the rows that count."""
    return (sizes["Sq"] - sizes["rows"], sizes["Sq"]) if sizes["causal"] else (0, sizes["rows"])


def heads_of_tokens(case, device):
    """Query as a projection lays it out, a view of [B, Sq, H, D], key as a cache does, and what rows there are."""
    generator = torch.Generator(device).manual_seed(0)
    B, H, Hk, Sq, Sk, D = (case.sizes[key] for key in ("B", "H", "Hk", "Sq", "Sk", "D"))
    normal = {"generator": generator, "device": device, "dtype": case.dtype}
    query, key = torch.randn(B, Sq, H, D, **normal).transpose(1, 2), torch.randn(B, Hk, Sk, D, **normal)
    rows = torch.arange(Sq, device=device).expand(B, Sq)
    start, end = live(case.sizes)
    options = {"query": query, "key": key, "causal": case.sizes["causal"]}
    if case.sizes["lse"]:
        options["lse"] = torch.full((B, H, Sq), -torch.inf, device=device)
        for b, h in itertools.product(range(B), range(H)):
            for block, logits in blocks(case, options, b, h):
                options["lse"][b, h, block] = logits.logsumexp(-1).float()
    return options, (rows >= start) & (rows < end)


def blocks(case, arguments, b, h):
    """(slice of live rows, their logits [rows, Sk] in float64, -inf where unseen) of one head, block by block."""
    sizes, (start, end) = case.sizes, live(case.sizes)
    query, key = arguments["query"][b, h], arguments["key"][b, h * sizes["Hk"] // sizes["H"]].double()
    for first in range(start, end, BLOCK):
        block = slice(first, min(first + BLOCK, end))
        logits = query[block].double() @ key.T * sizes["D"] ** -0.5
        if sizes["causal"]:
            logits.masked_fill_(~sight(sizes, block, key.device), -torch.inf)
        yield block, logits


def sight(sizes, block, device):
    """bool [rows, Sk]: the keys that a slice of rows sees where attention is causal."""
    last = torch.arange(block.start, block.stop, device=device)[:, None] + sizes["Sk"] - sizes["Sq"]
    return torch.arange(sizes["Sk"], device=device) <= last


def sampled(sizes):
    """(b, h) of the heads that a check compares: all where that is cheap."""
    count = sizes["B"] * sizes["H"]
    most = min(count, 64, max(2, SAMPLE // (sizes["rows"] * sizes["Sk"])))
    return [divmod(place, sizes["H"]) for place in torch.linspace(0, count - 1, most).round().int().tolist()]


def arguments(case, device):
    """System prompt, image and question one after the other."""
    options, counted = heads_of_tokens(case, device)
    B, Sq, Sk = (case.sizes[key] for key in ("B", "Sq", "Sk"))
    token = torch.arange(Sk, device=device).expand(B, Sk)
    group = (token >= SYSTEM).long() + (token >= Sk - TEXT)
    own = group[:, Sk - Sq :].where(counted, -1)
    return options | {"query_group": own, "key_group": group, "groups": GROUPS}


def call(arguments):
    """The documented Python face."""
    return pruneops.attention_mass(**arguments)


def check(case, arguments, result, expected, precision):
    """Mass of sampled heads, and their lse, within tolerance of float64; of all heads that groups of queries sum up."""
    if result is None:
        return Check(True, "a yardstick")
    mass, lse = result if isinstance(result, tuple) else (result, None)
    sizes, tolerance = case.sizes, TOLERANCE[precision]
    if mass.shape != (sizes["B"], sizes["H"], GROUPS, GROUPS):
        return Check(False, f"WRONG: of shape {list(mass.shape)}")
    to_group, from_group = F.one_hot(arguments["key_group"]).double(), one_hot_rows(arguments).double()
    queries = from_group.sum(-1)  # [B, 1, G]
    scale = queries.clamp(min=1)
    errors = [((mass.double().sum(-1) - queries) / scale).flatten()]
    for b, h in sampled(sizes):
        truth = torch.zeros_like(from_group[b, 0, :, :1] * to_group[b, :1])
        for block, logits in blocks(case, arguments, b, h):
            truth += from_group[b, 0, :, block] @ (logits.softmax(-1) @ to_group[b])
            if lse is not None:
                errors.append(lse[b, h, block] - logits.logsumexp(-1))
        errors.append(((mass[b, h] - truth) / scale[b, 0, :, None]).flatten())
    return verdict(errors, tolerance)


def one_hot_rows(arguments):
    """[B, 1, G, Sq]; zeros for a query that does not count."""
    return F.one_hot(arguments["query_group"] + 1, GROUPS + 1)[..., 1:].mT[:, None]


def verdict(errors, tolerance):
    error = float(torch.cat(errors).abs().nan_to_num(torch.inf).amax())
    numbers = {"max_diff": error, "tolerance": tolerance}
    if error > tolerance:
        return Check(False, f"WRONG: off by {error:.2g}", numbers)
    return Check(True, f"ok, within {error:.1g}", numbers)


def pairs(sizes):
    """Of a query that counts and a key that it sees, in one head; Sq is at most Sk."""
    rows, Sk = sizes["rows"], sizes["Sk"]
    return rows * Sk - (rows * (rows - 1) // 2 if sizes["causal"] else 0)


def heads_cost(case, written):
    """Cost that writes so many numbers a head."""
    B, H, Hk, Sk, D, rows = (case.sizes[key] for key in ("B", "H", "Hk", "Sk", "D", "rows"))
    read = B * (H * rows + Hk * Sk) * D * case.dtype.itemsize
    return Cost(read, 4 * B * H * written, 2 * B * H * pairs(case.sizes) * D)


def cost(case):
    return heads_cost(case, GROUPS**2 + case.sizes["Sq"])


def materialised_seconds(case, ceilings, rows=None, itemsize=None, passes=8):
    """Passes over the attention, as many again over the keys, all pairs multiplied."""
    B, H, Sk, D = (case.sizes[key] for key in ("B", "H", "Sk", "D"))
    rows, itemsize = rows or case.sizes["rows"], itemsize or case.dtype.itemsize
    memory = passes * B * H * Sk * (rows + D) * itemsize / ceilings.copy
    return memory + 2 * B * H * rows * Sk * D / ceilings.matmul[case.dtype]


def reference_seconds(case, ceilings):
    return materialised_seconds(case, ceilings, rows=case.sizes["Sq"], itemsize=4, passes=14)


def fused_seconds(case, ceilings, rows=None):
    """Attention of the live rows with values, at a third of the rate of a product."""
    sizes = case.sizes | {"rows": rows or case.sizes["rows"]}
    B, H, D = (sizes[key] for key in ("B", "H", "D"))
    return 12 * B * H * pairs(sizes) * D / ceilings.matmul[case.dtype] + cost(case).read / ceilings.copy


def forward_seconds(case, ceilings):
    """The yardstick has all rows."""
    return fused_seconds(case, ceilings, case.sizes["Sq"])


def live_rows(case, arguments):
    """(query, key, mask [rows, Sk] of what they see, or None where they see everything)."""
    block = slice(*live(case.sizes))
    query, key = arguments["query"], arguments["key"]
    seen_by_all = not case.sizes["causal"] or case.sizes["Sq"] == 1
    return query[:, :, block], key, None if seen_by_all else sight(case.sizes, block, query.device)


def prepare_forward(case, arguments):
    causal = case.sizes["causal"] and case.sizes["Sq"] > 1  # the first query would see only the first key
    return lambda: baselines.forward(arguments["query"], arguments["key"], causal)


def _grouped(case, arguments, width):
    """Groups of live rows [B, 1, G, rows], and of keys, padded to a width [B, 1, Sk, width]."""
    from_group = one_hot_rows(arguments)[..., slice(*live(case.sizes))].to(case.dtype)
    return from_group, F.one_hot(arguments["key_group"], width)[:, None].to(case.dtype)


def _prepare_materialised(case, arguments):
    query, key, mask = live_rows(case, arguments)
    groups = _grouped(case, arguments, GROUPS)
    return lambda: baselines.materialised(query, key, *groups, mask)


def _prepare_one_hot(case, arguments):
    query, key, mask = live_rows(case, arguments)
    from_group, value = _grouped(case, arguments, case.sizes["D"])
    causal = mask is not None and query.shape[2] == key.shape[2]
    value, mask = value.expand(key.shape), None if causal else mask
    return lambda: baselines.one_hot(query, key, from_group, value, mask, causal)


def _prepare_graph(case, arguments):
    return capture(_prepare_one_hot(case, arguments))


def _prepare_flex(case, arguments):
    query, key, mask = live_rows(case, arguments)
    from_group, value = _grouped(case, arguments, 16)
    value, first = value.expand(*key.shape[:3], 16).contiguous(), key.shape[2] - query.shape[2]
    block_mask = None
    if mask is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i + first, None, None, query.shape[2], key.shape[2], device=query.device
        )
    form = compiled(baselines.flex, dynamic=False)
    return lambda: form(query, key, from_group, value, block_mask)


def sanitize(device):
    """Small shapes: prefill with rows and keys left out, few rows over split keys, lse given, odd widths, strides."""
    generator = torch.Generator().manual_seed(5)
    for B, H, Hk, Sq, Sk, D, G, dtype, causal, given in (
        (1, 1, 1, 1, 1, 1, 1, torch.float32, True, False),
        (2, 4, 2, 150, 150, 64, 3, torch.float32, True, False),
        (1, 4, 4, 130, 301, 128, 8, torch.bfloat16, False, False),
        (2, 3, 1, 97, 97, 33, 5, torch.float16, True, False),
        (1, 4, 2, 200, 200, 80, 3, torch.float32, True, True),
        (2, 8, 2, 1, 3001, 128, 3, torch.bfloat16, True, False),
        (1, 2, 2, 1, 1025, 72, 2, torch.float16, True, True),
        (1, 7, 1, 3, 700, 256, 4, torch.float32, False, False),
    ):
        query = torch.randn(B, Sq, H, D + 1, generator=generator).to(dtype)
        key = torch.randn(B, Hk, Sk, D, generator=generator).to(dtype)
        query_group, key_group = (torch.randint(-1, G, (B, S), generator=generator).sort(-1).values for S in (Sq, Sk))
        lse = torch.rand(B, H, Sq, generator=generator) + 7 if given else None

        def run(to, own=(query, key, query_group, key_group, lse), G=G, causal=causal):
            query, key, query_group, key_group, lse = (t if t is None else t.to(to) for t in own)
            query = query[..., 1:].transpose(1, 2)
            mass, lse = pruneops.attention_mass(query, key, query_group, key_group, G, causal=causal, lse=lse)
            return torch.cat([mass.flatten(), lse.flatten()])

        words = f"B {B} H {H}/{Hk} S {Sq}/{Sk} D {D} G {G} {str(dtype).removeprefix('torch.')}"
        words += f"{' causal' if causal else ''}{' lse' if given else ''}"
        yield words, as_reference(run, device, max(Sq, 10) * TOLERANCE[torch.float32])


OPERATOR = Operator(
    name="attention_mass",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=reference_seconds,
    peers={
        "materialised": Peer(_prepare_materialised, materialised_seconds),
        "one_hot": Peer(_prepare_one_hot, fused_seconds),
        "graph": Peer(_prepare_graph, fused_seconds, devices=("cuda",)),
        "flex": Peer(_prepare_flex, fused_seconds, devices=("cuda",), compiles=True),
        "sdpa forward": Peer(prepare_forward, forward_seconds),
    },
    sanitize=sanitize,
)
