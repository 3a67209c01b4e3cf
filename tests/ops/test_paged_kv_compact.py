"""Compaction of paged caches on every backend: the contract of `pruneops.paged_kv_compact_`, line by line."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, strategies
from tests.contract import REFERENCE, assert_same_bits, every_backend, on_targets, size, to_device
from tests.inputs import BITS, GARBAGE, any_bits, ascending, block_tables, copied, pages_of, with_garbage
from tests.oracles import paged_kv_compact_
from tests.specs.paged_kv_compact import PLACE


def compact(target, tensors, table, keep, lengths, layout="NHD"):
    """Copies of the tensors after compaction on the target."""
    tensors, *arguments = copied((tensors, table, keep, lengths), target.device)
    with pruneops.backend(target.backend):
        assert pruneops.paged_kv_compact_(tensors, *arguments, layout=layout) is None
    return to_device(tensors, "cpu")


@st.composite
def cases(draw):
    """(tensors, table, keep, lengths, layout): garbage past the lengths and past the last kept token's page."""
    generator = draw(strategies.generators)
    B, Hk, blocks = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    page, layout = draw(st.sampled_from([1, 2, 3, 4, 7])), draw(st.sampled_from(["NHD", "HND"]))
    pages = B * blocks + draw(st.integers(1, 3))
    tensors = []
    for i in range(draw(st.integers(1, 3))):
        shape = pages, page, Hk, draw(st.sampled_from([1, 5, 16, 24])), layout
        tensors.append(pages_of(*shape, draw(st.sampled_from(BITS)), draw(st.booleans()), i))
    K = draw(st.integers(0, blocks * page))
    rows = draw(st.sampled_from([(B,), (B, Hk)]))
    lengths = torch.randint(0, K + 1, (B,), generator=generator)
    keep = with_garbage(ascending(rows, K, blocks * page, generator), lengths)
    table = block_tables(B, blocks, pages, generator)
    for b, length in enumerate(lengths.tolist()):
        last = int(keep[b, ..., :length].max()) if length else -1
        table[b, last // page + 1 :] = -(2**30) if b % 2 else 2**30
    lengths = lengths.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return tensors, table, keep, lengths, layout


@st.composite
def shared_pages(draw):
    """(tensors, table, keep, lengths, layout): pages at several places, the first tokens of every row stay."""
    generator = draw(strategies.generators)
    B, Hk, blocks, page = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(2, 4)), 2
    S, pages, prefix = blocks * page, draw(st.integers(blocks, B * blocks)), draw(st.integers(0, blocks - 1))
    table = torch.stack([torch.randperm(pages, generator=generator)[:blocks] for _ in range(B)]).int()
    table[:, :prefix] = table[:1, :prefix]
    rows, stay = draw(st.sampled_from([(B,), (B, Hk)])), max(0, prefix * page + draw(st.integers(-1, 2)))
    K = draw(st.integers(stay, S))
    rest = stay + ascending(rows, K - stay, S - stay, generator)
    keep = torch.cat([torch.arange(stay).expand(*rows, stay), rest], -1)
    lengths = torch.randint(K // 2, K + 1, (B,), generator=generator)
    layout = draw(st.sampled_from(["NHD", "HND"]))
    return [pages_of(pages, page, Hk, 5, layout)], table, with_garbage(keep, lengths), lengths, layout


def overwritten_page(table, keep, lengths, page):
    """The first page that a token moves to and that serves two places, or None; token by token."""
    places, written = Counter(), set()
    for b, length in enumerate(lengths.tolist()):
        rows = torch.atleast_2d(keep[b])[:, :length].tolist()
        last = max((position for row in rows for position in row), default=-1)
        places.update(table[b, : last // page + 1].tolist())
        written |= {int(table[b, r // page]) for row in rows for r, position in enumerate(row) if r != position}
    return min((own for own in written if places[own] > 1), default=None)


# Answers


@every_backend
def test_known_answer(target):
    """Two requests of pages of two tokens, the second of one page; page 1 is unused."""
    pages = torch.arange(10.0).view(5, 2, 1, 1)
    table = torch.tensor([[4, 0, 2], [3, -7, 99]], dtype=torch.int32)  # tokens 8 9 0 1 4 5; 6 7
    keep, lengths = torch.tensor([[1, 2, 5], [1, -9, -9]]), torch.tensor([3, 1])
    (after,) = compact(target, [pages], table, keep, lengths)
    assert after.flatten().tolist() == [5, 1, 2, 3, 4, 5, 7, 7, 9, 0]


@every_backend
@given(case=cases())
def test_exact_pages(target, case):
    """Every byte of every tensor, those that must not change too."""
    tensors, *arguments = case
    assert_same_bits(compact(target, *case), paged_kv_compact_(tensors, *arguments))


@every_backend
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [1, 3, 16, 128, 256])
def test_page_sizes(target, page, layout):
    """Across tiles, against the reference; shared and per-head positions."""
    generator = torch.Generator().manual_seed(page)
    B, Hk, D = 2, 2, 64
    blocks = -(-size(target, 700, 130) // page)
    table = block_tables(B, blocks, B * blocks + 3, generator)
    tensors = [pages_of(B * blocks + 3, page, Hk, D, layout, dtype, True) for dtype in (torch.bfloat16, torch.int8)]
    K = max(1, int(0.8 * blocks * page))
    lengths = torch.tensor([K, K // 3])
    for rows in ((B,), (B, Hk)):
        keep = with_garbage(ascending(rows, K, blocks * page, generator), lengths)
        arguments = table, keep, lengths, layout
        assert_same_bits(compact(target, tensors, *arguments), compact(REFERENCE, tensors, *arguments))


@every_backend
@pytest.mark.parametrize("dtype", BITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_exact_bits(target, dtype):
    """Keys and values apart, together, and as two views of one tensor."""
    generator = torch.Generator().manual_seed(0)
    table, keep, lengths = block_tables(2, 3, 7, generator), ascending((2,), 7, 12, generator), torch.tensor([7, 5])
    both = any_bits((7, 4, 2, 3, 20), dtype)  # [pages, page, 2, Hk, D]: interleaved per token
    held = to_device(both.clone(), target.device)
    with pruneops.backend(target.backend):
        pruneops.paged_kv_compact_(list(held.unbind(2)), *to_device((table, keep, lengths), target.device))
    parts = paged_kv_compact_(both.unbind(2), table, keep, lengths)
    assert_same_bits(held.cpu(), torch.stack(parts, 2))
    together = both.movedim(2, 1).contiguous()
    assert_same_bits(compact(target, [together], table, keep, lengths), [torch.stack(parts, 1)])


# Shared pages


@every_backend
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_shared_prefix(target, layout):
    """Three requests begin with the same two pages and keep them whole; what follows moves in other pages."""
    generator = torch.Generator().manual_seed(3)
    table = torch.cat([torch.tensor([[6, 2]]).expand(3, 2), torch.tensor([[0, 1, 3], [9, 8, 7], [4, 5, 10]])], 1).int()
    prefix, lengths = torch.arange(8), torch.tensor([13, 12, 9])
    for rows in ((3,), (3, 2)):
        rest = 8 + ascending(rows, 5, 12, generator)
        keep = with_garbage(torch.cat([prefix.expand(*rows, 8), rest], -1), lengths)
        tensors = [pages_of(12, 4, 2, 16, layout, dtype) for dtype in (torch.float16, torch.int8)]
        arguments = table, keep, lengths, layout
        after = compact(target, tensors, *arguments)
        assert_same_bits(after, paged_kv_compact_(tensors, *arguments))
        for old, new in zip(tensors, after):
            assert_same_bits(new[[6, 2, 11]], old[[6, 2, 11]])


@every_backend
def test_shared_sources(target):
    """Tokens may be moved from a page at several places, of one request too, as long as none moves to it."""
    tensor = pages_of(5, 2, 1, 4, "NHD")
    table = torch.tensor([[0, 4, 4], [1, 4, 3]], dtype=torch.int32)
    arguments = table, torch.tensor([[1, 5], [0, 2]]), torch.tensor([2, 2]), "NHD"
    assert_same_bits(compact(target, [tensor], *arguments), paged_kv_compact_([tensor], *arguments))


@every_backend
@given(case=shared_pages())
def test_shared_pages(target, case):
    """Right where no token moves to a shared page, on all backends; otherwise rejected on the CPU."""
    tensors, table, keep, lengths, layout = case
    page = overwritten_page(table, keep, lengths, tensors[0].shape[1 if layout == "NHD" else 2])
    if page is None:
        assert_same_bits(compact(target, *case), paged_kv_compact_(*case))
    elif target.device == "cpu":
        before = [tensor.clone() for tensor in tensors]
        with pruneops.backend(target.backend), pytest.raises(ValueError) as error:
            pruneops.paged_kv_compact_(tensors, table, keep, lengths, layout=layout)
        assert f"{PLACE}, got page {page} at two places" in str(error.value)
        assert_same_bits(tensors, before)


READ_ONLY = """
import ctypes, mmap, sys
import torch, pruneops
memory = mmap.mmap(-1, 5 * mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
pages = torch.frombuffer(memory, dtype=torch.uint8).view(5, 4, 2, -1)
pages.copy_(torch.randint(0, 256, pages.shape))
assert pages.data_ptr() == address
before, table = pages.clone(), torch.tensor([[2, 0], [2, 4]], dtype=torch.int32)
protect = ctypes.CDLL(None, use_errno=True).mprotect
assert protect(ctypes.c_void_p(address + 2 * mmap.PAGESIZE), mmap.PAGESIZE, mmap.PROT_READ) == 0
with pruneops.backend(sys.argv[1]):
    pruneops.paged_kv_compact_([pages], table, torch.tensor([[0, 1, 2, 3, 6], [0, 1, 2, 3, 5]]), torch.tensor([5, 5]))
assert pages[0, 0].equal(before[0, 2]) and pages[4, 0].equal(before[4, 1])
"""


@on_targets(*contract.CPU_TARGETS)
def test_tokens_that_stay_are_not_written(target):
    """The shared page lies in memory that cannot be written."""
    contract.run_python(READ_ONLY, target.backend, TRITON_INTERPRET="1")


# Relations between answers


@every_backend
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_equals_kv_compact(target, layout):
    """Pages in order are a cache: the same tokens move as in `kv_compact_`."""
    generator = torch.Generator().manual_seed(4)
    cache = any_bits((2, 3, 24, 16), torch.float16)  # [B, Hk, S, D]
    keep = ascending((2, 3), 10, 24, generator)
    pages = cache.view(2, 3, 6, 4, 16).movedim(2, 1)  # [B, blocks, Hk, page, D]
    pages = (pages if layout == "HND" else pages.transpose(2, 3)).flatten(0, 1).contiguous()
    table = torch.arange(12).view(2, 6).int()
    (after,) = compact(target, [pages], table, keep, torch.tensor([10, 10]), layout)
    after = after if layout == "HND" else after.transpose(1, 2)
    after = after.unflatten(0, (2, 6)).movedim(1, 2).flatten(2, 3)
    with pruneops.backend("reference"):
        pruneops.kv_compact_([cache], keep)
    assert_same_bits(after, cache)


# Edges


@every_backend
def test_edges(target):
    for B, blocks, page, K in ((0, 3, 4, 2), (1, 1, 1, 1), (2, 3, 4, 0), (1, 2, 4, 8), (1, 0, 4, 0)):
        tensor = pages_of(7, page, 2, 8, "NHD")
        table, keep = torch.arange(B * blocks).view(B, blocks).int(), torch.arange(K).expand(B, -1)
        for lengths in (torch.full((B,), K), torch.zeros(B, dtype=torch.int32)):
            assert_same_bits(compact(target, [tensor], table, keep, lengths), [tensor])


@every_backend
def test_garbage(target):
    """keep is not read past lengths, nor the table past the last kept token."""
    tensor = pages_of(5, 2, 1, 4, "NHD")
    for value in GARBAGE:
        keep = torch.full((2, 4), value)
        keep[0, :2] = torch.tensor([1, 2])
        table = torch.full((2, 3), value % 2**31 if value > 0 else -5, dtype=torch.int32)
        table[0, :2] = torch.tensor([3, 1])
        arguments = table, keep, torch.tensor([2, 0]), "NHD"
        assert_same_bits(compact(target, [tensor], *arguments), paged_kv_compact_([tensor], *arguments))


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Pages far apart in a sparse file."""
    near = pages_of(4, 2, 2, 8, "NHD", torch.float32)
    table, keep, lengths = torch.tensor([[3, 0, 2]]).int(), torch.tensor([[1, 2, 5]]), torch.tensor([3])
    (after,) = paged_kv_compact_([near], table, keep, lengths)
    far = contract.with_gaps_past_2_31(tmp_path, near, 0)
    with pruneops.backend(target.backend):
        pruneops.paged_kv_compact_([far], table, keep, lengths)
    assert_same_bits(far.contiguous(), after)


def test_pages_in_use():
    lengths = torch.tensor([0, 1, 15, 16, 17, 32], dtype=torch.int32)
    assert_same_bits(pruneops.pages_in_use(lengths, 16), torch.tensor([0, 1, 1, 1, 2, 2], dtype=torch.int32))
    assert_same_bits(pruneops.pages_in_use(lengths.long(), 1), lengths.long())
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        pruneops.pages_in_use(lengths, 0)
    with pytest.raises(TypeError, match="lengths must be Tensor, got list"):
        pruneops.pages_in_use([3], 4)
