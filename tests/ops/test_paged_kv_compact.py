"""Compaction of paged caches on every backend: the contract of `pruneops.paged_kv_compact_`, line by line."""

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pruneops
from tests import contract, cuda_checks, strategies
from tests.contract import CUDA_KERNELS, NATIVE, REFERENCE, assert_same_bits, every_backend, on_targets, size, to_device
from tests.invalid_calls import InvalidCall, assert_type_error, ints, invalid
from tests.token_copy import BITS, GARBAGE, any_bits, ascending, with_garbage


def tables(B, blocks, pages, generator):
    """int32 [B, blocks] of different pages."""
    return torch.randperm(pages, generator=generator)[: B * blocks].view(B, blocks).int()


def expected(tensor, table, keep, lengths, layout):
    """The tensor afterwards, token by token."""
    after = tensor.clone()
    for old, new in zip(*(t.unbind(1) if t.dim() == 5 else [t] for t in (tensor, after))):
        old, new = (t if layout == "NHD" else t.transpose(1, 2) for t in (old, new))  # [pages, page, Hk, D]
        page = old.shape[1]
        for b, length in enumerate(lengths.tolist()):
            for h in range(old.shape[2]):
                own = keep[b, h] if keep.dim() == 3 else keep[b]
                for r, position in enumerate(own[:length].tolist()):
                    there = int(table[b, r // page]), r % page, h
                    new[there] = old[int(table[b, position // page]), position % page, h]
    return after


def compact(target, tensors, table, keep, lengths, layout="NHD"):
    """Copies of the tensors after compaction on the target."""
    held, *own = to_device(([t.clone() for t in tensors], table, keep, lengths), target.device)
    with pruneops.backend(target.backend):
        assert pruneops.paged_kv_compact_(held, *own, layout=layout) is None
    return to_device(held, "cpu")


def pages_of(pages, page, Hk, D, layout, dtype=torch.float16, together=False, seed=0):
    own = (page, Hk) if layout == "NHD" else (Hk, page)
    return any_bits((pages, *([2] if together else []), *own, D), dtype, seed)


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
    table = tables(B, blocks, pages, generator)
    for b, length in enumerate(lengths.tolist()):
        last = int(keep[b, ..., :length].max()) if length else -1
        table[b, last // page + 1 :] = -(2**30) if b % 2 else 2**30
    lengths = lengths.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return tensors, table, keep, lengths, layout


@st.composite
def sharing(draw):
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


def lost_page(table, keep, lengths, page):
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
    """Two requests of pages of two tokens, the second of one page; page 1 is nobody's."""
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
    assert_same_bits(compact(target, *case), [expected(tensor, *arguments) for tensor in tensors])


@every_backend
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [1, 3, 16, 128, 256])
def test_page_sizes(target, page, layout):
    """Across tiles, against the reference; shared and per-head positions."""
    generator = torch.Generator().manual_seed(page)
    B, Hk, D = 2, 2, 64
    blocks = -(-size(target, 700, 130) // page)
    table = tables(B, blocks, B * blocks + 3, generator)
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
    table, keep, lengths = tables(2, 3, 7, generator), ascending((2,), 7, 12, generator), torch.tensor([7, 5])
    both = any_bits((7, 4, 2, 3, 20), dtype)  # [pages, page, 2, Hk, D]: interleaved per token
    held = to_device(both.clone(), target.device)
    with pruneops.backend(target.backend):
        pruneops.paged_kv_compact_(list(held.unbind(2)), *to_device((table, keep, lengths), target.device))
    parts = [expected(part, table, keep, lengths, "NHD") for part in both.unbind(2)]
    assert_same_bits(held.cpu(), torch.stack(parts, 2))
    together = both.movedim(2, 1).contiguous()
    assert_same_bits(compact(target, [together], table, keep, lengths), [torch.stack(parts, 1)])


# Shared pages


@every_backend
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_shared_prefix(target, layout):
    """Three requests begin with the same two pages and keep them whole; what follows moves in pages of their own."""
    generator = torch.Generator().manual_seed(3)
    table = torch.cat([torch.tensor([[6, 2]]).expand(3, 2), torch.tensor([[0, 1, 3], [9, 8, 7], [4, 5, 10]])], 1).int()
    prefix, lengths = torch.arange(8), torch.tensor([13, 12, 9])
    for rows in ((3,), (3, 2)):
        rest = 8 + ascending(rows, 5, 12, generator)
        keep = with_garbage(torch.cat([prefix.expand(*rows, 8), rest], -1), lengths)
        tensors = [pages_of(12, 4, 2, 16, layout, dtype) for dtype in (torch.float16, torch.int8)]
        arguments = table, keep, lengths, layout
        after = compact(target, tensors, *arguments)
        assert_same_bits(after, [expected(tensor, *arguments) for tensor in tensors])
        for old, new in zip(tensors, after):
            assert_same_bits(new[[6, 2, 11]], old[[6, 2, 11]])


@every_backend
def test_shared_sources(target):
    """Tokens may be moved from a page at several places, of one request too, as long as none moves to it."""
    tensor = pages_of(5, 2, 1, 4, "NHD")
    table = torch.tensor([[0, 4, 4], [1, 4, 3]], dtype=torch.int32)
    arguments = table, torch.tensor([[1, 5], [0, 2]]), torch.tensor([2, 2]), "NHD"
    assert_same_bits(compact(target, [tensor], *arguments), [expected(tensor, *arguments)])


@every_backend
@given(case=sharing())
def test_shared_pages(target, case):
    """Done right where no token moves to a shared page, on all backends; otherwise refused on the CPU."""
    tensors, table, keep, lengths, layout = case
    page = lost_page(table, keep, lengths, tensors[0].shape[1 if layout == "NHD" else 2])
    if page is None:
        assert_same_bits(compact(target, *case), [expected(tensor, *case[1:]) for tensor in tensors])
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
def test_as_one_cache(target, layout):
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


@on_targets(NATIVE)
def test_threads_change_no_bit(target):
    generator = torch.Generator().manual_seed(0)
    table, keep = tables(2, 60, 130, generator), ascending((2,), 800, 960, generator)
    tensors = [pages_of(130, 16, 4, 128, "NHD", seed=seed) for seed in range(3)]
    contract.assert_threads_change_no_bit(lambda: compact(target, tensors, table, keep, torch.tensor([800, 700])))


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
    """Where lengths are 0 or the last kept token comes early, nobody reads keep or the table."""
    tensor = pages_of(5, 2, 1, 4, "NHD")
    for value in GARBAGE:
        keep = torch.full((2, 4), value)
        keep[0, :2] = torch.tensor([1, 2])
        table = torch.full((2, 3), value % 2**31 if value > 0 else -5, dtype=torch.int32)
        table[0, :2] = torch.tensor([3, 1])
        arguments = table, keep, torch.tensor([2, 0]), "NHD"
        assert_same_bits(compact(target, [tensor], *arguments), [expected(tensor, *arguments)])


@on_targets(*contract.CPU_TARGETS)
def test_offsets_past_two_to_the_31(target, tmp_path):
    """Pages far apart in a sparse file."""
    near = pages_of(4, 2, 2, 8, "NHD", torch.float32)
    table, keep, lengths = torch.tensor([[3, 0, 2]]).int(), torch.tensor([[1, 2, 5]]), torch.tensor([3])
    after = expected(near, table, keep, lengths, "NHD")
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


# Compilation


@every_backend
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_opcheck(target, layout):
    tensors = [torch.randn(6, 4, 3, 8), torch.randn(6, 2, 4, 3, 8).half()]
    tensors = [t if layout == "NHD" else t.transpose(-3, -2) for t in tensors]
    table, keep = torch.tensor([[5, 0], [2, 3]]).int(), torch.tensor([[0, 2, 5], [1, 2, 3]])
    contract.opcheck(target, "paged_kv_compact_", tensors, table, keep, torch.tensor([3, 2]), layout=layout)


def compact_and_read(pages, table, keep, lengths):
    own = pages * 2
    pruneops.paged_kv_compact_([own], table, keep, lengths)
    return own + 1, pruneops.pages_in_use(lengths, pages.shape[1])


@every_backend
def test_compile_without_graph_break(target):
    calls = []
    for B, blocks, page, D in ((2, 3, 4, 8), (3, 2, 5, 6)):
        table = torch.arange(B * blocks).view(B, blocks).int()
        keep = (torch.arange(page) * 2).expand(B, -1)
        calls.append((torch.randn(B * blocks, page, 2, D), table, keep, torch.full((B,), page)))
    contract.assert_compiles(target, compact_and_read, calls)


# Errors

PAGES, TABLE = torch.zeros(6, 2, 3, 4), torch.tensor([[5, 0], [2, 3]]).int()
GOOD = {"pages": [PAGES], "block_table": TABLE, "keep": ints([0, 2, 3], [1, 2, 3]), "lengths": ints(3, 2)}
bad = functools.partial(InvalidCall, "paged_kv_compact_", GOOD)
RANK = "of rank 4 or 5: [pages, page, Hk, D] or [pages, 2, ...]"
PLACE = "a page of its own at every place that tokens move to"
BAD = [
    bad(ValueError, "layout", "'nhd'", "one of ('NHD', 'HND')", layout="nhd"),
    bad(ValueError, "pages", "an empty list", "at least one tensor", pages=[]),
    bad(ValueError, "pages[0]", "of shape [2, 3, 4]", RANK, pages=[PAGES[0]]),
    bad(
        ValueError, "pages[0]", "expanded", "memory of its own for every element",
        pages=[PAGES[:1].expand(6, 2, 3, 4)],
    ),
    bad(
        ValueError, "pages[1]", "of shape [6, 1, 3, 4]", "pages of 2 tokens, as pages[0] and keep say",
        pages=[PAGES, PAGES[:, :1]],
    ),
    bad(ValueError, "pages[1]", "the same memory as pages[0]", "passed once", values=True, pages=[PAGES, PAGES]),
    bad(TypeError, "block_table", "torch.int64", "int32", block_table=TABLE.long()),
    bad(ValueError, "block_table", "of shape [1, 2]", "of shape [2, blocks]", block_table=TABLE[:1]),
    bad(ValueError, "keep", "of shape [3]", "[B, K] or [B, Hk, K]", keep=ints(0, 1, 2)),
    bad(TypeError, "lengths", "torch.float32", "int64 or int32", lengths=torch.ones(2)),
    bad(ValueError, "lengths", "of shape [1]", "of shape [2]", lengths=ints(1)),
    bad(ValueError, "lengths", "4", "0 to the 3 entries of keep", values=True, lengths=ints(4, 1)),
    bad(ValueError, "keep", "4 at one place", "in [0, 4)", values=True, keep=ints([0, 2, 4], [1, 2, 3])),
    bad(
        ValueError, "keep", "0 after 2 at [0, 1]", "strictly ascending in every row", values=True,
        keep=ints([0, 2, 0], [1, 2, 3]),
    ),
    bad(ValueError, "block_table", "6 at one place", "in [0, 6)", values=True, block_table=ints([5, 0], [6, 3]).int()),
    bad(ValueError, "block_table", "page 0 at two places", PLACE, values=True, block_table=ints([5, 0], [0, 3]).int()),
    bad(ValueError, "block_table", "page 5 at two places", PLACE, values=True, block_table=ints([5, 5], [2, 3]).int()),
    bad(  # one request keeps the shared page whole, the other moves tokens in it
        ValueError, "block_table", "page 1 at two places", PLACE, values=True,
        block_table=ints([1, 0], [1, 3]).int(), keep=ints([0, 1, 3], [0, 2, 3]),
    ),
    bad(  # one head does
        ValueError, "block_table", "page 4 at two places", PLACE, values=True,
        block_table=ints([4, 0], [4, 3]).int(), keep=torch.tensor([0, 1, 2]).expand(2, 3, 3).index_put(
            (torch.tensor(1), torch.tensor(2)), torch.tensor([0, 2, 3])),
    ),
]  # fmt: skip


@invalid(BAD)
def test_errors(bad):
    bad.assert_raises()


@on_targets(*contract.CPU_TARGETS)
@invalid(BAD)
def test_errors_of_backends(target, bad):
    """The same words, and nothing written."""
    before = [tensor.clone() for tensor in bad.args[0]]
    with pruneops.backend(target.backend), pytest.raises(bad.error) as error:
        pruneops.paged_kv_compact_(*bad.args, **bad.kwargs)
    assert str(error.value) == bad.message
    assert_same_bits(list(bad.args[0]), before)


@invalid([bad for bad in BAD if not bad.values])
def test_errors_without_values(bad):
    bad.assert_raises_on_fake_tensors()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pages": PAGES}, "pages must be list or tuple, got Tensor"),
        ({"block_table": [[1]]}, "block_table must be Tensor, got list"),
        ({"lengths": None}, "lengths must be Tensor, got NoneType"),
        ({"layout": 3}, "layout must be str, got int"),
    ],
)
def test_errors_of_type(changes, words):
    assert_type_error("paged_kv_compact_", {**GOOD, **changes}, words)


# Triton's launcher


@invalid([bad for bad in BAD if not bad.values or "same memory" in bad.id])
def test_triton_refuses(bad):
    """As on a card, where nothing looks at the arguments before the launcher does."""
    kernels = pytest.importorskip("pruneops.triton_kernels.paged_kv_compact")
    with pytest.raises(RuntimeError):
        kernels.paged_kv_compact_(*bad.args, bad.kwargs.get("layout", "NHD"))


TRITON_LAUNCHES = """
import itertools
from pruneops.triton_kernels import paged_kv_compact as kernels
for B, page, count, layout in itertools.product((1, 3), (8, 16), (1, 8), ("NHD", "HND")):
    pages = [torch.zeros(40, 2, page, page, 64, dtype=torch.bfloat16) for _ in range(count)]
    keep, table = torch.arange(B * page).expand(B, -1), torch.arange(12, dtype=torch.int32).view(B, -1)
    kernels.paged_kv_compact_(pages, table, keep, torch.full((B,), page), layout)
"""


def test_triton_launchers_compile():
    """Every form launches as it would on a card; other lengths, batches and pages compile nothing anew."""
    launched, compiled = contract.triton_launches(TRITON_LAUNCHES)
    assert launched == 2 * 2 * 2 * 2
    assert compiled == 1


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
def test_cuda(target, check):
    def run(pages, table, keep, lengths):
        own = [pages.clone(), pages.transpose(2, 3).contiguous()]
        pruneops.paged_kv_compact_(own[:1], table, keep, lengths)
        pruneops.paged_kv_compact_(own[1:], table, keep, lengths, layout="HND")
        return own

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        table, keep = tables(2, 60, 130, generator), ascending((2,), 700, 960, generator)
        pages = pages_of(130, 16, 4, 64, "NHD", together=True, seed=seed)
        return [t.cuda() for t in (pages, table, keep, torch.tensor([700 - seed, 300 + seed]))]

    check(target, run, inputs)
