"""Compaction of paged caches in place: cases, inputs, cost model, check of a result, peers.

Least cost of a case: the kept tokens of all tensors, their positions and the pages they lie in read once, the kept
tokens written once; no operations.
"""

import itertools

import torch

import pruneops

from ..baselines import token_copy as baselines
from ..common import NAMES, as_reference
from ..harness import capture
from ..registry import Case, Cost, Operator, Peer
from .kv_compact import (
    Contents,
    as_bytes,
    ascending,
    copy_seconds,
    laid_out,
    layers_compiled,
    moved_seconds,
    on_card,
    origins,
)

PAGE = 16


def _case(tensors, B, S, K, dtype, Hk=8, D=128):
    sizes = {"tensors": tensors, "B": B, "Hk": Hk, "S": S, "K": K, "D": D, "page": PAGE}
    shape = f"{tensors} tensors, B {B} Hk {Hk} S {S} -> {K} D {D} pages of {PAGE} {NAMES[dtype]}"
    return Case(f"t{tensors}-b{B}-s{S}-k{K}-{NAMES[dtype]}", shape, dtype, sizes)


CASES = (
    _case(4, 2, 96, 86, torch.float32, Hk=2, D=16),
    _case(4, 2, 96, 10, torch.float32, Hk=2, D=16),
    *(_case(tensors, 8, 3072, K, dtype) for tensors, K, dtype in itertools.product((8, 64), (352, 2765), NAMES)),
)
TINY = tuple(case.name for case in CASES[:2])
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": ("t8-b8-s3072-k352-float32", "t8-b8-s3072-k2765-float32", "t8-b8-s3072-k2765-bfloat16"),
        "full": tuple(case.name for case in CASES if case.sizes["tensors"] == 8),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("t64-b8-s3072-k2765-bfloat16",),
        "goals": ("t64-b8-s3072-k352-bfloat16", "t64-b8-s3072-k2765-bfloat16"),
        "full": tuple(case.name for case in CASES if case.sizes["tensors"] == 64),
    },
}


def arguments(case, device):
    """Pages [pages, page, Hk, D] of known bits, in which every request has its own here and there."""
    generator = torch.Generator(device).manual_seed(2)
    tensors, B, Hk, S, K, D, page = (case.sizes[key] for key in ("tensors", "B", "Hk", "S", "K", "D", "page"))
    blocks = -(-S // page)
    table = torch.randperm(B * blocks, generator=generator, device=device).reshape(B, blocks).int()
    keep = ascending((B,), S, K, device)
    lengths = torch.full((B,), K, device=device)
    contents = Contents((B * blocks, page, Hk, D), case.dtype, tensors, device)
    return {"contents": contents, "block_table": table, "keep": keep, "lengths": lengths}


def call(arguments):
    """The documented Python face."""
    rest = (arguments[key] for key in ("block_table", "keep", "lengths"))
    return arguments["contents"].changed(pruneops.paged_kv_compact_, *rest)


def check(case, arguments, result, expected, precision):
    """Every bit is in its place, those too that stay."""
    contents, table, keep = (arguments[key] for key in ("contents", "block_table", "keep"))

    def after(times):
        capacity = table.shape[1] * case.sizes["page"]
        source = baselines.slots(contents.base, table, origins(keep, capacity, times))
        target = baselines.slots(contents.base, table, torch.arange(capacity, device=keep.device).expand(len(keep), -1))
        return contents.base.index_put(target, contents.base[source])

    return contents.verdict(result, after)


def cost(case):
    tensors, B, Hk, S, K, D, page = (case.sizes[key] for key in ("tensors", "B", "Hk", "S", "K", "D", "page"))
    kept = tensors * B * Hk * K * D * case.dtype.itemsize
    return Cost(kept + 8 * B * K + 4 * B * -(-S // page) + 8 * B, kept, 0)


def _seconds(case, ceilings):
    return moved_seconds(case, ceilings, cost, passes=4)


def _prepare(form):
    def prepare(case, arguments):
        return arguments["contents"].prepared(form, arguments["block_table"], arguments["keep"])

    return prepare


def _prepare_compiled(case, arguments):
    form = layers_compiled(baselines.paged_index_select_, arguments["keep"].device)
    return on_card(_prepare(form)(case, arguments), arguments["keep"])


def _prepare_graph(case, arguments):
    return capture(_prepare(baselines.paged_index_select_)(case, arguments))


def _prepare_copy(case, arguments):
    B, Hk, K, D = (case.sizes[key] for key in ("B", "Hk", "K", "D"))
    sources = [tensor.view(-1)[: B * Hk * K * D] for tensor in arguments["contents"].tensors]
    targets = [torch.zeros_like(source) for source in sources]
    return on_card(lambda: baselines.copy(sources, targets), sources[0])


def sanitize(device):
    """Small shapes: pages of one token to many, both layouts, keys and values together, heads, odd widths, garbage.

    Pages hold any bits and are compared as bytes with all that lies around. What a table and keep hold past a length is
    garbage.
    """
    generator = torch.Generator().manual_seed(7)
    half, full, byte = torch.bfloat16, torch.float32, torch.uint8
    for B, S, K, page, Hk, heads, lengths, layout, forms in (
        (1, 1, 1, 1, 1, False, [1], "NHD", [((), 1, full, "plain")]),
        (2, 97, 31, 16, 4, False, [31, 7], "NHD", [((), 64, half, "plain"), ((), 64, half, "plain")]),
        (2, 130, 117, 16, 3, True, [117, 60], "HND", [((2,), 128, half, "plain"), ((), 33, byte, "odd address")]),
        (3, 70, 9, 5, 2, True, [9, 0, 4], "NHD", [((2,), 80, full, "plain"), ((), 5, half, "strided")]),
        (1, 700, 630, 16, 2, False, [630], "NHD", [((), 128, half, "plain")] * 5),
    ):
        blocks = -(-S // page)
        inner = (page, Hk) if layout == "NHD" else (Hk, page)
        tensors = [laid_out(how, (B * blocks + 1, *kv, *inner, D), dtype, generator) for kv, D, dtype, how in forms]
        table = torch.randperm(B * blocks + 1, generator=generator)[: B * blocks].reshape(B, blocks).int()
        keep = torch.rand(B, *([Hk] if heads else []), S, generator=generator).argsort(-1)[..., :K].sort(-1).values
        lengths = torch.tensor(lengths)
        past = torch.arange(K) >= lengths.reshape(B, *[1] * (keep.dim() - 1))
        last = keep.masked_fill(past, -1).reshape(B, -1).amax(-1, keepdim=True)
        table = table.masked_fill(torch.arange(blocks) * page > last, torch.iinfo(torch.int32).max)
        keep = keep.masked_fill(past, torch.iinfo(torch.int64).max)

        def run(to, tensors=tensors, table=table, keep=keep, lengths=lengths, layout=layout):
            memory, own = zip(*(tensor(to) for tensor in tensors))
            pruneops.paged_kv_compact_(own, table.to(to), keep.to(to), lengths.to(to), layout=layout)
            return as_bytes(memory)

        kinds = dict.fromkeys(
            f"{'together ' if kv else ''}D {D} {str(dtype).removeprefix('torch.')} {how}" for kv, D, dtype, how in forms
        )
        words = f"{len(forms)} {layout} B {B} Hk {Hk} S {S} -> {K}{' per head' if heads else ''} pages of {page}"
        yield f"{words}: {', '.join(kinds)}", as_reference(run, device)


OPERATOR = Operator(
    name="paged_kv_compact",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=_seconds,
    peers={
        "copy": Peer(_prepare_copy, lambda case, ceilings: copy_seconds(case, ceilings, cost)),
        "index_select": Peer(_prepare(baselines.paged_index_select_), _seconds),
        "indexing": Peer(_prepare(baselines.paged_indexing_), _seconds),
        "graph": Peer(_prepare_graph, _seconds, devices=("cuda",)),
        "compiled": Peer(_prepare_compiled, _seconds, compiles=True),
    },
    sanitize=sanitize,
)
