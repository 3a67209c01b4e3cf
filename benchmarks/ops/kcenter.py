"""Greedy k-center: cases, inputs, cost model, check of a result, peers.

Least cost of a case: x read once and indices and radii written once; every chosen token meets
every token, 2 B N k D operations (the norms are 2 B N D more, not counted).
"""

import functools
import itertools

import torch

import pruneops

from ..baselines import kcenter as baselines
from ..common import NAMES, SHARE, TOLERANCE, VARLEN, as_reference, features, signs
from ..harness import capture, compiled
from ..registry import Case, Check, Cost, Operator, Peer

POWERS_OF_FOUR = (16, 64, 256, 1024, 4096)


def _batched(B, N, D, dtype):
    k = round(SHARE * N)
    name = f"b{B}-n{N}-d{D}-{NAMES[dtype]}"
    return Case(name, f"B {B} N {N} D {D} k {k} {NAMES[dtype]}", dtype, {"B": B, "N": N, "D": D, "k": k})


def _varlen(D, dtype):
    ks = [round(SHARE * n) for n in VARLEN]
    shape = f"{len(ks)} images T {sum(VARLEN)} D {D} k {sum(ks)} {NAMES[dtype]}"
    sizes = {"lengths": list(VARLEN), "D": D, "ks": ks}
    return Case(f"varlen-d{D}-{NAMES[dtype]}", shape, dtype, sizes)


CASES = (
    _batched(1, 96, 64, torch.float32),
    *(
        _batched(B, N, D, dtype)
        for N, B, D, dtype in itertools.product((576, 2880, 9216, 23328), (1, 8), (1024, 4096), NAMES)
    ),
    *(_varlen(D, dtype) for D, dtype in itertools.product((1024, 4096), NAMES)),
)
TINY = (CASES[0].name,)
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": (
            "b1-n576-d1024-float32",
            "b1-n576-d4096-float32",
            "b8-n576-d1024-float32",
            "b1-n2880-d1024-float32",
            "b1-n2880-d4096-float32",
            "varlen-d1024-float32",
        ),
        "full": tuple(
            case.name
            for case in CASES
            if case.dtype == torch.float32 and case.sizes.get("N", 0) * case.sizes.get("B", 1) <= 23328
        ),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("b1-n576-d1024-bfloat16", "b1-n2880-d4096-bfloat16", "varlen-d1024-bfloat16"),
        "goals": (
            "b1-n576-d1024-bfloat16",
            "b1-n2880-d4096-bfloat16",
            "b1-n2880-d4096-float32",
            "b8-n2880-d4096-bfloat16",
            "b1-n9216-d4096-bfloat16",
            "b1-n23328-d4096-bfloat16",
            "varlen-d4096-bfloat16",
        ),
        "full": tuple(case.name for case in CASES),
    },
}


def arguments(case, device):
    """Arguments of the operator: features, and a pivot per image as ToDRE has it."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = case.sizes
    if "lengths" in sizes:
        x = torch.cat([features(n, sizes["D"], generator) for n in sizes["lengths"]])
        starts = torch.tensor([0, *itertools.accumulate(sizes["lengths"])], device=device)
        pivots = starts[:-1, None] + 7
        return {"x": x.to(case.dtype), "cu_seqlens": starts, "ks": sizes["ks"], "seeds": pivots}
    x = torch.stack([features(sizes["N"], sizes["D"], generator) for _ in range(sizes["B"])])
    return {"x": x.to(case.dtype), "k": sizes["k"], "seeds": torch.full((sizes["B"], 1), 7, device=device)}


def call(arguments):
    """The documented Python face."""
    return (pruneops.kcenter_varlen if "ks" in arguments else pruneops.kcenter)(**arguments)


def images(case, arguments):
    """Per image or batch of equal images: features [B, N, D], k, pivot [B] and where the image starts."""
    x, seeds = arguments["x"], arguments["seeds"]
    if "ks" not in arguments:
        return [(x, arguments["k"], seeds[:, 0], 0)]
    starts = [0, *itertools.accumulate(case.sizes["lengths"])]
    return [
        (x[None, start:end], k, seed - start, start)
        for start, end, k, seed in zip(starts, starts[1:], arguments["ks"], seeds)
    ]


def check(case, arguments, result, expected, precision):
    """Replay the choices in float64: each must be within tolerance of the best choice left.

    Greedy paths part for good at the first near-tie, so two right answers may share few tokens;
    how many places agree with the reference is reported, not judged.
    """
    indices, radii = result if isinstance(result, tuple) else (result, None)
    flat, flat_radii, place = indices.reshape(-1), None if radii is None else radii.reshape(-1), 0
    excess = radii_error = 0.0
    for x, k, pivots, start in images(case, arguments):
        for image, pivot in zip(x, pivots):
            chosen = flat[place : place + k] - start
            if len(chosen) != k or chosen.min() < 0 or chosen.max() >= len(image) or len(chosen.unique()) != k:
                return Check(False, "WRONG: not k different tokens")
            if chosen[0] != pivot:
                return Check(False, "WRONG: does not begin with the pivot")
            unit = torch.nn.functional.normalize(image.double(), dim=-1)
            nearest = (unit @ unit[chosen].T).cummax(1).values[:, :-1]  # [N, k - 1]: after 1, 2, .. choices
            own = nearest[chosen[1:]].diagonal()
            excess = max(excess, float((own - nearest.amin(0)).amax()))
            if radii is not None:
                error = flat_radii[place + 1 : place + k] - (1 - own).clamp(min=0)
                radii_error = max(radii_error, float(error.abs().nan_to_num(torch.inf).amax()))
            place += k
    tolerance = TOLERANCE[precision]
    right = excess <= tolerance and radii_error <= tolerance
    numbers = {"excess": excess, "tolerance": tolerance, "radii_max_diff": None if radii is None else radii_error}
    agree = None if expected is None else int((flat == expected.indices.reshape(-1)).sum())
    numbers |= {"agree_with_reference": agree, "choices": len(flat)}
    if not right:
        return Check(False, f"WRONG: off by {max(excess, radii_error):.2g}", numbers)
    return Check(True, "ok" if agree is None else f"ok, {agree}/{len(flat)}", numbers)


def _blocks(case):
    """(B, N, k) of every block of equal images."""
    sizes = case.sizes
    if "ks" in sizes:
        return [(1, n, k) for n, k in zip(sizes["lengths"], sizes["ks"])]
    return [(sizes["B"], sizes["N"], sizes["k"])]


def cost(case):
    D, blocks = case.sizes["D"], _blocks(case)
    read = sum(B * N * D * case.dtype.itemsize for B, N, _ in blocks)
    written = sum(B * k * (8 + 4) for B, _, k in blocks)
    return Cost(read, written, sum(2 * B * N * k * D for B, N, k in blocks))


def _loop_seconds(case, ceilings, itemsize=None, launches=6, batched=True):
    """One pass over x and a few small kernels per step."""
    D, itemsize = case.sizes["D"], itemsize or case.dtype.itemsize
    steps = sum(k * (1 if batched else B) for B, _, k in _blocks(case))
    moved = sum(B * N * k * D * itemsize for B, N, k in _blocks(case))
    return moved / ceilings.copy + steps * launches * 5e-6


def _item_seconds(case, ceilings):
    return _loop_seconds(case, ceilings, batched=False, launches=10)


def _reference_seconds(case, ceilings):
    return _loop_seconds(case, ceilings, itemsize=4, launches=20)


def _n_by_n_seconds(case, ceilings):
    D, size = case.sizes["D"], case.dtype.itemsize
    products = sum(2 * B * N * N * D for B, N, _ in _blocks(case))
    moved = sum(1.5 * B * k * k * N * size for B, N, k in _blocks(case))  # gathered, written, reduced
    return products / ceilings.matmul[case.dtype] + moved / ceilings.copy


def _prepare(form):
    def prepare(case, arguments):
        blocks = images(case, arguments)
        return lambda: torch.cat([(form(x, k, pivot) + start).reshape(-1) for x, k, pivot, start in blocks])

    return prepare


def _prepare_compiled(case, arguments):
    step = compiled(baselines.step, dynamic=False)
    return _prepare(functools.partial(baselines.loop, step=step))(case, arguments)


def _prepare_graph(case, arguments):
    return capture(_prepare(baselines.loop)(case, arguments))


def sanitize(device):
    """Every form of the operator on small shapes: both metrics, seeds, masks, odd and even strides, packed images.

    Entries are 1 or -1, so choices are those of the reference to the last tie wherever the
    arithmetic is exact: Euclidean always, cosine where D is a power of four.
    """
    generator = torch.Generator().manual_seed(1)
    for B, N, D, k, dtype in (
        (1, 33, 40, 9, torch.float32),
        (2, 130, 64, 40, torch.bfloat16),
        (1, 200, 1030, 30, torch.float16),
        (1, 5003, 64, 70, torch.bfloat16),  # rounds: past the bound of the Gram form
        (1, 10007, 24, 150, torch.float32),
    ):
        mask = torch.rand(B, N, generator=generator) < 0.9
        seeds = torch.randperm(N, generator=generator)[: B * 2].reshape(B, 2)
        for metric, margin in (("cosine", 16), ("euclidean", 1)):
            wide = signs((B, N, D + 2 * margin), generator).to(dtype)
            words = f"B {B} N {N} D {D} k {k} {str(dtype).removeprefix('torch.')} {metric}"
            exact = metric == "euclidean" or D in POWERS_OF_FOUR

            def run(to, wide=wide, k=k, seeds=seeds, mask=mask, metric=metric, margin=margin):
                x = wide.to(to)[..., margin:-margin]
                return pruneops.kcenter(x, k, seeds=seeds.to(to), mask=mask.to(to), metric=metric).indices

            yield words, as_reference(run, device) if exact else _all_different(run(device))
    lengths, ks = (70, 0, 5200, 33), (7, 0, 40, 33)
    packed = signs((sum(lengths), 64), generator)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])

    def run_packed(to):
        return pruneops.kcenter_varlen(packed.to(to), starts.to(to), ks).indices

    yield f"images {lengths} D 64", as_reference(run_packed, device)


def _all_different(indices):
    return all(len(row.unique()) == len(row) and row.min() >= 0 for row in indices.cpu())


OPERATOR = Operator(
    name="kcenter",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=_reference_seconds,
    peers={
        "loop": Peer(_prepare(baselines.loop), _loop_seconds),
        "loop_item": Peer(_prepare(baselines.loop_item), _item_seconds),
        "compiled": Peer(_prepare_compiled, _loop_seconds, compiles=True),
        "graph": Peer(_prepare_graph, _loop_seconds, devices=("cuda",)),
        "n_by_n": Peer(_prepare(baselines.n_by_n), _n_by_n_seconds),
    },
    sanitize=sanitize,
)
