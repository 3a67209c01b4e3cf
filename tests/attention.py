"""What the tests of `attention_mass` and `attention_received` share: where they run, inputs, attention in float64."""

import functools

import torch
from hypothesis import strategies as st

from tests import contract, strategies
from tests.invalid_calls import DTYPE_NAMES, InvalidCall

# Layouts of a tensor [.., heads, tokens, features] in memory. All but "one head" keep its values.
LAYOUTS = {
    **{name: layout for name, layout in strategies.LAYOUTS.items() if name != "expanded"},
    "tokens before heads": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
    "one head": lambda t: t[..., :1, :, :].expand(t.shape),
}

# (B, H, Hk, Sq, Sk, D): prefill, more keys than queries and fewer, decode, few queries, a token past a block.
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


def attention(query, key, counted, seen, causal=True, scale=None, lse=None):
    """(probabilities [.., H, Sq, Sk], lse [.., H, Sq]) in float64; 0 and -inf where nothing is counted or seen."""
    (heads, queries, width), keys = query.shape[-3:], key.shape[-2]
    key = key.double().repeat_interleave(heads // key.shape[-3], -3)
    logits = query.double() @ key.mT * (width**-0.5 if scale is None else scale)
    visible = counted[..., None, :, None] & seen[..., None, None, :]
    if causal:
        visible = visible & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    logits = logits.where(visible, -torch.inf)
    lse = logits.logsumexp(-1) if lse is None else lse.double()
    live = visible & (lse != -torch.inf)[..., None]
    return (logits - lse[..., None]).exp().where(live, 0.0), lse


def real(B, H, Hk, Sq, Sk, D, seed=0, dtype=torch.float32):
    """(query, key): some rows attend to few keys, some to many."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, Sq, D, generator=generator) * torch.rand(B, H, Sq, 1, generator=generator) * 4
    return query.to(dtype), torch.randn(B, Hk, Sk, D, generator=generator).to(dtype)


def ranked(B, H, Hk, Sq, Sk, D, generator):
    """(query, key, options): to every query one key outdoes the others by 256, so its probability is exactly 1."""
    signs = torch.randint(0, 2, (D,), generator=generator) * 2.0 - 1
    query = signs * (torch.randint(0, 2, (B, H, Sq, 1), generator=generator) * 2.0 - 1)  # best: the last or first rank
    key = signs * torch.rand(B, Hk, Sk, generator=generator).argsort(-1)[..., None]
    return query, key, {"scale": 256 / D}


def counting(B, H, Hk, Sq, Sk, D, generator):
    """(query, key, options): logits are 0 or at most -256, lse is 0 or -inf, so probabilities are exactly 0 or 1."""
    query = 16.0 * (torch.rand(B, H, Sq, D, generator=generator) < 2 / D)
    key = -16.0 * (torch.rand(B, Hk, Sk, D, generator=generator) < 0.5)
    lse = torch.tensor([0.0, 0.0, -torch.inf])[torch.randint(0, 3, (B, H, Sq), generator=generator)]
    return query, key, {"scale": 1, "lse": lse}


def runs(shape, groups, generator):
    """int64 [.., S]: groups in runs of all lengths, as of text and images, some of them -1."""
    run = (torch.rand(shape, generator=generator) < 0.1).cumsum(-1)
    return torch.randint(-1, groups, (*shape[:-1], shape[-1] + 1), generator=generator).gather(-1, run)


def spoiled(tensor, live, generator):
    """The tensor with anything in it where it must not matter."""
    anything = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38]).to(tensor.dtype)
    return tensor.where(live, anything[torch.randint(0, len(anything), tensor.shape, generator=generator)])


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
def live(draw, shape, generator):
    """bool [B, S]: all, none, some, padded on the left, on the right or in the middle, each row to its own place."""
    edge, token = torch.randint(0, shape[-1] + 1, (shape[0], 1), generator=generator), torch.arange(shape[-1])
    chance = torch.rand(shape, generator=generator)
    forms = chance < 1, chance < 0, chance < 0.5, chance < 0.95, token >= edge, token < edge, (token - edge).abs() > 2
    return draw(st.sampled_from(forms))


@st.composite
def exact_attention(draw):
    """(query, key, counted, seen, options) whose probabilities are 0 or 1, in float32 as in float64.

    Queries that do not count and keys that nobody sees hold anything, and so does the lse of the former.
    """
    generator = draw(strategies.generators)
    B, _, _, Sq, Sk, _ = shape = draw(shapes())
    query, key, options = draw(st.sampled_from([ranked, counting]))(*shape, generator)
    dtype = draw(strategies.dtypes)  # ranks below 257 are exact in bfloat16
    counted, seen = draw(live((B, Sq), generator)), draw(live((B, Sk), generator))
    layouts = st.sampled_from(list(LAYOUTS.values()))
    query = draw(layouts)(spoiled(query.to(dtype), counted[:, None, :, None], generator))
    key = draw(layouts)(spoiled(key.to(dtype), seen[:, None, :, None], generator))
    if "lse" in options:
        options["lse"] = draw(strategies.laid_out(spoiled(options["lse"], counted[:, None], generator), expand=False))
    return query, key, counted, seen, {**options, "causal": draw(st.booleans())}


def small_tiles(monkeypatch, whole, ratio):
    """Triton kernels with tiles of 16, in steps of 16 features or with all of up to 64. ratio: H / Hk."""
    from pruneops.triton_kernels import attention_mass, attention_received

    heads = 1 << (ratio - 1).bit_length()
    tile = {"BLOCK_N": 16, "BLOCK_D": 64 if whole else 16, "WHOLE": whole}
    options = {"num_warps": 4, "num_stages": 2}
    received = {"BLOCK_T": 16 // heads, "R_PAD": heads, **tile}
    monkeypatch.setattr(attention_mass, "tiles", lambda *_: ({"BLOCK_M": 16, **tile}, options))
    monkeypatch.setattr(attention_received, "tiles", lambda *_: (received, options))
    monkeypatch.setattr(attention_mass, "LIST", ({"BLOCK_S": 32}, {"num_warps": 4}))
    monkeypatch.setattr(attention_mass, "REDUCE", ({"BLOCK_S": 16}, {"num_warps": 4}))
    for name, kernel in (vars(attention_mass) | vars(attention_received)).items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernel, "compiled", {})  # forms do not tell tiles apart


GROUPS = """
def groups(query, key):
    return [torch.arange(t.shape[2]).remainder(3).expand(1, -1) for t in (query, key)]
"""
NATIVE_MEMORY = """
import re, torch, pruneops

def kilobytes(name):  # getrusage would count the process that started this one
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s+(\\d+) kB", status.read())[1])

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
        if all(own.alias_info is None for own in function._schema.returns):
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


FORMS = """
import torch
from pruneops.triton_kernels import _launch, {op} as kernels
from tests import attention

asked = set()  # (kernel, form)

def ask(kernel, form, grid, *args):
    asked.add((kernel.__name__, form))
    divisible = kernel.describe(*form).divisible
    for name, arg in zip(kernel.jit.arg_names, args):
        number = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
        assert name not in divisible or number % 16 == 0, (kernel.__name__, name, number)

_launch.Kernel.__call__ = ask
for dtype, D in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 72), (torch.float16, 33)):
    for Sq in (20, 1):
        query, key = (torch.ones(2, h, S, D, dtype=dtype) for h, S in ((4, Sq), (2, 50)))
        query_group, key_group = groups(query, key)
        query_group, key_group = query_group.expand(2, -1), key_group.expand(2, -1)
        asked.clear()
        for layout in attention.LAYOUTS.values():
            for other in attention.LAYOUTS.values():
                query_now, key_now = layout(query), other(key)
                if query_now.stride(-1) == key_now.stride(-1) == 1:
                    {call}
        print(len(asked))
"""


def triton_forms(op, call):
    """How many kernels and forms a launcher asks for over all layouts of query and key: by dtype, prefill, decode."""
    return list(map(int, contract.run_python(GROUPS + FORMS.format(op=op, call=call)).split()))


def native_memory(call):
    """Bytes beyond its input that a call needs, in prefill and in decode: H 2, Sq 15000; Sk 2^17."""
    return map(int, contract.run_python(GROUPS + NATIVE_MEMORY.format(call=call)).split())


def triton_memory(op, call):
    """Bytes of all tensors that a launcher makes, in prefill and in decode: H 8, Sq 20000; H 8, Sk 2^17."""
    return map(int, contract.run_compile_only(GROUPS + TRITON_MEMORY.format(op=op, call=call)).split())


def attention_errors(op, good):
    """`Bad` calls by arguments that both operators have; `good` holds query [2, 4, 5, 8] and key [2, 2, 6, 8]."""
    bad, query, key, lse = functools.partial(InvalidCall, op, good), good["query"], good["key"], torch.zeros(2, 4, 5)
    of_batch = "of shape [2, Hk, Sk, 8]"
    return [
        bad(ValueError, "query", "of shape [5, 8]", "of rank 3 or 4", query=query[0, 0]),
        bad(ValueError, "query", "of shape [1, 2, 4, 5, 8]", "of rank 3 or 4", query=query[None]),
        bad(ValueError, "query", "of shape [2, 4, 5, 0]", "at least one feature wide", query=query[..., :0]),
        bad(TypeError, "query", "torch.float64", DTYPE_NAMES, query=query.double()),
        bad(TypeError, "query", "torch.int32", DTYPE_NAMES, query=query.int()),
        bad(TypeError, "key", "torch.float16", "the dtype of query, torch.float32", key=key.half()),
        bad(ValueError, "key", "on meta", "on the device of query, cpu", key=key.to("meta")),
        bad(ValueError, "key", "of shape [2, 6, 8]", of_batch, key=key[0]),
        bad(ValueError, "key", "of shape [1, 2, 6, 8]", of_batch, key=key[:1]),
        bad(ValueError, "key", "of shape [2, 2, 6, 7]", of_batch, key=key[..., :7]),
        bad(ValueError, "key", "of shape [2, 2, 6, 8]", "of shape [Hk, Sk, 8]", query=query[0]),
        bad(
            ValueError, "query", "257 features a head", "at most 256 features a head",
            query=torch.ones(2, 4, 5, 257), key=torch.ones(2, 2, 6, 257),
        ),
        bad(ValueError, "key", "of 0 heads", "of a number of heads that divides the 4 of query", key=key[:, :0]),
        bad(
            ValueError, "key", "of 3 heads", "of a number of heads that divides the 4 of query",
            key=key[:, [0, 1, 1]],
        ),
        bad(TypeError, "lse", "torch.float64", "float32", lse=lse.double()),
        bad(ValueError, "lse", "of shape [2, 4, 6]", "of shape [2, 4, 5]", lse=torch.zeros(2, 4, 6)),
        bad(ValueError, "lse", "of shape [4, 5]", "of shape [2, 4, 5]", lse=lse[0]),
        bad(ValueError, "lse", "on meta", "on the device of query, cpu", lse=lse.to("meta")),
    ]  # fmt: skip


# (changes to a good call, words of the TypeError)
ATTENTION_TYPES = [
    ({"query": [[1.0]]}, "query must be Tensor, got list"),
    ({"key": 1.0}, "key must be Tensor, got float"),
    ({"causal": "yes"}, "causal must be bool, got str"),
    ({"scale": "1"}, "scale must be float or int or NoneType, got str"),
    ({"lse": 0.0}, "lse must be Tensor or NoneType, got float"),
]
