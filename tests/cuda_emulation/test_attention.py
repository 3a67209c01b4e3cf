import ctypes
import functools

import pytest
import torch

from pruneops import reference
from tests import contract
from tests.attention import EDGES
from tests.contract import EPS, assert_same_bits
from tests.inputs import HEAD_LAYOUTS, counting, poison, ranked, real, runs
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
        *((name, INT32) for name in ("causal", "element", "clusters", "splits", "backwards", "launches")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernels("attention", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulate(kernel):
    """attention_mass or, without groups, attention_received. Outputs are poisoned first. launches: expected number."""

    def run(
        query, key, query_group=None, key_group=None, groups=None, *,
        causal=True, scale=None, lse=None, clusters=False, splits=0, backwards=False, launches=None,
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
            clusters=clusters,
            splits=splits,
            backwards=backwards,
        )
        kernel(ctypes.byref(call))
        assert launches in (None, call.launches)
        return outs[0] if groups is None else tuple(outs)

    return run


# Clusters are used if all rows of a key head are one query tile.
CONFIGS = {
    "clusters": dict(clusters=True),
    "clusters of 3, backwards": dict(clusters=True, splits=3, backwards=True),
    "two launches": dict(),
    "two launches, 3 splits, backwards": dict(splits=3, backwards=True),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# (B, H, Hk, Sq, Sk, D): decode, GQA, large GQA ratio, few queries, one full query tile, more than one; fewer and more
# keys than queries; odd and large head dims; more keys than a block of attention_received holds.
SHAPES = [
    (1, 2, 2, 1, 700, 128),
    (2, 14, 2, 1, 203, 64),
    (1, 40, 2, 1, 90, 32),
    (1, 4, 2, 3, 130, 80),
    (1, 2, 2, 16, 300, 16),
    (1, 2, 1, 9, 40, 256),
    (1, 7, 1, 20, 70, 33),
    (2, 2, 1, 50, 20, 8),
    (1, 1, 1, 40, 310, 1),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


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


def random_groups(shape, groups=3, seed=0):
    """(query_group, key_group) in runs, some of them -1; the last query is counted."""
    generator = torch.Generator().manual_seed(seed)
    B, _, _, Sq, Sk, _ = shape
    query_group, key_group = runs((B, Sq), groups, generator), runs((B, Sk), groups, generator)
    query_group[:, -1:] = 1
    return query_group, key_group


def random_masks(shape, seed=0):
    return tuple(group >= 0 for group in random_groups(shape, 3, seed))


@by_config
@by_shape
@pytest.mark.parametrize("kind", (ranked, counting), ids=lambda kind: kind.__name__)
def test_exact_inputs(emulate, config, shape, kind):
    query, key, options = kind(*shape, torch.Generator().manual_seed(0))
    dtype = ELEMENTS[SHAPES.index(shape) % 3] if shape[4] < 257 or kind is counting else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    for causal, groups in ((True, 5), (False, 8)):
        args, every = (query, key, *random_groups(shape, groups), groups), {**options, "causal": causal}
        mass, lse = emulate(*args, **every, **config)
        truth, true_lse = float64_mass(*args, **every)
        assert_same_bits(mass, truth.float())
        close(lse, options.get("lse", true_lse), rtol=4 * EPS, atol=0)
        for args in ((query, key), (query, key, *random_masks(shape))):
            assert_same_bits(emulate(*args, **every, **config), float64_received(*args, **every).float())


@by_config
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2, 2, 1, 500, 128), torch.bfloat16),
        ((1, 7, 1, 1, 203, 64), torch.float16),
        ((1, 20, 1, 1, 90, 40), torch.float32),
        ((1, 7, 1, 8, 70, 33), torch.bfloat16),
    ],
    ids=str,
)
def test_real_values(emulate, config, shape, dtype):
    """Errors at most twice the reference's; the same bits on every call."""
    args = query, key, *groups = (*real(*shape, dtype=dtype), *random_groups(shape))
    lse = float64_mass(*args, 3)[1].float()
    for options in ({}, {"causal": False, "scale": 0.3}, {"lse": lse}):
        truth, allowed = float64_mass(*args, 3, **options), reference.attention_mass(*args, 3, **options)
        got = emulate(*args, 3, **options, **config)
        own = {**options, "lse": lse.where(groups[0][:, None] >= 0, 0)} if "lse" in options else options
        flags = dict(zip(("query_mask", "key_mask"), random_masks(shape)))
        received = emulate(query, key, *random_masks(shape), **own, **config)
        truth += (float64_received(query, key, **flags, **own),)
        allowed += (reference.attention_received(query, key, **flags, **own),)
        for result, other, exact in zip((*got, received), allowed, truth):
            assert torch.equal(result.isfinite(), exact.isfinite())
            error, bound = (float((r - exact).nan_to_num(0).abs().max()) for r in (result, other))
            contract.assert_no_worse(error, bound, float(exact.abs().nan_to_num(posinf=0).max()), ulps=8)
        assert_same_bits(emulate(*args, 3, **options, **config), got)
        assert_same_bits(emulate(query, key, *random_masks(shape), **own, **config), received)


@by_config
@pytest.mark.parametrize("given_lse", (False, True))
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 90, 16), (2, 4, 2, 9, 50, 16)], ids=str)
def test_padding_and_strides_change_no_bit(emulate, config, shape, given_lse):
    """Poisoned padding; every layout, aligned and not; int32 groups; batch rows alone."""
    query, key = real(*shape)
    groups = query_group, key_group = random_groups(shape)
    lse = float64_mass(query, key, *groups, 3)[1].float() if given_lse else None
    answer = functools.partial(emulate, **config)

    def both(query, key, query_group, key_group, lse):
        received = answer(query, key, query_group >= 0, key_group >= 0, lse=lse)
        return *answer(query, key, query_group, key_group, 3, lse=lse), received

    plain = both(query, key, *groups, lse)
    generator = torch.Generator().manual_seed(0)
    live_queries, live_keys = (query_group >= 0)[:, None], (key_group >= 0)[:, None]
    bad_query, bad_key = (poison(t, m[..., None], generator) for t, m in ((query, live_queries), (key, live_keys)))
    bad = poison(lse, live_queries, generator) if given_lse else None
    again = both(bad_query, bad_key, *groups, bad)
    assert_same_bits(again, (plain[0], bad if given_lse else plain[1], plain[2]))
    for name in HEAD_LAYOUTS.keys() - {"one head"}:
        laid_out = HEAD_LAYOUTS[name](query), HEAD_LAYOUTS[name](key)
        if all(t.stride(-1) == 1 for t in laid_out):  # others are copied by pruneops.ops
            short = [torch.stack([g.int()] * 2, -1)[..., 1] for g in groups]
            strided = None if lse is None else torch.stack([lse] * 2, -1)[..., 0]
            assert_same_bits(both(*laid_out, *short, strided), plain)
    unaligned = torch.empty(key.numel() + 1)[1:].view(key.shape)  # 4 bytes past a multiple of 16
    assert_same_bits(both(query, unaligned.copy_(key), *groups, lse), plain)
    alone = both(*(t[1:] for t in (query, key, *groups)), None if lse is None else lse[1:])
    assert_same_bits(alone, [result[1:] for result in plain])


@by_config
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("given_lse", (False, True))
@pytest.mark.parametrize("queries", (1, 2, 24))
def test_special_values_show(emulate, config, queries, given_lse, bad):
    """They show in the rows that attend to them, as in the reference; other heads and batch rows keep their bits."""
    query, key = real(2, 4, 2, queries, 50, 16)
    group, other = torch.arange(queries).div(20).long().expand(2, -1), torch.arange(50).div(30).long().expand(2, -1)
    lse = float64_mass(query, key, group, other, 2)[1].float() if given_lse else None
    before = *emulate(query, key, group, other, 2, lse=lse, **config), emulate(query, key, lse=lse, **config)
    for tensor, place, heads, pair in (
        (query, (1, 2, 0), [2], (0, 0)),
        (key, (1, 1, 35), [2, 3], (int(group[0, -1]), 1)),
    ):
        original, tensor[place] = tensor[place].clone(), bad
        mass, lse_out = emulate(query, key, group, other, 2, lse=lse, **config)
        received = emulate(query, key, lse=lse, **config)
        expected = reference.attention_received(query, key, lse=lse)
        tensor[place] = original
        touched = torch.zeros(2, 4, dtype=torch.bool)
        touched[1, heads] = True
        assert_same_bits([r[~touched] for r in (mass, lse_out, received)], [r[~touched] for r in before])
        assert torch.equal(received.isnan(), expected.isnan())
        if given_lse:
            assert_same_bits(lse_out, lse)
            assert mass[touched][:, pair[0], pair[1]].isnan().all()
        else:
            assert mass[touched][:, pair[0]].isnan().all()
            assert not lse_out[touched].isfinite().all(-1).any()


@by_config
def test_nothing_visible(emulate, config):
    """Queries before the first key, rows of padding alone, lse of -inf: 0 and -inf, never NaN."""
    for queries in (1, 5, 28):
        query, key = real(3, 2, 1, queries, 12, 8)
        key_group, group = torch.full((3, 12), -1), torch.zeros(3, queries, dtype=torch.int64)
        key_group[1:, 3:9], group[2] = 1, -1
        truth, lse = float64_mass(query, key, group, key_group, 2)
        mass, lse_out = emulate(query, key, group, key_group, 2, **config)
        close((mass, lse_out), (truth, lse))
        assert (mass[[0, 2]] == 0).all()
        given, copy = emulate(query, key, group, key_group, 2, lse=lse.float(), **config)
        close(given, truth)
        assert_same_bits(copy, lse.float())
        for own_lse in (None, lse.float()):
            received = emulate(query, key, group >= 0, key_group >= 0, lse=own_lse, **config)
            close(received, float64_received(query, key, group >= 0, key_group >= 0))
            assert (received[[0, 2]] == 0).all()


@by_config
@pytest.mark.parametrize("shape", [(B, H, *_, Sq, Sk, D) for B, H, *_, Sq, Sk, D in EDGES if B * H * Sq], ids=str)
def test_edges(emulate, config, shape):
    """No keys, one of each; without rows nothing is launched."""
    B, H, _, Sq, Sk, _ = shape
    query, key = real(*shape)
    groups = torch.ones(B, Sq, dtype=torch.int64), torch.zeros(B, Sk, dtype=torch.int32)
    for options in ({}, {"causal": False}, {"lse": torch.zeros(B, H, Sq)}):
        close(emulate(query, key, *groups, 2, **options, **config), float64_mass(query, key, *groups, 2, **options))
        if Sk:
            close(emulate(query, key, **options, **config), float64_received(query, key, **options))


@by_config
def test_unchecked_groups(emulate, config):
    """A group out of range counts as -1."""
    for queries in (1, 30):
        query, key = real(1, 2, 1, queries, 130, 8)
        query_group, key_group = random_groups((1, 2, 1, queries, 130, 8))
        query_group[query_group == 0], key_group[key_group == 0], key_group[:, 40:80] = 9, 3, 2**40
        args = query, key, query_group, key_group, 3
        close(emulate(*args, **config), float64_mass(*args))


@pytest.mark.parametrize("kind", (ranked, counting), ids=lambda kind: kind.__name__)
def test_many_keys_a_block(emulate, kind):
    """Blocks keep the logits of several key chunks; some blocks of a cluster have no keys."""
    for shape, splits in (((1, 4, 2, 2, 900, 8), 1), ((1, 2, 1, 2, 40, 8), 8)):
        query, key, options = kind(*shape, torch.Generator().manual_seed(0))
        config = {"clusters": True, "splits": splits, "launches": 1}
        args = query, key, *random_groups(shape), 3
        assert_same_bits(emulate(*args, **options, **config)[0], float64_mass(*args, **options)[0].float())
        config["launches"] = None  # with lse no cluster is needed
        truth = float64_received(query, key, **options).float()
        assert_same_bits(emulate(query, key, **options, **config), truth)


@by_config
@pytest.mark.parametrize("height", (-1e4, 1e4))
def test_hard_softmax(emulate, config, height):
    """Steps of 1 on logits of 10^4, exact in float32; lse within rounding."""
    query = torch.tensor([100.0, 1]).expand(1, 2, 3, 2)
    key = torch.stack([torch.full((1, 1, 90), height / 100), -torch.randint(0, 9, (1, 1, 90))], -1)
    args = query, key, torch.zeros(1, 3, dtype=torch.int64), torch.arange(90)[None] % 3, 3
    got, truth = emulate(*args, scale=1, **config), float64_mass(*args, scale=1)
    close(got[0], truth[0], rtol=2 * EPS * 1e4, atol=0)
    close(got[1], truth[1], rtol=2 * EPS, atol=0)
    close(emulate(query, key, scale=1, **config), float64_received(query, key, scale=1), rtol=4 * EPS * 1e4, atol=0)


@by_config
@pytest.mark.parametrize("queries", (1, 9))
def test_offsets_past_two_to_the_31(emulate, config, queries, tmp_path):
    shape = 2, 4, 2, queries, 5, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    groups, far = random_groups(shape), functools.partial(contract.with_gaps_past_2_31, tmp_path)
    truth = float64_mass(query, key, *groups, 3, **options)[0].float()
    received = float64_received(query, key, **options).float()
    for dim in (0, 1, 2):
        own = far(query, dim) if query.shape[dim] > 1 else query, far(key, dim)
        assert_same_bits(emulate(*own, *groups, 3, **options, **config)[0], truth)
        assert_same_bits(emulate(*own, **options, **config), received)
    own = [far(group, 1) if group.shape[1] > 1 else group for group in groups]
    options["lse"] = far(options["lse"], 1)
    assert_same_bits(emulate(query, key, *own, 3, **options, **config)[0], truth)


def test_launches(emulate):
    """One in decode on GPUs with clusters, for any number of splits; else two, or one for few keys."""
    for H, Hk, Sk in ((2, 2, 3072), (14, 2, 577), (2, 1, 40)):
        shape = 1, H, Hk, 1, Sk, 32
        args = *real(*shape), *random_groups(shape)
        one = {"clusters": True, "launches": 1}
        mass, lse = emulate(*args, 3, **one)
        without_clusters = emulate(*args, 3, launches=2 if Sk > 256 else 1)
        close((mass, lse), float64_mass(*args, 3))
        close(without_clusters, float64_mass(*args, 3))
        received = emulate(*args[:2], **one)
        close(received, float64_received(*args[:2]))
        close(emulate(*args[:2], launches=2 if Sk > 256 else 1), received)
        close(emulate(*args[:2], lse=lse.nan_to_num(neginf=0), launches=1).shape, received.shape)
