"""Kernels that the checks of test_triton_compile must refuse, each for a reason of its own."""

import triton.language as tl
from pruneops.triton_kernels._launch import Specialization, kernel


def _form(block, warps):
    return Specialization({}, {"BLOCK": block}, {"num_warps": warps})


@kernel(_form, x="*fp32", out="*fp32")
def _spilling_kernel(x, out, BLOCK: tl.constexpr):
    """Holds far more than 255 registers a thread across a reduction."""
    lane = tl.arange(0, BLOCK)
    values = tl.load(x + lane)
    mean = tl.sum(values, 0) / BLOCK
    tl.store(out + lane, values - mean)


@kernel(_form, x="*fp32", out="*fp32")
def _sharing_kernel(x, out, BLOCK: tl.constexpr):
    """Transposes a tile of BLOCK x BLOCK floats through shared memory."""
    side = tl.arange(0, BLOCK)
    tile = tl.load(x + side[:, None] * BLOCK + side[None, :])
    tl.store(out + side[:, None] * BLOCK + side[None, :], tl.trans(tile) + tile)


@kernel(_form, x="*fp32", out="*fp32")
def _misspelt_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x + unknown))  # noqa: F821


@kernel(_form, x="*fp16", out="*fp32")
def _chaining_kernel(x, out, BLOCK: tl.constexpr):
    """Adds a product to what came before, which the compiler makes one instruction."""
    side = tl.arange(0, BLOCK)
    place = side[:, None] * BLOCK + side[None, :]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(3):
        tile = tl.load(x + place + step)
        sums += tl.dot(tile, tile)
    tl.store(out + place, sums)


def specializations():
    kernels = (_spilling_kernel, (32768, 1)), (_sharing_kernel, (256, 32)), (_misspelt_kernel, (16, 1))
    return [*kernels, (_chaining_kernel, (32, 4))]
