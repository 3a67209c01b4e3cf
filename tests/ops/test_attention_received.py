"""Attention that keys receive, on every backend: the contract of `pruneops.attention_received`, line by line."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruneops
from tests import contract, strategies
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
from tests.inputs import DTYPES, HEAD_LAYOUTS, LAYOUTS, counting, poison, ranked, real, runs, small_integers
from tests.invalid_calls import bools
from tests.oracles import attention, masked_attention
from tests.specs import attention_received as spec
from tests.strategies import laid_out

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)


def received_by(target, query, key, **options):
    received = call(target, "attention_received", query, key, **options)
    assert received.dtype == torch.float32
    return received


def float64_received(query, key, **options):
    return masked_attention(query, key, **options)[0].sum(-2)


def float64_lse(query, key, **options):
    return masked_attention(query, key, **options)[1].float()


def random_masks(shape, seed=0):
    """{query_mask, key_mask} for a shape (B, H, Hk, Sq, Sk, D), in runs."""
    generator = torch.Generator().manual_seed(seed)
    B, _, _, Sq, Sk, _ = shape
    return {name: runs((B, S), 3, generator) >= 0 for name, S in (("query_mask", Sq), ("key_mask", Sk))}


@st.composite
def exact_cases(draw):
    """(query, key, options)"""
    query, key, *masks, options = draw(exact_attention())
    for name, mask in zip(("query_mask", "key_mask"), masks):
        if not mask.all() or draw(st.booleans()):
            options[name] = draw(laid_out(mask, expand=False))
    if len(query) == 1 and draw(st.booleans()):
        return *unbatched((query, key)), unbatched(options)
    return query, key, options


@st.composite
def real_cases(draw):
    """(query, key, options)"""
    shape = B, _, _, Sq, Sk, _ = draw(shapes(widths=(1, 16, 33)))
    generator = draw(strategies.generators)
    masks = {name: draw(valid_masks((B, S), generator)) for name, S in (("query_mask", Sq), ("key_mask", Sk))}
    return *real(*shape), {**masks, "causal": draw(st.booleans())}


def assert_exact(target, query, key, options):
    """Counts, to the bit: a logit minus itself is 0, a normaliser that went through a logarithm would not be."""
    truth = float64_received(query, key, **options).float()
    assert_same_bits(received_by(target, query, key, **options), truth)


# Answers


@every_backend
def test_known_answer(target):
    """Written by hand: softmax of (2, 1) and of (3, 1, 3), then with masks and with lse given."""
    query, key = torch.tensor([2.0, 3.0]).log().view(1, 2, 1), torch.tensor([1.0, 0, 1]).view(1, 3, 1)
    exactly = functools.partial(close, rtol=4 * EPS, atol=0)
    mask, key_mask, lse = (
        torch.tensor([False, True]),
        torch.tensor([False, True, True]),
        torch.tensor([[0.0, math.log(9)]]),
    )
    for options, answer in (
        ({}, [2 / 3 + 3 / 7, 1 / 3 + 1 / 7, 3 / 7]),
        ({"query_mask": mask}, [3 / 7, 1 / 7, 3 / 7]),
        ({"key_mask": key_mask}, [0, 5 / 4, 3 / 4]),
        ({"query_mask": ~mask, "causal": False}, [2 / 5, 1 / 5, 2 / 5]),
        ({"lse": lse, "scale": 2}, [5, 10 / 9, 1]),
    ):
        exactly(received_by(target, query, key, **options), torch.tensor([answer]))


@every_backend
@given(case=exact_cases())
def test_exact_inputs(target, case):
    """One right answer: poisoned padding, strides, dtypes, heads, masks, alignments of the causal mask."""
    assert_exact(target, *case)


@every_backend
@pytest.mark.parametrize("kind", [ranked, counting], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_tiles(target, shape, kind):
    """Across blocks of keys and of rows, exactly."""
    shape = smaller(target, shape)
    query, key, options = kind(*shape, torch.Generator().manual_seed(0))
    for causal, masks in ((True, {}), (True, random_masks(shape)), (False, random_masks(shape))):
        assert_exact(target, query, key, {**options, **masks, "causal": causal})


@every_backend
@pytest.mark.parametrize(("shape", "dtype"), [*zip(SHAPES, itertools.cycle(DTYPES))], ids=str)
def test_real_values(target, shape, dtype):
    """Error at most twice the reference's, the same bits on every call."""
    shape = smaller(target, shape)
    query, key = real(*shape, dtype=dtype)
    masks = random_masks(shape)
    for options in (masks, {"causal": False, "scale": 0.3}, {"lse": float64_lse(query, key, **masks), **masks}):
        truth = float64_received(query, key, **options)
        received = received_by(target, query, key, **options)
        error, allowed = (
            float((r - truth).abs().max()) for r in (received, received_by(REFERENCE, query, key, **options))
        )
        # an ulp of a logit of 10 is 8 of a probability
        contract.assert_no_worse(error, allowed, float(truth.max()), ulps=8)
        assert_same_bits(received_by(target, query, key, **options), received)


@every_backend
@pytest.mark.parametrize("marked", [1, 5])
def test_few_marked_rows(target, marked):
    """FastV's last row, a few of text: as those rows alone, whatever the others are."""
    query, key = real(1, 4, 2, size(target, 300, 30), 1200, 8)
    mask = bools(1, query.shape[2])
    mask[:, :-marked] = False
    received = received_by(target, query, key, query_mask=mask)
    close(received, float64_received(query, key, query_mask=mask))
    close(received, received_by(target, query[:, :, -marked:], key))


@every_backend
def test_class_token(target):
    """FasterVLM's and VisionZip's row in front, which sees all patches."""
    query, key = real(2, 3, 3, 50, 50, 16)
    mask = torch.arange(50).eq(0).expand(2, -1)
    received = received_by(target, query, key, query_mask=mask, causal=False)
    close(received, (query[:, :, 0].double()[:, :, None] @ key.double().mT / 4).softmax(-1)[:, :, 0])


@every_backend
def test_equal_logits(target):
    """A query of zeros spreads evenly over 64 keys."""
    key_mask = torch.arange(100) % 25 < 16
    received = received_by(target, torch.zeros(2, 3, 50), torch.randn(1, 100, 50), key_mask=key_mask, causal=False)
    tolerance = 0 if target.backend == "triton" else 4 * EPS  # exp of a rounded logarithm
    close(received, (3 / 64 * key_mask).expand(2, -1), rtol=tolerance, atol=0)


@every_backend
@pytest.mark.parametrize("keys", [5, 300])
def test_one_visible_key(target, keys):
    """It receives all attention of every query."""
    query, key = real(2, 4, 2, 20, keys, 24)
    key_mask = torch.arange(keys) == torch.tensor([[2], [0]])
    received = received_by(target, query, key, key_mask=key_mask, causal=False)
    close(
        received, (20.0 * key_mask)[:, None].expand(2, 4, -1), rtol=16 * EPS, atol=0
    )  # lse and logit differ by rounding


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
def test_nothing_visible(target, given_lse):
    """Queries before the first key, rows of padding alone, no marked queries: 0, never NaN."""
    query, key = real(3, 2, 1, 40, 12, 8)
    masks = {"query_mask": bools(3, 40), "key_mask": bools(3, 12)}
    masks["query_mask"][2] = masks["key_mask"][0] = False
    options = {"lse": float64_lse(query, key, **masks)} if given_lse else {}
    received = received_by(target, query, key, **masks, **options)
    close(received, float64_received(query, key, **masks))
    close(received.sum(-1), torch.tensor([0.0, 12, 0])[:, None].expand(3, 2))
    assert (received[[0, 2]] == 0).all()


@every_backend
@pytest.mark.parametrize("height", [-1e4, 1e4])
def test_hard_softmax(target, height):
    """Steps of 1 on logits of 10^4, which float32 still holds."""
    generator = torch.Generator().manual_seed(0)
    query = torch.tensor([100.0, 1]).expand(2, 30, 2)
    key = torch.stack([torch.full((1, 90), height / 100), -torch.randint(0, 9, (1, 90), generator=generator)], -1)
    received = received_by(target, query, key, scale=1)
    close(received, float64_received(query, key, scale=1), rtol=4 * EPS * 1e4, atol=0)


@every_backend
def test_products_past_half_precision(target):
    """Features of hundreds: products that float16 does not hold."""
    generator = torch.Generator().manual_seed(0)
    query, key = (small_integers((2, S, 128), generator, 300).half() for S in (40, 70))
    received = received_by(target, query, key, causal=False)
    truth = float64_received(query, key, causal=False)
    highest = float((query.double() @ key.double().mT).max())
    assert highest > 65504
    close(received, truth, rtol=4 * EPS * highest * 128**-0.5, atol=1e-6)  # the rounding of lse


# What changes nothing, and what propagates


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 90, 16), (2, 4, 2, 1, 90, 16)], ids=str)
def test_padding_changes_no_bit(target, shape, given_lse):
    """Poisoned queries and keys that masks exclude, and the lse of such queries."""
    query, key = real(*shape)
    masks = random_masks(shape)
    query_mask, key_mask = masks["query_mask"][:, None], masks["key_mask"][:, None]
    generator = torch.Generator().manual_seed(0)
    clean = bad = {}
    if given_lse:
        clean = {"lse": float64_lse(query, key, **masks)}
        bad = {"lse": poison(clean["lse"], query_mask, generator)}
    plain = received_by(target, query, key, **masks, **clean)
    query, key = poison(query, query_mask[..., None], generator), poison(key, key_mask[..., None], generator)
    assert_same_bits(received_by(target, query, key, **masks, **bad), plain)


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_special_values_propagate(target, queries, bad, given_lse):
    """In the keys whose logits hold it, or that its rows see where lse is not given; all others keep their bits."""
    query, key = real(2, 4, 2, queries, 50, 16)
    options = {"lse": float64_lse(query, key)} if given_lse else {}
    before = received_by(target, query, key, **options)
    # the first query of head 2; a key that only the last 15 queries see, of heads 2 and 3
    for tensor, place in ((query, (1, 2, 0)), (key, (1, 1, 35))):
        original, tensor[place] = tensor[place].clone(), bad
        received, truth = received_by(target, query, key, **options), float64_received(query, key, **options)
        tensor[place] = original
        assert torch.equal(received.isnan(), truth.isnan())
        others = ~truth.isnan()
        assert others[0].all() and not others[1].all()
        assert_same_bits(received[others], before[others])


@every_backend
def test_given_lse(target):
    """That of attention_mass; any other is used as it is, with any strides."""
    shape = 2, 4, 2, 30, 70, 24
    query, key = real(*shape)
    masks = random_masks(shape)
    received = received_by(target, query, key, **masks)
    groups = (mask.long() - 1 for mask in masks.values())
    lse = call(target, "attention_mass", query, key, *groups, 1).lse
    close(received_by(target, query, key, **masks, lse=lse), received)
    close(received_by(target, query, key, **masks, lse=lse + 3), received * math.exp(-3))
    lse = HEAD_LAYOUTS["strided features"](lse.where(lse != -torch.inf, torch.nan))  # of queries that are not marked
    close(received_by(target, query, key, **masks, lse=lse), received)


@every_backend
@pytest.mark.parametrize("given_lse", [False, True])
def test_batch_rows_are_independent(target, given_lse):
    def answer(query, key, query_mask, key_mask, lse):
        lse = lse if given_lse else None
        return received_by(target, query, key, query_mask=query_mask, key_mask=key_mask, lse=lse)

    for shape in ((3, 4, 2, 40, 60, 16), (3, 2, 1, 1, size(target, 3000, 600), 16)):
        rows = spec.inputs(0, shape)
        alone = answer(*rows)[1]
        for neighbour in (torch.nan, 0.0, 1e4):
            batch = [torch.full_like(t, neighbour if t.is_floating_point() else 1) for t in rows]
            for tensor, values in zip(batch, rows):
                tensor[1] = values[1]
            assert_same_bits(answer(*batch)[1], alone)
        single = answer(*(t[1] for t in rows))
        (close if target.backend == "reference" else assert_same_bits)(single, alone)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 4, 2, 20, 50, 64), (2, 4, 2, 1, 50, 64)], ids=str)
def test_strides_change_no_bit(target, shape, dtype):
    query, key, *masks, lse = spec.inputs(0, shape, dtype)

    def both(query, key, query_mask, key_mask, lse):
        masks = {"query_mask": query_mask, "key_mask": key_mask}
        return received_by(target, query, key, **masks), received_by(target, query, key, **masks, lse=lse)

    plain = both(query, key, *masks, lse)
    for name in HEAD_LAYOUTS.keys() - {"one head"}:
        side = LAYOUTS.get(name, torch.clone)
        own = *(HEAD_LAYOUTS[name](t) for t in (query, key)), *(side(t) for t in (*masks, lse))
        assert_same_bits(both(*own), plain)


# Relations between answers


@every_backend
@given(case=real_cases())
@settings(max_examples=12)
def test_sums(target, case):
    """Over all keys, the marked queries that see one; over masks that share no query, that of their union."""
    query, key, options = case
    received = received_by(target, query, key, **options)
    masks = options["query_mask"], options["key_mask"]
    has_key = attention(query, key, *masks, causal=options["causal"])[1].isfinite()
    close(received.sum(-1), has_key.sum(-1))
    assert (received.where(masks[1][:, None], 0.0) == received).all()
    odd = torch.arange(query.shape[2]) % 2 == 1
    parts = (received_by(target, query, key, **{**options, "query_mask": masks[0] & part}) for part in (odd, ~odd))
    close(sum(parts), received)


@every_backend
@given(case=real_cases(), more=st.integers(1, 40))
@settings(max_examples=8)
def test_padding_and_order_of_heads(target, case, more):
    """Masked keys on the left, masked tokens on the right, heads in another order."""
    query, key, options = case
    received = received_by(target, query, key, **options)
    more_keys, more_queries = key[:, :, :1].expand(-1, -1, more, -1), query[:, :, :1].expand(-1, -1, more, -1)
    padding = torch.zeros(len(key), more, dtype=torch.bool)
    left = {**options, "key_mask": torch.cat([padding, options["key_mask"]], 1)}
    padded = received_by(target, query, torch.cat([more_keys, key], 2), **left)
    close(padded[..., more:], received)
    assert (padded[..., :more] == 0).all()
    right = {name: torch.cat([options[name], padding], 1) for name in ("query_mask", "key_mask")}
    padded = received_by(
        target, torch.cat([query, more_queries], 2), torch.cat([key, more_keys], 2), **{**options, **right}
    )
    close(padded[..., :-more], received)
    H, Hk = query.shape[1], key.shape[1]
    heads = torch.arange(H).view(Hk, -1).flip(0, 1).flatten()
    close(received_by(target, query[:, heads], key.flip(1), **options), received[:, heads])


# Edges


@every_backend
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges(target, shape):
    """No batch, no queries, no keys, no heads, one of each."""
    B, H, _, Sq, *_ = shape
    query, key = real(*shape)
    for options in ({}, {"query_mask": bools(B, Sq), "causal": False}, {"lse": torch.zeros(B, H, Sq)}):
        close(received_by(target, query, key, **options), float64_received(query, key, **options))


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Tokens, heads, masks and lse far apart in sparse files."""
    shape = 2, 4, 2, 3, 5, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    options |= random_masks(shape)
    truth = float64_received(query, key, **options).float()
    far = functools.partial(contract.with_gaps_past_2_31, tmp_path)
    options = {name: far(t, t.dim() - 1) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    with pruneops.backend(target.backend):  # `call` would copy the files
        for dim in (0, 1, 2):
            assert_same_bits(pruneops.attention_received(far(query, dim), far(key, dim), **options), truth)


@on_targets(NATIVE)
def test_memory(target):
    """Far below the matrix of 1.8 GB, and in decode below the 134 MB of the keys."""
    for extra in native_memory("pruneops.attention_received(query, key)"):
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
        assert_exact(target, query, key, {**options, **random_masks(shape), "causal": causal})
    query, key = real(*shape)
    close(received_by(target, query, key), float64_received(query, key))


@on_targets(*TRITON_TARGETS)
@pytest.mark.parametrize("queries", [1, 100])
def test_triton_normaliser_is_no_logarithm(target, queries):
    """One visible key gets exactly 1 from every query, at logits of all sizes: a logarithm would round by their ulp."""
    generator = torch.Generator().manual_seed(0)
    query, key = (small_integers((7, heads, S, 64), generator) for heads, S in ((4, queries), (2, 70)))
    key_mask = torch.arange(70) == torch.arange(7)[:, None] * 11
    received = received_by(target, query, key, key_mask=key_mask, causal=False, scale=1.7)
    assert_same_bits(received, (1.0 * queries * key_mask)[:, None].expand(-1, 4, -1))


def test_triton_layouts_share_a_spec():
    """Another would sum in another order: a dtype and a D have one, for all layouts of query and key."""
    call = "kernels.attention_received(query_now, key_now, query_group > 0, key_group > 0, True, 1.0, None)"
    assert triton_specializations("attention_received", call) == 4 * [3, 2]


def test_triton_memory():
    """Beside the answer a few floats a row, in decode for every split of the keys."""
    call = "kernels.attention_received(query, key, None, key_group > 0, True, 1.0, None)"
    prefill, decode = triton_memory("attention_received", call)
    assert prefill < 4 * (8 * 20000 + 4 * 8 * 20000 + 20000 + 20000 / 16)
    assert decode < 4 * 8 * 2**17 + 3e5


# CUDA


@CUDA_KERNELS
@pytest.mark.parametrize("queries", [1, 40])
def test_cuda_offsets_past_two_to_the_31(target, queries):
    """Keys spread over 2^31 elements."""
    shape = 2, 4, 2, queries, 300, 16
    query, key, options = counting(*shape, torch.Generator().manual_seed(0))
    options, gap = {**options, **random_masks(shape)}, 2**31 // 299 // 16 * 16 + 32
    truth = float64_received(query, key, **options).float()
    room = torch.empty(300 * gap, dtype=torch.bfloat16, device="cuda")
    far = room.as_strided(key.shape, (32, 16, gap, 1)).copy_(key)
    with pruneops.backend(target.backend):
        received = pruneops.attention_received(query.bfloat16().cuda(), far, **contract.to_device(options, "cuda"))
    assert_same_bits(received.cpu(), truth)


@CUDA_KERNELS
def test_cuda_memory(target):
    """A few floats a row; the matrix would take 8.6 GB."""
    query, key = contract.to_device(real(1, 8, 2, 2**14, 2**14, 64, dtype=torch.bfloat16), "cuda")
    with pruneops.backend(target.backend):
        pruneops.attention_received(query, key)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pruneops.attention_received(query, key)
        assert torch.cuda.max_memory_allocated() - before < 4 * 6 * 8 * 2**14
