"""What a benchmark of an operator declares; one file of `benchmarks/ops/` per operator.

An operator's file holds its cases, its inputs, its cost model, its check of a result and its
peers. Everything else (timing, tables, JSON, pytest-benchmark, sanitizers) is shared.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One set of sizes. `name` is what `--cases` takes, `shape` what the table shows."""

    name: str
    shape: str
    dtype: torch.dtype
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The least any implementation must do: bytes of the inputs, read once, of the outputs, written once (no more
    than are read), and operations."""

    read: int
    written: int
    operations: int

    @property
    def bytes(self):
        return self.read + self.written


@dataclass(frozen=True)
class Check:
    """Whether a result is right, in numbers that go into the JSON and a few words for the table."""

    right: bool
    words: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """What a user would run instead.

    `prepare(case, arguments)` returns a function of nothing that is timed; compiling and graph
    capture happen in it. `seconds(case, ceilings)` is a guess at one run, by which a peer that
    takes too long is left out. One that `compiles` takes seconds to prepare: others go first.
    """

    prepare: Callable[[Case, dict], Callable[[], Any]]
    seconds: Callable[[Case, Any], float]
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False


@dataclass(frozen=True)
class Operator:
    """A benchmarked operator.

    Attributes
    ----------
    cases : tuple of Case
        Small first, since what small cases leave of the time goes to the large ones.
    sets : dict
        Device type -> {"tiny", "quick", "full", "goals", ...} -> names of cases.
    arguments : callable (case, device) -> dict
        The same values on every call.
    call : callable (arguments) -> result
        The operator's documented Python face.
    variants : callable (case) -> dict
        Other ways through the package to the same result: words for the table -> like `call`.
    check : callable (case, arguments, result, expected, precision) -> Check
        `expected` is the reference's result, or None where it would take too long; `precision`
        is the dtype the implementation computes in.
    cost : callable (case) -> Cost
    reference_seconds : callable (case, ceilings) -> float
        A guess at one run of the reference.
    peers : dict of Peer
    sanitize : callable (device) -> iterable of (words, passed)
        Runs the operator on small shapes that reach every kernel of the backend in force.
    """

    name: str
    cases: tuple[Case, ...]
    sets: dict[str, dict[str, tuple[str, ...]]]
    arguments: Callable[[Case, torch.device], dict]
    call: Callable[[dict], Any]
    check: Callable[[Case, dict, Any, Any, torch.dtype], Check]
    cost: Callable[[Case], Cost]
    reference_seconds: Callable[[Case, Any], float]
    peers: dict[str, Peer]
    sanitize: Callable[[torch.device], Any]
    variants: Callable[[Case], dict[str, Callable[[dict], Any]]] = lambda case: {}

    def select(self, names, device):
        """Cases of a comma-separated list of sets and cases; KeyError names what there is not."""
        known = [case.name for case in self.cases]
        sets = self.sets[device.type]
        wanted = [name for part in names.split(",") for name in sets.get(part, (part,))]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            there = f"sets: {', '.join(sets)}; or cases such as {known[-1]}"
            raise KeyError(f"no case {unknown[0]!r} of {self.name}; {there}")
        return [case for case in self.cases if case.name in wanted]


def names():
    """Operators that have a benchmark."""
    return sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))


def operator(name):
    """The Operator that benchmarks/ops/<name>.py declares; KeyError if there is none."""
    if name not in names():
        raise KeyError(f"no operator {name!r}; there is: {', '.join(names())}")
    return importlib.import_module(f"{__package__}.ops.{name}").OPERATOR
