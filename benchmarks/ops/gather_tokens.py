"""Gathering tokens of what a model's layer takes: cases, inputs, cost model, check of a result, peers.

Hidden states, mRoPE positions, a mask, cosines and sines. Least cost of a case: the kept tokens and their positions
read once, the kept tokens written once; no operations.
"""

import itertools
import math

import torch

import pruneops

from ..baselines import token_copy as baselines
from ..common import NAMES, SHARE, as_reference
from ..harness import capture, compiled
from ..registry import Case, Check, Cost, Operator, Peer
from .kv_compact import as_bytes, ascending, copy_seconds, laid_out, moved_seconds, on_card

DIMS = (1, 2, 1, 1, 1)


def _case(B, S, D, rope, dtype):
    sizes = {"B": B, "S": S, "K": round(SHARE * S), "D": D, "rope": rope}
    shape = f"hidden states and 4 more, B {B} S {S} -> {round(SHARE * S)} D {D} {NAMES[dtype]}"
    return Case(f"b{B}-s{S}-d{D}-{NAMES[dtype]}", shape, dtype, sizes)


CASES = (
    _case(1, 96, 64, 16, torch.float32),
    _case(3, 96, 64, 16, torch.float32),
    *(_case(B, 2880, 4096, 128, dtype) for B, dtype in itertools.product((1, 8), NAMES)),
)
TINY = tuple(case.name for case in CASES[:2])
FULL = tuple(case.name for case in CASES[2:])
SETS = {
    "cpu": {"tiny": TINY, "quick": FULL, "full": FULL},
    "cuda": {
        "tiny": TINY,
        "quick": ("b1-s2880-d4096-bfloat16",),
        "goals": ("b1-s2880-d4096-bfloat16", "b8-s2880-d4096-bfloat16"),
        "full": FULL,
    },
}


def _shapes(sizes, tokens):
    """Of the tensors with so many tokens."""
    B, D, rope = (sizes[key] for key in ("B", "D", "rope"))
    return (B, tokens, D), (3, B, tokens), (B, tokens), (B, tokens, rope), (B, tokens, rope)


def arguments(case, device):
    generator = torch.Generator(device).manual_seed(0)
    hidden, positions, mask, *angles = _shapes(case.sizes, case.sizes["S"])
    normal = {"generator": generator, "device": device, "dtype": case.dtype}
    tensors = [
        torch.randn(hidden, **normal),
        torch.randint(1 << 40, positions, generator=generator, device=device),
        torch.rand(mask, generator=generator, device=device) < 0.9,
        *(torch.randn(shape, **normal) for shape in angles),
    ]
    keep = ascending((case.sizes["B"],), case.sizes["S"], case.sizes["K"], device)
    return {"tensors": tensors, "keep": keep, "dim": DIMS}


def call(arguments):
    """The documented Python face."""
    return pruneops.gather_tokens(**arguments)


def check(case, arguments, result, expected, precision):
    """Every bit is in its place."""
    if result is None:
        return Check(True, "a yardstick")
    truth = baselines.tokens_gather(**arguments)
    shapes = [list(tensor.shape) for tensor in result]
    if shapes != [list(tensor.shape) for tensor in truth]:
        return Check(False, f"WRONG: of shapes {shapes}")
    wrong = [i for i, (own, right) in enumerate(zip(result, truth)) if not as_bytes([own]).equal(as_bytes([right]))]
    numbers = {"wrong_tensors": len(wrong)}
    return (
        Check(False, f"WRONG: other bits in tensors {wrong}", numbers)
        if wrong
        else Check(True, "ok, all bits", numbers)
    )


def cost(case):
    sizes = case.sizes
    hidden, positions, mask, *angles = (math.prod(shape) for shape in _shapes(sizes, sizes["K"]))
    kept = (hidden + sum(angles)) * case.dtype.itemsize + 8 * positions + mask
    return Cost(kept + 8 * sizes["B"] * sizes["K"], kept, 0)


def _seconds(case, ceilings):
    return moved_seconds(case, ceilings, cost)


def _gather_seconds(case, ceilings):
    return moved_seconds(case, ceilings, cost, passes=4, index=2)


def _prepare(form):
    return lambda case, arguments: lambda: form(**arguments)


def _prepare_compiled(case, arguments):
    return _prepare(compiled(baselines.tokens_index_select, dynamic=False))(case, arguments)


def _prepare_graph(case, arguments):
    return capture(_prepare(baselines.tokens_index_select)(case, arguments))


def _prepare_copy(case, arguments):
    counts = map(math.prod, _shapes(case.sizes, case.sizes["K"]))
    sources = [tensor.view(-1)[:count] for tensor, count in zip(arguments["tensors"], counts)]
    return on_card(lambda: baselines.copy(sources), sources[0])


def sanitize(device):
    """Small shapes: one list of tokens and one a row, shared by rows, widths and addresses of all kinds."""
    generator = torch.Generator().manual_seed(8)
    half, full, byte, long = torch.bfloat16, torch.float32, torch.uint8, torch.int64
    for rows, S, K, forms in (
        (None, 1, 1, [((1,), 0, full, "plain")]),
        (
            None,
            130,
            60,
            [((130, 64), 0, half, "plain"), ((3, 130, 5), 1, byte, "odd address"), ((130,), 0, long, "plain")],
        ),
        (
            2,
            97,
            150,
            [((2, 97, 33), 1, half, "odd address"), ((3, 1, 97), 2, long, "plain"), ((2, 97), 1, byte, "plain")],
        ),
        (
            3,
            300,
            40,
            [
                ((3, 300, 520), 1, half, "plain"),
                ((1, 300, 16), 1, full, "strided"),
                ((2, 3, 300, 2, 7), 2, full, "plain"),
            ],
        ),
        (
            1,
            700,
            70,
            [((1, 700, 2048), 1, half, "plain"), ((4, 1, 700), 2, long, "plain"), ((1, 700), 1, byte, "plain")],
        ),
    ):
        tensors = [laid_out(how, shape, dtype, generator) for shape, _, dtype, how in forms]
        dims = [dim for _, dim, _, _ in forms]
        keep = torch.randint(S, (K,) if rows is None else (rows, K), generator=generator)

        def run(to, tensors=tensors, keep=keep, dims=dims):
            return as_bytes(pruneops.gather_tokens([tensor(to)[1] for tensor in tensors], keep.to(to), dims))

        words = ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')} {how}" for shape, _, dtype, how in forms)
        yield f"keep {list(keep.shape)}: {words}", as_reference(run, device)


OPERATOR = Operator(
    name="gather_tokens",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=_seconds,
    peers={
        "copy": Peer(_prepare_copy, lambda case, ceilings: copy_seconds(case, ceilings, cost)),
        "index_select": Peer(_prepare(baselines.tokens_index_select), _seconds),
        "gather": Peer(_prepare(baselines.tokens_gather), _gather_seconds),
        "graph": Peer(_prepare_graph, _seconds, devices=("cuda",)),
        "compiled": Peer(_prepare_compiled, _seconds, compiles=True),
    },
    sanitize=sanitize,
)
