"""Cache compaction on every backend: the contract of `pruneops.kv_compact` and `kv_compact_`, line by line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, oracles
from tests.contract import (
    CUDA_KERNELS,
    NATIVE,
    REFERENCE,
    assert_same_bits,
    call,
    every_backend,
    on_targets,
    size,
    to_device,
)
from tests.inputs import BITS, GARBAGE, PLACES, any_bits, ascending, copied, storage, with_garbage
from tests.strategies import positions


def names(dtype):
    return str(dtype).removeprefix("torch.")


def compact_in_place(target, caches, keep, lengths=None):
    """Storages of copies of the caches, on the target, after `kv_compact_`."""
    caches, keep, lengths = copied((caches, keep, lengths), target.device)
    with pruneops.backend(target.backend):
        assert pruneops.kv_compact_(caches, keep, lengths=lengths) is None
    return [storage(cache).cpu() for cache in caches]


@st.composite
def cases(draw, in_place):
    """(caches, keep, lengths)"""
    B, Hk, S = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 12))
    caches = []
    for i in range(draw(st.integers(1, 4))):
        D = draw(st.sampled_from([1, 3, 16, 20, 33]))
        cache = any_bits((B, Hk, S, D), draw(st.sampled_from(BITS)), seed=i)
        caches.append(PLACES[draw(st.sampled_from(list(PLACES)))](cache))
    keep, lengths = draw(positions(B, Hk, S, in_place))
    return caches, keep, lengths


# Answers


@every_backend
def test_known_answer(target):
    """Two requests, two heads, three kept of five; the second request keeps two."""
    cache = torch.arange(20).reshape(2, 2, 5, 1)
    keep, lengths = torch.tensor([[0, 2, 4], [1, 3, 77]]), torch.tensor([3, 2])
    (result,) = call(target, "kv_compact", [cache], keep, lengths=lengths)
    assert result[..., 0].tolist() == [[[0, 2, 4], [5, 7, 9]], [[11, 13, 0], [16, 18, 0]]]
    (bytes_,) = compact_in_place(target, [cache], keep, lengths)
    assert bytes_.view(torch.int64).tolist() == [0, 2, 4, 3, 4, 5, 7, 9, 8, 9, 11, 13, 12, 13, 14, 16, 18, 17, 18, 19]
    each = torch.tensor([[[0, 1], [3, 4]], [[2, 3], [0, 4]]])  # each head has its own
    (result,) = call(target, "kv_compact", [cache], each)
    assert result[..., 0].tolist() == [[[0, 1], [8, 9]], [[12, 13], [15, 19]]]


@every_backend
@given(case=cases(in_place=False))
def test_exact_new(target, case):
    caches, keep, lengths = case
    results = call(target, "kv_compact", caches, keep, lengths=lengths)
    assert_same_bits(results, [oracles.kv_compact(cache, keep, lengths) for cache in caches])


@every_backend
@given(case=cases(in_place=True))
def test_exact_in_place(target, case):
    """Every byte of every storage, those that must not change too."""
    caches, keep, lengths = case
    after = compact_in_place(target, caches, keep, lengths)
    assert_same_bits(after, [storage(oracles.kv_compact_(cache, keep, lengths)) for cache in caches])


@every_backend
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", BITS, ids=names)
def test_exact_bits(target, dtype, place):
    """Types of 1 to 16 bytes in all layouts."""
    cache = PLACES[place](any_bits((2, 2, 9, 20), dtype))
    keep = ascending((2, 2), 5, 9, torch.Generator().manual_seed(0))
    (result,) = call(target, "kv_compact", [cache], keep)
    assert_same_bits(result, oracles.kv_compact(cache, keep))
    assert_same_bits(compact_in_place(target, [cache], keep), [storage(oracles.kv_compact_(cache, keep))])


@every_backend
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 192, 256, 576, 577, 3000])
def test_exact_widths(target, width):
    cache = any_bits((1, 2, 30, width), torch.bfloat16)
    keep = ascending((1, 2), 20, 30, torch.Generator().manual_seed(width))
    assert_same_bits(call(target, "kv_compact", [cache], keep), [oracles.kv_compact(cache, keep)])
    assert_same_bits(compact_in_place(target, [cache], keep), [storage(oracles.kv_compact_(cache, keep))])


@every_backend
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("place", ["contiguous", "tokens outside", "off by one"])
def test_many_tiles(target, place, share):
    """Across tiles and threads, against the reference: long runs, short ones, all of them."""
    B, Hk, S, D = size(target, (2, 4, 3000, 128), (1, 2, 700, 64))
    caches = [PLACES[place](any_bits((B, Hk, S, D), torch.float16, seed)) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    K = int(share * S)
    for rows in ((B,), (B, Hk)):
        keep = ascending(rows, K, S, generator)
        lengths = torch.tensor([K, K // 2][:B])
        keep = with_garbage(keep, lengths)
        with pruneops.backend("reference"):
            truth = pruneops.kv_compact(caches, keep, lengths=lengths)
        assert_same_bits(call(target, "kv_compact", caches, keep, lengths=lengths), truth)
        expected = compact_in_place(REFERENCE, caches, keep, lengths)
        assert_same_bits(compact_in_place(target, caches, keep, lengths), expected)


@on_targets(NATIVE)
def test_exact_results_larger_than_caches(target):
    """Written with non-temporal stores where tokens are whole cache lines, which not all are."""
    kinds = [(128, "contiguous"), (24, "contiguous"), (128, "tokens outside"), (128, "off by one"), (20, "off by one")]
    caches = [PLACES[place](any_bits((2, 8, 2000, D), torch.bfloat16, D)) for D, place in kinds]
    keep = ascending((2, 8), 1500, 2000, torch.Generator().manual_seed(4))
    for lengths in (None, torch.tensor([1493, 0])):
        results = call(target, "kv_compact", caches, keep, lengths=lengths)
        assert sum(result.nbytes for result in results) > 1 << 24
        with pruneops.backend("reference"):
            assert_same_bits(results, pruneops.kv_compact(caches, keep, lengths=lengths))


@every_backend
@pytest.mark.parametrize("count", [1, 64, 200])
def test_many_caches(target, count):
    """Any number of them, of one kind and of many."""
    generator = torch.Generator().manual_seed(0)
    keep = ascending((2,), 3, 6, generator)
    alike = [any_bits((2, 2, 6, 16), torch.float16, seed) for seed in range(count)]
    most = size(target, count, min(count, 40))
    kinds = [(1 + i % 4, 6 + i % 3, 8 * (1 + i % 5), BITS[i % len(BITS)]) for i in range(most)]
    different = [any_bits((2, Hk, S, D), dtype, i) for i, (Hk, S, D, dtype) in enumerate(kinds)]
    for caches in (alike, different):
        assert_same_bits(
            call(target, "kv_compact", caches, keep), [oracles.kv_compact(cache, keep) for cache in caches]
        )
        expected = [storage(oracles.kv_compact_(cache, keep)) for cache in caches]
        assert_same_bits(compact_in_place(target, caches, keep), expected)


@every_backend
def test_keys_and_values_of_one_tensor(target):
    """Interleaved per token, as paged and fused caches hold them: two views of one storage."""
    both = any_bits((2, 9, 2, 3, 16), torch.bfloat16)  # [B, S, 2, Hk, D]
    keep = ascending((2,), 4, 9, torch.Generator().manual_seed(3))
    held = to_device(both.clone(), target.device)
    caches = [half.transpose(1, 2) for half in held.unbind(2)]
    with pruneops.backend(target.backend):
        pruneops.kv_compact_(caches, to_device(keep, target.device))
    expected = both.clone()
    for half, own in zip(expected.unbind(2), both.unbind(2)):
        half[:, :4] = oracles.kv_compact(own.transpose(1, 2), keep).transpose(1, 2)
    assert_same_bits(held.cpu(), expected)


@every_backend
def test_result_has_the_layout_of_its_cache(target):
    keep = torch.tensor([[0, 2]])
    for cache, inside in (
        (torch.zeros(1, 3, 5, 4), False),
        (torch.zeros(1, 5, 3, 4).transpose(1, 2), True),
        (torch.zeros(1, 5, 1, 4).transpose(1, 2), False),
    ):
        (result,) = call(target, "kv_compact", [cache], keep)
        assert (result.transpose(1, 2) if inside else result).is_contiguous()


# Relations between answers


@every_backend
def test_in_place_equals_new(target):
    """The first tokens after one are what the other returns."""
    caches = [any_bits((2, 3, 40, 16), dtype) for dtype in BITS[:4]]
    keep = ascending((2,), 21, 40, torch.Generator().manual_seed(1))
    new = call(target, "kv_compact", caches, keep)
    after = compact_in_place(target, caches, keep)
    for cache, result, own in zip(caches, new, after):
        assert_same_bits(own.view(cache.dtype).view(cache.shape)[:, :, :21], result)


@every_backend
def test_keeping_all_changes_nothing(target):
    cache = any_bits((2, 2, 11, 24), torch.float16)
    keep = torch.arange(11).expand(2, -1)
    assert_same_bits(compact_in_place(target, [cache], keep), [storage(cache)])
    assert_same_bits(call(target, "kv_compact", [cache], keep), [cache])


@every_backend
def test_two_steps_equal_one(target):
    cache = any_bits((1, 2, 50, 16), torch.float32)
    first = ascending((1,), 30, 50, torch.Generator().manual_seed(1))
    second = ascending((1,), 12, 30, torch.Generator().manual_seed(2))
    held, one, other = to_device((cache.clone(), first, second), target.device)
    with pruneops.backend(target.backend):
        pruneops.kv_compact_([held], one)
        pruneops.kv_compact_([held], other)
    (direct,) = call(target, "kv_compact", [cache], first.gather(1, second))
    assert_same_bits(held[:, :, :12].cpu(), direct)


# Edges


@every_backend
def test_edges(target):
    for B, Hk, S, D, K in (
        (1, 1, 1, 1, 1),
        (1, 1, 1, 1, 0),
        (2, 2, 5, 4, 0),
        (0, 2, 5, 4, 3),
        (2, 2, 0, 4, 0),
        (2, 2, 5, 0, 3),
        (2, 0, 5, 4, 3),
        (1, 1, 40, 576, 40),
    ):
        cache = any_bits((B, Hk, S, D), torch.bfloat16)
        keep = torch.arange(K).expand(B, -1)
        for lengths in (None, torch.zeros(B, dtype=torch.int32)):
            (result,) = call(target, "kv_compact", [cache], keep, lengths=lengths)
            assert_same_bits(result, oracles.kv_compact(cache, keep, lengths))
            after = compact_in_place(target, [cache], keep, lengths)
            assert_same_bits(after, [storage(oracles.kv_compact_(cache, keep, lengths))])


@every_backend
def test_garbage_past_the_lengths(target):
    for value in GARBAGE:
        keep = torch.full((2, 4), value)
        keep[0, :2] = torch.tensor([1, 3])
        cache, lengths = any_bits((2, 2, 5, 8)), torch.tensor([2, 0])
        assert_same_bits(
            call(target, "kv_compact", [cache], keep, lengths=lengths), [oracles.kv_compact(cache, keep, lengths)]
        )
        after = compact_in_place(target, [cache], keep, lengths)
        assert_same_bits(after, [storage(oracles.kv_compact_(cache, keep, lengths))])


@on_targets(*contract.CPU_TARGETS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_past_two_to_the_31(target, tmp_path, dim):
    """Batch rows, heads and tokens far apart in sparse files."""
    near = any_bits((3, 3, 4, 8), torch.float32)
    keep = torch.tensor([[0, 3], [1, 2], [2, 3]])
    expected = oracles.kv_compact(near, keep)
    far = contract.with_gaps_past_2_31(tmp_path, near, dim)
    with pruneops.backend(target.backend):  # `call` would copy the file
        assert_same_bits(pruneops.kv_compact([far], keep), [expected])
        pruneops.kv_compact_([far], keep)
    near[:, :, :2] = expected
    assert_same_bits(far.contiguous(), near)


@every_backend
def test_version_of_a_cache(target):
    """Autograd sees the change."""
    cache = torch.zeros(1, 1, 3, 2, device=target.device)
    version = cache._version
    with pruneops.backend(target.backend):
        pruneops.kv_compact_([cache], torch.tensor([[0, 2]], device=target.device))
    assert cache._version > version


# Triton's launchers


# CUDA


@CUDA_KERNELS
def test_cuda_offsets_past_two_to_the_31(target):
    """One cache of more than 2^31 elements: its last row is the one that it is alone."""
    shape = 9, 8, 32768, 1024
    if torch.cuda.mem_get_info()[0] < 2.3 * torch.Size(shape).numel():
        pytest.skip("too little memory")
    cache = torch.empty(shape, dtype=torch.int8, device="cuda").random_()
    keep = ascending((9,), 3000, 32768, torch.Generator().manual_seed(0)).cuda()
    with pruneops.backend(target.backend):
        (result,) = pruneops.kv_compact([cache], keep)
        for row in (0, 8):
            assert torch.equal(result[row], pruneops.kv_compact([cache[row:][:1]], keep[row:][:1])[0][0])
        pruneops.kv_compact_([cache], keep)
    assert torch.equal(cache[:, :, :3000], result)
