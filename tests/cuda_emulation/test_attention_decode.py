import ctypes
import functools

import pytest
import torch

from pruneops import reference
from tests import contract
from tests.contract import EPS, assert_same_bits
from tests.inputs import HEAD_LAYOUTS, counting, poison, random_groups, ranked, real
from tests.oracles import attention

from . import ELEMENTS, INT, INT32, POINTER, compile_kernels, needs_compiler, pointer

pytestmark = needs_compiler
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)


class GroupArg(ctypes.Structure):
    _fields_ = (("data", POINTER), ("stride", INT * 2), ("bytes", INT))

    def __init__(self, group):
        if group is not None:
            super().__init__(group.data_ptr(), (INT * 2)(*group.stride()), group.element_size())


class Call(ctypes.Structure):
    _fields_ = (
        *(("query", POINTER), ("key", POINTER), ("query_stride", INT * 3), ("key_stride", INT * 3)),
        *(("lse", POINTER), ("lse_stride", INT * 3), ("query_group", GroupArg), ("key_group", GroupArg)),
        *((name, INT) for name in ("batch", "heads", "key_heads", "queries", "keys", "head_dim", "groups")),
        *(("mass", POINTER), ("lse_out", POINTER), ("received", POINTER), ("scale", ctypes.c_float)),
        *((name, INT32) for name in ("causal", "element", "min_keys", "backwards", "supported")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("attention_decode", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """attention_mass or, without groups, attention_received; None where not supported. Outputs are poisoned first."""

    def run(
        query, key, query_group=None, key_group=None, groups=None, *,
        causal=True, scale=None, lse=None, min_keys=64, backwards=False,
    ):  # fmt: skip
        B, H, Sq, D = query.shape
        Sk = key.shape[2]
        sizes = [(B, H, Sk)] if groups is None else [(B, H, groups, groups), (B, H, Sq)]
        outs = [torch.full(size, torch.nan) for size in sizes]
        call = Call(
            query=pointer(query),
            key=pointer(key),
            query_stride=(INT * 3)(*query.stride()[:3]),
            key_stride=(INT * 3)(*key.stride()[:3]),
            lse=pointer(lse),
            lse_stride=(INT * 3)(*((0, 0, 0) if lse is None else lse.stride())),
            query_group=GroupArg(query_group),
            key_group=GroupArg(key_group),
            **{"batch": B, "heads": H, "key_heads": key.shape[1], "queries": Sq, "keys": Sk, "head_dim": D},
            groups=groups or 1,
            **dict(zip(("received",) if groups is None else ("mass", "lse_out"), map(pointer, outs))),
            scale=D**-0.5 if scale is None else scale,
            causal=causal,
            element=ELEMENTS.index(query.dtype),
            min_keys=min_keys,
            backwards=backwards,
        )
        kernel(ctypes.byref(call))
        if not call.supported:
            return None
        return outs[0] if groups is None else tuple(outs)

    return run


CONFIGS = {
    "64 keys": {},
    "16 keys, backwards": {"min_keys": 16, "backwards": True},
    "one block": {"min_keys": 1024},
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# (B, H, Hk, Sq, Sk, D): decode, GQA, one full tile, several tiles, fewer and more keys than queries, more queries than
# are scanned at once, blocks of more than four warps.
SHAPES = [
    (1, 2, 2, 1, 700, 128),
    (2, 14, 2, 1, 203, 64),
    (1, 2, 1, 8, 90, 128),
    (1, 3, 1, 5, 130, 64),
    (1, 3, 1, 40, 33, 64),
    (2, 2, 2, 100, 300, 128),
    (1, 1, 1, 1700, 70, 64),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def dtype_of(shape):
    """float16 where ranks need more than the 8 bits of bfloat16."""
    return torch.float16 if shape[4] > 256 or SHAPES.index(shape) % 2 else torch.bfloat16


def float64_mass(query, key, query_group, key_group, groups, **options):
    """(mass, lse) in float64; a group out of range counts as -1."""
    valid = [group.where(group < groups, -1) for group in (query_group, key_group)]
    probability, lse = attention(query, key, *(group >= 0 for group in valid), **options)
    from_group, to_group = ((group[..., None, :, None] == torch.arange(groups)).double() for group in valid)
    return from_group.mT @ probability @ to_group, lse


def float64_received(query, key, query_mask=None, key_mask=None, **options):
    masks = ((query, query_mask), (key, key_mask))
    masks = (torch.ones(len(t), t.shape[2], dtype=torch.bool) if m is None else m for t, m in masks)
    return attention(query, key, *masks, **options)[0].sum(-2)


def few_groups(shape, groups=3):
    """Random groups; of more than 100 queries about 40 count."""
    query_group, key_group = random_groups(shape, groups=groups)
    if shape[3] > 100:
        query_group = query_group.where(torch.rand(query_group.shape) < 40 / shape[3], -1)
    query_group[:, -1:] = 1
    return query_group, key_group


def is_supported(shape, options):
    """attention_mass without lse needs one tile of rows."""
    _, H, Hk, Sq, _, _ = shape
    return options.get("lse") is not None or H // Hk * Sq <= 16


@by_config
@by_shape
@pytest.mark.parametrize("kind", (ranked, counting), ids=lambda kind: kind.__name__)
def test_exact_inputs(emulate, config, shape, kind):
    query, key, options = kind(*shape, torch.Generator().manual_seed(0))
    query, key = query.to(dtype_of(shape)), key.to(dtype_of(shape))
    for causal, groups in ((True, 5), (False, 8)):
        own, every = few_groups(shape, groups), {**options, "causal": causal}
        result = emulate(query, key, *own, groups, **every, **config)
        assert (result is not None) == is_supported(shape, every)
        if result:
            truth, true_lse = float64_mass(query, key, *own, groups, **every)
            assert_same_bits(result[0], truth.float())
            close(result[1], options.get("lse", true_lse), rtol=4 * EPS, atol=0)
        for args in ((query, key, *(group >= 0 for group in own)), (query, key)):
            if shape[3] < 1000 or len(args) > 2:
                assert_same_bits(emulate(*args, **every, **config), float64_received(*args, **every).float())


@by_config
@by_shape
def test_real_values(emulate, config, shape):
    """Errors at most twice the reference's; the same bits on every call."""
    query, key = real(*shape, dtype=dtype_of(shape))
    groups = few_groups(shape)
    masks = [group >= 0 for group in groups]
    lse = float64_mass(query, key, *groups, 3)[1].float()
    for options in ({}, {"causal": False, "scale": 0.3}, {"lse": lse}):
        got, truth, allowed = [emulate(query, key, *masks, **options, **config)], [], []
        truth.append(float64_received(query, key, *masks, **options))
        allowed.append(reference.attention_received(query, key, query_mask=masks[0], key_mask=masks[1], **options))
        assert_same_bits(emulate(query, key, *masks, **options, **config), got[0])
        if is_supported(shape, options):
            got += emulate(query, key, *groups, 3, **options, **config)
            truth += float64_mass(query, key, *groups, 3, **options)
            allowed += reference.attention_mass(query, key, *groups, 3, **options)
            assert_same_bits(emulate(query, key, *groups, 3, **options, **config), tuple(got[1:]))
        for result, other, exact in zip(got, allowed, truth):
            assert torch.equal(result.isfinite(), exact.isfinite())
            error, bound = (float((r - exact).nan_to_num(0).abs().max()) for r in (result, other))
            contract.assert_no_worse(error, bound, float(exact.abs().nan_to_num(posinf=0).max()), ulps=8)


def every_result(emulate, query, key, query_group, key_group, lse, **config):
    received = emulate(query, key, query_group >= 0, key_group >= 0, lse=lse, **config)
    mass = emulate(query, key, query_group, key_group, 3, lse=lse, **config)
    return received, *(mass or ())


@by_config
@pytest.mark.parametrize("given_lse", (False, True))
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 90, 64), (2, 4, 2, 9, 150, 128), (2, 4, 2, 5, 50, 64)], ids=str)
def test_padding_and_strides_change_no_bit(emulate, config, shape, given_lse):
    """Poisoned padding; every aligned layout; int32 groups; batch rows alone."""
    query, key = real(*shape, dtype=torch.bfloat16)
    groups = query_group, key_group = random_groups(shape)
    query_group[:, -1] = 2
    lse = float64_mass(query, key, *groups, 3)[1].float() if given_lse else None
    answer = functools.partial(every_result, emulate, **config)
    plain = answer(query, key, *groups, lse)
    generator = torch.Generator().manual_seed(0)
    live_queries, live_keys = (query_group >= 0)[:, None], (key_group >= 0)[:, None]
    bad_query, bad_key = (poison(t, m[..., None], generator) for t, m in ((query, live_queries), (key, live_keys)))
    bad = poison(lse, live_queries, generator) if given_lse else None
    expected = (*plain[:2], bad) if given_lse else plain
    assert_same_bits(answer(bad_query, bad_key, *groups, bad), expected)
    for name in HEAD_LAYOUTS.keys() - {"one head"}:
        laid_out = HEAD_LAYOUTS[name](query), HEAD_LAYOUTS[name](key)
        short = [torch.stack([g.int()] * 2, -1)[..., 1] for g in groups]
        strided = None if lse is None else torch.stack([lse] * 2, -1)[..., 0]
        aligned = all(t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:3]) for t in laid_out)
        if aligned and all(t.stride(-1) == 1 for t in laid_out):
            assert_same_bits(answer(*laid_out, *short, strided), plain)
    alone = answer(*(t[1:] for t in (query, key, *groups)), None if lse is None else lse[1:])
    assert_same_bits(alone, tuple(result[1:] for result in plain))


@by_config
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("given_lse", (False, True))
@pytest.mark.parametrize("queries", (1, 7, 24))
def test_special_values_show(emulate, config, queries, given_lse, bad):
    """They show in the rows that attend to them, as in the reference; other heads and batch rows keep their bits."""
    query, key = real(2, 4, 2, queries, 80, 64, dtype=torch.float16)
    group, other = torch.arange(queries).div(20).long().expand(2, -1), torch.arange(80).div(30).long().expand(2, -1)
    lse = float64_mass(query, key, group, other, 3)[1].float() if given_lse else None
    options = {"lse": lse}
    has_mass = is_supported((2, 4, 2, queries, 80, 64), options)
    before = emulate(query, key, **options, **config), emulate(query, key, group, other, 3, **options, **config)
    for tensor, place, heads, from_group in (
        (query, (1, 2, 0), [2], 0),
        (key, (1, 1, 35), [2, 3], int(group[0, -1])),
    ):
        original, tensor[place] = tensor[place].clone(), bad
        received = emulate(query, key, **options, **config)
        expected = reference.attention_received(query, key, **options)
        mass = emulate(query, key, group, other, 3, **options, **config)
        tensor[place] = original
        touched = torch.zeros(2, 4, dtype=torch.bool)
        touched[1, heads] = True
        assert_same_bits(received[~touched], before[0][~touched])
        assert torch.equal(received.isnan(), expected.isnan())
        assert (mass is not None) == has_mass
        if not has_mass:
            continue
        assert_same_bits([r[~touched] for r in mass], [r[~touched] for r in before[1]])
        assert mass[0][touched][:, from_group].isnan().all()
        if given_lse:
            assert_same_bits(mass[1], lse)
        else:
            assert not mass[1][touched].isfinite().all(-1).any()


@by_config
def test_nothing_visible(emulate, config):
    """Queries before the first key, rows of padding alone, lse of -inf: 0 and -inf, never NaN."""
    for queries in (1, 5, 28):
        shape = 3, 2, 1, queries, 12, 64
        query, key = real(*shape, dtype=torch.bfloat16)
        key_group, group = torch.full((3, 12), -1), torch.zeros(3, queries, dtype=torch.int64)
        key_group[1:, 3:9], group[2] = 1, -1
        truth, lse = float64_mass(query, key, group, key_group, 2)
        for own_lse in (None, lse.float()):
            received = emulate(query, key, group >= 0, key_group >= 0, lse=own_lse, **config)
            close(received, float64_received(query, key, group >= 0, key_group >= 0))
            assert (received[[0, 2]] == 0).all()
            if is_supported(shape, {"lse": own_lse}):
                mass, lse_out = emulate(query, key, group, key_group, 2, lse=own_lse, **config)
                close((mass, lse_out), (truth, lse))
                assert (mass[[0, 2]] == 0).all()


@by_config
def test_unchecked_groups(emulate, config):
    """A group out of range counts as -1."""
    for queries in (1, 8, 30):
        shape = 1, 2, 1, queries, 130, 64
        query, key = real(*shape, dtype=torch.float16)
        query_group, key_group = random_groups(shape)
        query_group[query_group == 0], key_group[key_group == 0], key_group[:, 40:80] = 9, 3, 2**40
        query_group[:, -1] = 1
        args = query, key, query_group, key_group, 3
        for lse in (None, float64_mass(*args)[1].float()):
            if is_supported(shape, {"lse": lse}):
                close(emulate(*args, lse=lse, **config), float64_mass(*args, lse=lse))


@by_config
@pytest.mark.parametrize("height", (-1e4, 1e4))
def test_hard_softmax(emulate, config, height):
    """Steps of 1 on logits of 10^4, exact in float32; lse within rounding."""
    query, key = torch.zeros(1, 2, 3, 64), torch.zeros(1, 1, 190, 64)
    query[..., 0], query[..., 1] = 100, 1
    key[..., 0], key[..., 1] = height / 100, -torch.randint(0, 9, (1, 1, 190))
    query, key = query.half(), key.half()
    args = query, key, torch.zeros(1, 3, dtype=torch.int64), torch.arange(190)[None] % 3, 3
    got, truth = emulate(*args, scale=1, **config), float64_mass(*args, scale=1)
    close(got[0], truth[0], rtol=2 * EPS * 1e4, atol=0)
    close(got[1], truth[1], rtol=2 * EPS, atol=0)
    close(emulate(query, key, scale=1, **config), float64_received(query, key, scale=1), rtol=2 * EPS * 1e4, atol=0)


def test_unsupported_shapes(emulate):
    """Other kernels run: other head dims, unaligned rows, too many keys for a cluster, no keys."""
    for D, Sk in ((32, 40), (256, 40), (64, 6200), (64, 0)):
        query, key = real(1, 1, 1, 1, Sk, D, dtype=torch.float16)
        assert emulate(query, key) is None
    query, key = real(1, 1, 1, 1, 40, 64, dtype=torch.float16)
    unaligned = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape)
    assert emulate(query, unaligned) is None


def test_offsets_past_two_to_the_31(emulate, tmp_path):
    shape = 2, 4, 2, 5, 20, 64
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    query, key = query.half(), key.half()
    groups, far = random_groups(shape), functools.partial(contract.with_gaps_past_2_31, tmp_path)
    groups[0][:, -1] = 1
    truth = float64_mass(query, key, *groups, 3, **options)[0].float()
    for dim in (0, 1, 2):
        assert_same_bits(emulate(far(query, dim), far(key, dim), *groups, 3, **options)[0], truth)
    own = [far(group, 1) for group in groups]
    options["lse"] = far(options["lse"], 1)
    assert_same_bits(emulate(query, key, *own, 3, **options)[0], truth)
