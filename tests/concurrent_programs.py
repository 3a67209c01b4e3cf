"""Runs all programs of a Triton launch at once in its interpreter, each in a process of its own, on shared memory.

Kernels whose programs wait for each other need that: the interpreter alone runs one after another. A wait that
is missing or never ends shows; a missing fence may not, for the order of memory is this processor's.
Use it in a process of its own, it forks.
"""

import functools
import inspect
import os
import random
import signal
import time

import torch
import triton.language as tl  # noqa: F401, the interpreter looks for it beside the function that it runs
from triton.runtime import interpreter


def _dawdle(chance):
    """Stop now and then around atomic operations, so that programs which should have waited are caught."""
    builder = interpreter.interpreter_builder
    atomic = builder.create_atomic_rmw

    def slow(*args):
        time.sleep(chance.choice((0, 0, 0, 0.02)))
        result = atomic(*args)
        time.sleep(chance.choice((0, 0, 0, 0.02)))
        return result

    builder.create_atomic_rmw = slow


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
            _dawdle(random.Random(program))
            whole = self.kernel.rewrite()

            @functools.wraps(whole)
            def only(*args, **kwargs):
                if interpreter.interpreter_builder.grid_idx[0] == program:
                    whole(*args, **kwargs)

            only.__signature__ = inspect.signature(whole)
            self.kernel.rewritten_fn[self.kernel.fn] = only
            interpreter.GridExecutor._restore_args_dev = lambda *_: None  # would copy shared memory onto itself
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
                    raise TimeoutError(f"program {program} did not end: the programs wait for each other")
                time.sleep(0.01)
            if done.si_status:
                raise RuntimeError(f"program {program} failed")
