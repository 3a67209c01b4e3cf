"""Pivot cosines and their reduction, duplication: cases, inputs, cost model, check of a result, peers.

Least cost of a case: x read once and the scores written once; every token meets every pivot and
itself, 2 (P + 1) B N D operations.
"""

import itertools

import torch

import pruneops

from ..baselines import pivot_cosine as baselines
from ..common import NAMES, TOLERANCE, VARLEN, as_reference, features, signs
from ..harness import capture, compiled
from ..registry import Case, Check, Cost, Operator, Peer


def _batched(B, N, D, P, dtype, reduce=None):
    name = f"{'duplication-' if reduce else ''}b{B}-n{N}-d{D}-p{P}-{NAMES[dtype]}"
    shape = f"{f'{reduce} over P, ' if reduce else ''}B {B} N {N} D {D} P {P} {NAMES[dtype]}"
    return Case(name, shape, dtype, {"B": B, "N": N, "D": D, "P": P, "reduce": reduce})


def _varlen(D, P, dtype):
    shape = f"{len(VARLEN)} images T {sum(VARLEN)} D {D} P {P} {NAMES[dtype]}"
    sizes = {"lengths": list(VARLEN), "D": D, "P": P, "reduce": None}
    return Case(f"varlen-d{D}-p{P}-{NAMES[dtype]}", shape, dtype, sizes)


CASES = (
    _batched(1, 96, 64, 4, torch.float32),
    _batched(1, 96, 64, 4, torch.float32, "max"),
    *(
        _batched(B, N, D, 8, dtype)
        for N, B, D, dtype in itertools.product((576, 2880, 9216, 23328), (1, 8), (1024, 4096), NAMES)
    ),
    *(_batched(1, 2880, 4096, 64, dtype) for dtype in NAMES),
    *(_batched(1, N, 4096, 8, dtype, "max") for N, dtype in itertools.product((2880, 23328), NAMES)),
    *(_varlen(D, 8, dtype) for D, dtype in itertools.product((1024, 4096), NAMES)),
)
TINY = tuple(case.name for case in CASES[:2])
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": (
            "b1-n576-d1024-p8-float32",
            "b1-n2880-d4096-p8-float32",
            "b8-n2880-d1024-p8-float32",
            "b1-n2880-d4096-p64-float32",
            "duplication-b1-n2880-d4096-p8-float32",
            "varlen-d1024-p8-float32",
        ),
        "full": tuple(
            case.name
            for case in CASES
            if case.dtype == torch.float32 and case.sizes.get("N", 0) * case.sizes.get("B", 1) <= 23328
        ),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("b1-n576-d1024-p8-bfloat16", "b1-n2880-d4096-p8-bfloat16", "varlen-d1024-p8-bfloat16"),
        "goals": (
            "b1-n576-d1024-p8-bfloat16",
            "b1-n2880-d4096-p8-bfloat16",
            "b8-n2880-d4096-p8-bfloat16",
            "b1-n2880-d4096-p64-bfloat16",
            "duplication-b1-n2880-d4096-p8-bfloat16",
            "varlen-d4096-p8-bfloat16",
        ),
        "full": tuple(case.name for case in CASES),
    },
}


def arguments(case, device):
    """Arguments of the operator: features, and P tokens of each image as its pivots."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = case.sizes
    if "lengths" in sizes:
        x = torch.cat([features(n, sizes["D"], generator) for n in sizes["lengths"]])
        starts = [0, *itertools.accumulate(sizes["lengths"])]
        pivots = torch.stack(
            [start + pivot_tokens(n, sizes["P"], generator) for start, n in zip(starts, sizes["lengths"])]
        )
        return {"x": x.to(case.dtype), "cu_seqlens": torch.tensor(starts, device=device), "pivots": pivots}
    x = torch.stack([features(sizes["N"], sizes["D"], generator) for _ in range(sizes["B"])])
    pivots = torch.stack([pivot_tokens(sizes["N"], sizes["P"], generator) for _ in range(sizes["B"])])
    reduce = {"reduce": sizes["reduce"]} if sizes["reduce"] else {}
    return {"x": x.to(case.dtype), "pivots": pivots, **reduce}


def pivot_tokens(N, P, generator):
    return torch.randperm(N, generator=generator, device=generator.device)[:P]


def call(arguments):
    """The documented Python face."""
    if "reduce" in arguments:
        return pruneops.duplication(**arguments)
    return (pruneops.pivot_cosine_varlen if "cu_seqlens" in arguments else pruneops.pivot_cosine)(**arguments)


def images(case, arguments):
    """Features [B, N, D] and pivots [B, P] of every block of equal images."""
    x, pivots = arguments["x"], arguments["pivots"]
    if "lengths" not in case.sizes:
        return [(x, pivots)]
    starts = [0, *itertools.accumulate(case.sizes["lengths"])]
    return [(x[None, start:end], own[None] - start) for start, end, own in zip(starts, starts[1:], pivots)]


def cosines(x, pivots):
    """[P, N] in float64 of one image x [N, D] with pivots [P]."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit[pivots] @ unit.T


def _joined(scores):
    """What blocks of images give, as the operator returns it: packed ones lose their dimension of 1."""
    return scores[0] if len(scores) == 1 else torch.cat([score[0] for score in scores], -1)


def check(case, arguments, result, expected, precision):
    """Every score within tolerance of float64."""
    truth = []
    for x, pivots in images(case, arguments):
        scores = [cosines(*image) for image in zip(x, pivots)]
        truth.append(torch.stack([score.amax(0) for score in scores] if case.sizes["reduce"] else scores))
    truth = _joined(truth)
    if result.shape != truth.shape:
        return Check(False, f"WRONG: of shape {list(result.shape)}")
    error, tolerance = float((result - truth).abs().nan_to_num(torch.inf).amax()), TOLERANCE[precision]
    numbers = {"max_diff": error, "tolerance": tolerance}
    if error > tolerance:
        return Check(False, f"WRONG: off by {error:.2g}", numbers)
    return Check(True, f"ok, within {error:.1g}", numbers)


def _tokens(case):
    return sum(case.sizes["lengths"]) if "lengths" in case.sizes else case.sizes["B"] * case.sizes["N"]


def cost(case):
    T, D, P = _tokens(case), case.sizes["D"], case.sizes["P"]
    return Cost(T * D * case.dtype.itemsize, 4 * T * (1 if case.sizes["reduce"] else P), 2 * (P + 1) * T * D)


def _passes_seconds(passes, case, ceilings, itemsize=None):
    """So many passes over x."""
    return passes * _tokens(case) * case.sizes["D"] * (itemsize or case.dtype.itemsize) / ceilings.copy


def _normalized_seconds(case, ceilings):
    return _passes_seconds(4, case, ceilings) + cost(case).operations / ceilings.matmul[case.dtype]


def _per_pivot_seconds(case, ceilings):
    return _passes_seconds(12 * case.sizes["P"], case, ceilings)


def _reference_seconds(case, ceilings):
    return _passes_seconds(8, case, ceilings, itemsize=4)


def _prepare(form):
    def prepare(case, arguments):
        blocks = images(case, arguments)
        return lambda: _joined([form(x, pivots, case.sizes["reduce"]) for x, pivots in blocks])

    return prepare


def _prepare_compiled(case, arguments):
    return _prepare(compiled(baselines.normalized))(case, arguments)


def _prepare_graph(case, arguments):
    return capture(_prepare(baselines.normalized)(case, arguments))


def sanitize(device):
    """Small shapes: few and many pivots, repeated ones, masks, odd and even widths and strides, packed images.

    Entries are 1 or -1: where D is a power of four, cosines and their sums are those of the reference to the bit.
    """
    generator = torch.Generator().manual_seed(2)
    for B, N, D, P, dtype, reduce in (
        (1, 1, 1, 1, torch.float32, "sum"),
        (2, 33, 64, 8, torch.float16, "max"),
        (1, 130, 1031, 3, torch.bfloat16, "mean"),
        (2, 301, 256, 64, torch.float32, "mean"),
        (1, 77, 48, 70, torch.bfloat16, "max"),
        (1, 20011, 16, 8, torch.bfloat16, "sum"),
    ):
        pivots = torch.randint(N, (B, P), generator=generator)
        mask = torch.rand(B, N, generator=generator) < 0.9
        words = f"B {B} N {N} D {D} P {P} {str(dtype).removeprefix('torch.')}"
        odd, even = (signs((B, N, D + margin), generator).to(dtype) for margin in (3, 16))

        def run(to, x=odd, pivots=pivots, mask=mask, D=D):
            return pruneops.pivot_cosine(x.to(to)[..., 1 : D + 1], pivots.to(to), mask=mask.to(to))

        def run_reduced(to, x=even, pivots=pivots, reduce=reduce, D=D):
            return pruneops.duplication(x.to(to)[..., :D], pivots.to(to), reduce=reduce)

        yield words, as_reference(run, device, _tolerance(D, P))
        yield f"{words} {reduce}", as_reference(run_reduced, device, _tolerance(D, P))
    lengths, D, P = (70, 0, 5200, 33), 64, 5
    packed = signs((sum(lengths), D), generator)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    pivots = torch.stack(
        [start + torch.randint(max(n, 1), (P,), generator=generator) for start, n in zip(starts, lengths)]
    )
    mask = torch.rand(sum(lengths), generator=generator) < 0.9
    for face in (pruneops.pivot_cosine_varlen, pruneops.duplication_varlen):

        def run_packed(to, face=face):
            return face(packed.to(to), starts.to(to), pivots.to(to), mask=mask.to(to))

        yield f"images {lengths} D {D} P {P} {face.__name__}", as_reference(run_packed, device)


def _tolerance(D, P):
    """Zero where D is a power of four; the sum over pivots adds up their errors."""
    return 0.0 if D in (1, 16, 64, 256) else P * TOLERANCE[torch.float32]


OPERATOR = Operator(
    name="pivot_cosine",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=_reference_seconds,
    peers={
        "normalized": Peer(_prepare(baselines.normalized), _normalized_seconds),
        "per_pivot": Peer(_prepare(baselines.per_pivot), _per_pivot_seconds),
        "graph": Peer(_prepare_graph, _normalized_seconds, devices=("cuda",)),
        "compiled": Peer(_prepare_compiled, _normalized_seconds, compiles=True),
    },
    sanitize=sanitize,
)
