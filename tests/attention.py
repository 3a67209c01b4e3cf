"""Shared by the tests of `attention_mass` and `attention_received`: shapes, strategies, tiles, memory."""

import torch
from hypothesis import strategies as st

from tests import contract, strategies
from tests.inputs import HEAD_LAYOUTS, counting, poison, ranked

# (B, H, Hk, Sq, Sk, D): prefill, more and fewer keys than queries, decode, few queries, one token past a tile.
SHAPES = [
    (2, 4, 2, 300, 300, 64),
    (1, 7, 1, 130, 500, 80),
    (2, 2, 2, 400, 130, 33),
    (1, 3, 3, 65, 257, 256),
    (2, 8, 1, 1, 3000, 128),
    (1, 2, 2, 1, 4097, 72),
    (2, 16, 2, 3, 700, 16),
    (3, 2, 1, 129, 129, 32),
    (1, 1, 1, 50, 1025, 1),
]
EDGES = [(0, 2, 1, 3, 5, 4), (2, 2, 1, 0, 5, 4), (2, 2, 1, 5, 0, 4), (2, 0, 1, 3, 5, 4), (1, 1, 1, 1, 1, 1)]


def smaller(target, shape):
    """At most 250 keys and a quarter of the queries under Triton's interpreter."""
    B, H, Hk, Sq, Sk, D = shape
    return (B, H, Hk, Sq // 4 + 1, min(Sk // 4, 250) + 1, D) if target.interpreted else shape


def unbatched(values):
    """The only batch row of tensors, alone or in dictionaries; other values as they are."""
    if isinstance(values, dict):
        return dict(zip(values, unbatched(values.values())))
    return [value[0] if isinstance(value, torch.Tensor) else value for value in values]


@st.composite
def shapes(draw, widths=(1, 16, 32, 33, 72, 80, 128, 256)):
    """(B, H, Hk, Sq, Sk, D): more queries than keys or fewer, or decode."""
    queries, keys = draw(st.tuples(st.integers(1, 40), st.integers(1, 60)) | st.tuples(st.just(1), st.integers(1, 250)))
    key_heads, ratio = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 7, 8]))
    batch, width = draw(st.sampled_from([1, 1, 2, 2, 3, 0])), draw(st.sampled_from(widths))
    return batch, key_heads * ratio, key_heads, queries, keys, width


@st.composite
def valid_masks(draw, shape, generator):
    """bool [B, S]: all, none, some, padded on the left, right or in the middle, each row with another amount."""
    edge, token = torch.randint(0, shape[-1] + 1, (shape[0], 1), generator=generator), torch.arange(shape[-1])
    chance = torch.rand(shape, generator=generator)
    masks = chance < 1, chance < 0, chance < 0.5, chance < 0.95, token >= edge, token < edge, (token - edge).abs() > 2
    return draw(st.sampled_from(masks))


@st.composite
def exact_attention(draw):
    """(query, key, counted, seen, options) whose probabilities are 0 or 1, in float32 as in float64.

    Queries that are not counted, their lse, and masked keys are poisoned.
    """
    generator = draw(strategies.generators)
    B, _, _, Sq, Sk, _ = shape = draw(shapes())
    query, key, options = draw(st.sampled_from([ranked, counting]))(*shape, generator)
    dtype = draw(strategies.dtypes)  # ranks below 257 are exact in bfloat16
    counted, seen = draw(valid_masks((B, Sq), generator)), draw(valid_masks((B, Sk), generator))
    layouts = st.sampled_from(list(HEAD_LAYOUTS.values()))
    query = draw(layouts)(poison(query.to(dtype), counted[:, None, :, None], generator))
    key = draw(layouts)(poison(key.to(dtype), seen[:, None, :, None], generator))
    if "lse" in options:
        options["lse"] = draw(strategies.laid_out(poison(options["lse"], counted[:, None], generator), expand=False))
    return query, key, counted, seen, {**options, "causal": draw(st.booleans())}


def small_tiles(monkeypatch, full_d, ratio):
    """Triton kernels with tiles of 16, and steps of 16 features or one of up to 64 (full_d). ratio: H / Hk."""
    from pruneops.triton_kernels import attention_mass, attention_received

    heads = 1 << (ratio - 1).bit_length()
    tile = {"BLOCK_N": 16, "BLOCK_D": 64 if full_d else 16, "FULL_D": full_d}
    options = {"num_warps": 4, "num_stages": 2}
    received = {"BLOCK_T": 16 // heads, "R_PAD": heads, **tile}
    monkeypatch.setattr(attention_mass, "tiles", lambda *_: ({"BLOCK_M": 16, **tile}, options))
    monkeypatch.setattr(attention_received, "tiles", lambda *_: (received, options))
    monkeypatch.setattr(attention_mass, "LIST", ({"BLOCK_S": 32}, {"num_warps": 4}))
    monkeypatch.setattr(attention_mass, "REDUCE", ({"BLOCK_S": 16}, {"num_warps": 4}))
    for name, kernel in (vars(attention_mass) | vars(attention_received)).items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernel, "compiled", {})  # a spec does not name the tiles


GROUPS = """
def groups(query, key):
    return [torch.arange(t.shape[2]).remainder(3).expand(1, -1) for t in (query, key)]
"""
NATIVE_MEMORY = """
def run(query, key, query_group, key_group):
    {call}

with pruneops.backend("cpu"):
    for H, Hk, Sq, Sk, D in ((2, 2, 15000, 15000, 8), (8, 4, 1, 2**17, 64)):
        query, key = (torch.randn(1, S, h, D).transpose(1, 2) for S, h in ((Sq, H), (Sk, Hk)))
        start, whole = (query[:, :, :9], key[:, :, :9]), (query, key)
        run(*start, *groups(*start))
        before = kilobytes("VmRSS")
        run(*whole, *groups(*whole))
        print(1024 * (kilobytes("VmHWM") - before))
"""
TRITON_MEMORY = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tests import compile_only_driver
from pruneops.triton_kernels import {op} as kernels

class Fresh(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {{}}))
        if all(value.alias_info is None for value in function._schema.returns):
            self.bytes += result.nbytes
        return result

for Sq, Sk in ((20000, 20000), (1, 2**17)):
    query, key = (torch.ones(1, S, h, 64, dtype=torch.bfloat16).transpose(1, 2) for S, h in ((Sq, 8), (Sk, 2)))
    query_group, key_group = groups(query, key)
    mode = Fresh()
    mode.bytes = 0
    with mode:
        {call}
    print(mode.bytes)
"""


SPECIALIZATIONS = """
import torch
from pruneops.triton_kernels import _launch, {op} as kernels
from tests.inputs import HEAD_LAYOUTS

used = set()  # (kernel, spec)

def record(kernel, spec, grid, *args):
    used.add((kernel.__name__, spec))
    divisible = kernel.specialize(*spec).divisible
    for name, arg in zip(kernel.jit.arg_names, args):
        number = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
        assert name not in divisible or number % 16 == 0, (kernel.__name__, name, number)

_launch.Kernel.__call__ = record
_launch.INTERPRETED = True  # no driver is asked for the architecture
for dtype, D in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 72), (torch.float16, 33)):
    for Sq in (20, 1):
        query, key = (torch.ones(2, h, S, D, dtype=dtype) for h, S in ((4, Sq), (2, 50)))
        query_group, key_group = groups(query, key)
        query_group, key_group = query_group.expand(2, -1), key_group.expand(2, -1)
        used.clear()
        for layout in HEAD_LAYOUTS.values():
            for other in HEAD_LAYOUTS.values():
                query_now, key_now = layout(query), other(key)
                if query_now.stride(-1) == key_now.stride(-1) == 1:
                    {call}
        print(len(used))
"""


def triton_specializations(op, call):
    """Number of specializations that a launcher uses over all layouts of query and key: by dtype, prefill, decode."""
    return list(map(int, contract.run_python(GROUPS + SPECIALIZATIONS.format(op=op, call=call)).split()))


def native_memory(call):
    """Bytes that a call allocates, in prefill and in decode: H 2, Sq 15000; Sk 2^17."""
    return map(int, contract.run_python(contract.KILOBYTES + GROUPS + NATIVE_MEMORY.format(call=call)).split())


def triton_memory(op, call):
    """Bytes of all tensors that a launcher creates, in prefill and in decode: H 8, Sq 20000; H 8, Sk 2^17."""
    return map(int, contract.run_compile_only(GROUPS + TRITON_MEMORY.format(op=op, call=call)).split())
