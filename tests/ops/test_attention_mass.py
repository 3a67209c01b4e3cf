"""Attention between groups on every backend: the contract of `pruneops.attention_mass` and its ratios, line by line."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruneops
from tests import contract, oracles, strategies
from tests.attention import (
    EDGES,
    SHAPES,
    exact_attention,
    native_memory,
    shapes,
    small_tiles,
    smaller,
    triton_memory,
    triton_specializations,
    unbatched,
    valid_masks,
)
from tests.contract import (
    CUDA_KERNELS,
    EPS,
    NATIVE,
    REFERENCE,
    TRITON_TARGETS,
    assert_same_bits,
    call,
    every_backend,
    every_kernel,
    on_targets,
    size,
)
from tests.inputs import (
    DTYPES,
    HEAD_LAYOUTS,
    LAYOUTS,
    counting,
    poison,
    random_groups,
    ranked,
    real,
    runs,
    small_integers,
)
from tests.invalid_calls import ints
from tests.specs import attention_mass as spec
from tests.strategies import laid_out

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)


def mass_of(target, *args, **options):
    mass, lse = call(target, "attention_mass", *args, **options)
    assert (mass.dtype, lse.dtype) == (torch.float32, torch.float32)
    return mass, lse


@st.composite
def grouped(draw, mask, groups, generator):
    """Groups [B, S], int32 or int64: -1 where the mask is not, in runs or not, perhaps none of some groups."""
    used = draw(st.integers(1, groups))
    group = runs(mask.shape, used, generator).clamp(min=0)
    if draw(st.booleans()):
        group = torch.randint(0, used, mask.shape, generator=generator)
    return group.where(mask, -1).to(draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def exact_cases(draw):
    """(arguments, options)"""
    query, key, counted, seen, options = draw(exact_attention())
    generator, groups = draw(strategies.generators), draw(st.integers(1, 8))
    sides = (draw(laid_out(draw(grouped(mask, groups, generator)), expand=False)) for mask in (counted, seen))
    args = query, key, *sides, groups
    return (unbatched(args), unbatched(options)) if len(query) == 1 and draw(st.booleans()) else (args, options)


@st.composite
def real_cases(draw):
    """(arguments, options)"""
    shape = B, _, _, Sq, Sk, _ = draw(shapes(widths=(1, 16, 33)))
    generator, groups = draw(strategies.generators), draw(st.integers(2, 8))
    query_group, key_group = (draw(grouped(draw(valid_masks((B, S), generator)), groups, generator)) for S in (Sq, Sk))
    return (*real(*shape), query_group, key_group, groups), {"causal": draw(st.booleans())}


def assert_exact(target, args, options):
    """Counts, to the bit; lse to rounding, or as it was given."""
    mass, lse = mass_of(target, *args, **options)
    truth, true_lse = oracles.attention_mass(*args, **options)
    assert_same_bits(mass, truth.float())
    if "lse" in options:
        assert_same_bits(lse, options["lse"])
    else:
        close(lse, true_lse, rtol=4 * EPS, atol=0)


# Answers


@every_backend
def test_known_answer(target):
    """Written by hand: softmax of (2, 1) and of (3, 1, 3), then with padding, unmasked and with lse given."""
    query, key = torch.tensor([2.0, 3.0]).log().view(1, 2, 1), torch.tensor([1.0, 0, 1]).view(1, 3, 1)
    group, other = ints(0, 1), ints(0, 1, 0)
    exactly = functools.partial(close, rtol=4 * EPS, atol=0)
    mass, lse = mass_of(target, query, key, group, other, 2)
    exactly(mass, torch.tensor([[[2 / 3, 1 / 3], [6 / 7, 1 / 7]]]))
    exactly(lse, torch.tensor([[3.0, 7]]).log())
    mass, lse = mass_of(target, query, key, ints(1, -1), ints(-1, 1, 0), 2, causal=False)
    exactly(mass, torch.tensor([[[0, 0], [2 / 3, 1 / 3]]]))
    exactly(lse, torch.tensor([[math.log(3), -math.inf]]))
    mass, lse = mass_of(target, query, key, group, other, 2, scale=2, lse=torch.tensor([[0.0, math.log(9)]]))
    exactly(mass, torch.tensor([[[4, 1], [2, 1 / 9]]]))
    exactly(lse, torch.tensor([[0, math.log(9)]]))


@every_backend
@given(case=exact_cases())
def test_exact_inputs(target, case):
    """One right answer: poisoned padding, strides, dtypes, heads, groups, alignments of the causal mask."""
    assert_exact(target, *case)


@every_backend
@pytest.mark.parametrize("kind", [ranked, counting], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_tiles(target, shape, kind):
    """Blocks of one group and of several, seen in whole and in part, exactly."""
    shape = smaller(target, shape)
    query, key, options = kind(*shape, torch.Generator().manual_seed(0))
    for causal in (True, False):
        assert_exact(target, (query, key, *random_groups(shape, groups=5), 5), {**options, "causal": causal})


@every_backend
@pytest.mark.parametrize(("shape", "dtype"), [*zip(SHAPES, itertools.cycle(DTYPES))], ids=str)
def test_real_values(target, shape, dtype):
    """Errors of mass and lse at most twice the reference's, the same bits on every call."""
    shape = smaller(target, shape)
    args = (*real(*shape, dtype=dtype), *random_groups(shape), 3)
    given_lse = oracles.attention_mass(*args)[1].float()
    for options in ({}, {"causal": False, "scale": 0.3}, {"lse": given_lse}):
        truth = oracles.attention_mass(*args, **options)
        results = mass_of(target, *args, **options)
        for result, allowed, exact in zip(results, mass_of(REFERENCE, *args, **options), truth):
            assert torch.equal(result.isfinite(), exact.isfinite())
            error, allowed = (float((r - exact).nan_to_num(0).abs().max()) for r in (result, allowed))  # inf - inf
            scale = float(exact.abs().nan_to_num(posinf=0).max())
            contract.assert_no_worse(error, allowed, scale, ulps=8)  # an ulp of a logit of 10 is 8 of a probability
        assert_same_bits(mass_of(target, *args, **options), results)


@every_backend
def test_equal_logits(target):
    """Queries of zeros spread evenly over 64 keys."""
    valid_keys = torch.arange(100) % 25 < 16
    key_group = torch.arange(100).div(30, rounding_mode="floor").where(valid_keys, -1)
    query, key = torch.zeros(2, 3, 50), torch.randn(1, 100, 50)
    mass, lse = mass_of(target, query, key, ints(0, 1, 1), key_group, 4, causal=False)
    expected = (key_group == torch.arange(4)[:, None]).sum(1) / 64 * torch.tensor([1.0, 2, 0, 0])[:, None]
    close(mass, expected.expand(2, 4, 4), rtol=0 if target.backend != "reference" else 4 * EPS, atol=0)
    close(lse, torch.full((2, 3), math.log(64)), rtol=2 * EPS, atol=0)


@every_backend
@pytest.mark.parametrize("keys", [5, 300])
def test_one_visible_key(target, keys):
    """It receives all attention, exactly, and lse is its logit."""
    query, key = real(2, 4, 2, 20, keys, 24)
    one = torch.full((2, keys), -1)
    one[0, 2], one[1, 0] = 1, 0
    group = torch.arange(20).remainder(3).sub(1).expand(2, -1)  # 7 queries of group 0, 6 of group 1
    mass, lse = mass_of(target, query, key, group, one, 2, causal=False)
    assert_same_bits(mass, torch.tensor([[[0.0, 7], [0, 6]], [[7, 0], [6, 0]]])[:, None].expand(2, 4, 2, 2))
    close(lse, oracles.attention_mass(query, key, group, one, 2, causal=False)[1], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
def test_nothing_visible(target, given_lse):
    """Queries before the first key, rows of padding alone, padding on either side: mass 0, lse -inf, never NaN."""
    query, key = real(3, 2, 1, 40, 12, 8)
    key_group = torch.full((3, 12), -1)
    key_group[1:, 3:9], group = 1, torch.zeros(3, 40, dtype=torch.int64)
    group[2] = -1
    lse = torch.full((3, 2, 40), -torch.inf)
    lse[1, :, 31:] = oracles.attention_mass(query, key, group, key_group, 2)[1][
        1, :, 31:
    ]  # 31 + 12 - 40 is the first key
    mass, lse_out = mass_of(target, query, key, group, key_group, 2, lse=lse if given_lse else None)
    close(mass, torch.tensor([0.0, 9, 0])[:, None, None, None] * torch.tensor([[0.0, 1], [0, 0]]).expand(3, 2, 2, 2))
    close(lse_out, lse)
    assert (mass[..., 0] == 0).all() and (mass[..., 1, :] == 0).all()


@every_backend
@pytest.mark.parametrize("height", [-1e4, 1e4])
def test_hard_softmax(target, height):
    """Steps of 1 on logits of 10^4, which float32 holds."""
    generator = torch.Generator().manual_seed(0)
    query = torch.tensor([100.0, 1]).expand(2, 30, 2)
    key = torch.stack([torch.full((1, 90), height / 100), -torch.randint(0, 9, (1, 90), generator=generator)], -1)
    args = query, key, torch.zeros(30, dtype=torch.int64), torch.arange(90) % 3, 3
    mass, lse = mass_of(target, *args, scale=1)
    truth = oracles.attention_mass(*args, scale=1)
    close(mass, truth[0], rtol=2 * EPS * 1e4, atol=0)
    close(lse, truth[1], rtol=2 * EPS, atol=0)


@every_backend
def test_products_past_half_precision(target):
    """Features of hundreds: products that float16 does not hold, probabilities of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    query, key = (small_integers((2, S, 128), generator, 300).half() for S in (40, 70))
    args = query, key, ints(*range(40)) % 2, ints(*range(70)) % 2, 2
    truth, true_lse = oracles.attention_mass(*args)
    assert true_lse.max() > 65504
    mass, lse = mass_of(target, *args)
    assert_same_bits(mass, truth.float())
    close(lse, true_lse, rtol=2 * EPS, atol=0)


# What changes nothing, and what propagates


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 90, 16), (2, 4, 2, 1, 90, 16)], ids=str)
def test_padding_changes_no_bit(target, shape, given_lse):
    """Poisoned queries and keys of group -1, and the lse of such queries."""
    query, key = real(*shape)
    groups = query_group, key_group = random_groups(shape)
    query_group[1] = 1
    lse = oracles.attention_mass(query, key, *groups, 3)[1].float() if given_lse else None
    mass, lse_out = mass_of(target, query, key, *groups, 3, lse=lse)
    generator = torch.Generator().manual_seed(0)
    valid_queries, valid_keys = (query_group >= 0)[:, None], (key_group >= 0)[:, None]
    query, key = (poison(t, valid[..., None], generator) for t, valid in ((query, valid_queries), (key, valid_keys)))
    lse = poison(lse, valid_queries, generator) if given_lse else None
    again = mass_of(target, query, key, *groups, 3, lse=lse)
    assert_same_bits(again, (mass, lse if given_lse else lse_out))


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_special_values_propagate(target, queries, bad, given_lse):
    """In the rows that attend to it; other heads and batch rows keep their bits."""
    query, key = real(2, 4, 2, queries, 50, 16)
    group, other = torch.arange(queries).div(20).long().expand(2, -1), torch.arange(50).div(30).long().expand(2, -1)
    lse = oracles.attention_mass(query, key, group, other, 2)[1].float() if given_lse else None
    before = mass_of(target, query, key, group, other, 2, lse=lse)
    last = int(group[0, -1])
    # the first query of head 2, and a key that only the last 15 queries see, those of heads 2 and 3
    for tensor, place, heads, pair in ((query, (1, 2, 0), [2], (0, 0)), (key, (1, 1, 35), [2, 3], (last, 1))):
        original, tensor[place] = tensor[place].clone(), bad
        mass, lse_out = mass_of(target, query, key, group, other, 2, lse=lse)
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


@every_backend
def test_given_lse(target):
    """Its own lse fed back; any other is used as it is; a copy is returned, whatever it holds."""
    shape = 2, 4, 2, 30, 70, 24
    args = (*real(*shape), *random_groups(shape), 3)
    mass, lse = mass_of(target, *args)
    close(mass_of(target, *args, lse=lse)[0], mass)
    close(mass_of(target, *args, lse=lse + 3)[0], mass * math.exp(-3))
    lse = HEAD_LAYOUTS["strided features"](lse.where(lse != -torch.inf, torch.nan))  # of queries of group -1
    again, lse_out = mass_of(target, *args, lse=lse)
    close(again, mass)
    assert_same_bits(lse_out, lse)
    args, lse = contract.to_device((args, lse), target.device)
    with pruneops.backend(target.backend):
        assert pruneops.attention_mass(*args, lse=lse).lse.data_ptr() != lse.data_ptr()


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
def test_batch_rows_are_independent(target, given_lse):
    def answer(query, key, query_group, key_group, lse):
        return mass_of(target, query, key, query_group, key_group, 3, lse=lse if given_lse else None)

    for shape in ((3, 4, 2, 40, 60, 16), (3, 2, 1, 1, size(target, 3000, 600), 16)):
        rows = spec.inputs(0, shape)
        alone = [result[1] for result in answer(*rows)]
        for neighbour in (torch.nan, 0.0, 1e4):
            batch = [torch.full_like(t, neighbour if t.is_floating_point() else 1) for t in rows]
            for tensor, values in zip(batch, rows):
                tensor[1] = values[1]
            assert_same_bits([result[1] for result in answer(*batch)], alone)
        single = list(answer(*(t[1] for t in rows)))
        (close if target.backend == "reference" else assert_same_bits)(single, alone)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 4, 2, 20, 50, 64), (2, 4, 2, 1, 50, 64)], ids=str)
def test_strides_change_no_bit(target, shape, dtype):
    query, key = real(*shape, dtype=dtype)
    groups = random_groups(shape)
    lse = torch.randn(shape[:2] + shape[3:4])
    plain = mass_of(target, query, key, *groups, 3), mass_of(target, query, key, *groups, 3, lse=lse)
    for name in HEAD_LAYOUTS.keys() - {"one head"}:
        own = HEAD_LAYOUTS[name](query), HEAD_LAYOUTS[name](key)
        side = LAYOUTS.get(name, torch.clone)
        own = (*own, *(side(group).int() for group in groups), 3)
        assert_same_bits((mass_of(target, *own), mass_of(target, *own, lse=side(lse))), plain)


# Relations between answers


@every_backend
@given(case=real_cases())
@settings(max_examples=12)
def test_sums(target, case):
    """A row of mass sums to the queries of its group that see a key; the mass of one group is what its keys receive."""
    (query, key, query_group, key_group, groups), options = case
    mass, lse = mass_of(target, *case[0], **options)
    truth = oracles.attention(query, key, query_group >= 0, key_group >= 0, **options)[1]
    close(lse, truth)
    of_group = (query_group[..., None] == torch.arange(groups)).float()
    close(mass.sum(-1), truth.isfinite().float() @ of_group)
    close(mass_of(target, *case[0], **options, lse=lse)[0], mass)
    group = int(query_group.max().clamp(min=0)) if query_group.numel() else 0
    masks = {"query_mask": query_group == group, "key_mask": key_group >= 0}
    received = call(target, "attention_received", query, key, **masks, **options)
    close(received[..., None, :] @ (key_group[:, None, :, None] == torch.arange(groups)).float(), mass[..., [group], :])


@every_backend
@given(case=real_cases(), order=st.permutations(range(8)))
@settings(max_examples=12)
def test_permuted_groups_and_heads(target, case, order):
    """Merged groups have the sum of their columns or rows; permuted groups and heads permute the result."""
    (query, key, query_group, key_group, groups), options = case
    mass, lse = mass_of(target, *case[0], **options)
    merged, _ = mass_of(target, query, key, *(g.clamp(max=groups - 2) for g in case[0][2:4]), groups - 1, **options)
    pairs = torch.eye(groups)[:, : groups - 1]
    pairs[-1, -1] = 1
    close(merged, pairs.mT @ mass @ pairs)
    order = torch.tensor([p for p in order if p < groups])
    place = torch.cat([order.argsort(), ints(-1)])  # -1 stays
    renamed, renamed_lse = mass_of(
        target, query, key, place[query_group.long()], place[key_group.long()], groups, **options
    )
    close((renamed, renamed_lse), (mass[..., order, :][..., order], lse))
    H, Hk = query.shape[1], key.shape[1]
    heads = torch.arange(H).view(Hk, -1).flip(0, 1).flatten()
    permuted = mass_of(target, query[:, heads], key.flip(1), query_group, key_group, groups, **options)
    close(permuted, (mass[:, heads], lse[:, heads]))


@every_backend
@given(case=real_cases(), more=st.integers(1, 40))
@settings(max_examples=12)
def test_padding_changes_nothing(target, case, more):
    """Keys of group -1 on the left, tokens of group -1 on the right; tokens after a prefix do not change it."""
    (query, key, query_group, key_group, groups), options = case
    expected = mass, lse = mass_of(target, *case[0], **options)
    more_keys, more_queries = key[:, :, :1].expand(-1, -1, more, -1), query[:, :, :1].expand(-1, -1, more, -1)
    padding = key_group.new_full((len(key), more), -1)
    left = torch.cat([more_keys, key], 2), torch.cat([padding, key_group], 1)
    close(mass_of(target, query, left[0], query_group, left[1], groups, **options), expected)
    right = [torch.cat([t, m], 2) for t, m in ((query, more_queries), (key, more_keys))]
    right += [torch.cat([g, padding.to(g.dtype)], 1) for g in (query_group, key_group)]
    padded, longer = mass_of(target, *right, groups, **options)
    close((padded, longer[..., : lse.shape[-1]]), expected)
    assert (longer[..., lse.shape[-1] :] == -torch.inf).all()
    if options["causal"]:
        followed = [*right[:2], right[2], torch.cat([key_group, torch.zeros_like(padding)], 1)]
        close(mass_of(target, *followed, groups, **options)[0], mass)


# Edges


@every_backend
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges(target, shape):
    """No batch, no queries, no keys, no heads, one of each."""
    B, H, _, Sq, Sk, _ = shape
    args = (*real(*shape), torch.ones(B, Sq, dtype=torch.int64), torch.zeros(B, Sk, dtype=torch.int32), 2)
    for options in ({}, {"causal": False}, {"lse": torch.zeros(B, H, Sq)}):
        close(mass_of(target, *args, **options), oracles.attention_mass(*args, **options))


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Tokens, heads, groups and lse far apart in sparse files."""
    shape = 2, 4, 2, 3, 5, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    query_group, key_group = random_groups(shape)
    truth = oracles.attention_mass(query, key, query_group, key_group, 3, **options)[0].float()
    far = functools.partial(contract.with_gaps_past_2_31, tmp_path)
    sides = far(query_group, 1), far(key_group, 1), 3
    options["lse"] = far(options["lse"], 2)
    with pruneops.backend(target.backend):  # `call` would copy the files
        for dim in (0, 1, 2):
            assert_same_bits(pruneops.attention_mass(far(query, dim), far(key, dim), *sides, **options).mass, truth)


@on_targets(NATIVE)
def test_memory(target):
    """Far below the matrix of 1.8 GB, and in decode below the 134 MB of the keys."""
    call = "pruneops.attention_mass(query, key, query_group, key_group, 3)"
    for extra in native_memory(call):
        assert extra < 20e6, f"{extra / 1e6:.0f} MB beyond the input"


# Triton


@on_targets(*TRITON_TARGETS)
@pytest.mark.parametrize("full_d", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 2, 45, 70, 33), (1, 7, 1, 20, 40, 16), (1, 8, 2, 2, 150, 20)], ids=str)
def test_triton_small_tiles(target, shape, full_d, monkeypatch):
    """Many blocks in every loop of the kernels, keys split over programs in decode."""
    small_tiles(monkeypatch, full_d, shape[1] // shape[2])
    for kind, causal in ((ranked, True), (counting, True), (counting, False)):
        query, key, options = kind(*shape, torch.Generator().manual_seed(0))
        assert_exact(target, (query, key, *random_groups(shape, groups=5), 5), {**options, "causal": causal})
    args = (*real(*shape), *random_groups(shape), 3)
    close(mass_of(target, *args), oracles.attention_mass(*args))


@on_targets(*TRITON_TARGETS)
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1, 40, 130, 8), (1, 2, 1, 1, 130, 8)], ids=str)
def test_triton_unchecked_groups(target, shape, given_lse):
    """Where groups are not checked, one beyond the last counts as -1."""
    from pruneops.triton_kernels import attention_mass as kernels

    query, key = real(*shape)
    query_group, key_group = random_groups(shape)
    query_group[query_group == 1], query_group[:, -1] = 9, 2
    key_group[key_group == 1], key_group[:, 40:80] = 3, 7
    checked = [group.where(group < 3, -1) for group in (query_group, key_group)]
    truth, true_lse = oracles.attention_mass(query, key, *checked, 3)
    given = true_lse.float() if given_lse else None
    args = contract.to_device((query, key, query_group, key_group, 3, True, shape[-1] ** -0.5, given), target.device)
    mass, lse = contract.to_device(kernels.attention_mass(*args), "cpu")
    close(mass, truth)
    valid = (query_group < 3)[:, None].expand_as(lse)
    close(lse[valid], true_lse[valid])


def test_triton_layouts_share_a_spec():
    """Another would sum in another order: a dtype and a D have one, for all layouts of query and key."""
    call = "kernels.attention_mass(query_now, key_now, query_group, key_group, 3, True, 1.0, None)"
    assert triton_specializations("attention_mass", call) == 4 * [3, 2]


def test_triton_memory():
    """Floats: G + 2 a row; integers: two a query and two a block of keys. In decode far less than the keys."""
    call = "kernels.attention_mass(query, key, query_group, key_group, 3, True, 1.0, None)"
    prefill, decode = triton_memory("attention_mass", call)
    assert prefill < 4 * (5 * 8 * 20000 + 2 * 20000 + 2 * 20000 / 16)
    assert decode < 1e6


# Ratios


def test_cross_modal_ratio():
    """ToDRE's Eq. 7 from the attention itself: sums over heads and tokens, every batch row alone."""
    shape = 2, 4, 2, 30, 30, 16
    query, key = real(*shape)
    group = torch.arange(30).mul(7).remainder(4).sub(1).expand(2, -1)
    mass = pruneops.attention_mass(query, key, group, group, 3, causal=False).mass
    probability, _ = oracles.attention(query, key, group >= 0, group >= 0, causal=False)
    for ratio, (own, other) in zip(pruneops.cross_modal_ratio(mass, text=2, vision=0), ((2, 0), (0, 2))):
        ratios = []
        for rows, groups in zip(probability.sum(1), group):
            rows = rows[groups == own]
            ratios.append(rows[:, groups == other].sum() / rows.sum())
        close(ratio, torch.stack(ratios))
        assert ratio.shape == (2,)
    single = pruneops.cross_modal_ratio(mass[1], text=2, vision=0)
    assert_same_bits(single, [ratio[1] for ratio in pruneops.cross_modal_ratio(mass, text=2, vision=0)])


@every_backend
def test_ratios_of_a_causal_prompt(target):
    """An image that the text follows pays it no attention, exactly; where there is no text both are 0."""
    query, key = real(2, 4, 2, 40, 40, 16)
    group = torch.arange(40).ge(25).long().expand(2, -1).clone()
    group[1] = 0
    mass, _ = mass_of(target, query, key, group, group, 2)
    to_vision, to_text = pruneops.cross_modal_ratio(mass, text=1, vision=0)
    assert 0 < to_vision[0] < 1 and to_vision[1] == 0 and (to_text == 0).all()


@every_backend
def test_group_distribution(target):
    """DyRate's v_t: rows of mass divided by their sums, 0 where no query of the group sees a key."""
    query, key = real(3, 4, 2, 2, 50, 16)
    group, other = ints([-1, 1], [0, 1], [0, 0]), torch.arange(50).div(20).long().expand(3, -1)
    mass, _ = mass_of(target, query, key, group, other, 3)
    shares = pruneops.group_distribution(mass, query=1)
    assert shares.shape == (3, 4, 3)
    close(shares, mass[:, :, 1])  # one query: sums to 1 already
    close(shares.sum(-1), torch.tensor([1.0, 1, 0])[:, None].expand(3, 4))
    several = pruneops.group_distribution(mass, query=0)
    close(several[2], mass[2, :, 0] / 2)
    assert (several[0] == 0).all()
    assert_same_bits(pruneops.group_distribution(mass[1], query=1), shares[1])


@pytest.mark.parametrize("group", [-1, 3])
def test_errors_of_ratios(group):
    mass = torch.ones(2, 4, 3, 3)
    message = "a group of mass, 0 to 2, got"
    for name, other in (("text", "vision"), ("vision", "text")):
        with pytest.raises(ValueError, match=f"^pruneops.cross_modal_ratio: {name} must be {message} {group}$"):
            pruneops.cross_modal_ratio(mass, **{name: group, other: 0})
    with pytest.raises(ValueError, match=f"^pruneops.group_distribution: query must be {message} {group}$"):
        pruneops.group_distribution(mass, query=group)


# CUDA


@CUDA_KERNELS
@pytest.mark.parametrize("queries", [1, 40])
def test_cuda_offsets_past_two_to_the_31(target, queries):
    """Keys spread over 2^31 elements."""
    shape = 2, 4, 2, queries, 300, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    sides, gap = random_groups(shape), 2**31 // 299 // 16 * 16 + 32
    truth = oracles.attention_mass(query, key, *sides, 3, **options)[0].float()
    room = torch.empty(300 * gap, dtype=torch.bfloat16, device="cuda")
    far = room.as_strided(key.shape, (32, 16, gap, 1)).copy_(key)
    args, options = contract.to_device(((query.bfloat16(), *sides, 3), options), "cuda")
    with pruneops.backend(target.backend):
        assert_same_bits(pruneops.attention_mass(args[0], far, *args[1:], **options).mass.cpu(), truth)


@CUDA_KERNELS
def test_cuda_memory(target):
    """G + 2 floats a row; the matrix would take 8.6 GB."""
    shape = 1, 8, 2, 2**14, 2**14, 64
    query, key = contract.to_device(real(*shape, dtype=torch.bfloat16), "cuda")
    group = torch.arange(2**14, device="cuda").remainder(3)[None]
    with pruneops.backend(target.backend):
        pruneops.attention_mass(query, key, group, group, 3)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pruneops.attention_mass(query, key, group, group, 3)
        assert torch.cuda.max_memory_allocated() - before < 4 * 6 * 8 * 2**14
