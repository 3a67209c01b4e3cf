"""Shared by the Triton kernels: sort keys of scores, sums in a fixed order, alignment of tensors."""

import functools

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED

SMALLEST_SQUARE = tl.constexpr(2.0**-126)  # below: a zero vector
LARGEST_SQUARE = tl.constexpr(float(torch.finfo(torch.float32).max) / 4)  # above: non-finite
INF = tl.constexpr(float("inf"))  # no global NaN: Triton compares globals, and NaN differs from itself
LAST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # key of an excluded token


@triton.jit
def ordered_bits(s):
    """int32 that sorts as the float32 value does; -0.0 equals 0.0. NaN must be handled separately."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def row_sums(values, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums [ROWS] of float32 values [ROWS, COLS] by a fixed binary tree. The order of `tl.sum` follows the tile layout,
    so alignment and tile sizes would change bits. COLS: a power of two up to 1024."""
    for level in tl.static_range(10):
        if (COLS >> level) > 1:
            left, right = tl.split(tl.reshape(values, [ROWS, COLS >> (level + 1), 2]))
            values = left + right
    return tl.reshape(values, [ROWS])


def alignment_class(x):
    """Key of the tile tables for x [.., N, D]: "half" or "float" if rows are aligned to 16 elements and 16 bytes."""
    numbers = (x.data_ptr(), *x.stride()[:-1], x.shape[-1])
    bits = 0
    for number in numbers:
        bits |= number
    if bits & 15:
        return "unaligned"
    return "half" if x.element_size() == 2 else "float"


@functools.cache
def multiprocessors(device):
    """Number of programs that run concurrently; one in the interpreter."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
