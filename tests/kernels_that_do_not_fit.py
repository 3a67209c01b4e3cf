"""Kernels that the checks of test_triton_compile must refuse, each for a reason of its own."""

import triton
import triton.language as tl


@triton.jit
def _spilling_kernel(x, out, BLOCK: tl.constexpr):
    """Holds far more than 255 registers a thread across a reduction."""
    lane = tl.arange(0, BLOCK)
    values = tl.load(x + lane)
    mean = tl.sum(values, 0) / BLOCK
    tl.store(out + lane, values - mean)


@triton.jit
def _sharing_kernel(x, out, BLOCK: tl.constexpr):
    """Transposes a tile of BLOCK x BLOCK floats through shared memory."""
    side = tl.arange(0, BLOCK)
    tile = tl.load(x + side[:, None] * BLOCK + side[None, :])
    tl.store(out + side[:, None] * BLOCK + side[None, :], tl.trans(tile) + tile)


@triton.jit
def _misspelt_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x + unknown))  # noqa: F821


def compile_jobs():
    kernels = {"_spilling_kernel": (32768, 1), "_sharing_kernel": (256, 32), "_misspelt_kernel": (16, 1)}
    return [
        {
            "label": name,
            "kernel": name,
            "signature": {"x": "*fp32", "out": "*fp32"},
            "constexprs": {"BLOCK": block},
            "options": {"num_warps": warps},
        }
        for name, (block, warps) in kernels.items()
    ]
