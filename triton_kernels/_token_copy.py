"""Moving tokens in Triton: what kv_compact, paged_kv_compact and gather_tokens share.

Tensors of one layout (type, shape, strides) go into one launch, 192 at most. A layout is a number of lanes (rows of the
batch, heads, whatever else does not lie next to each other) whose tokens are `width` bytes each. Bytes are moved as the
widest integers that divide all addresses, strides and widths, 16 bytes a thread where they do.
    copy   a program moves a block of tokens, SLICE bytes of each at most, to new memory; zeros past lengths.
    shift  in place: a program owns a slice of a lane, so nobody else reads or writes it, and takes its blocks of tokens
           in ascending order. It reads a block whole before it writes it, and looks up the positions of the next one
           meanwhile. Tokens that stay where they are cost nothing but the look at their position.
Cost: what is kept read once and written once, 8 bytes of keep a token and slice out of L1 or L2; no arithmetic.

Addresses, sizes and strides travel as arguments of the launch, so nothing is copied from the host. A program picks
its own by a jump to eight of them and seven selections, while its positions are on their way. Programs of copy issue
about 420 instructions a warp on sm_90, 22 us in all where their bytes take 86 (see kv_compact).

The host looks at type, shape, strides, device and address of every tensor once. Arguments that do not fit are a
RuntimeError here, before anything is launched; pruneops/ops says in words what is wrong.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import TYPES, cdiv, device_guard, kernel, next_power_of_2
from ._launch import Specialization as KernelForm

COUNTS = (8, 64, 192)  # lengths that a list of addresses is filled up to; two of them are 3 KB of the 4 KB of arguments
RANKS = (2, 6)  # numbers of dimensions that a layout is filled up to
ELEMENTS = 2048  # a program holds at a time: 16 KB
COPY_SLICE, SHIFT_SLICE = 512, 128  # bytes; short ones in place, where only slices run side by side
WIDEST = 2**30  # bytes of a token that count as one: a program counts its elements by int32


def _form(count, rank, unit, block, lengths, paged=None):
    """What a kernel is compiled for: addresses and dimensions, bytes moved together, elements of a slice, type of the
    lengths or None; in place, whether tokens lie in pages. One stage: nothing is loaded ahead of the barrier."""
    types = {"sources": ("i64",) * count, "dims": ("i32", "i64", "i64", "i64") * rank}
    types["lengths"] = lengths and TYPES[lengths]
    constants = {"COUNT": count, "RANK": rank, "UNIT": unit, "HAS_LENGTHS": lengths is not None}
    if paged is None:
        types["results"] = types["sources"]
    else:
        types["table"] = "*i32" if paged else None
        constants["PAGED"] = paged
    constants |= {"BLOCK_R": ELEMENTS // block, "BLOCK_W": block}
    return KernelForm(types, constants, {"num_warps": 4, "num_stages": 1})


_STRIDES = dict.fromkeys(("keep_r", "lengths_b", "table_b", "table_t", "token", "result_token", "page_stride"), "i64")


@triton.jit
def picked(addresses, job, COUNT: tl.constexpr):
    """addresses[job]. Of each eight one branch, else every program would select among all."""
    found = tl.full([], 0, tl.int64)
    for i in tl.static_range(0, COUNT, 8):
        if (job >> 3) == i // 8:
            found = tl.cast(addresses[i], tl.int64)
            for j in tl.static_range(1, 8):
                found = tl.where((job & 7) == j, tl.cast(addresses[i + j], tl.int64), found)
    return found


@triton.jit
def pointer(address, UNIT: tl.constexpr):
    """To integers of UNIT bytes; of 8 where UNIT is 16."""
    if UNIT == 1:
        return tl.cast(address, tl.pointer_type(tl.int8))
    elif UNIT == 2:
        return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int16)), 2)
    elif UNIT == 4:
        return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int32)), 4)
    else:
        return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int64)), UNIT)


@triton.jit
def lane_of(index, dims, RANK: tl.constexpr):
    """(batch, source, result, keep): offsets of a lane. dims: (size, source, result, keep) of each dimension, the
    batch last."""
    source = tl.full([], 0, tl.int64)
    result = tl.full([], 0, tl.int64)
    keep = tl.full([], 0, tl.int64)
    for i in tl.static_range(RANK):
        place = tl.cast(index, tl.int64)
        if i < RANK - 1:
            size = tl.cast(dims[4 * i], tl.int32)
            place = tl.cast(index % size, tl.int64)
            index = index // size
        source += place * dims[4 * i + 1]
        result += place * dims[4 * i + 2]
        keep += place * dims[4 * i + 3]
    return tl.cast(index, tl.int64), source, result, keep


@triton.jit
def length_of(lengths, offset, K, HAS_LENGTHS: tl.constexpr):
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths + offset).to(tl.int32), K)
    else:
        return K


@triton.jit
def token_offset(position, inside, table, table_t, page, page_stride, token, PAGED: tl.constexpr):
    """From a lane's start to int32 positions; nothing is looked up for those that are not `inside`."""
    if PAGED:
        block = tl.load(table + (position // page).to(tl.int64) * table_t, mask=inside, other=0).to(tl.int64)
        return block * page_stride + (position % page).to(tl.int64) * token
    else:
        return position.to(tl.int64) * token


@kernel(_form, keep="*i64", **_STRIDES)
def copy_kernel(
    sources, results, dims, keep, lengths, keep_r, lengths_b, K, width, token, result_token,
    COUNT: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Strides and widths in UNITs, which are PER elements each."""
    PER: tl.constexpr = 2 if UNIT == 16 else 1
    width *= PER
    slices = tl.cdiv(width, BLOCK_W)
    blocks = tl.cdiv(K, BLOCK_R)
    job = tl.program_id(1)
    index = tl.program_id(0) // slices
    batch, source, result, keeps = lane_of(index // blocks, dims, RANK)
    r = index % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    w = tl.program_id(0) % slices * BLOCK_W + tl.arange(0, BLOCK_W)
    meant = r < length_of(lengths, batch * lengths_b, K, HAS_LENGTHS)
    position = tl.load(keep + keeps + r.to(tl.int64) * keep_r, mask=meant, other=0)
    start = pointer(picked(sources, job, COUNT), UNIT) + source * PER
    end = pointer(picked(results, job, COUNT), UNIT) + result * PER
    inside = (w < width)[None, :]
    tile = tl.load(start + (position * token * PER)[:, None] + w[None, :], mask=meant[:, None] & inside, other=0)
    tl.store(end + (r.to(tl.int64) * result_token * PER)[:, None] + w[None, :], tile, mask=(r < K)[:, None] & inside)


@kernel(_form, keep="*i64", **_STRIDES)
def shift_kernel(
    sources, dims, keep, lengths, table, keep_r, lengths_b, table_b, table_t, K, width, token, page, page_stride,
    COUNT: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Positions ascend, so that a block is read from no place that an earlier one was written to."""
    PER: tl.constexpr = 2 if UNIT == 16 else 1
    width *= PER
    slices = tl.cdiv(width, BLOCK_W)
    batch, source, _, keeps = lane_of(tl.program_id(0) // slices, dims, RANK)
    r = tl.arange(0, BLOCK_R)
    w = tl.program_id(0) % slices * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (w < width)[None, :]
    length = length_of(lengths, batch * lengths_b, K, HAS_LENGTHS)
    keep += keeps
    if PAGED:
        table += batch * table_b
    position = tl.load(keep + r.to(tl.int64) * keep_r, mask=r < length, other=0).to(tl.int32)
    origin = token_offset(position, r < length, table, table_t, page, page_stride, token, PAGED)
    start = pointer(picked(sources, tl.program_id(1), COUNT), UNIT) + source * PER
    for first in range(0, length, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        moves = (r < length) & (position != r)
        mask = moves[:, None] & inside
        tile = tl.load(start + (origin * PER)[:, None] + w[None, :], mask=mask, other=0)
        place = token_offset(r, moves, table, table_t, page, page_stride, token, PAGED)
        r += BLOCK_R
        position = tl.load(keep + r.to(tl.int64) * keep_r, mask=r < length, other=0).to(tl.int32)
        origin = token_offset(position, r < length, table, table_t, page, page_stride, token, PAGED)
        tl.debug_barrier()
        tl.store(start + (place * PER)[:, None] + w[None, :], tile, mask=mask)


class Roles(NamedTuple):
    """Which dimensions are which; without one for the batch, its rows are those of keep."""

    token: int
    batch: int | None = None
    head: int | None = None
    page: int | None = None


class Layout(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple
    device: int
    token: int | None  # whatever else tells tensors apart


class Plan(NamedTuple):
    """How tokens that lie alike move, in units of `unit` bytes."""

    unit: int
    rank: int
    block: int  # elements of a slice
    slices: int  # of all lanes
    dims: tuple  # (size, source, result, keep) of each dimension, the batch last, one after the other
    width: int
    token: int
    result_token: int
    page_stride: int


def unit_of(numbers):
    """The largest power of two up to 16 that divides them all."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits


def _block(most, unit, width):
    """Elements of a slice of tokens of `width` bytes."""
    element = min(unit, 8)
    return min(most // element, next_power_of_2(width // element))


@functools.lru_cache(256)  # a new length is a new plan
def plan_of(most, size, shape, stride, result_shape, result_stride, keep_shape, keep_stride, unit, roles):
    """Slices of at most so many bytes, elements of `size` bytes, addresses of multiples of `unit`. Dimensions that lie
    next to each other in source and result become one."""
    token, batch, head, page = roles
    rows, keep_b = (keep_shape[0], keep_stride[0]) if len(keep_shape) > 1 else (1, 0)
    width, dims, row = size, [], (rows, 0, 0, keep_b)
    for d, (count, given, here, there) in enumerate(zip(result_shape, shape, stride, result_stride)):
        here = here * size if given > 1 else 0  # else shared by all rows of a batch
        if d == batch:
            row = (rows, here, there * size, keep_b)
        elif d != token and d != page and count > 1:
            dims.append((count, here, there * size, keep_stride[1] if d == head and len(keep_shape) == 3 else 0))
    merged = []
    for count, here, there, own_keep in sorted(dims, key=lambda dim: dim[2]):
        inner = merged[-1] if merged else (0, 0, 0, 1)
        if here == there == width and not own_keep and width * count <= WIDEST:
            width *= count
        elif own_keep == inner[3] == 0 and (here, there) == (inner[0] * inner[1], inner[0] * inner[2]):
            merged[-1] = (count * inner[0], *inner[1:])
        else:
            merged.append((count, here, there, own_keep))
    merged.append(row if rows > 1 else (1, 0, 0, 0))
    strides = stride[token] * size, result_stride[token] * size, 0 if page is None else stride[page] * size
    places = [place for dim in merged for place in dim[1:3]]
    unit = unit_of([unit, width, *strides, *places])
    block = _block(most, unit, width)
    slices = cdiv(width // min(unit, 8), block)
    for dim in merged:
        slices *= dim[0]
    rank = next((rank for rank in RANKS if rank >= len(merged)), len(merged))
    flat = [1, 0, 0, 0] * (rank - len(merged))
    for count, here, there, own_keep in merged:
        flat += count, here // unit, there // unit, own_keep
    return Plan(unit, rank, block, slices, tuple(flat), width // unit, *(stride // unit for stride in strides))


def expect(condition):
    if not condition:
        raise RuntimeError("pruneops: the arguments do not fit together")


def grouped(tensors, dims=None):
    """(layout, indices, addresses) of tensors that lie alike; dims: where the tokens of each are, or None."""
    expect(tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    columns = (
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        [tensor.get_device() for tensor in tensors],
        dims or [None] * len(tensors),
    )
    if all(column.count(column[0]) == len(tensors) for column in columns):
        return [(Layout(*(column[0] for column in columns)), range(len(tensors)), addresses)]
    groups = {}
    for i, layout in enumerate(zip(*columns)):
        indices, own = groups.setdefault(layout, ([], []))
        indices.append(i)
        own.append(addresses[i])
    return [(Layout(*layout), *group) for layout, group in groups.items()]


def expect_keep(keep, lengths, ranks):
    """keep of one of the ranks; lengths of its rows."""
    expect(keep.dtype is torch.int64 and keep.dim() in ranks)
    if lengths is not None:
        expect(lengths.dtype in (torch.int64, torch.int32) and lengths.shape == keep.shape[:1])
        expect(lengths.get_device() == keep.get_device())


def expect_apart(groups):
    """No tensor twice, and none that overlaps with itself."""
    places = []
    for layout, _, addresses in groups:
        expect(0 not in layout.stride or all(stride or n < 2 for n, stride in zip(layout.shape, layout.stride)))
        places += addresses if 0 not in layout.shape else ()
    expect(len(set(places)) == len(places))


def alike(result, count):
    """So many uninitialised tensors, the given one among them, each in memory of its own: of views of one buffer the
    last would keep all of it alive, and each would be saved with all of it."""
    return [result, *[torch.empty_like(result) for _ in range(count - 1)]]


def _launches(*lists):
    """(tensors, length of the lists, lists as they travel) of every launch."""
    for first in range(0, len(lists[0]), COUNTS[-1]):
        parts = [own[first : first + COUNTS[-1]] for own in lists]
        used = len(parts[0])
        count = next(count for count in COUNTS if count >= used)
        yield used, count, *[(*own, *own[:1] * (count - used)) for own in parts]


def _lengths(lengths):
    """(type, stride)"""
    return (None, 0) if lengths is None else (lengths.dtype, lengths.stride(0))


def copy(layout, sources, results, keep, lengths, roles):
    """Tokens of tensors that lie alike, at addresses `sources`, to their results."""
    if 0 in layout.shape:  # none is meant
        for result in results:
            result.zero_()
        return
    first, K = results[0], keep.shape[-1]
    if not first.numel():
        return
    ends = [result.data_ptr() for result in results]
    unit, rank, block, slices, dims, width, token, result_token, _ = plan_of(
        COPY_SLICE, first.element_size(), layout.shape, layout.stride, first.shape, first.stride(),
        keep.shape, keep.stride(), unit_of(sources + ends), roles,
    )  # fmt: skip
    programs = slices * cdiv(K, ELEMENTS // block)
    kind, lengths_b = _lengths(lengths)
    with device_guard(keep):
        for used, count, *addresses in _launches(sources, ends):
            copy_kernel(
                (count, rank, unit, block, kind), (programs, used, 1),
                *addresses, dims, keep, lengths, keep.stride(-1), lengths_b, K, width, token, result_token,
            )  # fmt: skip


def shift(layout, sources, keep, lengths, roles, table=None, page_size=1):
    """Tokens of tensors that lie alike, at addresses `sources`, in place; table [B, blocks] of their pages."""
    if 0 in layout.shape or not keep.numel():
        return
    shape, stride, keep_stride = layout.shape, layout.stride, keep.stride()
    unit, rank, block, slices, dims, width, token, _, page_stride = plan_of(
        SHIFT_SLICE, layout.dtype.itemsize, shape, stride, shape, stride,
        keep.shape, keep_stride, unit_of(sources), roles,
    )  # fmt: skip
    kind, lengths_b = _lengths(lengths)
    table_b, table_t = (0, 0) if table is None else table.stride()
    with device_guard(keep):
        for used, count, addresses in _launches(sources):
            shift_kernel(
                (count, rank, unit, block, kind, table is not None), (slices, used, 1),
                addresses, dims, keep, lengths, table, keep_stride[-1], lengths_b, table_b, table_t,
                keep.shape[-1], width, token, page_size, page_stride,
            )  # fmt: skip


def form(most, unit, width, count=8, rank=2, lengths=None, *paged):
    """What the launchers above ask for: width in bytes."""
    return count, rank, unit, _block(most, unit, width), lengths, *paged
