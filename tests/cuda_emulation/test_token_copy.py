"""The kernel of kv_compact, kv_compact_, paged_kv_compact_ and gather_tokens: exactly the reference's bytes."""

import os
import subprocess

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from pruneops import reference
from tests.contract import assert_same_bits, poisoned
from tests.inputs import PLACES, any_bits, ascending, storage, with_garbage

from . import HERE, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    """The operators as token_copy.cpp registers them, on tensors of a CPU."""
    target = tmp_path_factory.mktemp("emulation") / "token_copy.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE.parents[1] / 'csrc'}"]
    flags += [part for path in include_paths() for part in ("-isystem", path)]
    link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, HERE / "token_copy.cpp", "-o", target, *link], check=True)
    torch.ops.load_library(target)
    return torch.ops.pruneops_emulated


# (min_blocks, backwards): few wide chunks or many narrow ones in place; threads run in ascending or descending order.
SCHEDULES = {"wide": (1, False), "narrow backwards": (1024, True)}
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
by_layout = pytest.mark.parametrize("layout", PLACES.values(), ids=PLACES)
by_rows = pytest.mark.parametrize("heads", (False, True), ids=["keep per row", "keep per head"])
# Bytes of a token: vectors of 16, 8, 4, 2 and 1 bytes, one and several chunks, odd widths. Values: numbers of tokens
# that fill several tiles, in new tensors and in place.
WIDTHS = {256: (300, 900), 1152: (130, 120), 40: (900, 800), 20: (900, 800), 258: (90, 80), 8: (2100, 900)}
WIDTHS |= {2: (2100, 900), 17: (250, 300), 577: (20, 60)}
by_width = pytest.mark.parametrize("width", WIDTHS)


def positions(B, Hk, K, S, heads, lengths, sort=True):
    rows = (B, Hk) if heads else (B,)
    generator = torch.Generator().manual_seed(K)
    keep = ascending(rows, K, S, generator) if sort else torch.randint(0, S, (*rows, K), generator=generator)
    if lengths is None:
        return keep, None
    lengths = torch.tensor(lengths)
    return with_garbage(keep, lengths), lengths


def assert_new(ops, schedule, caches, keep, lengths=None):
    with poisoned():
        got = ops.kv_compact(caches, keep, lengths, *schedule)
    wanted = reference.kv_compact(caches, keep, lengths=lengths)
    assert_same_bits(got, wanted)
    assert [one.stride() for one in got] == [one.stride() for one in wanted]


def assert_in_place(ops, schedule, caches, keep, lengths=None):
    wanted = cloned_with_storage(caches)
    reference.kv_compact_(wanted, keep, lengths=lengths)
    ops.kv_compact_(caches, keep, lengths, *schedule)
    assert_same_memory(caches, wanted)


def cloned_with_storage(tensors):
    """Views of copies of the whole storages."""
    return [storage(t).clone().view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset()) for t in tensors]


def assert_same_memory(left, right):
    assert_same_bits([storage(one) for one in left], [storage(one) for one in right])


@by_width
@by_rows
def test_widths(ops, heads, width):
    K = WIDTHS[width][0]
    keep, lengths = positions(1, 2, K, K, heads, [K - K // 4], sort=False)
    assert_new(ops, (1, heads), [any_bits((1, 2, K, width), torch.uint8)], keep, lengths)


@by_schedule
@by_width
@by_rows
def test_widths_in_place(ops, schedule, heads, width):
    K = WIDTHS[width][1]
    keep, lengths = positions(1, 2, K, K + K // 8, heads, [K - 3])
    assert_in_place(ops, schedule, [any_bits((1, 2, K + K // 8, width), torch.uint8)], keep, lengths.int())


@by_layout
@by_rows
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.complex128), ids=str)
def test_memory_layouts(ops, layout, heads, dtype):
    caches = [layout(any_bits((2, 2, 30, D), dtype, D)) for D in (4, 3)]
    schedule = SCHEDULES["wide"]
    keep, lengths = positions(2, 2, 25, 30, heads, [25, 16])
    assert_new(ops, schedule, caches, keep, lengths)
    assert_new(ops, schedule, [cache[:1].expand(2, -1, -1, -1) for cache in caches], keep, lengths.int())
    assert_in_place(ops, schedule, caches, keep, lengths)


@by_schedule
def test_distances(ops, schedule):
    """Keeps the last tokens, the first ones, every other one, one, all, none."""
    cache = any_bits((1, 1, 700, 128), torch.bfloat16)
    for keep in (range(300, 700), range(400), range(0, 700, 2), range(699, 700), range(700), ()):
        assert_in_place(ops, schedule, [cache], torch.tensor([[*keep]], dtype=torch.int64))
    assert_in_place(ops, schedule, [cache], torch.full((1, 5), 2**60), torch.tensor([0]))
    assert_in_place(ops, schedule, [cache[:0]], torch.zeros(0, 5, dtype=torch.int64))


def test_empty_cache(ops):
    keep, lengths = torch.full((2, 9), -(2**60)), torch.tensor([0, 0], dtype=torch.int32)
    assert_new(ops, SCHEDULES["wide"], [any_bits((2, 3, 0, 5)), any_bits((2, 1, 4, 8))], keep, lengths)


def test_several_launches(ops):
    """More tensors and layouts than fit one launch, and one layout at addresses of different alignment."""
    many = [any_bits((1, 1, 9, 4), torch.uint8, i) for i in range(140)]
    layouts = [any_bits((1, 2, 9, D), torch.int16, D) for D in range(1, 20)]
    alignments = [any_bits((200,), torch.uint8, i)[i : i + 9 * 16].view(1, 1, 9, 16) for i in (0, 1, 2, 4, 8)]
    keep = torch.tensor([[0, 2, 3, 6, 7, 8]])
    assert_new(ops, SCHEDULES["wide"], many + layouts + alignments, keep.flip(1))
    assert_in_place(ops, SCHEDULES["wide"], many + layouts + alignments, keep)


def test_offsets_past_two_to_the_31(ops):
    memory = torch.empty(2**32 + 2**31, dtype=torch.uint8)  # only a few pages are touched
    cache = memory.as_strided((1, 2, 3, 32), (64, 32, 2**31, 1))
    for token in range(3):
        cache[:, :, token] = any_bits((1, 2, 32), torch.uint8, token)
    keep = torch.tensor([[1, 2]])
    wanted = cache[:, :, keep[0]]
    assert_same_bits(ops.kv_compact([cache], keep, None, 1, False)[0], wanted)
    ops.kv_compact_([cache], keep, None, 1, False)
    assert_same_bits(cache[:, :, :2], wanted)


PAGED = {  # shape of a tensor of pages
    "NHD": lambda n, page, Hk, D: (n, page, Hk, D),
    "HND": lambda n, page, Hk, D: (n, Hk, page, D),
    "NHD pairs": lambda n, page, Hk, D: (n, 2, page, Hk, D),
    "HND pairs": lambda n, page, Hk, D: (n, 2, Hk, page, D),
}


@by_rows
@pytest.mark.parametrize("page", (1, 3, 16, 256))
@pytest.mark.parametrize("layout", PAGED)
def test_pages(ops, heads, page, layout):
    lengths, S = [290, 0, 201], 330
    blocks = -(-S // page)
    shape = PAGED[layout](3 * blocks + 2, page, 2, 40)
    tensors = [any_bits(shape, torch.bfloat16), any_bits((*shape[:-1], 7), torch.uint8)]
    tensors.append(any_bits((*shape[:-1], 4), torch.float32)[..., ::2])
    keep, lengths = positions(3, 2, 300, S, heads, lengths)
    table = torch.randperm(3 * blocks + 2)[: 3 * blocks].view(3, blocks).int()
    wanted = cloned_with_storage(tensors)
    reference.paged_kv_compact_(wanted, table, keep, lengths, layout=layout[:3])
    for b, length in enumerate(lengths.tolist()):
        last = int(keep[b, ..., :length].max()) if length else -1
        table[b, last // page + 1 :] = 2**31 - 1 if b else -(2**31)
    if heads:
        table = table.t().contiguous().t()
    ops.paged_kv_compact_(
        tensors, table, keep, lengths, layout[:3] == "NHD", *SCHEDULES["narrow backwards" if heads else "wide"]
    )
    assert_same_memory(tensors, wanted)


def test_gather(ops):
    keep = torch.randint(0, 90, (2, 70))
    tensors = [
        (any_bits((2, 90, 260), torch.bfloat16), 1),
        (any_bits((90, 2), torch.int64).t(), 1),
        (any_bits((3, 2, 90), torch.int64), 2),
        (any_bits((1, 90), torch.uint8), 1),
        (any_bits((2, 1, 90, 9)).transpose(0, 1), 2),
        (any_bits((1, 1, 90)).expand(4, 2, 90), 2),
        (any_bits((2, 3, 1, 90, 5), torch.float16), 3),
        (any_bits((1, 2, 2, 90, 5), torch.complex64)[..., ::2], 3),
        (any_bits((90, 3, 2, 2, 2), torch.int16).permute(2, 0, 4, 1, 3), 1),
    ]
    assert_gathered(ops, tensors, keep)
    shared = [(tensor.select(dim - 1, 0), dim - 1) for tensor, dim in tensors] + [(any_bits((90,)), 0)]
    assert_gathered(ops, shared, keep[1], backwards=True)
    assert_gathered(ops, tensors, keep[:, :0])
    assert_gathered(ops, [(any_bits((2, 90, 0)), 1)], keep)


def assert_gathered(ops, tensors, keep, backwards=False):
    dims = [dim for _, dim in tensors]
    tensors = [tensor for tensor, _ in tensors]
    with poisoned():
        got = ops.gather_tokens(tensors, keep, dims, 1, backwards)
    wanted = reference.gather_tokens(tensors, keep, dims)
    assert_same_bits(got, wanted)
    assert all(one.is_contiguous() for one in got)


@pytest.mark.parametrize("vec_bytes", (1, 2, 4, 8, 16))
@pytest.mark.parametrize("in_place", (False, True))
def test_chunks_cover_a_token(ops, vec_bytes, in_place):
    for vecs in (*range(1, 80), 129, 144, 256, 257, 512, 577, 4096):
        for min_chunks in 1, 3, 1000:
            chunk, chunks, tiles, blocks = ops.chunking(vecs * vec_bytes, vec_bytes, 3, 1000, min_chunks, in_place)
            assert 1 <= chunk <= 256 and (chunks - 1) * chunk < vecs <= chunks * chunk
            assert blocks == 3 * chunks * tiles
            assert 2 * (256 // chunk) * vecs >= 256 * chunks  # at least half of the threads are active
            if in_place and min_chunks >= vecs:
                assert chunk * vec_bytes <= 64
            if vecs * vec_bytes % 32 == 0:
                assert chunk * vec_bytes % 32 == 0


def test_few_threads_are_idle(ops):
    for D in (64, 72, 80, 96, 112, 128, 192, 256, 576, 1152, 4096, 4608):
        chunk, chunks, *_ = ops.chunking(2 * D, 16, 1, 1000, 1, False)
        assert 256 // chunk * (D // 8) >= 230 * chunks


def test_documented_numbers_of_blocks(ops):
    """Those of docs/kernels/token_copy.md."""
    assert 64 * ops.chunking(256, 16, 32, 352, 1, False)[3] == 6144
    assert 64 * ops.chunking(256, 16, 32, 2765, 1, True)[3] == 2048
    assert 64 * ops.chunking(256, 16, 4, 2765, 2, True)[3] == 512
    assert ops.chunking(256, 16, 8, 2765, 64, True)[3] == 32
