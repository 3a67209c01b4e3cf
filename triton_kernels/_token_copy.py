"""Token copies in Triton: the kernels of kv_compact, paged_kv_compact_ and gather_tokens.

A slice of a tensor is one index of all dimensions but the tokens': a matrix [tokens, width bytes]. Kept bytes are read
once and written once, by integers of at most 16 bytes a thread; no arithmetic. Tensors of one layout (type, shape,
strides) share a launch, up to 192, whose addresses, sizes and strides are kernel arguments.
    copy_new       a program copies a tile: a block of tokens, a chunk of the width. Zeros past lengths.
    copy_in_place  a program copies all tokens of a chunk, block by block in ascending order. A block is loaded before
                   it is stored; positions ascend. No other program accesses the chunk. Unmoved tokens are skipped.
An argument that does not fit is a RuntimeError here, before anything is launched; pruneops/ops then says which one.
Documentation: docs/kernels/token_copy.md
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import TYPES, Specialization, cdiv, device_guard, kernel, next_power_of_2

PADDED_COUNTS = (8, 64, 192)  # lengths of a list of addresses; two lists of 192 are 3 KB of the 4 KB of arguments
PADDED_RANKS = (2, 6)  # numbers of dimensions of a layout
TILE_ELEMENTS = 2048  # 16 KB
NEW_CHUNK, IN_PLACE_CHUNK = 512, 128  # maximum bytes; in place only chunks run in parallel
MAX_WIDTH = 2**30  # merged bytes of a token: a program counts its elements by int32


def _specialize(count, rank, vec_bytes, chunk, lengths, paged=None):
    """Specialization of a spec: number of addresses and of dimensions, bytes of a vector, elements of a chunk, dtype
    of lengths or None; in place, whether tokens are paged. One stage: no load may move ahead of the barrier."""
    types = {"sources": ("i64",) * count, "dims": ("i32", "i64", "i64", "i64") * rank}
    types["lengths"] = lengths and TYPES[lengths]
    constants = {"COUNT": count, "RANK": rank, "VEC_BYTES": vec_bytes, "HAS_LENGTHS": lengths is not None}
    if paged is None:
        types["results"] = types["sources"]
    else:
        types["table"] = "*i32" if paged else None
        constants["PAGED"] = paged
    constants |= {"BLOCK_R": TILE_ELEMENTS // chunk, "BLOCK_W": chunk}
    return Specialization(types, constants, {"num_warps": 4, "num_stages": 1})


_STRIDES = dict.fromkeys(("keep_r", "lengths_b", "table_b", "table_t", "token", "result_token", "page_stride"), "i64")


@triton.jit
def select_address(addresses, index, COUNT: tl.constexpr):
    """addresses[index]: one branch per eight addresses, then seven selects."""
    address = tl.full([], 0, tl.int64)
    for i in tl.static_range(0, COUNT, 8):
        if (index >> 3) == i // 8:
            address = tl.cast(addresses[i], tl.int64)
            for j in tl.static_range(1, 8):
                address = tl.where((index & 7) == j, tl.cast(addresses[i + j], tl.int64), address)
    return address


@triton.jit
def as_pointer(address, VEC_BYTES: tl.constexpr):
    """Pointer to integers of VEC_BYTES bytes, or of 8 where VEC_BYTES is 16."""
    if VEC_BYTES == 1:
        return tl.cast(address, tl.pointer_type(tl.int8))
    elif VEC_BYTES == 2:
        return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int16)), 2)
    elif VEC_BYTES == 4:
        return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int32)), 4)
    else:
        return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int64)), VEC_BYTES)


@triton.jit
def slice_offsets(index, dims, RANK: tl.constexpr):
    """(batch, source offset, result offset, keep offset) of a slice. dims: (size, source stride, result stride, keep
    stride) of each dimension, the batch last."""
    source = tl.full([], 0, tl.int64)
    result = tl.full([], 0, tl.int64)
    keep = tl.full([], 0, tl.int64)
    for i in tl.static_range(RANK):
        coordinate = tl.cast(index, tl.int64)
        if i < RANK - 1:
            size = tl.cast(dims[4 * i], tl.int32)
            coordinate = tl.cast(index % size, tl.int64)
            index = index // size
        source += coordinate * dims[4 * i + 1]
        result += coordinate * dims[4 * i + 2]
        keep += coordinate * dims[4 * i + 3]
    return tl.cast(index, tl.int64), source, result, keep


@triton.jit
def row_length(lengths, offset, K, HAS_LENGTHS: tl.constexpr):
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths + offset).to(tl.int32), K)
    else:
        return K


@triton.jit
def token_offset(position, mask, table, table_t, page, page_stride, token, PAGED: tl.constexpr):
    """Offsets of int32 positions from the start of a slice; the block table is read where mask is true."""
    if PAGED:
        block = tl.load(table + (position // page).to(tl.int64) * table_t, mask=mask, other=0).to(tl.int64)
        return block * page_stride + (position % page).to(tl.int64) * token
    else:
        return position.to(tl.int64) * token


@kernel(_specialize, keep="*i64", **_STRIDES)
def copy_new_kernel(
    sources, results, dims, keep, lengths, keep_r, lengths_b, K, width, token, result_token,
    COUNT: tl.constexpr, RANK: tl.constexpr, VEC_BYTES: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all slices * blocks of tokens, tensors). Strides and width are in vectors."""
    PER: tl.constexpr = 2 if VEC_BYTES == 16 else 1  # elements of a vector
    width *= PER
    chunks = tl.cdiv(width, BLOCK_W)
    blocks = tl.cdiv(K, BLOCK_R)
    tensor = tl.program_id(1)
    index = tl.program_id(0) // chunks
    batch, source, result, keep_offset = slice_offsets(index // blocks, dims, RANK)
    r = index % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    w = tl.program_id(0) % chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    valid = r < row_length(lengths, batch * lengths_b, K, HAS_LENGTHS)
    position = tl.load(keep + keep_offset + r.to(tl.int64) * keep_r, mask=valid, other=0)
    src = as_pointer(select_address(sources, tensor, COUNT), VEC_BYTES) + source * PER
    dst = as_pointer(select_address(results, tensor, COUNT), VEC_BYTES) + result * PER
    in_width = (w < width)[None, :]
    tile = tl.load(src + (position * token * PER)[:, None] + w[None, :], mask=valid[:, None] & in_width, other=0)
    tl.store(dst + (r.to(tl.int64) * result_token * PER)[:, None] + w[None, :], tile, mask=(r < K)[:, None] & in_width)


@kernel(_specialize, keep="*i64", **_STRIDES)
def copy_in_place_kernel(
    sources, dims, keep, lengths, table, keep_r, lengths_b, table_b, table_t, K, width, token, page, page_stride,
    COUNT: tl.constexpr, RANK: tl.constexpr, VEC_BYTES: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all slices, tensors). Positions ascend: no block reads what an earlier block has written."""
    PER: tl.constexpr = 2 if VEC_BYTES == 16 else 1  # elements of a vector
    width *= PER
    chunks = tl.cdiv(width, BLOCK_W)
    batch, source, _, keep_offset = slice_offsets(tl.program_id(0) // chunks, dims, RANK)
    r = tl.arange(0, BLOCK_R)
    w = tl.program_id(0) % chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = (w < width)[None, :]
    length = row_length(lengths, batch * lengths_b, K, HAS_LENGTHS)
    keep += keep_offset
    if PAGED:
        table += batch * table_b
    position = tl.load(keep + r.to(tl.int64) * keep_r, mask=r < length, other=0).to(tl.int32)
    src_offset = token_offset(position, r < length, table, table_t, page, page_stride, token, PAGED)
    base = as_pointer(select_address(sources, tl.program_id(1), COUNT), VEC_BYTES) + source * PER
    for first in range(0, length, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        moved = (r < length) & (position != r)
        mask = moved[:, None] & in_width
        tile = tl.load(base + (src_offset * PER)[:, None] + w[None, :], mask=mask, other=0)
        dst_offset = token_offset(r, moved, table, table_t, page, page_stride, token, PAGED)
        r += BLOCK_R
        position = tl.load(keep + r.to(tl.int64) * keep_r, mask=r < length, other=0).to(tl.int32)
        src_offset = token_offset(position, r < length, table, table_t, page, page_stride, token, PAGED)
        tl.debug_barrier()
        tl.store(base + (dst_offset * PER)[:, None] + w[None, :], tile, mask=mask)


class DimRoles(NamedTuple):
    """Special dimensions of a tensor. Without a batch dimension the batch is that of keep."""

    token: int
    batch: int | None = None
    head: int | None = None
    page: int | None = None


class Layout(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple
    device: int
    token: int | None  # the token dimension, where it differs among tensors


class Plan(NamedTuple):
    """Launch parameters of tensors of one layout; strides and widths in vectors."""

    vec_bytes: int
    rank: int
    chunk: int  # elements
    chunks: int  # of all slices
    dims: tuple  # (size, source, result, keep) of each dimension, the batch last, flattened
    width: int
    token: int
    result_token: int
    page_stride: int


def max_vec_bytes(numbers):
    """The largest power of two up to 16 that divides all numbers."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits


def _chunk_elements(max_bytes, vec_bytes, width):
    """Elements of a chunk of tokens of `width` bytes."""
    element = min(vec_bytes, 8)
    return min(max_bytes // element, next_power_of_2(width // element))


@functools.lru_cache(256)  # a new length makes a new plan
def make_plan(
    max_chunk, element_size, shape, stride, result_shape, result_stride, keep_shape, keep_stride, alignment, roles
):
    """Plan for chunks of at most `max_chunk` bytes and addresses that are multiples of `alignment`. Merges dimensions
    that are adjacent in both source and result."""
    token, batch, head, page = roles
    rows, keep_b = (keep_shape[0], keep_stride[0]) if len(keep_shape) > 1 else (1, 0)
    width, dims, batch_dim = element_size, [], (rows, 0, 0, keep_b)
    for d, (count, src_count, src, dst) in enumerate(zip(result_shape, shape, stride, result_stride)):
        src = src * element_size if src_count > 1 else 0  # 0: broadcast over the batch
        if d == batch:
            batch_dim = (rows, src, dst * element_size, keep_b)
        elif d != token and d != page and count > 1:
            dims.append((count, src, dst * element_size, keep_stride[1] if d == head and len(keep_shape) == 3 else 0))
    merged = []
    for count, src, dst, keep in sorted(dims, key=lambda dim: dim[2]):
        inner = merged[-1] if merged else (0, 0, 0, 1)
        if src == dst == width and not keep and width * count <= MAX_WIDTH:
            width *= count
        elif keep == inner[3] == 0 and (src, dst) == (inner[0] * inner[1], inner[0] * inner[2]):
            merged[-1] = (count * inner[0], *inner[1:])
        else:
            merged.append((count, src, dst, keep))
    merged.append(batch_dim if rows > 1 else (1, 0, 0, 0))
    page_stride = 0 if page is None else stride[page] * element_size
    strides = stride[token] * element_size, result_stride[token] * element_size, page_stride
    dim_strides = [stride for dim in merged for stride in dim[1:3]]
    vec_bytes = max_vec_bytes([alignment, width, *strides, *dim_strides])
    chunk = _chunk_elements(max_chunk, vec_bytes, width)
    chunks = cdiv(width // min(vec_bytes, 8), chunk)
    for dim in merged:
        chunks *= dim[0]
    rank = next((rank for rank in PADDED_RANKS if rank >= len(merged)), len(merged))
    flat = [1, 0, 0, 0] * (rank - len(merged))
    for count, src, dst, keep in merged:
        flat += count, src // vec_bytes, dst // vec_bytes, keep
    in_vectors = (stride // vec_bytes for stride in strides)
    return Plan(vec_bytes, rank, chunk, chunks, tuple(flat), width // vec_bytes, *in_vectors)


def check(condition):
    if not condition:
        raise RuntimeError("pruneops: inconsistent arguments")


def group_by_layout(tensors, dims=None):
    """[(layout, indices, addresses)] of tensors; dims: the token dimension of each, or None."""
    check(tensors)
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
        indices, group_addresses = groups.setdefault(layout, ([], []))
        indices.append(i)
        group_addresses.append(addresses[i])
    return [(Layout(*layout), *group) for layout, group in groups.items()]


def check_keep(keep, lengths, ranks):
    """dtypes and devices; keep has one of the ranks, lengths one entry per row of keep."""
    check(keep.dtype is torch.int64 and keep.dim() in ranks)
    if lengths is not None:
        check(lengths.dtype in (torch.int64, torch.int32) and lengths.shape == keep.shape[:1])
        check(lengths.get_device() == keep.get_device())


def check_no_overlap(groups):
    """No tensor is passed twice or overlaps itself."""
    all_addresses = []
    for layout, _, addresses in groups:
        check(0 not in layout.stride or all(stride or n < 2 for n, stride in zip(layout.shape, layout.stride)))
        all_addresses += addresses if 0 not in layout.shape else ()
    check(len(set(all_addresses)) == len(all_addresses))


def allocate_like(result, count):
    """[result, ...]: `count` uninitialised tensors, each with its own storage. A view of a shared buffer would keep all
    of the buffer alive and be saved with it."""
    return [result, *[torch.empty_like(result) for _ in range(count - 1)]]


def _launches(*lists):
    """(number of tensors, padded length, padded lists) of every launch."""
    for first in range(0, len(lists[0]), PADDED_COUNTS[-1]):
        parts = [addresses[first : first + PADDED_COUNTS[-1]] for addresses in lists]
        used = len(parts[0])
        count = next(count for count in PADDED_COUNTS if count >= used)
        yield used, count, *[(*part, *part[:1] * (count - used)) for part in parts]


def _dtype_and_stride(lengths):
    return (None, 0) if lengths is None else (lengths.dtype, lengths.stride(0))


def copy_new(layout, sources, results, keep, lengths, roles):
    """Copies kept tokens of tensors of one layout, at addresses `sources`, to their results."""
    if 0 in layout.shape:  # no valid positions
        for result in results:
            result.zero_()
        return
    first, K = results[0], keep.shape[-1]
    if not first.numel():
        return
    result_addresses = [result.data_ptr() for result in results]
    vec_bytes, rank, chunk, chunks, dims, width, token, result_token, _ = make_plan(
        NEW_CHUNK, first.element_size(), layout.shape, layout.stride, first.shape, first.stride(),
        keep.shape, keep.stride(), max_vec_bytes(sources + result_addresses), roles,
    )  # fmt: skip
    programs = chunks * cdiv(K, TILE_ELEMENTS // chunk)
    lengths_dtype, lengths_b = _dtype_and_stride(lengths)
    with device_guard(keep):
        for used, count, *addresses in _launches(sources, result_addresses):
            copy_new_kernel(
                (count, rank, vec_bytes, chunk, lengths_dtype), (programs, used, 1),
                *addresses, dims, keep, lengths, keep.stride(-1), lengths_b, K, width, token, result_token,
            )  # fmt: skip


def copy_in_place(layout, sources, keep, lengths, roles, table=None, page_size=1):
    """Moves kept tokens of tensors of one layout, at addresses `sources`, in place; table [B, blocks]: their pages."""
    if 0 in layout.shape or not keep.numel():
        return
    shape, stride, keep_stride = layout.shape, layout.stride, keep.stride()
    vec_bytes, rank, chunk, chunks, dims, width, token, _, page_stride = make_plan(
        IN_PLACE_CHUNK, layout.dtype.itemsize, shape, stride, shape, stride,
        keep.shape, keep_stride, max_vec_bytes(sources), roles,
    )  # fmt: skip
    lengths_dtype, lengths_b = _dtype_and_stride(lengths)
    table_b, table_t = (0, 0) if table is None else table.stride()
    with device_guard(keep):
        for used, count, addresses in _launches(sources):
            copy_in_place_kernel(
                (count, rank, vec_bytes, chunk, lengths_dtype, table is not None), (chunks, used, 1),
                addresses, dims, keep, lengths, table, keep_stride[-1], lengths_b, table_b, table_t,
                keep.shape[-1], width, token, page_size, page_stride,
            )  # fmt: skip


def make_spec(max_chunk, vec_bytes, width, count=8, rank=2, lengths=None, *paged):
    """The spec that the launchers pass for tokens of `width` bytes."""
    return count, rank, vec_bytes, _chunk_elements(max_chunk, vec_bytes, width), lengths, *paged
