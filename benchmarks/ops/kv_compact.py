"""Compaction of key and value caches, into new ones and in place: cases, cost model, check of a result, baselines.

Minimum cost of a case: the kept tokens of all caches and their positions read once, the kept tokens written once; no
operations.
"""

import itertools
import math

import torch

import pruneops
from pruneops import backends

from .. import common
from ..baselines import token_copy as baselines
from ..harness import capture, compiled
from ..registry import Baseline, Check, Cost

GPU_TIME_SHARE = 4
BITS = {2: torch.int16, 4: torch.int32}


def _case(caches, B, Hk, S, K, dtype, D=128, heads=False, in_place=False):
    name = f"{'in-place-' * in_place}{'heads-' * heads}c{{caches}}-b{{B}}-h{{Hk}}-s{{S}}"
    shape = f"{'in place, ' * in_place}{{caches}} caches, B {{B}} Hk {{Hk}} S {{S}} -> {{K}} D {{D}}"
    sizes = {"caches": caches, "B": B, "Hk": Hk, "S": S, "K": K, "D": D, "heads": heads, "in_place": in_place}
    return common.case(name, f"{shape}{' keep per head' * heads}", dtype, **sizes)


def _bytes(case):
    """Of all caches."""
    return math.prod(case.sizes[key] for key in ("caches", "B", "Hk", "S", "D")) * case.dtype.itemsize


def _cases(caches):
    """LLaVA's heads, or GQA at batch 8; a prompt pruned before generation, or a tenth of it during generation."""
    for (in_place, K), (B, Hk), heads, dtype in itertools.product(
        ((False, 352), (True, 2765)), ((1, 32), (8, 4)), (False, True), common.DTYPES
    ):
        yield _case(caches, B, Hk, 3072, K, dtype, heads=heads, in_place=in_place)


CASES = (
    _case(4, 2, 2, 96, 10, torch.float32, D=16),
    _case(4, 2, 2, 96, 86, torch.float32, D=16, heads=True, in_place=True),
    *(_case(64, 1, 1, 1, 1, torch.float32, D=16, in_place=in_place) for in_place in (False, True)),  # cost of a call
    *(_case(64, 1, 8, 64, 16, dtype, D=64) for dtype in common.DTYPES),
    *itertools.chain.from_iterable(map(_cases, (16, 64))),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=2,
        quick="c64-b1-h1-s1-float32 in-place-c64-b1-h1-s1-float32 c64-b1-h8-s64-float32 c16-b1-h32-s3072-float32 "
        "c64-b1-h32-s3072-bfloat16 c64-b8-h4-s3072-bfloat16 heads-c64-b1-h32-s3072-bfloat16 "
        "c16-b8-h4-s3072-float32 in-place-c16-b1-h32-s3072-float32 in-place-c16-b1-h32-s3072-bfloat16",
        full=lambda case: case not in CASES[:2] and _bytes(case) <= 2 << 30,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=2,
        quick="c64-b1-h32-s3072-bfloat16 in-place-c64-b1-h32-s3072-bfloat16",
        goals="c64-b1-h32-s3072-bfloat16 c64-b8-h4-s3072-bfloat16 heads-c64-b1-h32-s3072-bfloat16 "
        "in-place-c64-b1-h32-s3072-bfloat16",
        full=lambda case: case.sizes["caches"] == 64,
    ),
}


class Contents:
    """Tensors of known bits: the i-th holds base ^ i, compacted in place `times` times.

    Timed calls move the same number of bytes between the same places whatever these hold, so only checked ones need
    fresh contents: the check before them and a backend's first call restore them. Floats are finite, because some
    baselines change the bits of NaN.
    """

    def __init__(self, shape, dtype, count, device):
        generator = torch.Generator(device).manual_seed(0)
        bits = BITS[dtype.itemsize]
        low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
        self.base = torch.randint(low, high, shape, generator=generator, device=device, dtype=bits)
        self.base &= ~(high // 2 + 1)  # the first bit of an exponent
        self.tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
        self.callers = set()
        self.restore()

    def restore(self):
        for i, tensor in enumerate(self.tensors):
            torch.bitwise_xor(self.base, i, out=tensor.view(self.base.dtype))
        self.times = 0

    def changed(self, change, *arguments):
        """The tensors after a change in place by the current backend."""
        caller = backends.choose(self.base.device.type)
        if caller not in self.callers:  # a backend that failed may have left anything
            self.callers.add(caller)
            self.restore()
        return self._change(change, *arguments)

    def _change(self, change, *arguments):
        change(self.tensors, *arguments)
        self.times += 1
        return self.tensors

    def prepared(self, change, *arguments):
        """`changed` for a baseline."""
        self.restore()
        return lambda: self._change(change, *arguments)

    def verdict(self, results, expected):
        """Check that the i-th result holds expected(times) ^ i; a replayed graph has one call more than counted."""
        try:
            shapes = {tuple(result.shape) for result in results}
            for times in range(self.times, self.times + 2):
                bits = expected(times)
                if shapes != {tuple(bits.shape)} or len(results) != len(self.tensors):
                    return common.wrong(f"{len(results)} of shape {sorted(map(list, shapes))}")
                wrong = [i for i, result in enumerate(results) if not torch.equal(result.view(bits.dtype), bits ^ i)]
                if not wrong:
                    return Check(True, "ok, all bits", {"wrong_tensors": 0})
            return common.wrong(f"other bits in {len(wrong)} tensors", wrong_tensors=len(wrong))
        finally:
            if self.times:
                self.restore()


def ascending(shape, S, K, device):
    """Random positions [*shape, K] of S, ascending."""
    generator = torch.Generator(device).manual_seed(1)
    order = torch.rand(*shape, S, generator=generator, device=device).argsort(-1)
    return order[..., :K].sort(-1).values


def origins(keep, S, times):
    """[..., S]: source position of every token after so many compactions in place."""
    once = torch.arange(S, device=keep.device).expand(*keep.shape[:-1], S)
    step = torch.cat([keep, once[..., keep.shape[-1] :]], -1)
    for _ in range(times):
        once = step.gather(-1, once)
    return once


def arguments(case, device):
    """Caches of known bits, and ascending positions, which only compaction in place requires."""
    sizes = case.sizes
    B, Hk, S, K, D = (sizes[key] for key in ("B", "Hk", "S", "K", "D"))
    contents = Contents((B, Hk, S, D), case.dtype, sizes["caches"], device)
    keep = ascending((B, Hk) if sizes["heads"] else (B,), S, K, device)
    return {"contents": contents, "keep": keep, "in_place": sizes["in_place"]}


def call(arguments):
    if arguments["in_place"]:
        return arguments["contents"].changed(pruneops.kv_compact_, arguments["keep"])
    return pruneops.kv_compact(arguments["contents"].tensors, arguments["keep"])


def check(case, arguments, result, expected, precision):
    """All bits equal; in place, those that stay too."""
    contents, keep = arguments["contents"], arguments["keep"]

    def after(times):
        source = origins(keep, case.sizes["S"], times) if case.sizes["in_place"] else keep
        return baselines.gather([contents.base], source)[0]

    return contents.verdict(result, after)


def cost(case):
    caches, B, Hk, K, D = (case.sizes[key] for key in ("caches", "B", "Hk", "K", "D"))
    kept = caches * B * Hk * K * D * case.dtype.itemsize
    return Cost(kept + 8 * B * K * (Hk if case.sizes["heads"] else 1), kept, 0)


def pass_seconds(cost, passes=3, index=0):
    """Estimate from a cost model: passes over the bytes moved, and over an int64 index of every element."""

    def seconds(case, rates):
        elements = cost(case).written / case.dtype.itemsize
        return (passes * cost(case).bytes + 8 * index * elements) / rates.copy

    return seconds


def copy_seconds(cost):
    return pass_seconds(cost, passes=1)


_seconds, reference_seconds = pass_seconds(cost), pass_seconds(cost, passes=16, index=4)


def _prepare(new, in_place):
    def prepare(case, arguments):
        contents, keep = arguments["contents"], arguments["keep"]
        if case.sizes["in_place"]:
            return contents.prepared(in_place, keep)
        return lambda: new(contents.tensors, keep)

    return prepare


def _prepare_compiled(case, arguments):
    functions = (compiled_lists(own, arguments["keep"]) for own in (baselines.index_select, baselines.index_select_))
    return graph_on_cuda(_prepare(*functions)(case, arguments), arguments["keep"])


def compiled_lists(function, tensor):
    """A function of lists, compiled as one; on CUDA tensor by tensor, as so many kernels take minutes to compile."""
    call = compiled(function, dynamic=False)
    if not tensor.is_cuda:
        return call
    return lambda tensors, *others: [kept for tensor in tensors for kept in call([tensor], *others) or []]


def prepare_copy(case, arguments):
    """A lower bound: a copy into new memory, as a result is; in place into existing memory."""
    B, Hk, K, D = (case.sizes[key] for key in ("B", "Hk", "K", "D"))
    sources = [cache.view(-1)[: B * Hk * K * D] for cache in arguments["contents"].tensors]
    targets = [torch.zeros_like(source) for source in sources] if case.sizes.get("in_place", True) else None
    return graph_on_cuda(lambda: baselines.copy(sources, targets), sources[0])


def graph_on_cuda(call, tensor):
    """The call; on CUDA replayed from a graph, because its launches take longer than its work."""
    return capture(call) if tensor.is_cuda else call


_INDEX_SELECT = Baseline(_prepare(baselines.index_select, baselines.index_select_), _seconds)
BASELINES = {
    "copy": Baseline(prepare_copy, copy_seconds(cost)),
    "index_select": _INDEX_SELECT,
    "gather": Baseline(_prepare(baselines.gather, baselines.gather_), pass_seconds(cost, passes=4, index=2)),
    "graph": common.captured(_INDEX_SELECT),
    "compiled": Baseline(_prepare_compiled, _seconds, compiles=True),
}
