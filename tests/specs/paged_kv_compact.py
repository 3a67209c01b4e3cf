"""Calls of `paged_kv_compact_`."""

import functools
import itertools

import torch

import pruneops
from tests.inputs import ascending, block_tables, pages_of
from tests.invalid_calls import InvalidCall, TypeErrorCall, ints

from ._small import as_bytes, as_reference, laid_out, name_of


def small_calls():
    """Pages of one token to many, both layouts, keys and values together, heads, odd widths, garbage.

    Pages hold any bits and are compared as bytes with all memory around them. What a table and keep hold past a length
    is garbage.
    """
    generator = torch.Generator().manual_seed(7)
    half, full, byte = torch.bfloat16, torch.float32, torch.uint8
    for B, S, K, page, Hk, heads, lengths, layout, layouts in (
        (1, 1, 1, 1, 1, False, [1], "NHD", [((), 1, full, "plain")]),
        (2, 97, 31, 16, 4, False, [31, 7], "NHD", [((), 64, half, "plain"), ((), 64, half, "plain")]),
        (2, 130, 117, 16, 3, True, [117, 60], "HND", [((2,), 128, half, "plain"), ((), 33, byte, "odd address")]),
        (3, 70, 9, 5, 2, True, [9, 0, 4], "NHD", [((2,), 80, full, "plain"), ((), 5, half, "strided")]),
        (1, 700, 630, 16, 2, False, [630], "NHD", [((), 128, half, "plain")] * 5),
    ):
        blocks = -(-S // page)
        inner = (page, Hk) if layout == "NHD" else (Hk, page)
        tensors = [laid_out(how, (B * blocks + 1, *kv, *inner, D), dtype, generator) for kv, D, dtype, how in layouts]
        table = torch.randperm(B * blocks + 1, generator=generator)[: B * blocks].reshape(B, blocks).int()
        keep = torch.rand(B, *([Hk] if heads else []), S, generator=generator).argsort(-1)[..., :K].sort(-1).values
        lengths = torch.tensor(lengths)
        past = torch.arange(K) >= lengths.reshape(B, *[1] * (keep.dim() - 1))
        last = keep.masked_fill(past, -1).reshape(B, -1).amax(-1, keepdim=True)
        table = table.masked_fill(torch.arange(blocks) * page > last, torch.iinfo(torch.int32).max)
        keep = keep.masked_fill(past, torch.iinfo(torch.int64).max)

        def run(to, tensors=tensors, table=table, keep=keep, lengths=lengths, layout=layout):
            memory, own = zip(*(tensor(to) for tensor in tensors))
            pruneops.paged_kv_compact_(own, table.to(to), keep.to(to), lengths.to(to), layout=layout)
            return as_bytes(memory)

        kinds = dict.fromkeys(
            f"{'together ' if kv else ''}D {D} {name_of(dtype)} {how}" for kv, D, dtype, how in layouts
        )
        label = f"{len(layouts)} {layout} B {B} Hk {Hk} S {S} -> {K}{' per head' if heads else ''} pages of {page}"
        yield f"{label}: {', '.join(kinds)}", as_reference(run)


PAGES, TABLE = torch.zeros(6, 2, 3, 4), torch.tensor([[5, 0], [2, 3]]).int()
VALID = {"pages": [PAGES], "block_table": TABLE, "keep": ints([0, 2, 3], [1, 2, 3]), "lengths": ints(3, 2)}
RANK = "of rank 4 or 5: [pages, page, Hk, D] or [pages, 2, ...]"
PLACE = "a page of its own at every place that tokens move to"
invalid, wrong_type = (functools.partial(kind, "paged_kv_compact_", VALID) for kind in (InvalidCall, TypeErrorCall))
INVALID = [
    invalid(ValueError, "layout", "'nhd'", "one of ('NHD', 'HND')", layout="nhd"),
    invalid(ValueError, "pages", "an empty list", "at least one tensor", pages=[]),
    invalid(ValueError, "pages[0]", "of shape [2, 3, 4]", RANK, pages=[PAGES[0]]),
    invalid(
        ValueError, "pages[0]", "expanded", "memory of its own for every element",
        pages=[PAGES[:1].expand(6, 2, 3, 4)],
    ),
    invalid(
        ValueError, "pages[1]", "of shape [6, 1, 3, 4]", "pages of 2 tokens, as pages[0] and keep say",
        pages=[PAGES, PAGES[:, :1]],
    ),
    invalid(ValueError, "pages[1]", "the same memory as pages[0]", "passed once", values=True, pages=[PAGES, PAGES]),
    invalid(TypeError, "block_table", "torch.int64", "int32", block_table=TABLE.long()),
    invalid(ValueError, "block_table", "of shape [1, 2]", "of shape [2, blocks]", block_table=TABLE[:1]),
    invalid(ValueError, "keep", "of shape [3]", "[B, K] or [B, Hk, K]", keep=ints(0, 1, 2)),
    invalid(TypeError, "lengths", "torch.float32", "int64 or int32", lengths=torch.ones(2)),
    invalid(ValueError, "lengths", "of shape [1]", "of shape [2]", lengths=ints(1)),
    invalid(ValueError, "lengths", "4", "0 to the 3 entries of keep", values=True, lengths=ints(4, 1)),
    invalid(ValueError, "keep", "4 at one place", "in [0, 4)", values=True, keep=ints([0, 2, 4], [1, 2, 3])),
    invalid(
        ValueError, "keep", "0 after 2 at [0, 1]", "strictly ascending in every row", values=True,
        keep=ints([0, 2, 0], [1, 2, 3]),
    ),
    invalid(
        ValueError, "block_table", "6 at one place", "in [0, 6)", values=True, block_table=ints([5, 0], [6, 3]).int()
    ),
    invalid(
        ValueError, "block_table", "page 0 at two places", PLACE, values=True, block_table=ints([5, 0], [0, 3]).int()
    ),
    invalid(
        ValueError, "block_table", "page 5 at two places", PLACE, values=True, block_table=ints([5, 5], [2, 3]).int()
    ),
    invalid(  # one request keeps the shared page whole, the other moves tokens in it
        ValueError, "block_table", "page 1 at two places", PLACE, values=True,
        block_table=ints([1, 0], [1, 3]).int(), keep=ints([0, 1, 3], [0, 2, 3]),
    ),
    invalid(  # one head does
        ValueError, "block_table", "page 4 at two places", PLACE, values=True,
        block_table=ints([4, 0], [4, 3]).int(), keep=torch.tensor([0, 1, 2]).expand(2, 3, 3).index_put(
            (torch.tensor(1), torch.tensor(2)), torch.tensor([0, 2, 3])),
    ),
]  # fmt: skip
TYPE_ERRORS = [
    wrong_type("pages must be list or tuple, got Tensor", pages=PAGES),
    wrong_type("block_table must be Tensor, got list", block_table=[[1]]),
    wrong_type("lengths must be Tensor, got NoneType", lengths=None),
    wrong_type("layout must be str, got int", layout=3),
]


def samples():
    tensors = [torch.randn(6, 4, 3, 8), torch.randn(6, 2, 4, 3, 8).half()]
    table, keep = torch.tensor([[5, 0], [2, 3]]).int(), torch.tensor([[0, 2, 5], [1, 2, 3]])
    return [
        ("paged_kv_compact_", (own, table, keep, torch.tensor([3, 2])), {"layout": layout})
        for layout, own in (("NHD", tensors), ("HND", [t.transpose(-3, -2) for t in tensors]))
    ]


def model(pages, table, keep, lengths):
    own = pages * 2
    pruneops.paged_kv_compact_([own], table, keep, lengths)
    return own + 1, pruneops.pages_in_use(lengths, pages.shape[1])


def model_inputs():
    calls = []
    for B, blocks, page, D in ((2, 3, 4, 8), (3, 2, 5, 6)):
        table = torch.arange(B * blocks).view(B, blocks).int()
        keep = (torch.arange(page) * 2).expand(B, -1)
        calls.append((torch.randn(B * blocks, page, 2, D), table, keep, torch.full((B,), page)))
    return calls


def every_form(pages, table, keep, lengths):
    """Both layouts."""
    own = [pages.clone(), pages.transpose(2, 3).contiguous()]
    pruneops.paged_kv_compact_(own[:1], table, keep, lengths)
    pruneops.paged_kv_compact_(own[1:], table, keep, lengths, layout="HND")
    return own


def form_inputs(seed, small=False):
    blocks, K = (15, 200) if small else (60, 800)
    generator = torch.Generator().manual_seed(seed)
    table, keep = block_tables(2, blocks, 130, generator), ascending((2,), K, 16 * blocks, generator)
    pages = pages_of(130, 16, 4, 128, "NHD", together=True, seed=seed)
    return [pages, table, keep, torch.tensor([K - seed, K // 2 + seed])]


def triton_launches():
    from pruneops.triton_kernels import paged_kv_compact as kernels

    for B, page, count, layout in itertools.product((1, 3), (8, 16), (1, 8), ("NHD", "HND")):
        pages = [torch.zeros(40, 2, page, page, 64, dtype=torch.bfloat16) for _ in range(count)]
        keep, table = torch.arange(B * page).expand(B, -1), torch.arange(12, dtype=torch.int32).view(B, -1)
        kernels.paged_kv_compact_(pages, table, keep, torch.full((B,), page), layout)


LAUNCHES = 2 * 2 * 2 * 2, 1
