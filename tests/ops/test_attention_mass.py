"""Attention between groups on every backend: the contract of `pruneops.attention_mass` and its ratios, line by line."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruneops
from tests import contract, cuda_checks, strategies
from tests.attention import (
    ATTENTION_TYPES,
    EDGES,
    LAYOUTS,
    SHAPES,
    attention,
    attention_errors,
    counting,
    exact_attention,
    live,
    native_memory,
    ranked,
    real,
    runs,
    shapes,
    small_tiles,
    smaller,
    spoiled,
    triton_forms,
    triton_memory,
    unbatched,
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
from tests.invalid_calls import InvalidCall, assert_type_error, ints, invalid
from tests.strategies import laid_out

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)


def mass_of(target, *args, **options):
    mass, lse = call(target, "attention_mass", *args, **options)
    assert (mass.dtype, lse.dtype) == (torch.float32, torch.float32)
    return mass, lse


def float64_mass(query, key, query_group, key_group, groups, **options):
    """(mass, lse) in float64; a group that is not one of `groups` is counted nowhere, as a key it is seen."""
    probability, lse = attention(query, key, query_group >= 0, key_group >= 0, **options)
    own, other = (group[..., None, :, None] == torch.arange(groups) for group in (query_group, key_group))
    return own.double().mT @ probability @ other.double(), lse


def random_groups(shape, seed=0, groups=3):
    """(query_group, key_group) for a shape (B, H, Hk, Sq, Sk, D), -1 among them."""
    generator = torch.Generator().manual_seed(seed)
    B, _, _, Sq, Sk, _ = shape
    return runs((B, Sq), groups, generator), runs((B, Sk), groups, generator)


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
    query_group, key_group = (draw(grouped(draw(live((B, S), generator)), groups, generator)) for S in (Sq, Sk))
    return (*real(*shape), query_group, key_group, groups), {"causal": draw(st.booleans())}


def assert_exact(target, args, options):
    """Counts, to the bit; lse to rounding, or as it was given."""
    mass, lse = mass_of(target, *args, **options)
    truth, true_lse = float64_mass(*args, **options)
    assert_same_bits(mass, truth.float())
    if "lse" in options:
        assert_same_bits(lse, options["lse"])
    else:
        close(lse, true_lse, rtol=4 * EPS, atol=0)


# Answers


@every_backend
def test_known_answer(target):
    """Stands on no other code: softmax of (2, 1) and of (3, 1, 3), then with padding, unmasked and with lse given."""
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
    """One right answer: padding that holds anything, strides, dtypes, heads, groups, alignments of the causal mask."""
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
@pytest.mark.parametrize(("shape", "dtype"), [*zip(SHAPES, itertools.cycle(strategies.DTYPES))], ids=str)
def test_real_values(target, shape, dtype):
    """Errors of mass and lse at most twice the reference's, the same bits on every call."""
    shape = smaller(target, shape)
    args = (*real(*shape, dtype=dtype), *random_groups(shape), 3)
    given_lse = float64_mass(*args)[1].float()
    for options in ({}, {"causal": False, "scale": 0.3}, {"lse": given_lse}):
        truth = float64_mass(*args, **options)
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
    live_keys = torch.arange(100) % 25 < 16
    key_group = torch.arange(100).div(30, rounding_mode="floor").where(live_keys, -1)
    query, key = torch.zeros(2, 3, 50), torch.randn(1, 100, 50)
    mass, lse = mass_of(target, query, key, ints(0, 1, 1), key_group, 4, causal=False)
    expected = (key_group == torch.arange(4)[:, None]).sum(1) / 64 * torch.tensor([1.0, 2, 0, 0])[:, None]
    close(mass, expected.expand(2, 4, 4), rtol=0 if target.backend != "reference" else 4 * EPS, atol=0)
    close(lse, torch.full((2, 3), math.log(64)), rtol=2 * EPS, atol=0)


@every_backend
@pytest.mark.parametrize("keys", [5, 300])
def test_one_visible_key(target, keys):
    """It gets everything, exactly, and lse is its logit."""
    query, key = real(2, 4, 2, 20, keys, 24)
    one = torch.full((2, keys), -1)
    one[0, 2], one[1, 0] = 1, 0
    group = torch.arange(20).remainder(3).sub(1).expand(2, -1)  # 7 queries of group 0, 6 of group 1
    mass, lse = mass_of(target, query, key, group, one, 2, causal=False)
    assert_same_bits(mass, torch.tensor([[[0.0, 7], [0, 6]], [[7, 0], [6, 0]]])[:, None].expand(2, 4, 2, 2))
    close(lse, float64_mass(query, key, group, one, 2, causal=False)[1], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
def test_nothing_visible(target, given_lse):
    """Queries before the first key, rows of padding alone, padding on either side: mass 0, lse -inf, never NaN."""
    query, key = real(3, 2, 1, 40, 12, 8)
    key_group = torch.full((3, 12), -1)
    key_group[1:, 3:9], group = 1, torch.zeros(3, 40, dtype=torch.int64)
    group[2] = -1
    lse = torch.full((3, 2, 40), -torch.inf)
    lse[1, :, 31:] = float64_mass(query, key, group, key_group, 2)[1][1, :, 31:]  # 31 + 12 - 40 is the first key
    mass, found = mass_of(target, query, key, group, key_group, 2, lse=lse if given_lse else None)
    close(mass, torch.tensor([0.0, 9, 0])[:, None, None, None] * torch.tensor([[0.0, 1], [0, 0]]).expand(3, 2, 2, 2))
    close(found, lse)
    assert (mass[..., 0] == 0).all() and (mass[..., 1, :] == 0).all()


@every_backend
@pytest.mark.parametrize("height", [-1e4, 1e4])
def test_hard_softmax(target, height):
    """Steps of 1 on logits of 10^4, which float32 still holds."""
    generator = torch.Generator().manual_seed(0)
    query = torch.tensor([100.0, 1]).expand(2, 30, 2)
    key = torch.stack([torch.full((1, 90), height / 100), -torch.randint(0, 9, (1, 90), generator=generator)], -1)
    args = query, key, torch.zeros(30, dtype=torch.int64), torch.arange(90) % 3, 3
    mass, lse = mass_of(target, *args, scale=1)
    truth = float64_mass(*args, scale=1)
    close(mass, truth[0], rtol=2 * EPS * 1e4, atol=0)
    close(lse, truth[1], rtol=2 * EPS, atol=0)


@every_backend
def test_products_past_half_precision(target):
    """Features of hundreds: products that float16 does not hold, probabilities of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    query, key = (contract.small_integers((2, S, 128), generator, 300).half() for S in (40, 70))
    args = query, key, ints(*range(40)) % 2, ints(*range(70)) % 2, 2
    truth, true_lse = float64_mass(*args)
    assert true_lse.max() > 65504
    mass, lse = mass_of(target, *args)
    assert_same_bits(mass, truth.float())
    close(lse, true_lse, rtol=2 * EPS, atol=0)


# What must not matter, and what must show


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 90, 16), (2, 4, 2, 1, 90, 16)], ids=str)
def test_padding_changes_no_bit(target, shape, given_lse):
    """Queries that do not count and keys that nobody sees, with anything in them; so an lse that is not asked for."""
    query, key = real(*shape)
    groups = query_group, key_group = random_groups(shape)
    query_group[1] = 1
    lse = float64_mass(query, key, *groups, 3)[1].float() if given_lse else None
    mass, found = mass_of(target, query, key, *groups, 3, lse=lse)
    generator = torch.Generator().manual_seed(0)
    live_queries, live_keys = (query_group >= 0)[:, None], (key_group >= 0)[:, None]
    query, key = (spoiled(t, alive[..., None], generator) for t, alive in ((query, live_queries), (key, live_keys)))
    lse = spoiled(lse, live_queries, generator) if given_lse else None
    again = mass_of(target, query, key, *groups, 3, lse=lse)
    assert_same_bits(again, (mass, lse if given_lse else found))


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_special_values_show(target, queries, bad, given_lse):
    """In the rows that meet it; other heads and batch rows keep their bits."""
    query, key = real(2, 4, 2, queries, 50, 16)
    group, other = torch.arange(queries).div(20).long().expand(2, -1), torch.arange(50).div(30).long().expand(2, -1)
    lse = float64_mass(query, key, group, other, 2)[1].float() if given_lse else None
    before = mass_of(target, query, key, group, other, 2, lse=lse)
    last = int(group[0, -1])
    # the first query of head 2, and a key that only the last 15 queries see, those of heads 2 and 3
    for tensor, place, heads, pair in ((query, (1, 2, 0), [2], (0, 0)), (key, (1, 1, 35), [2, 3], (last, 1))):
        original, tensor[place] = tensor[place].clone(), bad
        mass, found = mass_of(target, query, key, group, other, 2, lse=lse)
        tensor[place] = original
        touched = torch.zeros(2, 4, dtype=torch.bool)
        touched[1, heads] = True
        assert_same_bits([r[~touched] for r in (mass, found)], [r[~touched] for r in before])
        if given_lse:
            assert_same_bits(found, lse)
            assert mass[touched][:, pair[0], pair[1]].isnan().all()
        else:
            assert mass[touched][:, pair[0]].isnan().all()
            assert not found[touched].isfinite().all(-1).any()


@every_backend
def test_given_lse(target):
    """Its own lse fed back; any other is taken at its word; a copy comes back, whatever it holds."""
    shape = 2, 4, 2, 30, 70, 24
    args = (*real(*shape), *random_groups(shape), 3)
    mass, lse = mass_of(target, *args)
    close(mass_of(target, *args, lse=lse)[0], mass)
    close(mass_of(target, *args, lse=lse + 3)[0], mass * math.exp(-3))
    lse = LAYOUTS["strided features"](lse.where(lse != -torch.inf, torch.nan))  # of queries that do not count
    again, found = mass_of(target, *args, lse=lse)
    close(again, mass)
    assert_same_bits(found, lse)
    args, lse = contract.to_device((args, lse), target.device)
    with pruneops.backend(target.backend):
        assert pruneops.attention_mass(*args, lse=lse).lse.data_ptr() != lse.data_ptr()


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
def test_batch_rows_do_not_meet(target, given_lse):
    def answer(query, key, query_group, key_group, lse):
        return mass_of(target, query, key, query_group, key_group, 3, lse=lse if given_lse else None)

    for shape in ((3, 4, 2, 40, 60, 16), (3, 2, 1, 1, size(target, 3000, 600), 16)):
        rows = form_inputs(0, shape)
        alone = [result[1] for result in answer(*rows)]
        for neighbour in (torch.nan, 0.0, 1e4):
            crowded = [torch.full_like(t, neighbour if t.is_floating_point() else 1) for t in rows]
            for theirs, mine in zip(crowded, rows):
                theirs[1] = mine[1]
            assert_same_bits([result[1] for result in answer(*crowded)], alone)
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
    for name in LAYOUTS.keys() - {"one head"}:
        own = LAYOUTS[name](query), LAYOUTS[name](key)
        side = strategies.LAYOUTS.get(name, torch.clone)
        own = (*own, *(side(group).int() for group in groups), 3)
        assert_same_bits((mass_of(target, *own), mass_of(target, *own, lse=side(lse))), plain)


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    for shape in ((2, 4, 2, 200, 300, 40), (1, 4, 4, 1, 3000, 40)):
        inputs = form_inputs(0, shape)
        with pruneops.backend(target.backend):
            contract.assert_threads_change_no_bit(lambda inputs=inputs: every_form(*inputs))


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    """Calls from several threads at once give the answers of calls in turn."""
    calls = [functools.partial(every_form, *form_inputs(seed, (2, 4, 2, 50, 90, 20))) for seed in range(4)]
    results = contract.run_concurrently(target, calls)
    with pruneops.backend(target.backend):
        assert_same_bits(results, [call() for call in calls])


# Relations between answers


@every_backend
@given(case=real_cases())
@settings(max_examples=12)
def test_sums(target, case):
    """A row of mass sums to the queries of its group that see a key; the mass of one group is what its keys receive."""
    (query, key, query_group, key_group, groups), options = case
    mass, lse = mass_of(target, *case[0], **options)
    truth = attention(query, key, query_group >= 0, key_group >= 0, **options)[1]
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
def test_groups_and_heads_are_names(target, case, order):
    """Merged groups have the sum of their columns or rows, renamed ones change places; and so do heads."""
    (query, key, query_group, key_group, groups), options = case
    mass, lse = mass_of(target, *case[0], **options)
    merged, _ = mass_of(target, query, key, *(g.clamp(max=groups - 2) for g in case[0][2:4]), groups - 1, **options)
    pairs = torch.eye(groups)[:, : groups - 1]
    pairs[-1, -1] = 1
    close(merged, pairs.mT @ mass @ pairs)
    order = torch.tensor([p for p in order if p < groups])
    place = torch.cat([order.argsort(), ints(-1)])  # -1 stays itself
    renamed, found = mass_of(target, query, key, place[query_group.long()], place[key_group.long()], groups, **options)
    close((renamed, found), (mass[..., order, :][..., order], lse))
    H, Hk = query.shape[1], key.shape[1]
    heads = torch.arange(H).view(Hk, -1).flip(0, 1).flatten()
    turned = mass_of(target, query[:, heads], key.flip(1), query_group, key_group, groups, **options)
    close(turned, (mass[:, heads], lse[:, heads]))


@every_backend
@given(case=real_cases(), more=st.integers(1, 40))
@settings(max_examples=12)
def test_padding_changes_nothing(target, case, more):
    """Keys of group -1 on the left, tokens of group -1 on the right; a prefix is what it is with what follows it."""
    (query, key, query_group, key_group, groups), options = case
    expected = mass, lse = mass_of(target, *case[0], **options)
    more_keys, more_queries = key[:, :, :1].expand(-1, -1, more, -1), query[:, :, :1].expand(-1, -1, more, -1)
    nobody = key_group.new_full((len(key), more), -1)
    left = torch.cat([more_keys, key], 2), torch.cat([nobody, key_group], 1)
    close(mass_of(target, query, left[0], query_group, left[1], groups, **options), expected)
    right = [torch.cat([t, m], 2) for t, m in ((query, more_queries), (key, more_keys))]
    right += [torch.cat([g, nobody.to(g.dtype)], 1) for g in (query_group, key_group)]
    padded, longer = mass_of(target, *right, groups, **options)
    close((padded, longer[..., : lse.shape[-1]]), expected)
    assert (longer[..., lse.shape[-1] :] == -torch.inf).all()
    if options["causal"]:
        followed = [*right[:2], right[2], torch.cat([key_group, torch.zeros_like(nobody)], 1)]
        close(mass_of(target, *followed, groups, **options)[0], mass)


def every_form(query, key, query_group, key_group, lse):
    """All forms of a call: prefill, with lse given, unmasked, decode, unbatched."""
    last = query[:, :, -1:], key, query_group[:, -1:], key_group
    return (
        *pruneops.attention_mass(query, key, query_group, key_group, 3),
        *pruneops.attention_mass(query, key, query_group, key_group, 3, lse=lse),
        *pruneops.attention_mass(*last, 3),
        *pruneops.attention_mass(*last, 3, lse=lse[..., -1:], scale=0.1),
        *pruneops.attention_mass(query[0], key[0], query_group[0], key_group[0], 3, causal=False),
    )


def form_inputs(seed, shape=(2, 4, 2, 300, 500, 64), dtype=torch.float32):
    """[query, key, query_group, key_group, lse]"""
    lse = torch.randn(shape[:2] + shape[3:4], generator=torch.Generator().manual_seed(seed))
    query_group, key_group = random_groups(shape, seed)
    query_group[:, -1] = 0
    return [*real(*shape, seed, dtype), query_group, key_group, lse]


# Edges


@every_backend
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges(target, shape):
    """No batch, no queries, no keys, no heads, one of each."""
    B, H, _, Sq, Sk, _ = shape
    args = (*real(*shape), torch.ones(B, Sq, dtype=torch.int64), torch.zeros(B, Sk, dtype=torch.int32), 2)
    for options in ({}, {"causal": False}, {"lse": torch.zeros(B, H, Sq)}):
        close(mass_of(target, *args, **options), float64_mass(*args, **options))


@every_backend
def test_no_gradient(target):
    query, key, *others = contract.to_device(form_inputs(0, (2, 4, 2, 5, 7, 4)), target.device)
    with pruneops.backend(target.backend):
        results = every_form(query.requires_grad_(), key.requires_grad_(), *others)
    assert not any(result.requires_grad for result in results)


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Tokens, heads, groups and lse far apart in sparse files."""
    shape = 2, 4, 2, 3, 5, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    query_group, key_group = random_groups(shape)
    truth = float64_mass(query, key, query_group, key_group, 3, **options)[0].float()
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
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 2, 45, 70, 33), (1, 7, 1, 20, 40, 16), (1, 8, 2, 2, 150, 20)], ids=str)
def test_triton_small_tiles(target, shape, whole, monkeypatch):
    """Many blocks in every loop of the kernels, keys split over programs in decode."""
    small_tiles(monkeypatch, whole, shape[1] // shape[2])
    for kind, causal in ((ranked, True), (counting, True), (counting, False)):
        query, key, options = kind(*shape, torch.Generator().manual_seed(0))
        assert_exact(target, (query, key, *random_groups(shape, groups=5), 5), {**options, "causal": causal})
    args = (*real(*shape), *random_groups(shape), 3)
    close(mass_of(target, *args), float64_mass(*args))


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
    truth, true_lse = float64_mass(query, key, *checked, 3)
    given = true_lse.float() if given_lse else None
    args = contract.to_device((query, key, query_group, key_group, 3, True, shape[-1] ** -0.5, given), target.device)
    mass, lse = contract.to_device(kernels.attention_mass(*args), "cpu")
    close(mass, truth)
    valid = (query_group < 3)[:, None].expand_as(lse)
    close(lse[valid], true_lse[valid])


TRITON_LAUNCHES = """
from pruneops.triton_kernels import attention_mass as kernels

for Sq, Sk in ((50, 50), (51, 70), (1000, 3001), (64, 32), (1, 1), (1, 17), (1, 3000)):
    query, key = (torch.ones(3, S, h, 64, dtype=torch.bfloat16) for S, h in ((Sq, 4), (Sk, 2)))
    group, other = (torch.zeros(3, S, dtype=torch.int64) for S in (Sq, Sk))
    for batch in (1, 3):
        args = [*(t[:batch].transpose(1, 2) for t in (query, key)), group[:batch], other[:batch], 3]
        for causal in (True, False):
            kernels.attention_mass(*args, causal, 0.1, None)
            kernels.attention_mass(*args, causal, 0.2, torch.ones(3, 4, Sq)[:batch])
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths, batches, scales and groups compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    # lists in prefill; sums and their end
    assert launched == 2 * 4 * (4 * 3 + 3 * 2)
    # prefill or decode, with lse and without; causal and not for the sums; an end that does not ask for lse in prefill
    assert compiled == 1 + 8 + 3


def test_triton_layouts_have_one_form():
    """Another form sums in another order: for a dtype and D there is one, however query and key lie in memory."""
    call = "kernels.attention_mass(query_now, key_now, query_group, key_group, 3, True, 1.0, None)"
    assert triton_forms("attention_mass", call) == 4 * [3, 2]


def test_triton_memory():
    """Floats: G + 2 a row; integers: one a query and one a block of keys. In decode far less than the keys."""
    call = "kernels.attention_mass(query, key, query_group, key_group, 3, True, 1.0, None)"
    prefill, decode = triton_memory("attention_mass", call)
    assert prefill < 4 * (5 * 8 * 20000 + 20000 + 20000 / 16)
    assert decode < 1e6


# Compilation


def samples():
    """(arguments, options)"""
    query, key, query_group, key_group, lse = form_inputs(0, (2, 4, 2, 5, 7, 6))
    return [
        ((query, key, query_group, key_group, 3), {}),
        ((query[:, :, -1:], key, query_group[:, -1:], key_group.int(), 3), {"lse": lse[:, :, -1:], "causal": False}),
        ((LAYOUTS["tokens before heads"](query).half(), key.half(), query_group, key_group, 8), {"scale": 0.1}),
        ((query[0].bfloat16(), LAYOUTS["transposed"](key[0]).bfloat16(), query_group[0], key_group[0], 3), {}),
    ]


@every_backend
@pytest.mark.parametrize("sample", range(4))
def test_opcheck(target, sample):
    args, options = samples()[sample]
    contract.opcheck(target, "attention_mass", *args, **options)


def watched(x, y, tokens):
    """What a model does with the operator: project, watch the attention of its text to the image, use it."""
    query, key = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (x, y))
    query_group, key_group = (torch.arange(t.shape[1], device=t.device).ge(tokens).long() for t in (x, y))
    query_group, key_group = (g.expand(x.shape[0], -1) for g in (query_group, key_group))
    mass, lse = pruneops.attention_mass(query, key, query_group, key_group, 2)
    again = pruneops.attention_mass(query, key, query_group, key_group, 2, lse=lse).mass
    ratios = pruneops.cross_modal_ratio(mass, text=1, vision=0)
    return x * ratios[0][:, None, None], *ratios, pruneops.group_distribution(again, query=1), lse


@every_backend
def test_compile_without_graph_break(target):
    sizes = (12, 19, 3, 2), (20, 20, 7, 4), (31, 40, 16, 6)
    calls = [(torch.randn(2, Sq, H * 8), torch.randn(2, Sk, H // 2 * 8), tokens) for Sq, Sk, tokens, H in sizes]
    contract.assert_compiles(target, watched, calls)


def test_compile_with_inductor():
    calls = "[(torch.randn(2, N, 32), torch.randn(2, N + 3, 16), N // 3) for N in (12, 20)]"
    contract.assert_compiles_with_inductor(__name__, "watched", calls)


# Ratios


def test_cross_modal_ratio():
    """ToDRE's Eq. 7 from the attention itself: sums over heads and tokens, every batch row alone."""
    shape = 2, 4, 2, 30, 30, 16
    query, key = real(*shape)
    group = torch.arange(30).mul(7).remainder(4).sub(1).expand(2, -1)
    mass = pruneops.attention_mass(query, key, group, group, 3, causal=False).mass
    probability, _ = attention(query, key, group >= 0, group >= 0, causal=False)
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
    words = "a group of mass, 0 to 2, got"
    for name, other in (("text", "vision"), ("vision", "text")):
        with pytest.raises(ValueError, match=f"^pruneops.cross_modal_ratio: {name} must be {words} {group}$"):
            pruneops.cross_modal_ratio(mass, **{name: group, other: 0})
    with pytest.raises(ValueError, match=f"^pruneops.group_distribution: query must be {words} {group}$"):
        pruneops.group_distribution(mass, query=group)


# Errors

QUERY, KEY, SIDE, OTHER, _ = form_inputs(0, (2, 4, 2, 5, 6, 8))
GOOD = {"query": QUERY, "key": KEY, "query_group": SIDE, "key_group": OTHER, "groups": 3}
BAD = attention_errors("attention_mass", GOOD)
bad = functools.partial(InvalidCall, "attention_mass", GOOD)
BAD += [
    bad(ValueError, "groups", "0", "1 to 8", groups=0),
    bad(ValueError, "groups", "9", "1 to 8", groups=9),
    bad(TypeError, "query_group", "torch.float32", "int64 or int32", query_group=SIDE.float()),
    bad(TypeError, "key_group", "torch.bool", "int64 or int32", key_group=OTHER.bool()),
    bad(ValueError, "query_group", "of shape [5]", "of shape [2, 5]", query_group=SIDE[0]),
    bad(ValueError, "query_group", "of shape [2, 6]", "of shape [2, 5]", query_group=OTHER),
    bad(ValueError, "key_group", "of shape [2, 5]", "of shape [2, 6]", key_group=SIDE),
    bad(ValueError, "key_group", "of shape [1, 6]", "of shape [2, 6]", key_group=OTHER[:1]),
    bad(ValueError, "query_group", "on meta", "on the device of query, cpu", query_group=SIDE.to("meta")),
    bad(ValueError, "query_group", "3 at one place", "in [-1, 3)", query_group=torch.full_like(SIDE, 3), values=True),
    bad(ValueError, "key_group", "-2 at one place", "in [-1, 3)", key_group=torch.full_like(OTHER, -2), values=True),
]


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@invalid([bad for bad in BAD if bad.argument == "groups" or bad.id.startswith("attention_mass-lse-of")])
def test_errors_under_compile(bad):
    bad.assert_raises_under_compile()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *ATTENTION_TYPES,
        ({"query_group": [0]}, "query_group must be Tensor, got list"),
        ({"key_group": 0}, "key_group must be Tensor, got int"),
        ({"groups": 3.0}, "groups must be int or SymInt, got float"),
    ],
)
def test_errors_of_type(changes, words):
    assert_type_error("attention_mass", {**GOOD, **changes}, words)


@pytest.mark.gpu
def test_errors_on_cuda(monkeypatch):
    """Groups are read under PRUNEOPS_DEBUG=1 only."""
    args = contract.to_device([*GOOD.values()], "cuda")
    with pytest.raises(ValueError, match="on the device of query, cuda"):
        pruneops.attention_mass(*args[:3], OTHER, 3)
    monkeypatch.setenv("PRUNEOPS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"key_group must be in \[-1, 3\), got 3 at one place"):
        pruneops.attention_mass(*args[:3], args[3].clamp(min=3), 3)


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    check(target, every_form, lambda seed: contract.to_device(form_inputs(seed, dtype=torch.bfloat16), "cuda"))


@CUDA_KERNELS
@pytest.mark.parametrize("queries", [1, 40])
def test_cuda_offsets_past_two_to_the_31(target, queries):
    """Keys spread over 2^31 elements."""
    shape = 2, 4, 2, queries, 300, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    sides, gap = random_groups(shape), 2**31 // 299 // 16 * 16 + 32
    truth = float64_mass(query, key, *sides, 3, **options)[0].float()
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
