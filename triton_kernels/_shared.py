"""What the Triton kernels compute alike: order of scores, sums in a fixed order, how a tensor can be read."""

import functools

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED

SMALLEST_SQUARE = tl.constexpr(2.0**-126)  # below: a zero vector
LARGEST_SQUARE = tl.constexpr(float(torch.finfo(torch.float32).max) / 4)  # above: non-finite
INF = tl.constexpr(float("inf"))  # NaN is written out: as a global it would differ from itself
LAST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # of what can not be chosen


@triton.jit
def ordered_bits(s):
    """int32 that orders float32 values as numbers do, -0.0 and 0.0 alike; NaN must be handled apart."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def row_sums(values, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums [ROWS] of float32 values [ROWS, COLS], a tree of neighbours: `tl.sum` adds in an order that follows the
    layout of the tile, so alignment and tile sizes would change bits. COLS: a power of two up to 1024."""
    for level in tl.static_range(10):
        if (COLS >> level) > 1:
            left, right = tl.split(tl.reshape(values, [ROWS, COLS >> (level + 1), 2]))
            values = left + right
    return tl.reshape(values, [ROWS])


def alignment_class(x):
    """Which tiles suit x [.., N, D]: by element size if every row starts on 16 elements and 16 bytes."""
    numbers = (x.data_ptr(), *x.stride()[:-1], x.shape[-1])
    bits = 0
    for number in numbers:
        bits |= number
    if bits & 15:
        return "unaligned"
    return "half" if x.element_size() == 2 else "float"


@functools.cache
def multiprocessors(device):
    """Programs that are resident together; the interpreter runs one after another."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
