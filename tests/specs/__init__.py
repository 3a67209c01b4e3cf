"""What tests of all operators know of one: a module per operator, named as its files. Needs torch alone.

small_calls()   (label, check) of small calls that reach every kernel of every backend; `check(device)` runs one on the
                backend in force and compares it with the reference. `python -m tests.sanitize` runs them.
INVALID         calls that must be rejected (`InvalidCall`)
TYPE_ERRORS     calls with values of wrong types (`TypeErrorCall`)
samples()       (operator, arguments, keyword arguments) of tiny calls, for torch.library.opcheck
model           what a model does with the operator, for torch.compile
model_inputs()  arguments of several calls of `model`, of different shapes
every_form      all kinds of calls of the operator, on tensors; returns tensors
form_inputs(seed, small=False)
                tensors for `every_form`: other seeds, other values of the same shapes
triton_launches()
                calls of the Triton launchers that compile every specialization
LAUNCHES        how many launches and compilations those are
"""

import importlib
from pathlib import Path

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def spec(name):
    """The module of one operator."""
    return importlib.import_module(f"{__name__}.{name}")
