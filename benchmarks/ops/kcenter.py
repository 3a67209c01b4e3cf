"""Greedy k-center, by cosines or Euclidean distances: cases, cost model, check of a result, baselines.

Minimum cost of a case: x read once, indices and radii written once; the dot product of every chosen token with every
token, 2 B N k D operations (the norms are 2 B N D more, not counted).
"""

import functools
import itertools

import torch

import pruneops

from .. import common
from ..baselines import kcenter as baselines
from ..harness import compiled
from ..registry import Baseline, Cost

GPU_TIME_SHARE = 5
FIRST = 7  # token of an image that is chosen first


def _batched(B, N, D, dtype, metric="cosine"):
    name, shape = ("euclidean-", "euclidean, ") if metric == "euclidean" else ("", "")
    sizes = {"B": B, "N": N, "D": D, "k": round(common.KEEP * N), "metric": metric}
    return common.case(f"{name}b{{B}}-n{{N}}-d{{D}}", f"{shape}B {{B}} N {{N}} D {{D}} k {{k}}", dtype, **sizes)


def _varlen(D, dtype):
    ks = [round(common.KEEP * n) for n in common.VARLEN]
    shape = f"{len(ks)} images T {sum(common.VARLEN)} D {D} k {sum(ks)}"
    return common.case("varlen-d{D}", shape, dtype, lengths=list(common.VARLEN), D=D, ks=ks, metric="cosine")


CASES = (
    _batched(1, 96, 64, torch.float32),
    *(
        _batched(B, N, D, dtype)
        for N, B, D, dtype in itertools.product((576, 2880, 9216, 23328), (1, 8), (1024, 4096), common.DTYPES)
    ),
    *(_varlen(D, dtype) for D, dtype in itertools.product((1024, 4096), common.DTYPES)),
    _batched(1, 96, 64, torch.float32, "euclidean"),
    *(_batched(1, 2880, D, dtype, "euclidean") for D, dtype in itertools.product((1024, 4096), common.DTYPES)),
)
SETS = {
    "cpu": common.case_sets(
        CASES,
        tiny=1,
        quick="b1-n576-d1024-float32 b1-n576-d4096-float32 b8-n576-d1024-float32 b1-n2880-d1024-float32 "
        "b1-n2880-d4096-float32 varlen-d1024-float32 euclidean-b1-n2880-d1024-float32",
        goals="b1-n2880-d4096-bfloat16 b1-n576-d1024-bfloat16 b1-n2880-d4096-float32 euclidean-b1-n2880-d1024-float32",
        full=common.small_on_cpu,
    ),
    "cuda": common.case_sets(
        CASES,
        tiny=1,
        quick="b1-n576-d1024-bfloat16 b1-n2880-d4096-bfloat16 varlen-d1024-bfloat16",
        goals="b1-n576-d1024-bfloat16 b1-n2880-d4096-bfloat16 b1-n2880-d4096-float32 b8-n2880-d4096-bfloat16 "
        "b1-n9216-d4096-bfloat16 b1-n23328-d4096-bfloat16 varlen-d4096-bfloat16 euclidean-b1-n2880-d4096-bfloat16",
        full=common.every,
    ),
}


def arguments(case, device):
    """Features, and one seed per image, as in ToDRE."""
    sizes, x = case.sizes, common.image_tokens(case, torch.Generator(device).manual_seed(0))
    if "ks" in sizes:
        starts = torch.tensor(common.offsets(case), device=device)
        return {"x": x, "cu_seqlens": starts, "ks": sizes["ks"], "seeds": starts[:-1, None] + FIRST}
    options = {"metric": "euclidean"} if _is_euclidean(case) else {}
    return {"x": x, "k": sizes["k"], "seeds": torch.full((sizes["B"], 1), FIRST, device=device), **options}


def call(arguments):
    return (pruneops.kcenter_varlen if "ks" in arguments else pruneops.kcenter)(**arguments)


def images(case, arguments):
    """(start, features [B, N, D], k, pivots [B]) of every block of equal images."""
    ks = arguments["ks"] if "ks" in arguments else [arguments["k"]]
    blocks = common.blocks(case, arguments["x"], arguments["seeds"])
    return [(start, x, k, seeds[:, 0]) for (start, x, seeds), k in zip(blocks, ks)]


def check(case, arguments, result, expected, precision):
    """Replay the choices in float64: each must be within tolerance of the best choice left.

    Greedy paths diverge at the first near-tie, so two right results may share few tokens: agreement with the reference
    is reported, not judged.
    """
    indices, radii = result if isinstance(result, tuple) else (result, None)
    flat, flat_radii, place = indices.reshape(-1), None if radii is None else radii.reshape(-1), 0
    excess = radii_error = 0.0
    for start, x, k, pivots in images(case, arguments):
        for image, pivot in zip(x, pivots):
            chosen = flat[place : place + k] - start
            if len(chosen) != k or chosen.min() < 0 or chosen.max() >= len(image) or len(chosen.unique()) != k:
                return common.wrong("not k different tokens")
            if chosen[0] != pivot:
                return common.wrong("does not begin with the pivot")
            similarities = _similarities(case, image, chosen)
            nearest = similarities.cummax(1).values[:, :-1]  # [N, k - 1]: after 1, 2, .. choices
            similarity = nearest[chosen[1:]].diagonal()
            excess = max(excess, float((similarity - nearest.amin(0)).amax()))
            if radii is not None:
                stated = flat_radii[place + 1 : place + k]
                if _is_euclidean(case):
                    error = stated.double().square() / _scale(image) + similarity
                else:
                    error = stated - (1 - similarity).clamp(min=0)
                radii_error = max(radii_error, float(error.abs().nan_to_num(torch.inf).amax()))
            place += k
    numbers = {"excess": excess, "radii_max_diff": None if radii is None else radii_error}
    truth = None if expected is None else expected.indices.reshape(-1)
    return common.check_choices(max(excess, radii_error), common.TOLERANCE[precision], flat, truth, **numbers)


def _is_euclidean(case):
    return case.sizes["metric"] == "euclidean"


def _similarities(case, image, chosen):
    """[N, k] in float64; minus squared distances are in units of their largest term."""
    x = image.double()
    if not _is_euclidean(case):
        x = torch.nn.functional.normalize(x, dim=-1)
        return x @ x[chosen].T
    square = x.square().sum(-1)
    return (2 * (x @ x[chosen].T) - square[:, None] - square[chosen]) / _scale(image)


def _scale(image):
    return 4 * image.double().square().sum(-1).amax()


def _sizes(case):
    """(B, N, k) of every block of equal images."""
    sizes = case.sizes
    if "ks" in sizes:
        return [(1, n, k) for n, k in zip(sizes["lengths"], sizes["ks"])]
    return [(sizes["B"], sizes["N"], sizes["k"])]


def cost(case):
    D, itemsize = case.sizes["D"], case.dtype.itemsize
    read, written, operations = map(
        sum, zip(*((B * N * D * itemsize, B * k * (8 + 4), 2 * B * N * k * D) for B, N, k in _sizes(case)))
    )
    return Cost(read, written, operations)


def _loop_seconds(case, rates, itemsize=None, launches=6, batched=True):
    """A pass over x and a few small kernels per step."""
    steps = sum(k * (1 if batched else B) for B, _, k in _sizes(case))
    moved = cost(case).operations // 2 * (itemsize or case.dtype.itemsize)
    return moved / rates.copy + steps * launches * 5e-6


def _item_seconds(case, rates):
    return _loop_seconds(case, rates, batched=False, launches=10)


def reference_seconds(case, rates):
    return _loop_seconds(case, rates, itemsize=4, launches=20)


def _n_by_n_seconds(case, rates):
    D, itemsize = case.sizes["D"], case.dtype.itemsize
    products = sum(2 * B * N * N * D for B, N, _ in _sizes(case))
    moved = sum(1.5 * B * k * k * N * itemsize for B, N, k in _sizes(case))  # gathered, written, reduced
    return products / rates.matmul[case.dtype] + moved / rates.copy


def _prepare(function):
    def prepare(case, arguments):
        blocks, options = images(case, arguments), {"metric": "euclidean"} if _is_euclidean(case) else {}
        return lambda: torch.cat([
            (function(x, k, pivots, **options) + start).reshape(-1) for start, x, k, pivots in blocks
        ])  # fmt: skip

    return prepare


def _prepare_quickfps(bucketed):
    def prepare(case, arguments):
        return lambda: baselines.quickfps(arguments["x"], arguments["k"], FIRST, bucketed).reshape(-1)

    return prepare


def _prepare_compiled(case, arguments):
    step = compiled(baselines.step, dynamic=False)
    return _prepare(functools.partial(baselines.loop, step=step))(case, arguments)


_LOOP = Baseline(_prepare(baselines.loop), _loop_seconds)
BASELINES = {
    "loop": _LOOP,
    "loop_item": Baseline(_prepare(baselines.loop_item), _item_seconds),
    "compiled": Baseline(_prepare_compiled, _loop_seconds, compiles=True),
    "graph": common.captured(_LOOP),
    "n_by_n": Baseline(_prepare(baselines.n_by_n), _n_by_n_seconds, applies=lambda case: not _is_euclidean(case)),
    "quickfps": Baseline(
        _prepare_quickfps(True), _loop_seconds, package="torch_quickfps", applies=_is_euclidean,
    ),
    "quickfps plain": Baseline(
        _prepare_quickfps(False), _loop_seconds, package="torch_quickfps", applies=_is_euclidean,
    ),
}  # fmt: skip
