"""Moving tokens in Triton: what kv_compact, paged_kv_compact and gather_tokens share.

Tensors of one form (type, shape, strides, alignment) go into one launch, 192 at most. A form is a number of lanes (rows
of the batch, heads, whatever else does not lie next to each other) whose tokens are `width` bytes each. Bytes are moved
as the widest integers that divide all addresses, strides and widths, 16 bytes a thread where they do.
    copy   a program moves a block of tokens, SLICE bytes of each at most, to new memory; zeros past lengths.
    shift  in place: a program owns a slice of a lane, so nobody else reads or writes it, and takes its blocks of tokens
           in ascending order. It reads a block whole before it writes it, and looks up the positions of the next one
           meanwhile. Tokens that stay where they are cost nothing but the look at their position.
Cost: what is kept read once and written once, 8 bytes of keep a token and slice out of L1 or L2; no arithmetic.

Addresses, sizes and strides travel as arguments of the launch, so nothing is copied from the host. A program picks
its own by a jump to eight of them and seven selections, while its positions are on their way. Programs of copy issue
about 420 instructions a warp on sm_90, 22 us in all where their bytes take 86 (see kv_compact).
None of this has run on a GPU yet: it runs in Triton's interpreter and compiles for every architecture without spills.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._shared import OPTIONS, compile_job, on

COUNTS = (8, 64, 192)  # lengths that a list of addresses is filled up to; two of them are 3 KB of the 4 KB of arguments
RANKS = (2, 6)  # numbers of dimensions that a form is filled up to
ELEMENTS = 2048  # a program holds at a time: 16 KB
SLICES = {"copy_kernel": 512, "shift_kernel": 128}  # bytes; short ones in place, where only slices run side by side

_kernel = triton.jit(
    do_not_specialize=(
        "sources", "results", "dims", "keep_r", "lengths_b", "table_b", "table_t", "K", "width", "token",
        "result_token", "page", "page_stride",
    ),
    do_not_specialize_on_alignment=("keep", "lengths", "table"),
)  # fmt: skip


@triton.jit
def picked(addresses, job, COUNT: tl.constexpr):
    """addresses[job]. Of each eight one branch, else every program would select among all."""
    found = tl.full([], 0, tl.int64)
    for i in tl.static_range(0, COUNT, 8):
        if (job >> 3) == i // 8:
            found = tl.cast(addresses[i], tl.int64)
            for j in tl.static_range(1, 8):
                found = tl.where((job & 7) == j, tl.cast(addresses[i + j], tl.int64), found)
    return found >> 2


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
    batch last, as 4 d + 2."""
    source = tl.full([], 0, tl.int64)
    result = tl.full([], 0, tl.int64)
    keep = tl.full([], 0, tl.int64)
    for i in tl.static_range(RANK):
        place = tl.cast(index, tl.int64)
        if i < RANK - 1:
            place = tl.cast(index % (dims[4 * i] >> 2), tl.int64)
            index = index // (dims[4 * i] >> 2)
        source += place * (dims[4 * i + 1] >> 2)
        result += place * (dims[4 * i + 2] >> 2)
        keep += place * (dims[4 * i + 3] >> 2)
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


@_kernel
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


@_kernel
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


class Form(NamedTuple):
    """How the tokens of a tensor and its result lie, in units of `unit` bytes."""

    unit: int
    width: int
    token: int
    result_token: int
    page_stride: int
    dims: list  # (size, source, result, keep) of each dimension, the batch last


def form_of(source, result, addresses, keep, token, batch=None, head=None, page=None):
    """The last four arguments name dimensions; without one for the batch, its rows are those of keep.

    Dimensions that lie next to each other in source and result become one. `addresses` and all others of a launch are
    multiples of the same powers of two, up to 16.
    """
    size = source.element_size()
    rows, keep_b = (keep.shape[0], keep.stride(0)) if keep.dim() > 1 else (1, 0)
    width, dims, row = size, [], (rows, 0, 0, keep_b)
    for d, (count, given, here, there) in enumerate(zip(result.shape, source.shape, source.stride(), result.stride())):
        here = here * size if given > 1 else 0  # else shared by all rows of a batch
        if d == batch:
            row = (rows, here, there * size, keep_b)
        elif d != token and d != page and count > 1:
            dims.append((count, here, there * size, keep.stride(1) if d == head and keep.dim() == 3 else 0))
    merged = []
    for count, here, there, own_keep in sorted(dims, key=lambda dim: dim[2]):
        inner = merged[-1] if merged else (0, 0, 0, 1)
        if here == there == width and not own_keep:
            width *= count
        elif own_keep == inner[3] == 0 and (here, there) == (inner[0] * inner[1], inner[0] * inner[2]):
            merged[-1] = (count * inner[0], *inner[1:])
        else:
            merged.append((count, here, there, own_keep))
    merged.append(row if rows > 1 else (1, 0, 0, 0))
    page_stride = 0 if page is None else source.stride(page) * size
    strides = [source.stride(token) * size, result.stride(token) * size, page_stride]
    bits = 16 | width
    for number in (*addresses, *strides, *(stride for dim in merged for stride in dim[1:3])):
        bits |= number
    unit = bits & -bits
    dims = [(count, here // unit, there // unit, own_keep) for count, here, there, own_keep in merged]
    return Form(unit, width // unit, *(stride // unit for stride in strides), dims)


def grouped(tensors, dims=None):
    """(indices, addresses) of tensors that lie alike; dims: what else must be equal, one for each."""
    groups = {}
    for i, tensor in enumerate(tensors):
        address = tensor.data_ptr()
        key = tensor.dtype, tensor.shape, tensor.stride(), address & 15, dims and dims[i]
        if key not in groups:
            groups[key] = [], []
        indices, addresses = groups[key]
        indices.append(i)
        addresses.append(address)
    return groups.values()


def encoded(numbers):
    """As 4 n + 2: neither 1 nor a multiple of 16, so that Triton does not specialise for the value."""
    return tuple([4 * number + 2 for number in numbers])


def _launches(*addresses):
    """(tensors, length of the lists, lists as they travel) of every launch."""
    for first in range(0, len(addresses[0]), COUNTS[-1]):
        parts = [own[first : first + COUNTS[-1]] for own in addresses]
        used = len(parts[0])
        count = next(count for count in COUNTS if count >= used)
        yield used, count, *[encoded([*own, *own[:1] * (count - used)]) for own in parts]


def _setting(kernel, form):
    """(programs of a block of tokens of all lanes, dims as they travel, options)."""
    options = tiles(kernel, form.unit, form.width)
    programs = triton.cdiv(form.width * form.unit // min(form.unit, 8), options["BLOCK_W"])
    for count, *_ in form.dims:
        programs *= count
    rank = next((rank for rank in RANKS if rank >= len(form.dims)), len(form.dims))
    dims = [*[(1, 0, 0, 0)] * (rank - len(form.dims)), *form.dims]
    return programs, encoded([number for dim in dims for number in dim]), {"RANK": rank, "UNIT": form.unit, **options}


def copy(tensor, sources, results, keep, lengths, **dims):
    """Tokens of tensors that lie like `tensor`, at addresses `sources`, to their results; dims as in form_of."""
    if not tensor.numel():  # none is meant
        for result in results:
            result.zero_()
    if not tensor.numel() or not results[0].numel():
        return
    ends = [result.data_ptr() for result in results]
    form = form_of(tensor, results[0], [sources[0], *ends], keep, **dims)
    programs, shape, options = _setting(copy_kernel, form)
    programs *= triton.cdiv(keep.shape[-1], options["BLOCK_R"])
    with on(keep.device):
        for used, count, *addresses in _launches(sources, ends):
            copy_kernel[programs, used](
                *addresses, shape, keep, lengths, keep.stride(-1), 0 if lengths is None else lengths.stride(0),
                keep.shape[-1], form.width, form.token, form.result_token,
                COUNT=count, HAS_LENGTHS=lengths is not None, **options, **OPTIONS,
            )  # fmt: skip


def shift(tensor, sources, keep, lengths, table=None, page_size=1, **dims):
    """Tokens of tensors that lie like `tensor`, at addresses `sources`, in place; table [B, blocks] of their pages."""
    if not tensor.numel() or not keep.numel():
        return
    form = form_of(tensor, tensor, sources[:1], keep, **dims)
    programs, shape, options = _setting(shift_kernel, form)
    table_strides = (0, 0) if table is None else table.stride()
    with on(keep.device):
        for used, count, addresses in _launches(sources):
            shift_kernel[programs, used](
                addresses, shape, keep, lengths, table,
                keep.stride(-1), 0 if lengths is None else lengths.stride(0), *table_strides,
                keep.shape[-1], form.width, form.token, page_size, form.page_stride,
                COUNT=count, HAS_LENGTHS=lengths is not None, PAGED=table is not None, **options, **OPTIONS,
            )  # fmt: skip


def tiles(kernel, unit, width):
    """Tile sizes and launch options. One stage: nothing is loaded ahead of the barrier that orders it."""
    element = min(unit, 8)
    block = min(SLICES[kernel.__name__] // element, triton.next_power_of_2(width * unit // element))
    return {"BLOCK_R": ELEMENTS // block, "BLOCK_W": block, "num_warps": 4, "num_stages": 1}


def move_job(kernel, unit, width, count=8, rank=2, lengths=None, paged=False):
    """One entry of `compile_jobs()`: width in bytes; lengths "i32", "i64" or None."""
    types = {"keep": "*i64", "lengths": f"*{lengths}", "table": "*i32", "dims": ("i32",) * (4 * rank)}
    types |= dict.fromkeys(("sources", "results"), ("i64",) * count)
    forms = {"COUNT": count, "RANK": rank, "UNIT": unit, "HAS_LENGTHS": lengths is not None}
    forms |= {} if kernel is copy_kernel else {"PAGED": paged}
    forms |= {} if lengths else {"lengths": None}
    forms |= {} if paged or kernel is copy_kernel else {"table": None}
    return compile_job(kernel, tiles(kernel, unit, width // unit), types, words=(lengths or "whole",), **forms)


def move_jobs(kernel, widths, **forms):
    """One entry for each (unit, width in bytes)."""
    return [move_job(kernel, unit, width, **forms) for unit, width in widths]
