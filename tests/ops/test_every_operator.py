"""What holds for every operator: small calls, threads, torch.compile, launches, streams and graphs of CUDA."""

import functools

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import pruneops
from tests import contract, cuda_checks, sanitize, specs
from tests.contract import (
    CUDA_KERNELS,
    NATIVE,
    REFERENCE,
    assert_same_bits,
    every_backend,
    every_kernel,
    on_targets,
    run_compile_only,
    run_python,
    to_device,
)

every_operator = pytest.mark.parametrize("operator", specs.NAMES)
SAMPLES = [(name, i) for name in specs.NAMES for i in range(len(specs.spec(name).samples()))]


def test_every_operator_has_a_spec():
    ops = {op for name in specs.NAMES for op, *_ in specs.spec(name).samples()}
    assert ops == pruneops.ops.OPERATORS.keys()
    assert ops == {call.op for name in specs.NAMES for call in specs.spec(name).INVALID}


# Small calls


@every_kernel
@every_operator
def test_small_calls(target, operator):
    """Those that compute-sanitizer watches."""
    if target.interpreted and operator in ("assign_ranks", "exclusive_bottomk", "kcenter", "pivot_cosine"):
        pytest.skip("thousands of tokens take Triton's interpreter too long")
    with pruneops.backend(target.backend):
        calls = specs.spec(operator).small_calls()
        assert [label for label, check in calls if not check(torch.device(target.device))] == []


@pytest.mark.skipif(bool(NATIVE.problem), reason=f"{NATIVE}: {NATIVE.problem}")
def test_sanitize(monkeypatch, capsys):
    """A line for every call, few tokens first; the status tells wrong results, exceptions, that nothing can run."""
    calls = {
        "kcenter": [("N 9 one", lambda device: True), ("two", lambda device: False)],
        "kv_compact": [("N 3", None)],
    }
    monkeypatch.setattr(specs, "NAMES", list(calls))
    monkeypatch.setattr(specs, "spec", lambda name: type("Spec", (), {"small_calls": lambda: calls[name]}))
    assert sanitize.main(["--device", "cpu"]) == 1
    count, wrong, error, ok = capsys.readouterr().out.splitlines()
    assert (count, wrong, ok) == (
        "sanitize: 3 calls", "sanitize: kcenter cpu two: WRONG", "sanitize: kcenter cpu N 9 one: ok",
    )  # fmt: skip
    assert error.startswith("sanitize: kv_compact cpu N 3: TypeError: ")
    calls["kcenter"].pop()
    assert sanitize.main(["--device", "cpu", "--backends", "reference", "--max-tokens", "8"]) == 1
    assert capsys.readouterr().out.startswith("sanitize: 1 calls\nsanitize: kv_compact reference N 3: TypeError: ")
    calls.clear()
    monkeypatch.setattr(specs, "NAMES", [])
    assert sanitize.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out == "sanitize: 0 calls\n"
    monkeypatch.setattr(sanitize.backends, "why_not", lambda name, device: "not built")
    assert sanitize.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().out == "sanitize: cpu not run: not built\n"


# Threads


@on_targets(NATIVE)
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@every_operator
def test_threads_change_no_bit(target, operator, small):
    """Batch rows, sequences, and the tokens of one row shared out among 1, 2, 3 and 7 threads."""
    spec = specs.spec(operator)
    inputs = spec.form_inputs(0, small)
    with pruneops.backend(target.backend):
        contract.assert_threads_change_no_bit(lambda: spec.every_form(*inputs))


@on_targets(REFERENCE, NATIVE)
@every_operator
def test_concurrent_calls(target, operator):
    """Calls from several threads at once give the answers of calls in turn."""
    spec = specs.spec(operator)
    calls = [functools.partial(spec.every_form, *spec.form_inputs(seed, small=True)) for seed in range(4)]
    results = contract.run_concurrently(target, calls)
    with pruneops.backend(target.backend):
        assert_same_bits(results, [call() for call in calls])


# Gradients


@every_backend
@pytest.mark.parametrize("operator", sorted({*specs.NAMES} - {"gather_tokens", "paged_kv_compact"}))
def test_no_gradient(target, operator):
    """Results of operators that return new tensors; those of `gather_tokens` alone have a gradient."""

    def with_gradient(tensor):
        return tensor.detach().requires_grad_(tensor.is_floating_point())

    for op, args, kwargs in to_device(specs.spec(operator).samples(), target.device):
        if not op.endswith("_"):
            args, kwargs = tree_map_only(torch.Tensor, with_gradient, (args, kwargs))
            with pruneops.backend(target.backend):
                results = getattr(pruneops, op)(*args, **kwargs)
            assert not any(result.requires_grad for result in tree_leaves(results))


# Compilation


@every_backend
@pytest.mark.parametrize(("operator", "sample"), SAMPLES)
def test_opcheck(target, operator, sample):
    op, args, kwargs = specs.spec(operator).samples()[sample]
    contract.opcheck(target, op, *args, **kwargs)


@every_backend
@every_operator
def test_compile_without_graph_break(target, operator):
    spec = specs.spec(operator)
    contract.assert_compiles(target, spec.model, spec.model_inputs())


INDUCTOR = """
import torch
from tests import specs

for name in specs.NAMES:
    spec = specs.spec(name)
    torch._dynamo.reset()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        calls = spec.model_inputs()
    compiled = torch.compile(spec.model, fullgraph=True, dynamic=True)
    for args in calls[:1] + calls[-1:]:
        torch.testing.assert_close(compiled(*args), spec.model(*args), msg=lambda text: f"{name}: {text}")
    print(name)
"""


def test_compile_with_inductor():
    """On the default backend; one process for all operators."""
    assert run_python(INDUCTOR, timeout=1200).split() == list(specs.NAMES)


# Launches


TRITON_LAUNCHES = """
import sys
from tests import compile_only_driver, specs

compile_only_driver.record()
specs.spec(sys.argv[1]).triton_launches()
print(len(compile_only_driver.launches), len(compile_only_driver.compilations))
"""


@every_operator
def test_triton_launchers_compile(operator):
    """Every specialization launches as it would on a GPU; other sizes compile nothing anew."""
    counts = run_compile_only(TRITON_LAUNCHES, operator)
    assert tuple(map(int, counts.split())) == specs.spec(operator).LAUNCHES


# CUDA


@CUDA_KERNELS
@cuda_checks.every_check
@every_operator
def test_cuda(target, check, operator):
    spec = specs.spec(operator)
    check(target, spec.every_form, lambda seed: to_device(spec.form_inputs(seed), "cuda"))
