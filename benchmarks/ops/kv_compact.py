"""Compaction of key and value caches, into new ones and in place: cases, inputs, cost model, check of a result, peers.

Least cost of a case: the kept tokens of all caches and their positions read once, the kept tokens written once; no
operations.
"""

import itertools
import math

import torch

import pruneops
from pruneops import backends

from ..baselines import token_copy as baselines
from ..common import NAMES, as_reference
from ..harness import capture, compiled
from ..registry import Case, Check, Cost, Operator, Peer

BITS = {2: torch.int16, 4: torch.int32}


def _case(caches, B, Hk, S, K, dtype, D=128, heads=False, in_place=False):
    sizes = {"caches": caches, "B": B, "Hk": Hk, "S": S, "K": K, "D": D, "heads": heads, "in_place": in_place}
    kind = f"{'in-place-' if in_place else ''}{'heads-' if heads else ''}"
    shape = f"{caches} caches, B {B} Hk {Hk} S {S} -> {K} D {D}{' keep per head' if heads else ''} {NAMES[dtype]}"
    name = f"{kind}c{caches}-b{B}-h{Hk}-s{S}-{NAMES[dtype]}"
    return Case(name, f"{'in place, ' if in_place else ''}{shape}", dtype, sizes)


def _bytes(case):
    """Of all caches."""
    return math.prod(case.sizes[key] for key in ("caches", "B", "Hk", "S", "D")) * case.dtype.itemsize


def _cases(caches):
    """LLaVA's heads, and as many tokens of grouped ones; a prompt pruned before generation, or a tenth in between."""
    for (in_place, K), (B, Hk), heads, dtype in itertools.product(
        ((False, 352), (True, 2765)), ((1, 32), (8, 4)), (False, True), NAMES
    ):
        yield _case(caches, B, Hk, 3072, K, dtype, heads=heads, in_place=in_place)


CASES = (
    _case(4, 2, 2, 96, 10, torch.float32, D=16),
    _case(4, 2, 2, 96, 86, torch.float32, D=16, heads=True, in_place=True),
    *(_case(64, 1, 1, 1, 1, torch.float32, D=16, in_place=own) for own in (False, True)),  # what a call itself costs
    *(_case(64, 1, 8, 64, 16, dtype, D=64) for dtype in NAMES),
    *itertools.chain.from_iterable(map(_cases, (16, 64))),
)
TINY = tuple(case.name for case in CASES[:2])
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": (
            "c64-b1-h1-s1-float32",
            "in-place-c64-b1-h1-s1-float32",
            "c64-b1-h8-s64-float32",
            "c16-b1-h32-s3072-float32",
            "c64-b1-h32-s3072-bfloat16",
            "c64-b8-h4-s3072-bfloat16",
            "heads-c64-b1-h32-s3072-bfloat16",
            "c16-b8-h4-s3072-float32",
            "in-place-c16-b1-h32-s3072-float32",
            "in-place-c16-b1-h32-s3072-bfloat16",
        ),
        "full": tuple(case.name for case in CASES[2:] if _bytes(case) <= 2 << 30),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("c64-b1-h32-s3072-bfloat16", "in-place-c64-b1-h32-s3072-bfloat16"),
        "goals": (
            "c64-b1-h32-s3072-bfloat16",
            "c64-b8-h4-s3072-bfloat16",
            "heads-c64-b1-h32-s3072-bfloat16",
            "in-place-c64-b1-h32-s3072-bfloat16",
        ),
        "full": tuple(case.name for case in CASES if case.sizes["caches"] == 64),
    },
}


class Contents:
    """Tensors of known bits: the i-th holds base ^ i, until calls compact it `times` over.

    A compaction in place moves as many bytes between the same places whatever they are, so that timed calls need no
    fresh contents. Checked ones do: they get them from the check before, and a backend from its first call. Floats
    are finite, for some of what people run does not keep the bits of NaN.
    """

    def __init__(self, shape, dtype, count, device):
        generator = torch.Generator(device).manual_seed(0)
        bits = BITS[dtype.itemsize]
        least, most = torch.iinfo(bits).min, torch.iinfo(bits).max
        self.base = torch.randint(least, most, shape, generator=generator, device=device, dtype=bits)
        self.base &= ~(most // 2 + 1)  # the first bit of an exponent
        self.tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
        self.callers = set()
        self.restore()

    def restore(self):
        for i, tensor in enumerate(self.tensors):
            torch.bitwise_xor(self.base, i, out=tensor.view(self.base.dtype))
        self.times = 0

    def changed(self, change, *arguments):
        """The tensors after a change in place by the backend in force."""
        caller = backends.choose(self.base.device.type)
        if caller not in self.callers:  # one that failed may have left anything
            self.callers.add(caller)
            self.restore()
        change(self.tensors, *arguments)
        self.times += 1
        return self.tensors

    def prepared(self, change, *arguments):
        """`changed` for a peer."""
        self.restore()

        def call():
            change(self.tensors, *arguments)
            self.times += 1
            return self.tensors

        return call

    def verdict(self, results, expected):
        """Whether the i-th result holds expected(times) ^ i; calls replayed from a graph are one more than counted."""
        if results is None:
            return Check(True, "a yardstick")
        try:
            shapes = {tuple(result.shape) for result in results}
            for times in range(self.times, self.times + 2):
                bits = expected(times)
                if shapes != {tuple(bits.shape)} or len(results) != len(self.tensors):
                    return Check(False, f"WRONG: {len(results)} of shape {sorted(map(list, shapes))}")
                wrong = [i for i, result in enumerate(results) if not torch.equal(result.view(bits.dtype), bits ^ i)]
                if not wrong:
                    return Check(True, "ok, all bits", {"wrong_tensors": 0})
            return Check(False, f"WRONG: other bits in {len(wrong)} tensors", {"wrong_tensors": len(wrong)})
        finally:
            if self.times:
                self.restore()


def ascending(shape, S, K, device):
    """Random positions [*shape, K] of S, ascending."""
    generator = torch.Generator(device).manual_seed(1)
    order = torch.rand(*shape, S, generator=generator, device=device).argsort(-1)
    return order[..., :K].sort(-1).values


def origins(keep, S, times):
    """[..., S]: where tokens come from that were compacted in place so many times."""
    once = torch.arange(S, device=keep.device).expand(*keep.shape[:-1], S)
    step = torch.cat([keep, once[..., keep.shape[-1] :]], -1)
    for _ in range(times):
        once = step.gather(-1, once)
    return once


def arguments(case, device):
    """Caches of known bits, and positions that ascend, though only the form in place asks for it."""
    sizes = case.sizes
    B, Hk, S, K, D = (sizes[key] for key in ("B", "Hk", "S", "K", "D"))
    contents = Contents((B, Hk, S, D), case.dtype, sizes["caches"], device)
    keep = ascending((B, Hk) if sizes["heads"] else (B,), S, K, device)
    return {"contents": contents, "keep": keep, "in_place": sizes["in_place"]}


def call(arguments):
    """The documented Python face."""
    if arguments["in_place"]:
        return arguments["contents"].changed(pruneops.kv_compact_, arguments["keep"])
    return pruneops.kv_compact(arguments["contents"].tensors, arguments["keep"])


def check(case, arguments, result, expected, precision):
    """Every bit is in its place; in place, those too that stay."""
    contents, keep = arguments["contents"], arguments["keep"]

    def after(times):
        source = origins(keep, case.sizes["S"], times) if case.sizes["in_place"] else keep
        return baselines.gather([contents.base], source)[0]

    return contents.verdict(result, after)


def cost(case):
    caches, B, Hk, K, D = (case.sizes[key] for key in ("caches", "B", "Hk", "K", "D"))
    kept = caches * B * Hk * K * D * case.dtype.itemsize
    return Cost(kept + 8 * B * K * (Hk if case.sizes["heads"] else 1), kept, 0)


def moved_seconds(case, ceilings, cost=cost, passes=3, index=0):
    """Passes over what is moved, and so many over an int64 index of an element."""
    elements = cost(case).written / case.dtype.itemsize
    return (passes * cost(case).bytes + 8 * index * elements) / ceilings.copy


def copy_seconds(case, ceilings, cost=cost):
    return cost(case).bytes / ceilings.copy


def _gather_seconds(case, ceilings):
    return moved_seconds(case, ceilings, passes=4, index=2)


def _reference_seconds(case, ceilings):
    return moved_seconds(case, ceilings, passes=16, index=4)


def _prepare(new, in_place):
    def prepare(case, arguments):
        contents, keep = arguments["contents"], arguments["keep"]
        if case.sizes["in_place"]:
            return contents.prepared(in_place, keep)
        return lambda: new(contents.tensors, keep)

    return prepare


_prepare_index_select = _prepare(baselines.index_select, baselines.index_select_)


def _prepare_compiled(case, arguments):
    forms = (
        layers_compiled(form, arguments["keep"].device) for form in (baselines.index_select, baselines.index_select_)
    )
    return on_card(_prepare(*forms)(case, arguments), arguments["keep"])


def layers_compiled(form, device):
    """A form of lists compiled as one; for a card tensor by tensor, for so many kernels take minutes to compile."""
    own = compiled(form, dynamic=False)
    if device.type == "cpu":
        return own
    return lambda tensors, *others: [kept for tensor in tensors for kept in own([tensor], *others) or []]


def _prepare_graph(case, arguments):
    return capture(_prepare_index_select(case, arguments))


def _prepare_copy(case, arguments):
    """New memory, as a result is; in place memory that is there."""
    B, Hk, K, D = (case.sizes[key] for key in ("B", "Hk", "K", "D"))
    sources = [cache.view(-1)[: B * Hk * K * D] for cache in arguments["contents"].tensors]
    targets = [torch.zeros_like(source) for source in sources] if case.sizes["in_place"] else None
    return on_card(lambda: baselines.copy(sources, targets), sources[0])


def on_card(call, tensor):
    """The call; on a card replayed from a graph, for launching it takes longer than what it does."""
    return capture(call) if tensor.is_cuda else call


def laid_out(how, shape, dtype, generator):
    """A function of a device: memory of random bytes there, and a tensor that lies in it as told, new on every call."""
    count = math.prod(shape)
    memory = torch.randint(256, (2 * (count + 1) * dtype.itemsize,), generator=generator, dtype=torch.uint8)

    def on(device):
        own = memory.to(device, copy=True)
        start = int(how == "odd address")
        elements = own.view(dtype)[start:]
        if how == "heads inside":
            return own, elements[:count].view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        if how == "strided":
            return own, elements[: 2 * count].view(*shape, 2)[..., 1]
        return own, elements[:count].view(shape)

    return on


def as_bytes(tensors):
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def sanitize(device):
    """Small shapes, new and in place: one token to many, layouts, odd widths and addresses, heads, lengths, mixtures.

    Caches hold any bits, NaN too, and are compared as bytes, in place with all that lies around. Positions past a
    length are garbage.
    """
    generator = torch.Generator().manual_seed(6)
    half, full, byte = torch.bfloat16, torch.float32, torch.uint8
    for B, S, K, heads, lengths, forms in (
        (1, 1, 1, False, None, [(1, 1, full, "plain")]),
        (2, 97, 31, False, [31, 7], [(4, 64, half, "plain"), (4, 64, half, "heads inside")]),
        (2, 130, 117, True, None, [(3, 128, half, "heads inside"), (3, 33, byte, "odd address")]),
        (3, 70, 9, True, [9, 0, 4], [(2, 80, full, "plain"), (2, 5, half, "strided")]),
        (1, 700, 630, False, None, [(2, 128, half, "plain")] * 5),
        (1, 300, 40, False, None, [(8, 128, half, "plain"), (1, 576, half, "odd address"), (2, 24, full, "strided")]),
    ):
        caches = [laid_out(how, (B, Hk, S, D), dtype, generator) for Hk, D, dtype, how in forms]
        order = torch.rand(B, *([forms[0][0]] if heads else []), S, generator=generator).argsort(-1)
        keep, lengths = order[..., :K].sort(-1).values, lengths and torch.tensor(lengths)
        if lengths is not None:
            past = torch.arange(K) >= lengths.reshape(B, *[1] * (keep.dim() - 1))
            keep = keep.where(~past, torch.iinfo(torch.int64).max)

        def run(to, caches=caches, keep=keep, lengths=lengths):
            options = {} if lengths is None else {"lengths": lengths.to(to)}
            return as_bytes(pruneops.kv_compact([cache(to)[1] for cache in caches], keep.to(to), **options))

        def run_in_place(to, caches=caches, keep=keep, lengths=lengths):
            options = {} if lengths is None else {"lengths": lengths.to(to)}
            memory, own = zip(*(cache(to) for cache in caches))
            pruneops.kv_compact_(own, keep.to(to), **options)
            return as_bytes(memory)

        words = f"{len(forms)} caches B {B} S {S} -> {K}{' per head' if heads else ''}"
        words += f"{'' if lengths is None else ' lengths'}: {described(forms)}"
        yield words, as_reference(run, device)
        yield f"in place, {words}", as_reference(run_in_place, device)


def described(forms):
    kinds = dict.fromkeys(f"Hk {Hk} D {D} {str(dtype).removeprefix('torch.')} {how}" for Hk, D, dtype, how in forms)
    return ", ".join(kinds)


OPERATOR = Operator(
    name="kv_compact",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=_reference_seconds,
    peers={
        "copy": Peer(_prepare_copy, copy_seconds),
        "index_select": Peer(_prepare_index_select, moved_seconds),
        "gather": Peer(_prepare(baselines.gather, baselines.gather_), _gather_seconds),
        "graph": Peer(_prepare_graph, moved_seconds, devices=("cuda",)),
        "compiled": Peer(_prepare_compiled, moved_seconds, compiles=True),
    },
    sanitize=sanitize,
)
