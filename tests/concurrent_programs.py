"""Runs all programs of a Triton launch concurrently in the interpreter, one process a program, on shared memory.

For kernels whose programs wait for each other; the interpreter alone runs one program after another. Detects missing
waits and deadlocks. May not detect a missing fence: memory ordering is that of the CPU. It forks, so use it in a
separate process.
"""

import functools
import inspect
import os
import random
import signal
import time

import torch
import triton.language as tl  # noqa: F401, the interpreter looks it up in this module
from triton.runtime import interpreter


def _delay_atomics(generator):
    """Sleep at random around atomic operations, so that a missing wait shows."""
    builder = interpreter.interpreter_builder
    atomic = builder.create_atomic_rmw

    def delayed(*args):
        time.sleep(generator.choice((0, 0, 0, 0.02)))
        result = atomic(*args)
        time.sleep(generator.choice((0, 0, 0, 0.02)))
        return result

    builder.create_atomic_rmw = delayed


class ConcurrentPrograms:
    """Stands in for an interpreted kernel with a grid of one dimension."""

    def __init__(self, kernel, seconds=120):
        self.kernel, self.seconds = kernel, seconds

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *args, **options):
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()
        children = [self.start(program, grid, args, options) for program in range(grid[0])]
        try:
            self.wait(children)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)

    def start(self, program, grid, args, options):
        child = os.fork()
        if child:
            return child
        try:
            _delay_atomics(random.Random(program))
            function = self.kernel.rewrite()

            @functools.wraps(function)
            def one_program(*args, **kwargs):
                if interpreter.interpreter_builder.grid_idx[0] == program:
                    function(*args, **kwargs)

            one_program.__signature__ = inspect.signature(function)
            self.kernel.rewritten_fn[self.kernel.fn] = one_program
            interpreter.GridExecutor._restore_args_dev = lambda *_: None  # it would copy shared memory onto itself
            self.kernel[grid](*args, **options)
            os._exit(0)
        except BaseException as error:
            print(f"program {program}: {error!r}", flush=True)
            os._exit(1)

    def wait(self, children):
        end = time.monotonic() + self.seconds
        for program, child in enumerate(children):
            while not (done := os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                if time.monotonic() > end:
                    raise TimeoutError(f"program {program} did not end: deadlock")
                time.sleep(0.01)
            if done.si_status:
                raise RuntimeError(f"program {program} failed")
