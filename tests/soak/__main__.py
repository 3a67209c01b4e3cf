"""Random calls of every operator on every backend of a device, held to float64 oracles.

`python -m tests.soak --seconds 60` exits with 0 if all answers were right, 1 if one was wrong, 2 if nothing could
run, 130 on Ctrl-C. Each finding is a line that ends with the command that repeats it.
"""

import argparse
import contextlib
import itertools
import sys
import time
import warnings
from typing import NamedTuple

import torch

import pruneops
from pruneops import backends, reference
from pruneops.ops import OPERATORS
from tests.inputs import copied, poisoned, storage
from tests.oracles import differ, first

from . import SOAKS
from .draws import Random

MAX_FINDINGS = 20  # printed


class ContextLost(Exception):
    """The CUDA context is in an error state: no further call can run."""


class Trial(NamedTuple):
    """One random call; without `large` no call of the few large ones is drawn."""

    seed: int
    operator: str
    backend: str
    large: bool = True

    def __str__(self):
        return ":".join(map(str, self[:3]))


class Parser(argparse.ArgumentParser):
    """Errors take one line."""

    def error(self, message):
        self.exit(2, f"soak: {message}\n")


def main(argv=None):
    parser = Parser(prog="python -m tests.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60, help="how long; 60 by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; 0 by default")
    parser.add_argument("--operators", help="a,b: these alone")
    parser.add_argument("--backends", help="a,b: these alone")
    parser.add_argument("--no-large", dest="large", action="store_false", help="only trials that take milliseconds")
    parser.add_argument("--trial", metavar="SEED:OPERATOR:BACKEND", help="one trial, as a finding gives it")
    options = parser.parse_args(argv)
    try:
        if options.trial:
            trials, seconds = [parse_trial(options.trial, options.device)._replace(large=options.large)], float("inf")
        else:
            trials, seconds = round_robin(runnable(options), options.seed, options.large), options.seconds
    except ValueError as error:
        parser.error(str(error))
    return run(trials, seconds, options.device)


def runnable(options):
    """(operator, backend) of all that are requested and can run, the operators of a backend one after the other;
    ValueError if there is none."""
    operators, names = (
        known_names(options.operators, SOAKS, "operator"),
        known_names(options.backends, backends.BACKENDS, "backend"),
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU")
    reasons = {name: backends.why_not(name, options.device) for name in names}
    found = [
        (operator, name)
        for name in names
        if reasons[name] is None
        for operator in operators
        if name in OPERATORS[operator]
    ]
    if not found:
        reasons = "; ".join(f"{name}: {reason or 'none of the operators has it'}" for name, reason in reasons.items())
        raise ValueError(f"nothing can run on {options.device}: {reasons}")
    return found


def known_names(names, known, what):
    requested = list(known) if names is None else names.split(",")
    for name in requested:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; there is: {', '.join(known)}")
    return requested


def parse_trial(text, device):
    """The Trial of SEED:OPERATOR:BACKEND; ValueError if it cannot run."""
    seed, *names = text.split(":")
    if len(names) != 2 or not seed.isdecimal():
        raise ValueError(f"--trial must be SEED:OPERATOR:BACKEND, got {text!r}")
    options = argparse.Namespace(operators=names[0], backends=names[1], device=device)
    return Trial(int(seed), *runnable(options)[0])


def round_robin(pairs, seed, large):
    for number, pair in enumerate(itertools.cycle(pairs)):
        yield Trial((seed * 1_000_003 + number) % 2**32, *pair, large)  # PyTorch's generator has 32 bits of seed


def run(trials, seconds, device):
    """Status, after as many trials as fit into the seconds, findings and a summary."""
    tried, findings, slowest, status = [], 0, (0.0, None), None
    start = time.monotonic()
    with progress(seconds) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poisoned memory: operations that are not deterministic; of the interpreter
        try:
            for trial in trials:
                began = time.monotonic()
                if began - start >= seconds:
                    break
                problem, shapes = run_trial(trial, device)
                tried.append(trial)
                slowest = max(slowest, (time.monotonic() - began, trial), key=lambda one: one[0])
                findings += problem is not None
                if problem and findings <= MAX_FINDINGS:
                    print(finding(trial, device, shapes, problem), flush=True)
                bar(time.monotonic() - start)
        except KeyboardInterrupt:
            status = 130
        except ContextLost as error:
            tried.append(trial)
            findings += 1
            print(f"soak: WRONG {trial}: the CUDA context is lost, nothing more can run: {error}", flush=True)
    names = ", ".join(dict.fromkeys(trial.backend for trial in tried)) or "none"
    last = f"slowest {slowest[1]} {slowest[0]:.2f} s"
    operators = len({trial.operator for trial in tried})
    print(
        f"soak: {len(tried)} trials of {operators} operators on backends {names}; {findings} wrong; {last}", flush=True
    )
    return status or int(findings > 0)


@contextlib.contextmanager
def progress(seconds):
    """A function that shows how many seconds have passed, on a terminal and where there is tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda passed: None
        return
    total = seconds if seconds < float("inf") else None
    with tqdm(total=total, desc="soak", disable=None, bar_format="{l_bar}{bar}| {n:.0f}/{total} s", leave=False) as bar:
        yield lambda passed: bar.update(min(passed, seconds) - bar.n)


def finding(trial, device, shapes, problem):
    interpreter = "TRITON_INTERPRET=1 " if (trial.backend, device) == ("triton", "cpu") else ""
    repeat = f"{interpreter}python -m tests.soak --device {device}{' --no-large' * (not trial.large)} --trial {trial}"
    return f"soak: WRONG {trial.operator} {trial.backend} ({shapes}): {' '.join(problem.split())}; {repeat}"


def run_trial(trial, device):
    """(None or what is wrong, description of the arguments) of one trial."""
    soak = SOAKS[trial.operator]
    interpreted = (trial.backend, device) == ("triton", "cpu")
    call = soak.draw(Random(trial.seed, interpreted, trial.large))
    try:
        return check(trial, soak, call, device), describe(call)
    except (Exception, SystemExit) as error:
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as lost:
                raise ContextLost(f"{describe(call)}: {error}") from lost
        return f"{type(error).__name__}: {error}", describe(call)


def check(trial, soak, call, device):
    """None, or what the operator did wrong."""
    results = call_operator(trial, soak, call, device)
    expected = copied(call.arguments, "cpu")
    with torch.no_grad():
        reference_results = as_list(getattr(reference, trial.operator)(**expected))
    reference_results = expected[soak.writes] if soak.writes else reference_results
    problem = first(
        itertools.chain(metadata_problems(results, reference_results), [soak.verify(call, results, reference_results)])
    )
    if problem:
        return problem
    threads = torch.get_num_threads()
    try:  # the C++ kernels give the same bits on any number
        torch.set_num_threads(1 if trial.backend == "cpu" else threads)
        repeated = call_operator(trial, soak, call, device)
    finally:
        torch.set_num_threads(threads)
    again = (differ(own, other, f"result {i}") for i, (own, other) in enumerate(zip(results, repeated)))
    return next((f"called again: {problem}" for problem in again if problem), None)


def call_operator(trial, soak, call, device):
    """Results on the CPU, from fresh memory that held NaN; ValueError if an argument was written to."""
    arguments = copied(call.arguments, device)
    with pruneops.backend(trial.backend), poisoned():
        results = as_list(getattr(pruneops, trial.operator)(**arguments))
        after = copied(arguments)
    for name, value in call.arguments.items():
        written = first(differ(*map(storage, pair), name) for pair in zip(tensors(after[name]), tensors(value)))
        if written and name != soak.writes:
            raise ValueError(f"an argument was written to: {written}")
    return after[soak.writes] if soak.writes else copied(results, "cpu")


def as_list(results):
    return [results] if isinstance(results, torch.Tensor) else list(results or ())


def metadata_problems(results, expected):
    """Wrong shapes and dtypes."""
    if len(results) != len(expected):
        yield f"{len(results)} results, not {len(expected)}"
    for i, (own, other) in enumerate(zip(results, expected)):
        actual, wanted = ((t.dtype, list(t.shape)) for t in (own, other))
        yield f"result {i} is {actual[0]} {actual[1]}, not {wanted[0]} {wanted[1]}" if actual != wanted else None


def tensors(value):
    """The tensors of an argument."""
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, torch.Tensor)]


def describe(call):
    """The arguments on one line."""
    parts = []
    for name, value in call.arguments.items():
        found = tensors(value)
        if found:
            kinds = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}/{list(t.stride())}" for t in found[:2]]
            parts.append(f"{name} {' '.join(kinds)}" + (f" .. {len(found)} in all" if len(found) > 2 else ""))
        elif value is not None and not (isinstance(value, list) and len(value) > 8):
            parts.append(f"{name} {value}")
    return ", ".join([*parts, "exact" if call.exact else "real"])


if __name__ == "__main__":
    sys.exit(main())
