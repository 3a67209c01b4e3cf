"""Launches of Triton kernels with little host overhead.

Triton's own `kernel[grid](...)` inspects every argument to specialize on its type, alignment and value: 30 to 40 us a
launch on the host of an H100. Here an operator names what a kernel is compiled for by a small tuple, the spec, and a
compiled spec is launched without inspecting the arguments. Sizes, strides and addresses are in no spec, so a new length
compiles nothing. Triton's driver does the launch, its hooks included.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import driver

from ..backends import interpreting

INTERPRETED = interpreting()  # when the kernels were defined
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*u8",
}  # fmt: skip

# enable_fp_fusion: explicit because its default differs among Triton releases. maxnreg: ptxas would otherwise spill to
# fit two programs on a multiprocessor.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}


class Specialization(NamedTuple):
    """What a kernel is compiled for, by names of its parameters."""

    types: dict  # of pointers and tuples that differ between specs; None: the argument is None
    constants: dict
    options: dict  # num_warps, num_stages, launch_cooperative_grid
    divisible: tuple = ()  # pointers and numbers divisible by 16


class Kernel:
    """A Triton kernel whose parameters are pointers, then numbers, then constants.

    Parameters
    ----------
    function : callable
        What `triton.jit` takes.
    specialize : callable (*spec) -> Specialization
    types : dict
        Of parameters whose type is the same in every spec. Numbers without one are int32.
    """

    def __init__(self, function, specialize, types):
        self.jit, self.specialize, self.types = triton.jit(function), specialize, types
        self.__name__ = function.__name__
        self.compiled = {}

    def __call__(self, spec, grid, *args):
        """Launch on the current device and stream; args are pointers (tensors, addresses, tuples of integers or None)
        and numbers in the order of the parameters."""
        if INTERPRETED:
            _, constants, options, _ = self.specialize(*spec)
            self.jit[grid](*args, **constants, **OPTIONS, **{k: v for k, v in options.items() if k.startswith("num_")})
            return
        device = driver.active.get_current_device()
        entry = self.compiled.get((device, spec))
        if entry is None:
            compiled = self.compile(spec)
            kinds = compiled.src.signature.values()
            numbers = [isinstance(kind, str) and kind[0] != "*" and kind != "constexpr" for kind in kinds]
            constants = tuple(self.specialize(*spec).constants.values())
            entry = self.compiled[device, spec] = compiled, (*numbers, True).index(True), constants
        compiled, pointers, constants = entry
        # addresses, because Triton would query the driver for every tensor
        addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args[:pointers]]
        stream = driver.active.get_current_stream(device)
        compiled[grid](*addresses, *args[pointers:], *constants, stream=stream)

    def compile(self, spec, target=None):
        """Triton's CompiledKernel of a spec, for the current device by default."""
        with _compiling_for(target):
            types, constants, options, divisible = self.specialize(*spec)
        types = self.types | types
        absent = {name: None for name, kind in types.items() if kind is None}
        names = self.jit.arg_names
        signature = {
            name: "constexpr" if name in constants or name in absent else types.get(name, "i32") for name in names
        }
        position = {name: (i,) for i, name in enumerate(names)}
        source = ASTSource(
            fn=self.jit,
            signature=signature,
            constexprs={position[name]: value for name, value in (constants | absent).items()},
            attrs={position[name]: [["tt.divisibility", 16]] for name in divisible},
        )
        return triton.compile(source, target=target, options=OPTIONS | options)


_target = None  # of a compilation for another device than the current one


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
    """table[arch, key] if the table has an entry for the GPU's architecture (90, say; from `make gpu-tune`), else
    table[key]."""
    if INTERPRETED:
        return table[key]
    arch = _target.arch if _target else _arch_of(driver.active.get_current_device())
    return table[(arch, key) if (arch, key) in table else key]


def kernel(specialize, **types):
    """Decorator that makes a Kernel; types by names of parameters."""
    return lambda function: Kernel(function, specialize, types)


def workspace(device, *parts):
    """Uninitialised memory in one allocation: its owner, which must live until the last launch, and a pointer to each
    part (dtype, elements). Parts start at multiples of 256 bytes."""
    if INTERPRETED:
        return [None, *(torch.empty(count, dtype=dtype, device=device) for dtype, count in parts)]
    ends = [0]
    for dtype, count in parts:
        ends.append(ends[-1] + (dtype.itemsize * count + 255 & -256))
    memory = torch.empty(ends.pop(), dtype=torch.uint8, device=device)
    start = memory.data_ptr()
    return [memory, *(start + end for end in ends)]


_NO_SWITCH = contextlib.nullcontext()


def device_guard(tensor):
    """Context in which launches go to the tensor's device."""
    device = tensor.get_device()  # -1 on CPU
    return _NO_SWITCH if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


def cdiv(a, b):
    """a / b rounded up; triton.cdiv takes 6 us."""
    return -(-a // b)


def next_power_of_2(n):
    """The smallest power of two >= n >= 1."""
    return 1 << (n - 1).bit_length()
