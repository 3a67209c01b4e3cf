"""Attention between groups of tokens: cases, cost model, check of a result, baselines.

Minimum cost of a case: the counted queries and the keys read once, mass and lse written once; a dot product, 2 D
operations, for every head and pair of a counted query and a key visible to it.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import pruneops

from .. import common
from ..baselines import attention as baselines
from ..harness import compiled
from ..registry import Baseline, Cost

GPU_TIME_SHARE = 4
GROUPS = 3  # system prompt, image, question
SYSTEM, TEXT = 32, 64  # tokens of the first and the last
BLOCK = 512  # rows in float64 at a time
SAMPLE = 1 << 24  # pairs that a check goes over, unless two heads have more


def attention_case(name, H, Hk, Sq, Sk, dtype, D=128, B=1, rows=None, causal=True, lse=False):
    """The case of so many counted rows: the last ones, or the first ones if attention is not causal; all by default."""
    sizes = {"B": B, "H": H, "Hk": Hk, "Sq": Sq, "Sk": Sk, "D": D, "rows": rows or Sq, "causal": causal, "lse": lse}
    shape = f"{name.partition('-')[0]}, B {B} H {H}/{Hk} S {Sq if Sq == Sk else f'{Sq}/{Sk}'} D {D}"
    counted = f" {rows} {'row' if rows == 1 else 'rows'}" if rows else ""
    return common.case(name, f"{shape}{counted}{' lse' if lse else ''}", dtype, **sizes)


def _cases(dtype):
    for S, (H, Hk) in itertools.product((704, 1088, 3072, 8192), ((32, 32), (28, 4))):
        yield attention_case(f"prefill-s{S}-h{H}", H, Hk, S, S, dtype)
    yield attention_case("text-s3072-h32", 32, 32, 3072, 3072, dtype, rows=TEXT, lse=True)
    for Sk, B in itertools.product((3072, 32768), (1, 16)):
        yield attention_case(f"decode-b{B}-s{Sk}", 32, 32, 1, Sk, dtype, B=B)


def _small_on_cpu(case):
    sizes = case.sizes
    return case.dtype == torch.float32 and sizes["Sq"] < 8192 and sizes["B"] * sizes["Sk"] <= 49152


CASES = (
    attention_case("prefill-s130-h4", 4, 2, 130, 130, torch.float32, D=32),
    attention_case("text-s130-h4", 4, 2, 130, 130, torch.float32, D=32, rows=TEXT, lse=True),
    *itertools.chain.from_iterable(map(_cases, common.DTYPES)),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=2,
        quick="prefill-s704-h32-float32 prefill-s1088-h32-float32 prefill-s1088-h28-float32 text-s3072-h32-float32 "
        "decode-b1-s3072-float32",
        full=_small_on_cpu,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="prefill-s1088-h32-bfloat16 prefill-s3072-h32-bfloat16 decode-b1-s3072-bfloat16",
        goals="prefill-s3072-h32-bfloat16 prefill-s3072-h28-bfloat16 text-s3072-h32-bfloat16 "
        "decode-b1-s3072-bfloat16 decode-b16-s3072-bfloat16",
        full=common.every,
    ),
}


def counted_rows(sizes):
    """First and last + 1 of the rows that count."""
    return (sizes["Sq"] - sizes["rows"], sizes["Sq"]) if sizes["causal"] else (0, sizes["rows"])


def attention_inputs(case, device):
    """Query as a projection lays it out, a view of [B, Sq, H, D], key as a cache does, bool [B, Sq] of counted rows."""
    generator = torch.Generator(device).manual_seed(0)
    B, H, Hk, Sq, Sk, D = (case.sizes[key] for key in ("B", "H", "Hk", "Sq", "Sk", "D"))
    normal = {"generator": generator, "device": device, "dtype": case.dtype}
    query, key = torch.randn(B, Sq, H, D, **normal).transpose(1, 2), torch.randn(B, Hk, Sk, D, **normal)
    rows = torch.arange(Sq, device=device).expand(B, Sq)
    start, end = counted_rows(case.sizes)
    options = {"query": query, "key": key, "causal": case.sizes["causal"]}
    if case.sizes["lse"]:
        options["lse"] = torch.full((B, H, Sq), -torch.inf, device=device)
        for b, h in itertools.product(range(B), range(H)):
            for block, logits in logit_blocks(case, options, b, h):
                options["lse"][b, h, block] = logits.logsumexp(-1).float()
    return options, (rows >= start) & (rows < end)


def logit_blocks(case, arguments, b, h):
    """(slice of counted rows, their logits [rows, Sk] in float64, -inf where masked) of one head, block by block."""
    sizes, (start, end) = case.sizes, counted_rows(case.sizes)
    query, key = arguments["query"][b, h], arguments["key"][b, h * sizes["Hk"] // sizes["H"]].double()
    for first in range(start, end, BLOCK):
        block = slice(first, min(first + BLOCK, end))
        logits = query[block].double() @ key.T * sizes["D"] ** -0.5
        if sizes["causal"]:
            logits.masked_fill_(~causal_mask(sizes, block, key.device), -torch.inf)
        yield block, logits


def causal_mask(sizes, block, device):
    """bool [rows, Sk]: the keys visible to a slice of rows."""
    last = torch.arange(block.start, block.stop, device=device)[:, None] + sizes["Sk"] - sizes["Sq"]
    return torch.arange(sizes["Sk"], device=device) <= last


def sampled_heads(sizes):
    """(b, h) of the heads that a check compares: all where that is cheap."""
    count = sizes["B"] * sizes["H"]
    most = min(count, 64, max(2, SAMPLE // (sizes["rows"] * sizes["Sk"])))
    return [divmod(place, sizes["H"]) for place in torch.linspace(0, count - 1, most).round().int().tolist()]


def arguments(case, device):
    """System prompt, image and question one after the other."""
    options, counted = attention_inputs(case, device)
    B, Sq, Sk = (case.sizes[key] for key in ("B", "Sq", "Sk"))
    token = torch.arange(Sk, device=device).expand(B, Sk)
    group = (token >= SYSTEM).long() + (token >= Sk - TEXT)
    query_group = group[:, Sk - Sq :].where(counted, -1)
    return options | {"query_group": query_group, "key_group": group, "groups": GROUPS}


def call(arguments):
    return pruneops.attention_mass(**arguments)


def check(case, arguments, result, expected, precision):
    """Mass of sampled heads and their lse within tolerance of float64; sums over keys of all heads."""
    mass, lse = result if isinstance(result, tuple) else (result, None)
    sizes = case.sizes
    if mass.shape != (sizes["B"], sizes["H"], GROUPS, GROUPS):
        return common.wrong(f"of shape {list(mass.shape)}")
    to_group, from_group = F.one_hot(arguments["key_group"]).double(), one_hot_rows(arguments).double()
    queries = from_group.sum(-1)  # [B, 1, G]
    scale = queries.clamp(min=1)
    errors = [((mass.double().sum(-1) - queries) / scale).flatten()]
    for b, h in sampled_heads(sizes):
        truth = torch.zeros_like(from_group[b, 0, :, :1] * to_group[b, :1])
        for block, logits in logit_blocks(case, arguments, b, h):
            truth += from_group[b, 0, :, block] @ (logits.softmax(-1) @ to_group[b])
            if lse is not None:
                errors.append(lse[b, h, block] - logits.logsumexp(-1))
        errors.append(((mass[b, h] - truth) / scale[b, 0, :, None]).flatten())
    return common.check_error(torch.cat(errors), common.TOLERANCE[precision])


def one_hot_rows(arguments):
    """[B, 1, G, Sq]; zeros for a query that does not count."""
    return F.one_hot(arguments["query_group"] + 1, GROUPS + 1)[..., 1:].mT[:, None]


def pairs(sizes):
    """Pairs of a counted query and a key visible to it, in one head; Sq is at most Sk."""
    rows, Sk = sizes["rows"], sizes["Sk"]
    return rows * Sk - (rows * (rows - 1) // 2 if sizes["causal"] else 0)


def attention_cost(case, written):
    """Cost of an operator that writes so many numbers a head."""
    B, H, Hk, Sk, D, rows = (case.sizes[key] for key in ("B", "H", "Hk", "Sk", "D", "rows"))
    read = B * (H * rows + Hk * Sk) * D * case.dtype.itemsize
    return Cost(read, 4 * B * H * written, 2 * B * H * pairs(case.sizes) * D)


def cost(case):
    return attention_cost(case, GROUPS**2 + case.sizes["Sq"])


def materialised_seconds(case, rates, rows=None, itemsize=None, passes=8):
    """Passes over the attention, as many over the keys, the product of all pairs."""
    B, H, Sk, D = (case.sizes[key] for key in ("B", "H", "Sk", "D"))
    rows, itemsize = rows or case.sizes["rows"], itemsize or case.dtype.itemsize
    memory = passes * B * H * Sk * (rows + D) * itemsize / rates.copy
    return memory + 2 * B * H * rows * Sk * D / rates.matmul[case.dtype]


def reference_seconds(case, rates):
    return materialised_seconds(case, rates, rows=case.sizes["Sq"], itemsize=4, passes=14)


def fused_seconds(case, rates, rows=None):
    """Attention of the counted rows with values, at a third of the rate of a product."""
    sizes = case.sizes | {"rows": rows or case.sizes["rows"]}
    B, H, D = (sizes[key] for key in ("B", "H", "D"))
    return 12 * B * H * pairs(sizes) * D / rates.matmul[case.dtype] + cost(case).read / rates.copy


def counted_inputs(case, arguments):
    """(query of the counted rows, key, mask [rows, Sk] of visible keys, None if all are)."""
    block = slice(*counted_rows(case.sizes))
    query, key = arguments["query"], arguments["key"]
    unmasked = not case.sizes["causal"] or case.sizes["Sq"] == 1
    return query[:, :, block], key, None if unmasked else causal_mask(case.sizes, block, query.device)


def _prepare_forward(case, arguments):
    causal = case.sizes["causal"] and case.sizes["Sq"] > 1  # SDPA would show the first key alone to a single query
    return lambda: baselines.forward(arguments["query"], arguments["key"], causal)


# a lower bound: the layer's attention of all rows
FORWARD = Baseline(_prepare_forward, lambda case, rates: fused_seconds(case, rates, case.sizes["Sq"]))


def _one_hot_groups(case, arguments, width):
    """Groups of counted rows [B, 1, G, rows], and of keys, padded to a width [B, 1, Sk, width]."""
    from_group = one_hot_rows(arguments)[..., slice(*counted_rows(case.sizes))].to(case.dtype)
    return from_group, F.one_hot(arguments["key_group"], width)[:, None].to(case.dtype)


def _prepare_materialised(case, arguments):
    query, key, mask = counted_inputs(case, arguments)
    groups = _one_hot_groups(case, arguments, GROUPS)
    return lambda: baselines.materialised(query, key, *groups, mask)


def _prepare_one_hot(case, arguments):
    query, key, mask = counted_inputs(case, arguments)
    from_group, value = _one_hot_groups(case, arguments, case.sizes["D"])
    causal = mask is not None and query.shape[2] == key.shape[2]
    value, mask = value.expand(key.shape), None if causal else mask
    return lambda: baselines.one_hot(query, key, from_group, value, mask, causal)


def _prepare_flex(case, arguments):
    query, key, mask = counted_inputs(case, arguments)
    from_group, value = _one_hot_groups(case, arguments, 16)
    value, first = value.expand(*key.shape[:3], 16).contiguous(), key.shape[2] - query.shape[2]
    block_mask = None
    if mask is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i + first, None, None, query.shape[2], key.shape[2], device=query.device
        )
    function = compiled(baselines.flex, dynamic=False)
    with_lse = not case.sizes["lse"] and case.sizes["rows"] == case.sizes["Sq"]
    return lambda: function(query, key, from_group, value, block_mask, with_lse)


_ONE_HOT = Baseline(_prepare_one_hot, fused_seconds)
BASELINES = {
    "materialised": Baseline(_prepare_materialised, materialised_seconds),
    "one_hot": _ONE_HOT,
    "graph": common.captured(_ONE_HOT),
    "flex": Baseline(_prepare_flex, fused_seconds, devices=("cuda",), compiles=True),
    "sdpa forward": FORWARD,
}
