"""Compaction of paged caches in place: cases, cost model, check of a result, baselines.

Minimum cost of a case: the kept tokens of all tensors, their positions and the pages they lie in read once, the kept
tokens written once; no operations.
"""

import itertools

import torch

import pruneops

from .. import common
from ..baselines import token_copy as baselines
from ..registry import Baseline, Cost
from .kv_compact import (
    Contents,
    ascending,
    compiled_lists,
    copy_seconds,
    graph_on_cuda,
    origins,
    pass_seconds,
    prepare_copy,
)

PAGE = 16


def _case(tensors, B, S, K, dtype, Hk=8, D=128):
    shape = "{tensors} tensors, B {B} Hk {Hk} S {S} -> {K} D {D} pages of {page}"
    sizes = {"tensors": tensors, "B": B, "Hk": Hk, "S": S, "K": K, "D": D, "page": PAGE}
    return common.case("t{tensors}-b{B}-s{S}-k{K}", shape, dtype, **sizes)


CASES = (
    _case(4, 2, 96, 86, torch.float32, Hk=2, D=16),
    _case(4, 2, 96, 10, torch.float32, Hk=2, D=16),
    *(
        _case(tensors, 8, 3072, K, dtype)
        for tensors, K, dtype in itertools.product((8, 64), (352, 2765), common.DTYPES)
    ),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=2,
        quick="t8-b8-s3072-k352-float32 t8-b8-s3072-k2765-float32 t8-b8-s3072-k2765-bfloat16",
        full=lambda case: case.sizes["tensors"] == 8,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="t64-b8-s3072-k2765-bfloat16",
        goals="t64-b8-s3072-k352-bfloat16 t64-b8-s3072-k2765-bfloat16",
        full=lambda case: case.sizes["tensors"] == 64,
    ),
}


def arguments(case, device):
    """Pages [pages, page, Hk, D] of known bits; the pages of a request are scattered."""
    generator = torch.Generator(device).manual_seed(2)
    tensors, B, Hk, S, K, D, page = (case.sizes[key] for key in ("tensors", "B", "Hk", "S", "K", "D", "page"))
    blocks = -(-S // page)
    table = torch.randperm(B * blocks, generator=generator, device=device).reshape(B, blocks).int()
    keep = ascending((B,), S, K, device)
    lengths = torch.full((B,), K, device=device)
    contents = Contents((B * blocks, page, Hk, D), case.dtype, tensors, device)
    return {"contents": contents, "block_table": table, "keep": keep, "lengths": lengths}


def call(arguments):
    rest = (arguments[key] for key in ("block_table", "keep", "lengths"))
    return arguments["contents"].changed(pruneops.paged_kv_compact_, *rest)


def check(case, arguments, result, expected, precision):
    """All bits equal, those that stay too."""
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


_seconds = reference_seconds = pass_seconds(cost, passes=4)


def _prepare(function):
    def prepare(case, arguments):
        return arguments["contents"].prepared(function, arguments["block_table"], arguments["keep"])

    return prepare


def _prepare_compiled(case, arguments):
    function = compiled_lists(baselines.paged_index_select_, arguments["keep"])
    return graph_on_cuda(_prepare(function)(case, arguments), arguments["keep"])


_INDEX_SELECT = Baseline(_prepare(baselines.paged_index_select_), _seconds)
BASELINES = {
    "copy": Baseline(prepare_copy, copy_seconds(cost)),
    "index_select": _INDEX_SELECT,
    "indexing": Baseline(_prepare(baselines.paged_indexing_), _seconds),
    "graph": common.captured(_INDEX_SELECT),
    "compiled": Baseline(_prepare_compiled, _seconds, compiles=True),
}
