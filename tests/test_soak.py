"""`tests.soak`: it knows every operator, right answers pass, each kind of wrong one is found, findings repeat."""

import os
import re
import subprocess
import sys

import pytest
import torch

import pruneops
from pruneops import backends
from pruneops.ops import OPERATORS
from tests.contract import ROOT
from tests.soak import SOAKS
from tests.soak import __main__ as soak
from tests.soak.draws import Random

INDICES = ("kcenter", "kcenter_varlen", "exclusive_bottomk", "pivot_bottomk", "assign_ranks")
ATTENTION = ("attention_mass", "attention_received")
SCORES = ("pivot_cosine", "pivot_cosine_varlen", "duplication", "duplication_varlen", *ATTENTION)
TOKEN_COPY = ("kv_compact", "kv_compact_", "paged_kv_compact_", "gather_tokens")


def swapped(results):
    """The first two choices of a row change places."""
    results[0][..., [0, 1]] = results[0][..., [1, 0]]


def repeated(results):
    """The last choice repeats the first."""
    results[0][..., -1] = results[0][..., 0]


def beyond(results):
    """The last choice is no token."""
    results[0][..., -1] = 2**40


def shifted(results, dim=-1):
    """Every finite value is off by 1e-3, a large one by a thousandth."""
    results[dim].copy_(results[dim] + 1e-3 * results[dim].abs().clamp(min=1))


def first_shifted(results):
    shifted(results, 0)


def not_a_number(results):
    """NaN for one value."""
    results[-1].view(-1)[0] = torch.nan


def flipped(results):
    """One bit of a tensor, in its last element."""
    element = results[0][(-1,) * results[0].dim()].clone()
    element.view(1).view(torch.uint8).bitwise_xor_(1)
    results[0][(-1,) * results[0].dim()] = element


def shortened(results):
    """A token is missing."""
    results[0] = results[0].narrow(-1, 0, results[0].shape[-1] - 1)


SPOILED = [
    *[(operator, spoil) for operator in INDICES for spoil in (swapped, repeated, beyond, shortened)],
    *[(operator, shifted) for operator in ("kcenter", "kcenter_varlen", *SCORES)],
    ("attention_mass", first_shifted),
    *[(operator, spoil) for operator in SCORES for spoil in (not_a_number, shortened)],
    *[(operator, flipped) for operator in TOKEN_COPY],
    *[(operator, shortened) for operator in ("kv_compact", "gather_tokens")],
]


def spoil_answers(monkeypatch, operator, spoil):
    """Make `pruneops.<operator>` wrong; soak calls the reference directly."""
    right = getattr(pruneops, operator)

    def wrong(*args, **kwargs):
        results = right(*args, **kwargs)
        if SOAKS[operator].writes:
            spoil(kwargs[SOAKS[operator].writes])
            return None
        results = soak.as_list(results)
        spoil(results)
        return results

    monkeypatch.setattr(pruneops, operator, wrong)


def problem_of(operator, seed, backend="reference"):
    return soak.run_trial(soak.Trial(seed, operator, backend), "cpu")[0]


def run(capsys, *arguments):
    """(status, lines of output, of stderr)"""
    try:
        status = soak.main([*arguments, "--device", "cpu"])
    except SystemExit as error:
        status = error.code
    output = capsys.readouterr()
    return status, output.out.splitlines(), output.err.splitlines()


def test_every_operator_is_known():
    assert set(SOAKS) == set(OPERATORS)
    assert {operator for operator, _ in SPOILED} == set(OPERATORS)


def test_right_answers(capsys):
    status, lines, _ = run(capsys, "--seconds", "20", "--seed", "1", "--backends", "reference,cpu")
    assert status == 0, "\n".join(lines)
    assert re.fullmatch(
        r"soak: \d+ trials of \d+ operators on backends reference(, cpu)?; 0 wrong; slowest .*", lines[-1]
    )
    assert len(lines) == 1


@pytest.mark.parametrize("operator", SOAKS)
def test_a_few_of_every_operator(operator):
    for backend in OPERATORS[operator]:
        if backend in ("reference", "cpu") and not backends.why_not(backend, "cpu"):
            assert [problem_of(operator, seed, backend) for seed in range(4)] == [None] * 4


@pytest.mark.parametrize(("operator", "spoil"), SPOILED, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_answers_are_found(monkeypatch, operator, spoil):
    """In at least half of the calls that it can spoil: two equal tokens may be swapped, infinities stay infinite."""
    spoil_answers(monkeypatch, operator, spoil)
    found = [problem for problem in (problem_of(operator, seed) for seed in range(24)) if not impossible(problem)]
    assert len(found) >= 5
    assert sum(problem is not None for problem in found) >= len(found) / 2, found


def impossible(problem):
    """The result is empty: it cannot be made wrong."""
    return problem is not None and problem.startswith(("IndexError", "RuntimeError: narrow", "RuntimeError: start"))


@pytest.mark.parametrize("writes", [True, False])
def test_bytes_that_must_not_change(monkeypatch, writes):
    """Of an argument; in place, of what lies around the tensors."""
    operator = "kv_compact_" if writes else "pivot_cosine"
    right = getattr(pruneops, operator)

    def wrong(**arguments):
        result = right(**arguments)
        soak.storage(arguments["caches"][0] if writes else arguments["x"])[:1] ^= 1
        return result

    monkeypatch.setattr(pruneops, operator, wrong)
    found = [problem_of(operator, seed) for seed in range(20)]
    assert sum(problem is not None and ("bytes of" in problem) for problem in found) >= 15, found


def test_answers_that_change(monkeypatch):
    """The same call once more must give the same bits."""
    calls, right = [], pruneops.pivot_cosine

    def wrong(**arguments):
        calls.append(right(**arguments))
        return torch.nextafter(calls[-1], torch.tensor(torch.inf)) if len(calls) % 2 == 0 else calls[-1]

    monkeypatch.setattr(pruneops, "pivot_cosine", wrong)
    found = [problem_of("pivot_cosine", seed) for seed in range(10)]
    assert any(problem is not None and problem.startswith("called again") for problem in found)


def test_findings_repeat(monkeypatch, capsys):
    """An exception is one; the command of a line runs that trial again, and says the same."""

    def raises(**arguments):
        raise ZeroDivisionError(f"of {arguments['j']}\nranks")

    monkeypatch.setattr(pruneops, "assign_ranks", raises)
    arguments = "--operators", "assign_ranks,kv_compact", "--backends", "reference"
    status, lines, _ = run(capsys, *arguments, "--seconds", "3", "--seed", "5")
    *findings, last = lines
    assert status == 1 and 1 <= len(findings) <= soak.MAX_FINDINGS
    assert int(re.search(r"(\d+) wrong", last)[1]) >= len(findings)
    finding = findings[-1]
    assert "assign_ranks reference (logits " in finding and "ZeroDivisionError: of " in finding
    command = finding.rpartition("; ")[2].split()
    assert command[:3] == ["python", "-m", "tests.soak"]
    status, lines, _ = run(capsys, *command[5:])
    assert status == 1 and lines[0] == finding and len(lines) == 2


def test_findings_are_limited(monkeypatch, capsys):
    monkeypatch.setattr(pruneops, "assign_ranks", None)
    monkeypatch.setattr(soak, "MAX_FINDINGS", 3)
    status, lines, _ = run(capsys, "--operators", "assign_ranks", "--backends", "reference", "--seconds", "2")
    assert status == 1 and len(lines) == 4


def test_a_trial_is_the_same_everywhere():
    """In another process too."""
    code = "from tests.soak import SOAKS; from tests.soak.draws import Random"
    code += "; print([SOAKS[name].draw(Random(7)).arguments for name in SOAKS])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == str([SOAKS[name].draw(Random(7)).arguments for name in SOAKS])


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(trial, device):
        if trial.operator == "kcenter_varlen":
            raise KeyboardInterrupt
        return None, ""

    monkeypatch.setattr(soak, "run_trial", interrupted)
    status, lines, _ = run(capsys, "--seconds", "60", "--backends", "reference")
    assert status == 130 and lines[-1].startswith("soak: 1 trials of 1 operators on backends reference; 0 wrong")


def test_lost_context(monkeypatch, capsys):
    """After an error of the CUDA context no further trial runs."""

    def lost(trial, device):
        raise soak.ContextLost("an illegal memory access")

    monkeypatch.setattr(soak, "run_trial", lost)
    status, lines, _ = run(capsys, "--seconds", "60", "--backends", "reference")
    assert status == 1 and "the CUDA context is lost" in lines[0] and "an illegal memory access" in lines[0]
    assert "1 wrong" in lines[-1] and len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "sort"], "no operator 'sort'; there is: kcenter, "),
        (["--backends", "tpu"], "no backend 'tpu'; there is: reference, cpu, triton, cuda"),
        (["--backends", "cuda"], "nothing can run on cpu: cuda: it serves CUDA tensors, not CPU"),
        (["--trial", "5"], "--trial must be SEED:OPERATOR:BACKEND, got '5'"),
        (["--trial", "x:kcenter:cpu"], "--trial must be SEED:OPERATOR:BACKEND, got 'x:kcenter:cpu'"),
        (["--trial", "5:kcenter:cuda"], "nothing can run on cpu: cuda: it serves"),
        (["--seconds", "long"], "argument --seconds: invalid float value: 'long'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments(capsys, arguments, message):
    status, lines, errors = run(capsys, *arguments)
    assert status == 2 and not lines and len(errors) == 1
    assert errors[0].startswith(f"soak: {message}")


def test_command():
    """From a shell, without tqdm."""
    code = "import sys; sys.modules['tqdm'] = None; from tests.soak.__main__ import main; sys.exit(main())"
    arguments = ["--device", "cpu", "--seconds", "1", "--operators", "kv_compact", "--backends", "reference"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.startswith("soak: "), done.stderr
    assert not done.stderr
