"""What `make gpu-tune` may change in CUDA C++: launch parameters that csrc/cuda declares as `Tuned` (tuning.h)."""

import contextlib
import ctypes
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from pruneops import backends

from . import ROOT
from .spaces import Space

DECLARATION = re.compile(r'Tuned\s+\w+\{"(\w+)",\s*([^}]+)\};')


@functools.cache
def _library():
    reason = backends.why_not("cuda", "cuda")  # which loads it
    if reason:
        raise OSError(f"CUDA C++ cannot run: {reason}")
    return ctypes.CDLL(str(next(Path(backends.__file__).parent.glob("_cuda*.so"))))


def tune(name, value=-1):
    """Set a parameter and return its previous value; -1 only reads. KeyError if the library has none of the name."""
    previous = _library().pruneops_tune(name.encode(), value)
    if previous < 0:
        raise KeyError(f"pruneops._cuda has no launch parameter {name!r}")
    return previous


def declarations():
    """Name of a parameter -> (file, line, text), from the sources."""
    found = {}
    for path in sorted(Path(ROOT, "csrc", "cuda").glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in DECLARATION.finditer(line):
                found[match[1]] = path.relative_to(ROOT), number, match[0]
    return found


@dataclass(frozen=True)
class Native:
    """Some launch parameters; a configuration is {parameter: value}."""

    parameters: tuple[str, ...]
    backend = "cuda"

    @property
    def place(self):
        return ", ".join(sorted({str(declarations()[name][0]) for name in self.parameters}))

    def current(self):
        return {name: tune(name) for name in self.parameters}

    @contextlib.contextmanager
    def use(self, config):
        """Override the parameters; yields their names, as if all were read."""
        before = {name: tune(name, value) for name, value in config.items()}
        try:
            yield list(config)
        finally:
            for name, value in before.items():
                tune(name, value)

    def text(self, config):
        """The lines that would be committed, and where they are."""
        lines, found = [], declarations()
        for name, value in config.items():
            path, number, text = found[name]
            lines.append(f"{path}:{number}: {text[: text.index(',')]}, {value}}};")
        return "\n".join(lines)


def _space(case, **values):
    """Every combination of values of some parameters, timed in a case: "operator case"."""
    operator, name = case.split()
    candidates = tuple(dict(zip(values, chosen)) for chosen in itertools.product(*values.values()))
    label = " ".join(key.removeprefix(f"{operator}_") for key in values)
    return Space(f"{operator} {name}: {label}", Native(tuple(values)), operator, name, candidates)


# The most important goals first. A parameter may be swept in several cases, which may propose different values.
SPACES = (
    _space("kcenter b1-n2880-d4096-bfloat16", kcenter_gram_tile=(64, 128, 192), kcenter_greedy_blocks=(4, 8, 16)),
    _space("kcenter b1-n9216-d4096-bfloat16", kcenter_candidates=(128, 192, 240), kcenter_block_tokens=(16, 64)),
    _space("kcenter b1-n2880-d4096-float32", kcenter_gram_tokens_float32=(2048, 4096)),
    _space("kcenter b1-n23328-d4096-bfloat16", kcenter_candidates=(160, 240)),
    _space("attention_mass decode-b1-s3072-bfloat16", attention_decode=(0, 1)),
    _space("attention_mass decode-b16-s3072-bfloat16", attention_decode=(0, 1), attention_decode_keys=(256, 384, 768)),
    _space("attention_received text-s3072-bfloat16", attention_decode=(0, 1)),
    _space("attention_mass text-s3072-h32-bfloat16", attention_decode=(0, 1), attention_prefill_lse=(0, 1)),
    _space("attention_received cls-s577-bfloat16", attention_decode_keys=(64, 128, 256)),
    _space("attention_received text-s3072-lse-bfloat16", attention_decode=(0, 1)),
    _space("attention_received last-s3072-bfloat16", attention_decode_queries=(16, 1 << 16)),
    _space("attention_received all-s1088-bfloat16", attention_decode_unmasked=(64, 1 << 16)),
    _space("kcenter b1-n576-d1024-bfloat16", kcenter_gram_tile=(64, 128), kcenter_greedy_blocks=(4, 8)),
    _space("kcenter b8-n2880-d4096-bfloat16", kcenter_gram_tile=(128, 192), kcenter_greedy_blocks=(8, 16)),
    _space("kcenter b1-n2880-d4096-bfloat16", kcenter_gram_tokens=(2048, 16384)),
    _space("attention_mass prefill-s3072-h28-bfloat16", attention_prefill_rows=(64, 256)),
)  # fmt: skip
