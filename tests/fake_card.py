"""A card that compiles but runs nothing, so that launchers can be tried whole without a GPU.

Import it in a process of its own, outside of Triton's interpreter. Launches then go as far as the
launch: options, None arguments, specialisation and compilation are real.
"""

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

launches = []  # name and key of what each launch would have run; a new key is a new compilation


class Card:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _compile_only(kernel, *args, warmup, **options):
    compiled = _run(kernel, *args, warmup=True, **options)
    launches.append((kernel.__name__, compiled.hash))
    return compiled


driver.set_active(Card())
_run, JITFunction.run = JITFunction.run, _compile_only
