"""What the Triton kernels share: constants, ordered scores, launch options, how a tensor can be read."""

import functools

import torch
import triton
import triton.language as tl

from ..backends import interpreting

# Fusion said out loud: its default differs among Triton releases. All registers: ptxas would
# otherwise spill to fit two programs on a multiprocessor.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}

SMALLEST_SQUARE = tl.constexpr(2.0**-126)  # below: a zero vector
LARGEST_SQUARE = tl.constexpr(float(torch.finfo(torch.float32).max) / 4)  # above: non-finite
INF = tl.constexpr(float("inf"))  # NaN is written out: as a global it would differ from itself
LAST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # of what can not be chosen


@triton.jit
def order_of(s):
    """int32 that orders float32 values as numbers do, -0.0 and 0.0 alike; NaN must be handled apart."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def access(x):
    """Which tiles suit x [.., N, D]: by element size if every row starts on 16 elements, as Triton's specialisation
    sees it."""
    numbers = (x.data_ptr(), *x.stride()[:-1], x.shape[-1])
    if any(number % 16 for number in numbers):
        return "unaligned"
    return "half" if x.element_size() == 2 else "float"


@functools.cache
def multiprocessors(device):
    """Programs that are resident together; the interpreter runs one after another."""
    return 1 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count


def on(device):
    """Launches inside go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.device(device)


def compile_job(kernel, config, types, divisible=(), words=(), **constexprs):
    """One entry of `compile_jobs()`: a kernel, its launch options and tile sizes, the types of its pointers and tuples.

    Arguments without a type are int32. `words` go into the label beside the constexprs.
    """
    options = OPTIONS | {key: value for key, value in config.items() if key.startswith("num_")}
    constexprs |= {key: value for key, value in config.items() if key not in options}
    return {
        "label": "-".join([kernel.__name__, *words, *(f"{key}={value}" for key, value in constexprs.items())]),
        "kernel": kernel.__name__,
        "signature": {name: types.get(name, "i32") for name in kernel.arg_names if name not in constexprs},
        "constexprs": constexprs,
        "options": options,
        "divisible_by_16": [name for name in kernel.arg_names if name in divisible],
    }
