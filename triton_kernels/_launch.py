"""Launches of Triton kernels that cost their host little.

Triton's own `kernel[grid](...)` looks at every argument, to compile for its type, its alignment and its value: 30 to 40
us a launch on the host of an H100. Here an operator tells what it compiles for, a tuple of few values (the form), and a
form that is compiled is launched without a look. Sizes, strides and addresses are in no form, so no new length compiles
anew. Triton's driver does the launch, its hooks included.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import driver

from ..backends import interpreting

INTERPRETED = interpreting()  # as Triton saw it when the kernels were defined
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*u8",
}  # fmt: skip

# Fusion said out loud: its default differs among Triton releases. All registers: ptxas would
# otherwise spill to fit two programs on a multiprocessor.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}


class Specialization(NamedTuple):
    """What a kernel is compiled for, by names of its parameters."""

    types: dict  # of pointers and tuples that differ between forms; None: there is none
    constants: dict
    options: dict  # num_warps, num_stages, launch_cooperative_grid
    divisible: tuple = ()  # pointers and numbers that are multiples of 16


class Kernel:
    """A Triton kernel whose parameters are pointers, then numbers, then constants.

    Parameters
    ----------
    function : callable
        What `triton.jit` takes.
    describe : callable (*form) -> Form
    types : dict
        Of parameters that are the same in every form. Numbers without one are int32.
    """

    def __init__(self, function, describe, types):
        self.jit, self.describe, self.types = triton.jit(function), describe, types
        self.__name__ = function.__name__
        self.compiled = {}

    def __call__(self, form, grid, *args):
        """Launch on the current device and stream; args are pointers (tensors, addresses, tuples of integers or None)
        and numbers in the order of the parameters."""
        if INTERPRETED:
            _, constants, options, _ = self.describe(*form)
            self.jit[grid](*args, **constants, **OPTIONS, **{k: v for k, v in options.items() if k.startswith("num_")})
            return
        device = driver.active.get_current_device()
        found = self.compiled.get((device, form))
        if found is None:
            compiled = self.compile(form)
            kinds = compiled.src.signature.values()
            numbers = [isinstance(kind, str) and kind[0] != "*" and kind != "constexpr" for kind in kinds]
            constants = tuple(self.describe(*form).constants.values())
            found = self.compiled[device, form] = compiled, (*numbers, True).index(True), constants
        compiled, pointers, constants = found
        # addresses, since Triton would ask the driver about every tensor
        addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args[:pointers]]
        stream = driver.active.get_current_stream(device)
        compiled[grid](*addresses, *args[pointers:], *constants, stream=stream)

    def compile(self, form, target=None):
        """Triton's CompiledKernel of a form, for the current device by default."""
        with _compiling_for(target):
            types, constants, options, divisible = self.describe(*form)
        types = self.types | types
        absent = {name: None for name, kind in types.items() if kind is None}
        names = self.jit.arg_names
        signature = {
            name: "constexpr" if name in constants or name in absent else types.get(name, "i32") for name in names
        }
        place = {name: (i,) for i, name in enumerate(names)}
        source = ASTSource(
            fn=self.jit,
            signature=signature,
            constexprs={place[name]: value for name, value in (constants | absent).items()},
            attrs={place[name]: [["tt.divisibility", 16]] for name in divisible},
        )
        return triton.compile(source, target=target, options=OPTIONS | options)


_target = None  # what is compiled for, if not for the current device


@contextlib.contextmanager
def _compiling_for(target):
    global _target
    _target = target
    try:
        yield
    finally:
        _target = None


@functools.cache
def _arch_of(device):
    return driver.active.get_current_target().arch


def tuned(table, key):
    """table[key], or table[arch, key] where the card's architecture, 90 say, has an entry of its own (from `make
    gpu-tune`)."""
    if INTERPRETED:
        return table[key]
    arch = _target.arch if _target else _arch_of(driver.active.get_current_device())
    return table[(arch, key) if (arch, key) in table else key]


def kernel(describe, **types):
    """Decorator that makes a Kernel; types by names of parameters."""
    return lambda function: Kernel(function, describe, types)


def workspace(device, *parts):
    """Uninitialised memory in one allocation: its owner, which must live until the last launch, and a pointer to each
    part (dtype, elements), a multiple of 256 bytes from its start."""
    if INTERPRETED:
        return [None, *(torch.empty(count, dtype=dtype, device=device) for dtype, count in parts)]
    ends = [0]
    for dtype, count in parts:
        ends.append(ends[-1] + (dtype.itemsize * count + 255 & -256))
    memory = torch.empty(ends.pop(), dtype=torch.uint8, device=device)
    start = memory.data_ptr()
    return [memory, *(start + end for end in ends)]


_HERE = contextlib.nullcontext()


def device_guard(tensor):
    """Launches inside go to the tensor's device."""
    device = tensor.get_device()  # -1 on CPU
    return _HERE if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


def cdiv(a, b):
    """a / b rounded up; Triton's own takes 6 us."""
    return -(-a // b)


def next_power_of_2(n):
    """The least power of two >= n >= 1."""
    return 1 << (n - 1).bit_length()
