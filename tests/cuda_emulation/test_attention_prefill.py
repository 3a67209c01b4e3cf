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
        super().__init__(group.data_ptr(), (INT * 2)(*group.stride()), group.element_size())


class Call(ctypes.Structure):
    _fields_ = (
        *(("query", POINTER), ("key", POINTER), ("query_stride", INT * 3), ("key_stride", INT * 3)),
        *(("lse", POINTER), ("lse_stride", INT * 3), ("query_group", GroupArg), ("key_group", GroupArg)),
        *((name, INT) for name in ("batch", "heads", "key_heads", "queries", "keys", "head_dim", "groups")),
        *(("mass", POINTER), ("lse_out", POINTER), ("scale", ctypes.c_float)),
        *((name, INT32) for name in ("causal", "element", "backwards")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("attention_prefill", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """attention_mass; outputs are poisoned first."""

    def run(
        query, key, query_group, key_group, groups, *,
        causal=True, scale=None, lse=None, backwards=False,
    ):  # fmt: skip
        B, H, Sq, D = query.shape
        outs = mass, lse_out = torch.full((B, H, groups, groups), torch.nan), torch.full((B, H, Sq), torch.nan)
        call = Call(
            query=pointer(query),
            key=pointer(key),
            query_stride=(INT * 3)(*query.stride()[:3]),
            key_stride=(INT * 3)(*key.stride()[:3]),
            lse=pointer(lse),
            lse_stride=(INT * 3)(*((0, 0, 0) if lse is None else lse.stride())),
            query_group=GroupArg(query_group),
            key_group=GroupArg(key_group),
            **{"batch": B, "heads": H, "key_heads": key.shape[1], "queries": Sq, "keys": key.shape[2], "head_dim": D},
            groups=groups,
            mass=pointer(mass),
            lse_out=pointer(lse_out),
            scale=D**-0.5 if scale is None else scale,
            causal=causal,
            element=ELEMENTS.index(query.dtype),
            backwards=backwards,
        )
        kernel(ctypes.byref(call))
        return outs

    return run


CONFIGS = {"backwards": {"backwards": True}}  # the last thread of the last block runs first
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# (B, H, Hk, Sq, Sk, D): more keys than the stages hold, GQA, more and fewer keys than queries, one row.
SHAPES = [
    (1, 2, 2, 300, 300, 128),
    (2, 2, 1, 100, 900, 64),
    (1, 7, 1, 90, 200, 128),
    (1, 1, 1, 257, 130, 64),
    (2, 1, 1, 1, 700, 64),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def float64_mass(query, key, query_group, key_group, groups, **options):
    """(mass, lse) in float64; a group out of range counts as -1."""
    valid = [group.where(group < groups, -1) for group in (query_group, key_group)]
    probability, lse = attention(query, key, *(group >= 0 for group in valid), **options)
    from_group, to_group = ((group[..., None, :, None] == torch.arange(groups)).double() for group in valid)
    return from_group.mT @ probability @ to_group, lse


def long_runs(shape, groups=3):
    """Groups in runs longer than key blocks, and a hole of several blocks among the keys."""
    B, _, _, Sq, Sk, _ = shape
    query_group, key_group = (torch.arange(S).mul(2 * groups).div(S).long() % groups for S in (Sq, Sk))
    key_group[Sk // 3 : Sk // 3 + min(300, Sk // 2)] = -1
    query_group[Sq // 2 : Sq // 2 + Sq // 5] = -1
    return query_group.expand(B, -1), key_group.expand(B, -1)


def group_kinds(shape, groups):
    return random_groups(shape, groups=groups), long_runs(shape, groups)


@by_config
@by_shape
@pytest.mark.parametrize("kind", (ranked, counting), ids=lambda kind: kind.__name__)
def test_exact_inputs(emulate, config, shape, kind):
    query, key, options = kind(*shape, torch.Generator().manual_seed(0))
    dtype = torch.float16 if shape[4] > 256 or SHAPES.index(shape) % 2 else torch.bfloat16
    query, key = query.to(dtype), key.to(dtype)
    for causal, groups in ((True, 5), (False, 8)):
        for own in group_kinds(shape, groups):
            args, every = (query, key, *own, groups), {**options, "causal": causal}
            mass, lse = emulate(*args, **every, **config)
            truth, true_lse = float64_mass(*args, **every)
            assert_same_bits(mass, truth.float())
            close(lse, options.get("lse", true_lse), rtol=4 * EPS, atol=0)


@by_config
@by_shape
def test_real_values(emulate, config, shape):
    """Errors at most twice the reference's; the same bits on every call."""
    dtype = torch.float16 if SHAPES.index(shape) % 2 else torch.bfloat16
    query, key = real(*shape, dtype=dtype)
    for groups in group_kinds(shape, 3):
        args = query, key, *groups, 3
        lse = float64_mass(*args)[1].float()
        for options in ({}, {"causal": False, "scale": 0.3}, {"lse": lse}):
            truth, allowed = float64_mass(*args, **options), reference.attention_mass(*args, **options)
            got = emulate(*args, **options, **config)
            for result, other, exact in zip(got, allowed, truth):
                assert torch.equal(result.isfinite(), exact.isfinite())
                error, bound = (float((r - exact).nan_to_num(0).abs().max()) for r in (result, other))
                contract.assert_no_worse(error, bound, float(exact.abs().nan_to_num(posinf=0).max()), ulps=8)
            assert_same_bits(emulate(*args, **options, **config), got)


@by_config
@pytest.mark.parametrize("given_lse", (False, True))
def test_padding_and_strides_change_no_bit(emulate, config, given_lse):
    """Poisoned padding; every layout, aligned and not; int32 groups; batch rows alone."""
    shape = 2, 2, 1, 70, 150, 64
    query, key = real(*shape, dtype=torch.bfloat16)
    groups = query_group, key_group = random_groups(shape)
    lse = float64_mass(query, key, *groups, 3)[1].float() if given_lse else None
    answer = functools.partial(emulate, groups=3, **config)
    plain = answer(query, key, *groups, lse=lse)
    generator = torch.Generator().manual_seed(0)
    live_queries, live_keys = (query_group >= 0)[:, None], (key_group >= 0)[:, None]
    bad_query, bad_key = (poison(t, m[..., None], generator) for t, m in ((query, live_queries), (key, live_keys)))
    bad = poison(lse, live_queries, generator) if given_lse else None
    assert_same_bits(answer(bad_query, bad_key, *groups, lse=bad), (plain[0], bad if given_lse else plain[1]))
    for name in HEAD_LAYOUTS.keys() - {"one head"}:
        laid_out = HEAD_LAYOUTS[name](query), HEAD_LAYOUTS[name](key)
        if all(t.stride(-1) == 1 for t in laid_out):  # others are copied by pruneops.ops
            short = [torch.stack([g.int()] * 2, -1)[..., 1] for g in groups]
            strided = None if lse is None else torch.stack([lse] * 2, -1)[..., 0]
            assert_same_bits(answer(*laid_out, *short, lse=strided), plain)
    alone = answer(*(t[1:] for t in (query, key, *groups)), lse=None if lse is None else lse[1:])
    assert_same_bits(alone, [result[1:] for result in plain])


@by_config
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("given_lse", (False, True))
def test_special_values_show(emulate, config, given_lse, bad):
    """They show in the rows that attend to them; other heads and batch rows keep their bits."""
    query, key = real(2, 4, 2, 40, 150, 64, dtype=torch.float16)
    group, other = torch.arange(40).div(30).long().expand(2, -1), torch.arange(150).div(90).long().expand(2, -1)
    lse = float64_mass(query, key, group, other, 2)[1].float() if given_lse else None
    before = emulate(query, key, group, other, 2, lse=lse, **config)
    for tensor, place, heads, pair in (
        (query, (1, 2, 0), [2], (0, 0)),
        (key, (1, 1, 112), [2, 3], (1, 1)),
    ):
        original, tensor[place] = tensor[place].clone(), bad
        mass, lse_out = emulate(query, key, group, other, 2, lse=lse, **config)
        tensor[place] = original
        touched = torch.zeros(2, 4, dtype=torch.bool)
        touched[1, heads] = True
        assert_same_bits([r[~touched] for r in (mass, lse_out)], [r[~touched] for r in before])
        if given_lse:
            assert_same_bits(lse_out, lse)
            assert mass[touched][:, pair[0], pair[1]].isnan().all()
        else:
            assert mass[touched][:, pair[0]].isnan().all()
            assert not lse_out[touched].isfinite().all(-1).any()


@by_config
def test_nothing_visible(emulate, config):
    """Queries before the first key, rows of padding alone, lse of -inf: 0 and -inf, never NaN."""
    query, key = real(3, 2, 1, 190, 12, 64, dtype=torch.bfloat16)
    key_group, group = torch.full((3, 12), -1), torch.zeros(3, 190, dtype=torch.int64)
    key_group[1:, 3:9], group[2] = 1, -1
    truth, lse = float64_mass(query, key, group, key_group, 2)
    mass, lse_out = emulate(query, key, group, key_group, 2, **config)
    close((mass, lse_out), (truth, lse))
    assert (mass[[0, 2]] == 0).all()
    given, copy = emulate(query, key, group, key_group, 2, lse=lse.float(), **config)
    close(given, truth)
    assert_same_bits(copy, lse.float())


@by_config
@pytest.mark.parametrize("causal", (True, False))
def test_rows_far_apart(emulate, config, causal):
    """Rows of a block that attend to one key block and to all: warpgroups skip many of the block's key blocks."""
    query, key = real(1, 2, 2, 1300, 1400, 64, dtype=torch.bfloat16)
    query_group, key_group = torch.arange(1300)[None] // 200 % 3, torch.arange(1400)[None] // 350
    query_group[:, 70:-100] = -1
    args = query, key, query_group, key_group, 4
    close(emulate(*args, causal=causal, **config), float64_mass(*args, causal=causal))


@by_config
def test_unchecked_groups(emulate, config):
    """A group out of range counts as -1."""
    shape = 1, 2, 1, 60, 260, 64
    query, key = real(*shape, dtype=torch.float16)
    query_group, key_group = random_groups(shape)
    query_group[query_group == 0], key_group[key_group == 0], key_group[:, 40:80] = 9, 3, 2**40
    args = query, key, query_group, key_group, 3
    close(emulate(*args, **config), float64_mass(*args))


@by_config
@pytest.mark.parametrize("height", (-1e4, 1e4))
def test_hard_softmax(emulate, config, height):
    """Steps of 1 on logits of 10^4, exact in float32; lse within rounding."""
    query, key = torch.zeros(1, 2, 30, 64), torch.zeros(1, 1, 190, 64)
    query[..., 0], query[..., 1] = 100, 1
    key[..., 0], key[..., 1] = height / 100, -torch.randint(0, 9, (1, 1, 190))
    args = query.half(), key.half(), torch.zeros(1, 30, dtype=torch.int64), torch.arange(190)[None] % 3, 3
    got, truth = emulate(*args, scale=1, **config), float64_mass(*args, scale=1)
    close(got[0], truth[0], rtol=2 * EPS * 1e4, atol=0)
    close(got[1], truth[1], rtol=2 * EPS, atol=0)
    for lse in (truth[1].float(), truth[1].float() + 3):
        close(
            emulate(*args, scale=1, lse=lse, **config)[0], float64_mass(*args, scale=1, lse=lse)[0], rtol=1e-2, atol=0
        )


def test_offsets_past_two_to_the_31(emulate, tmp_path):
    shape = 2, 4, 2, 5, 5, 64
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    query, key = query.half(), key.half()
    groups, far = random_groups(shape), functools.partial(contract.with_gaps_past_2_31, tmp_path)
    truth = float64_mass(query, key, *groups, 3, **options)[0].float()
    for dim in (0, 1, 2):
        assert_same_bits(emulate(far(query, dim), far(key, dim), *groups, 3, **options)[0], truth)
    own = [far(group, 1) for group in groups]
    options["lse"] = far(options["lse"], 1)
    assert_same_bits(emulate(query, key, *own, 3, **options)[0], truth)
