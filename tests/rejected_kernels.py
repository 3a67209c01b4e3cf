"""Kernels that the checks of test_triton_compile must reject, each for another reason."""

import triton.language as tl
from pruneops.triton_kernels._launch import Specialization, kernel


def _specialize(block, warps):
    return Specialization({}, {"BLOCK": block}, {"num_warps": warps})


@kernel(_specialize, x="*fp32", out="*fp32")
def _spilling_kernel(x, out, BLOCK: tl.constexpr):
    """Keeps far more than 255 registers a thread live across a reduction."""
    lane = tl.arange(0, BLOCK)
    values = tl.load(x + lane)
    mean = tl.sum(values, 0) / BLOCK
    tl.store(out + lane, values - mean)


@kernel(_specialize, x="*fp32", out="*fp32")
def _sharing_kernel(x, out, BLOCK: tl.constexpr):
    """Transposes a tile of BLOCK x BLOCK floats through shared memory."""
    side = tl.arange(0, BLOCK)
    tile = tl.load(x + side[:, None] * BLOCK + side[None, :])
    tl.store(out + side[:, None] * BLOCK + side[None, :], tl.trans(tile) + tile)


@kernel(_specialize, x="*fp32", out="*fp32")
def _misspelt_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x + unknown))  # noqa: F821


@kernel(_specialize, x="*fp16", out="*fp32")
def _chaining_kernel(x, out, BLOCK: tl.constexpr):
    """Accumulates products; the compiler fuses each addition into the dot."""
    side = tl.arange(0, BLOCK)
    offsets = side[:, None] * BLOCK + side[None, :]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(3):
        tile = tl.load(x + offsets + step)
        sums += tl.dot(tile, tile)
    tl.store(out + offsets, sums)


def specializations():
    kernels = (_spilling_kernel, (32768, 1)), (_sharing_kernel, (256, 32)), (_misspelt_kernel, (16, 1))
    return [*kernels, (_chaining_kernel, (32, 4))]
