"""What the benchmark of an operator declares, in one file of `benchmarks/ops/` per operator.

Its module has the attributes of `Operator` below (constants in upper case): cases, inputs, cost model, check of a
result, baselines. Timing, tables, JSON and pytest-benchmark are shared.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LOWER_BOUND = "lower bound, not checked"


@dataclass(frozen=True)
class Case:
    """One set of sizes: `name` for --cases, `shape` for the table."""

    name: str
    shape: str
    dtype: torch.dtype
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Minimum work of any implementation: bytes of the inputs, read once, of the outputs, written once (no more than
    are read), and operations."""

    read: int
    written: int
    operations: int

    @property
    def bytes(self):
        return self.read + self.written


@dataclass(frozen=True)
class Check:
    """Whether a result is right, a message for the table, and numbers for the JSON."""

    right: bool
    message: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """What a user would run instead.

    Attributes
    ----------
    prepare : callable (case, arguments) -> callable () -> result
        Compiles and captures; the function returned is timed. It returns None if it does less than the operator (a
        plain copy, an attention's own forward pass): a lower bound, which is not checked.
    seconds : callable (case, peak_rates) -> float
        Estimate of one run; a baseline that takes too long is skipped.
    devices : tuple of str
    compiles : bool
        Takes seconds to prepare, so it comes after the others.
    package : str
        An optional package, which is imported by this name.
    applies : callable (case) -> bool
        Whether it does what a case asks for.
    """

    prepare: Callable[[Case, dict], Callable[[], Any]]
    seconds: Callable[[Case, Any], float]
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False
    package: str = ""
    applies: Callable[[Case], bool] = lambda case: True

    def why_not(self, device):
        """None if it can run on a device, else the reason."""
        if device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)} only"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


@dataclass(frozen=True)
class Operator:
    """A benchmarked operator.

    Attributes
    ----------
    cases : tuple of Case
        Small first: the time that small cases leave goes to the large ones.
    sets : dict
        Device type -> {"tiny", "quick", "full", "goals", ...} -> names of cases, the most important goals first.
    arguments : callable (case, device) -> dict
        The same values on every call.
    call : callable (arguments) -> result
        The operator's public function.
    check : callable (case, arguments, result, expected, precision) -> Check
        `expected` is the reference's result, or None where it would take too long; `precision` is the dtype that the
        implementation computes in.
    cost : callable (case) -> Cost
    reference_seconds : callable (case, peak_rates) -> float
        Estimate of one run of the reference.
    baselines : dict of Baseline
    variants : callable (case) -> dict
        Other ways through the package to the same result: label for the table -> like `call`. Optional.
    gpu_time_share : int
        Share of the time that `make gpu` has for operators; the largest come first. Optional.
    """

    name: str
    cases: tuple[Case, ...]
    sets: dict[str, dict[str, tuple[str, ...]]]
    arguments: Callable[[Case, torch.device], dict]
    call: Callable[[dict], Any]
    check: Callable[[Case, dict, Any, Any, torch.dtype], Check]
    cost: Callable[[Case], Cost]
    reference_seconds: Callable[[Case, Any], float]
    baselines: dict[str, Baseline]
    variants: Callable[[Case], dict[str, Callable[[dict], Any]]] = lambda case: {}
    gpu_time_share: int = 2

    def verify(self, case, arguments, result, expected, precision):
        """The Check of a result; that of a lower bound is None."""
        if result is None:
            return Check(True, LOWER_BOUND)
        return self.check(case, arguments, result, expected, precision)

    def select(self, names, device):
        """Cases of a comma-separated list of sets and cases, in its order; KeyError names an unknown one."""
        known = {case.name: case for case in self.cases}
        sets = self.sets[device.type]
        wanted = [name for part in names.split(",") for name in sets.get(part, (part,))]
        for name in wanted:
            if name not in known:
                there = f"sets: {', '.join(sets)}; or cases such as {self.cases[-1].name}"
                raise KeyError(f"no case {name!r} of {self.name}; {there}")
        return [known[name] for name in dict.fromkeys(wanted)]


def names():
    """Operators that have a benchmark."""
    return sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))


def operator(name):
    """The Operator that benchmarks/ops/<name>.py declares; KeyError if there is none."""
    if name not in names():
        raise KeyError(f"no operator {name!r}; there is: {', '.join(names())}")
    module = vars(importlib.import_module(f"{__package__}.ops.{name}"))
    attributes = [key for field in dataclasses.fields(Operator) for key in (field.name, field.name.upper())]
    return Operator(name, **{key.lower(): module[key] for key in attributes if key in module})
