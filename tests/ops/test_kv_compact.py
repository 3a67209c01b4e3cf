"""Cache compaction on every backend: the contract of `pruneops.kv_compact` and `kv_compact_`, line by line."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, cuda_checks
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
from tests.invalid_calls import InvalidCall, assert_type_error, ints, invalid
from tests.token_copy import BITS, GARBAGE, PLACES, any_bits, ascending, positions, storage, with_garbage


def names(dtype):
    return str(dtype).removeprefix("torch.")


def entries(cache, keep, lengths):
    """(b, h, r, position) of all that is kept."""
    for b in range(cache.shape[0]):
        length = keep.shape[-1] if lengths is None else int(lengths[b])
        for h in range(cache.shape[1]):
            for r, position in enumerate((keep[b, h] if keep.dim() == 3 else keep[b])[:length].tolist()):
                yield b, h, r, position


def compacted(cache, keep, lengths=None):
    """Token by token."""
    result = torch.zeros(*cache.shape[:2], keep.shape[-1], cache.shape[3], dtype=cache.dtype)
    for b, h, r, position in entries(cache, keep, lengths):
        result[b, h, r] = cache[b, h, position]
    return result


def compacted_storage(cache, keep, lengths=None):
    """All bytes around a cache after compaction in place."""
    whole = to_device(cache, "meta")  # a view of the same storage, elsewhere
    copy = storage(cache).clone().view(cache.dtype).as_strided(whole.shape, whole.stride(), whole.storage_offset())
    before = cache.clone()
    for b, h, r, position in entries(cache, keep, lengths):
        copy[b, h, r] = before[b, h, position]
    return storage(copy)


def compact_in_place(target, caches, keep, lengths=None):
    """Storages of copies of the caches, on the target, after `kv_compact_`."""
    own = [c.clone(memory_format=torch.preserve_format) if c.device.type != "cpu" else again(c) for c in caches]
    own, keep, lengths = to_device((own, keep, lengths), target.device)
    with pruneops.backend(target.backend):
        assert pruneops.kv_compact_(own, keep, lengths=lengths) is None
    return [storage(cache) for cache in own]


def again(tensor):
    """The same bits in the same place of another storage."""
    return storage(tensor).clone().view(tensor.dtype).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )  # fmt: skip


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
    each = torch.tensor([[[0, 1], [3, 4]], [[2, 3], [0, 4]]])  # every head its own
    (result,) = call(target, "kv_compact", [cache], each)
    assert result[..., 0].tolist() == [[[0, 1], [8, 9]], [[12, 13], [15, 19]]]


@every_backend
@given(case=cases(in_place=False))
def test_exact_new(target, case):
    caches, keep, lengths = case
    results = call(target, "kv_compact", caches, keep, lengths=lengths)
    assert_same_bits(results, [compacted(cache, keep, lengths) for cache in caches])


@every_backend
@given(case=cases(in_place=True))
def test_exact_in_place(target, case):
    """Every byte of every storage, those that must not change too."""
    caches, keep, lengths = case
    after = compact_in_place(target, caches, keep, lengths)
    assert_same_bits(after, [compacted_storage(cache, keep, lengths) for cache in caches])


@every_backend
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", BITS, ids=names)
def test_exact_bits(target, dtype, place):
    """Types of 1 to 16 bytes wherever they lie."""
    cache = PLACES[place](any_bits((2, 2, 9, 20), dtype))
    keep = ascending((2, 2), 5, 9, torch.Generator().manual_seed(0))
    (result,) = call(target, "kv_compact", [cache], keep)
    assert_same_bits(result, compacted(cache, keep))
    assert_same_bits(compact_in_place(target, [cache], keep), [compacted_storage(cache, keep)])


@every_backend
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 192, 256, 576, 577, 3000])
def test_exact_widths(target, width):
    cache = any_bits((1, 2, 30, width), torch.bfloat16)
    keep = ascending((1, 2), 20, 30, torch.Generator().manual_seed(width))
    assert_same_bits(call(target, "kv_compact", [cache], keep), [compacted(cache, keep)])
    assert_same_bits(compact_in_place(target, [cache], keep), [compacted_storage(cache, keep)])


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
    """Such are written past the caches of a processor where tokens are whole lines, as not all are."""
    forms = [(128, "contiguous"), (24, "contiguous"), (128, "tokens outside"), (128, "off by one"), (20, "off by one")]
    caches = [PLACES[place](any_bits((2, 8, 2000, D), torch.bfloat16, D)) for D, place in forms]
    keep = ascending((2, 8), 1500, 2000, torch.Generator().manual_seed(4))
    for lengths in (None, torch.tensor([1493, 0])):
        results = call(target, "kv_compact", caches, keep, lengths=lengths)
        assert sum(result.nbytes for result in results) > 1 << 24
        with pruneops.backend("reference"):
            assert_same_bits(results, pruneops.kv_compact(caches, keep, lengths=lengths))


@every_backend
@pytest.mark.parametrize("count", [1, 64, 200])
def test_many_caches(target, count):
    """Any number of them, of one form and of many."""
    generator = torch.Generator().manual_seed(0)
    keep = ascending((2,), 3, 6, generator)
    alike = [any_bits((2, 2, 6, 16), torch.float16, seed) for seed in range(count)]
    most = size(target, count, min(count, 40))
    forms = [(1 + i % 4, 6 + i % 3, 8 * (1 + i % 5), BITS[i % len(BITS)]) for i in range(most)]
    different = [any_bits((2, Hk, S, D), dtype, i) for i, (Hk, S, D, dtype) in enumerate(forms)]
    for caches in (alike, different):
        assert_same_bits(call(target, "kv_compact", caches, keep), [compacted(cache, keep) for cache in caches])
        expected = [compacted_storage(cache, keep) for cache in caches]
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
        half[:, :4] = compacted(own.transpose(1, 2), keep).transpose(1, 2)
    assert_same_bits(held.cpu(), expected)


@every_backend
def test_result_lies_as_its_cache(target):
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
def test_in_place_is_new(target):
    """What lies in front after one is what the other returns."""
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
def test_two_steps_are_one(target):
    cache = any_bits((1, 2, 50, 16), torch.float32)
    first = ascending((1,), 30, 50, torch.Generator().manual_seed(1))
    second = ascending((1,), 12, 30, torch.Generator().manual_seed(2))
    held, one, other = to_device((cache.clone(), first, second), target.device)
    with pruneops.backend(target.backend):
        pruneops.kv_compact_([held], one)
        pruneops.kv_compact_([held], other)
    (direct,) = call(target, "kv_compact", [cache], first.gather(1, second))
    assert_same_bits(held[:, :, :12].cpu(), direct)


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    caches = [any_bits((1, 2, 2000, 128), torch.float32, seed) for seed in range(3)]
    keep = ascending((1,), 1500, 2000, torch.Generator().manual_seed(1))

    def run():
        return *call(target, "kv_compact", caches, keep), *compact_in_place(target, caches, keep)

    contract.assert_threads_change_no_bit(run)


@on_targets(REFERENCE, NATIVE)
def test_threads_of_a_program(target):
    inputs = [any_bits((1, 2, 300, 64), torch.float32, seed) for seed in range(4)]
    keep = ascending((1,), 100, 300, torch.Generator().manual_seed(1))
    results = contract.run_concurrently(target, [functools.partial(pruneops.kv_compact, [own], keep) for own in inputs])
    assert_same_bits(results, [call(target, "kv_compact", [own], keep) for own in inputs])


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
            assert_same_bits(result, compacted(cache, keep, lengths))
            after = compact_in_place(target, [cache], keep, lengths)
            assert_same_bits(after, [compacted_storage(cache, keep, lengths)])


@every_backend
def test_garbage_past_the_lengths(target):
    for value in GARBAGE:
        keep = torch.full((2, 4), value)
        keep[0, :2] = torch.tensor([1, 3])
        cache, lengths = any_bits((2, 2, 5, 8)), torch.tensor([2, 0])
        assert_same_bits(call(target, "kv_compact", [cache], keep, lengths=lengths), [compacted(cache, keep, lengths)])
        after = compact_in_place(target, [cache], keep, lengths)
        assert_same_bits(after, [compacted_storage(cache, keep, lengths)])


@on_targets(*contract.CPU_TARGETS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_past_two_to_the_31(target, tmp_path, dim):
    """Batch rows, heads and tokens far apart in sparse files."""
    near = any_bits((3, 3, 4, 8), torch.float32)
    keep = torch.tensor([[0, 3], [1, 2], [2, 3]])
    expected = compacted(near, keep)
    far = contract.with_gaps_past_2_31(tmp_path, near, dim)
    with pruneops.backend(target.backend):  # `call` would copy the file
        assert_same_bits(pruneops.kv_compact([far], keep), [expected])
        pruneops.kv_compact_([far], keep)
    near[:, :, :2] = expected
    assert_same_bits(far.contiguous(), near)


@every_backend
def test_version_of_a_cache(target):
    """Autograd learns of the change."""
    cache = torch.zeros(1, 1, 3, 2, device=target.device)
    version = cache._version
    with pruneops.backend(target.backend):
        pruneops.kv_compact_([cache], torch.tensor([[0, 2]], device=target.device))
    assert cache._version > version


@every_backend
def test_new_caches_have_no_gradient(target):
    cache = torch.zeros(1, 1, 3, 2, device=target.device, requires_grad=True)
    assert not call(target, "kv_compact", [cache], torch.tensor([[0, 2]]))[0].requires_grad


# Compilation


@every_backend
@pytest.mark.parametrize("op", ["kv_compact", "kv_compact_"])
@pytest.mark.parametrize("form", ["two", "per head", "lengths", "tokens outside"])
def test_opcheck(target, op, form):
    caches = [torch.randn(2, 3, 6, 4), torch.randn(2, 3, 7, 2).half()]
    keep, lengths = torch.tensor([[0, 2, 5], [1, 2, 3]]), None
    if form == "per head":
        keep = keep[:, None].repeat(1, 3, 1)
    if form == "lengths":
        lengths = torch.tensor([3, 1])
    if form == "tokens outside":
        caches = [PLACES[form](cache) for cache in caches]
    contract.opcheck(target, op, caches, keep, lengths=lengths)


def both_ways(key, value, keep):
    """What a model does with the operators."""
    new = pruneops.kv_compact([key, value], keep)
    own = [key * 2, value + 1]
    pruneops.kv_compact_(own, keep)
    return new[0] * 2, new[1], own[0][:, :, : keep.shape[1]] + 1, own[1]


@every_backend
def test_compile_without_graph_break(target):
    sizes = (2, 3, 12, 8, 5), (3, 2, 20, 4, 7)
    calls = [
        (torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.arange(K).expand(B, -1) * 2) for B, H, S, D, K in sizes
    ]
    contract.assert_compiles(target, both_ways, calls)


def test_compile_with_inductor():
    sizes = "((2, 3, 12, 8, 5), (3, 2, 20, 4, 7))"
    calls = (
        "[(torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.arange(K).expand(B, -1) * 2)"
        f" for B, H, S, D, K in {sizes}]"
    )
    contract.assert_compiles_with_inductor(__name__, "both_ways", calls)


# Errors

CACHE, KEEP = torch.zeros(2, 3, 5, 4), ints([0, 2, 4], [1, 2, 3])
GOOD = {"caches": [CACHE], "keep": KEEP}
new, inside = (functools.partial(InvalidCall, op, GOOD) for op in ("kv_compact", "kv_compact_"))
ONE = torch.zeros(1, 1, 1, 1)


def both(*args, **kwargs):
    return [new(*args, **kwargs), inside(*args, **kwargs)]


BAD = [
    *both(ValueError, "caches", "an empty list", "at least one cache", caches=[]),
    *both(ValueError, "caches[1]", "of shape [3, 5, 4]", "of rank 4: [B, Hk, S, D]", caches=[CACHE, CACHE[0]]),
    *both(ValueError, "keep", "of shape [3]", "[B, K] or [B, Hk, K]", keep=KEEP[0]),
    *both(ValueError, "keep", "of shape [1, 3]", "of shape [2, K]", keep=KEEP[:1]),
    *both(ValueError, "keep", "of shape [2, 1, 3]", "of shape [2, 3, K]", keep=KEEP[:, None]),
    *both(TypeError, "keep", "torch.int32", "int64", keep=KEEP.int()),
    *both(TypeError, "lengths", "torch.float32", "int64 or int32", lengths=torch.ones(2)),
    *both(ValueError, "lengths", "of shape [3]", "of shape [2]", lengths=ints(1, 1, 1)),
    *both(
        ValueError, "caches[1]", "of shape [1, 1, 1, 1]", "[2, Hk, S, D], as caches[0] and keep say",
        caches=[CACHE, ONE],
    ),
    *both(
        ValueError, "caches[1]", "of shape [2, 1, 5, 4]", "[2, 3, S, D], as caches[0] and keep say",
        caches=[CACHE, torch.zeros(2, 1, 5, 4)], keep=KEEP[:, None].expand(2, 3, 3),
    ),
    *both(ValueError, "keep", "5 at one place", "in [0, 5)", values=True, keep=ints([0, 2, 4], [1, 2, 5])),
    *both(ValueError, "keep", "-1 at one place", "in [0, 5)", values=True, keep=ints([-1, 2, 4], [1, 2, 3])),
    *both(ValueError, "lengths", "4", "0 to the 3 entries of keep", values=True, lengths=ints(1, 4)),
    *both(ValueError, "lengths", "-1", "0 to the 3 entries of keep", values=True, lengths=ints(-1, 1)),
    inside(
        ValueError, "keep", "6 entries a row", "at most the 5 positions of caches[0]",
        keep=torch.arange(6).repeat(2, 1),
    ),
    inside(
        ValueError, "caches[0]", "expanded", "memory of its own for every element",
        caches=[CACHE[:1].expand(2, 3, 5, 4)],
    ),
    inside(ValueError, "caches[1]", "the same memory as caches[0]", "passed once", values=True, caches=[CACHE, CACHE]),
    inside(
        ValueError, "keep", "2 after 2 at [1, 1]", "strictly ascending in every row", values=True,
        keep=ints([0, 2, 4], [1, 2, 2]),
    ),
]  # fmt: skip


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@on_targets(*contract.CPU_TARGETS)
@invalid(BAD)
def test_errors_of_backends(target, bad):
    """The same words, and nothing written."""
    before = [cache.clone() for cache in bad.args[0]]
    with pruneops.backend(target.backend), pytest.raises(bad.error) as error:
        getattr(pruneops, bad.op)(*bad.args, **bad.kwargs)
    assert str(error.value) == bad.message
    assert_same_bits(list(bad.args[0]), before)


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@pytest.mark.parametrize("op", ["kv_compact", "kv_compact_"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caches": CACHE}, "caches must be list or tuple, got Tensor"),
        ({"caches": [CACHE, None]}, "caches[1] must be Tensor, got NoneType"),
        ({"keep": [[0, 1]]}, "keep must be Tensor, got list"),
        ({"lengths": [1, 2]}, "lengths must be Tensor or NoneType, got list"),
    ],
)
def test_errors_of_type(op, changes, words):
    assert_type_error(op, {**GOOD, **changes}, words)


# Triton's launchers


@invalid([bad for bad in BAD if not bad.values or "same memory" in bad.id])
def test_triton_refuses(bad):
    """As on a card, where nothing looks at the arguments before the launcher does."""
    kernels = pytest.importorskip("pruneops.triton_kernels.kv_compact")
    with pytest.raises(RuntimeError):
        getattr(kernels, bad.op)(*bad.args, bad.kwargs.get("lengths"))


TRITON_LAUNCHES = """
import itertools
from pruneops.triton_kernels import kv_compact as kernels
for B, (S, K), count in itertools.product((1, 3), ((5, 3), (300, 256), (1000, 1)), (1, 8, 200)):
    caches = [torch.zeros(B, 2, S, 64, dtype=torch.bfloat16) for _ in range(count)]
    keep = torch.arange(K).expand(B, -1)
    results = kernels.kv_compact(caches, keep, None)
    assert len({result.untyped_storage().data_ptr() for result in results}) == count
    kernels.kv_compact_(caches, keep, None)
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths, batches and counts compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 2 * 2 * 3 * (1 + 1 + 2)  # 200 caches: 192 and 8
    assert compiled == 2 * 2  # kernels, lengths of the lists


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    def run(key, value, keep, lengths):
        own = [key.clone(), value.clone()]
        pruneops.kv_compact_(own, keep, lengths=lengths)
        return *pruneops.kv_compact([key, value], keep), *own

    def inputs(seed):
        caches = [any_bits((2, 4, 900, 64), torch.bfloat16, seed + i).cuda() for i in range(2)]
        keep = ascending((2,), 400, 900, torch.Generator().manual_seed(seed))
        return [*caches, keep.cuda(), torch.tensor([400 - seed, 100 + seed]).cuda()]

    check(target, run, inputs)


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
