"""Runs the CUDA kernels on emulated threads (runtime.h) and compares them with the reference.

Covers indexing, tails, block and cluster barriers, order of arithmetic. Does not cover memory ordering between real
threads, timing and compiled code; `make gpu` does.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
INT, INT32, POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p

needs_compiler = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++"))),
    reason="needs Linux and a C++ compiler",
)
by_dtype = pytest.mark.parametrize("dtype", ELEMENTS, ids=lambda d: str(d).removeprefix("torch."))


def compile_kernels(op, folder):
    """Compile `<op>.cpp`; returns its entry point, which takes a pointer to its `Call`."""
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]
    target = folder / f"{op}.so"
    command = [os.environ.get("CXX", "g++"), *flags, f"-I{HERE.parents[1] / 'csrc'}", HERE / f"{op}.cpp", "-o", target]
    subprocess.run(command, check=True)
    return getattr(ctypes.CDLL(str(target)), op)


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def strides(tensor):
    """The strides of the first two dimensions, 0 for None."""
    return (INT * 2)(*((0, 0) if tensor is None else tensor.stride()[:2]))
