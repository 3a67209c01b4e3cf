"""Packaging: import directions, signatures, versions, choice of backend, installs without a compiler or Triton."""

import ast
import doctest
import inspect
import os
import re
import shutil
import threading
import warnings
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import pruneops
from pruneops import backends, reference
from tests import contract
from tests.contract import CPU_TARGETS, ROOT, TARGETS, Target, assert_same_bits, run_python

OPERATORS = sorted(path.stem for path in (ROOT / "pruneops" / "ops").glob("[!_]*.py"))

# What a folder may import of the package besides itself; `pruneops` is the public API.
LAYERS = {
    "reference": set(),
    "triton_kernels": {"backends"},
    "ops": {"reference", "triton_kernels", "backends", "checks", "autocast", "_C"},
    "methods": {"ops", "networks", "checks", "autocast", "pruneops"},
    "adapters": {"methods", "ops", "checks", "pruneops"},
    "training": {"adapters", "methods", "networks", "ops", "checks"},
}
MODULES = ("backends", "checks", "autocast", "networks", "_C")
# All that some folders may import from outside.
OUTSIDE = {
    "reference": {"torch", "collections"},
    "triton_kernels": {"torch", "triton", "contextlib", "functools", "itertools", "math", "typing"},
}
MODELS = {"transformers", "vllm"}


def sources(layer):
    folder = ROOT / layer if layer == "triton_kernels" else ROOT / "pruneops" / layer
    return sorted(folder.rglob("*.py"))


def imports(path, package):
    """Absolute names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    for path in sources(layer):
        inside = path.parent.relative_to(ROOT / "pruneops").parts if layer != "triton_kernels" else (layer,)
        for name in imports(path, ".".join(("pruneops", *inside))):
            top, _, rest = name.partition(".")
            if top == "pruneops":
                folder = rest.partition(".")[0]
                folder = folder if (ROOT / "pruneops" / folder).exists() or folder in (*LAYERS, *MODULES) else top
                assert folder in {layer, *LAYERS[layer]}, f"{path.relative_to(ROOT)} imports {name}"
            else:
                assert top not in {"benchmarks", "tests"}, f"{path.relative_to(ROOT)} imports {name}"
                assert top in OUTSIDE.get(layer, {top}), f"{path.relative_to(ROOT)} imports {name}"
                allowed = layer in ("adapters", "training") or top not in MODELS
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "place",
    [
        "pruneops/reference/{}.py",
        "triton_kernels/{}.py",
        "csrc/cpu/{}.cpp",
        "csrc/cuda/{}.cu",
        "tests/ops/test_{}.py",
        "tests/specs/{}.py",
        "benchmarks/ops/{}.py",
    ],
)
def test_one_name_in_every_folder(operator, place):
    backends_of = {name.rstrip("_"): has for name, has in pruneops.ops.OPERATORS.items()}
    if "cuda" in place and "cuda" not in backends_of[operator]:
        place = "triton_kernels/{}.py"  # Triton alone serves CUDA tensors
    assert (ROOT / place.format(operator)).is_file()


@pytest.mark.parametrize("operator", pruneops.ops.OPERATORS)
def test_one_signature_everywhere(operator):
    """The public function, the reference and torch's schema agree on names, order and defaults."""

    def arguments(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    def default(argument):
        value = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        return value[0] if isinstance(value, list) else value  # int[1] takes an int

    schema = getattr(torch.ops.pruneops, operator).default._schema
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    stated = [(a.name, kinds[a.kwarg_only], default(a)) for a in schema.arguments]
    assert arguments(getattr(pruneops, operator)) == arguments(getattr(reference, operator)) == stated


@pytest.mark.parametrize("operator", pruneops.ops.__all__)
def test_docstring_examples(operator):
    function = getattr(pruneops, operator)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(function, operator):
        assert runner.run(test).failed == 0


def test_py_typed_is_installed():
    """Type checkers use the hints of an installed package only if this file is there, so setup.py must list it."""
    assert (ROOT / "pruneops" / "py.typed").is_file()
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (data,) = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "package_data"]
    assert "py.typed" in ast.literal_eval(data)["pruneops"]


def test_versions_agree():
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "setup.py")}
    matches = {name: re.search(r'^version = "(.+)"|^VERSION = "(.+)"', text, re.M) for name, text in texts.items()}
    stated = {name: match[1] or match[2] for name, match in matches.items()}
    try:
        stated["installed"] = version("pruneops")
        assert pruneops.__version__ == stated["installed"]
    except PackageNotFoundError:
        assert pruneops.__version__ == "0+unknown"
    if backends.native_problem() is None:
        stated["_C"] = __import__("pruneops._C")._C.version
    assert len(set(stated.values())) == 1, stated


# Choice of backend


@pytest.mark.parametrize("name", os.environ.get("PRUNEOPS_REQUIRE", "").replace(",", " ").split() or ["reference"])
def test_required_backend_runs(name):
    """PRUNEOPS_REQUIRE="cpu,triton" turns the skips of these backends into a failure."""
    reasons = {str(target): target.problem for target in TARGETS if target.backend == name}
    assert None in reasons.values(), reasons or f"no such backend: {name}"


def test_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"pruneops\.backend: name must be one of .*'reference'.*, got 'gpu'"):
        with pruneops.backend("gpu"):
            pass


@pytest.mark.parametrize(
    "target", [Target("cuda", "cpu"), *(target for target in CPU_TARGETS if target.problem)], ids=str
)
def test_backend_that_cannot_run_says_why(target):
    with pruneops.backend(target.backend), pytest.raises(pruneops.BackendUnavailable) as error:
        pruneops.kcenter(torch.ones(2, 2, device=target.device), 1)
    assert str(error.value) == f"backend {target.backend!r} cannot run here: {target.problem}"
    assert isinstance(error.value, RuntimeError) and len(target.problem) > 10


def test_backend_nests_and_survives_errors():
    chosen = lambda: backends.choose("cpu")  # noqa: E731
    automatic = chosen()
    with pruneops.backend("reference"):
        assert chosen() == "reference"
        with pruneops.backend("auto"):
            assert chosen() == automatic
        with pytest.raises(KeyError), pruneops.backend("auto"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == automatic


def test_backend_belongs_to_its_thread():
    """One thread's choice does not leak into another that runs inside the block."""
    automatic, seen = backends.choose("cpu"), []
    with pruneops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose("cpu")))
        thread.start()
        thread.join()
        assert backends.choose("cpu") == "reference"
    assert seen == [automatic]


def test_poison_reaches_new_memory():
    """`call` relies on torch filling new tensors."""
    with contract.poisoned():
        assert torch.ones(3).new_empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_same_bits_sees_a_sign():
    with pytest.raises(AssertionError, match=r"1 bytes of .* differ, the first at byte 7"):
        assert_same_bits(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))


# Installs that lack something


def pure_copy(folder):
    """A copy of the package as an install without a compiler leaves it."""
    copy = shutil.copytree(ROOT / "pruneops", folder / "pruneops", ignore=shutil.ignore_patterns("*.so", "_build.json"))
    shutil.copytree(ROOT / "triton_kernels", copy / "triton_kernels")
    return copy


PROGRAM = """
import sys, warnings
sys.modules.update({name: None for name in sys.argv[2:]})
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, pruneops
    assert pruneops.__file__.startswith(sys.argv[1]), pruneops.__file__
    for _ in range(3):
        assert pruneops.kcenter(torch.eye(3), 2).indices.tolist() == [0, 1]
for warning in caught:
    if "pruneops" in str(warning.message):
        print("warning:", warning.message)
for name in ("cpu", "triton", "cuda"):
    try:
        with pruneops.backend(name):
            pruneops.kcenter(torch.eye(3), 2)
        print("runs:", name)
    except pruneops.BackendUnavailable as error:
        print("error:", error)
"""


def test_install_without_compiler(tmp_path):
    """Imports, works on the reference, says so once, and says why."""
    pure_copy(tmp_path)
    lines = run_python(PROGRAM, tmp_path, TRITON_INTERPRET="1").splitlines()
    warned = [line for line in lines if line.startswith("warning")]
    assert len(warned) == 1
    assert "CPU tensors run on the slow PyTorch reference (cpu: not built: " in warned[0]
    assert "error: backend 'cpu' cannot run here: not built: the package was installed without a build step" in lines
    assert "error: backend 'cuda' cannot run here: it serves CUDA tensors, not CPU" in lines


def test_install_with_a_broken_library(tmp_path):
    copy = pure_copy(tmp_path)
    (copy / "_C.abi3.so").write_bytes(b"no library")
    lines = run_python(PROGRAM, tmp_path).splitlines()
    assert sum(line.startswith("warning") for line in lines) == 1
    assert any(line.startswith("error: backend 'cpu' cannot run here: built, but it does not load: ") for line in lines)


def test_install_with_a_recorded_failure(tmp_path):
    (pure_copy(tmp_path) / "_build.json").write_text('{"cpu": {"built": false, "reason": "no C++ compiler found"}}')
    lines = run_python(PROGRAM, tmp_path).splitlines()
    assert "error: backend 'cpu' cannot run here: not built: no C++ compiler found" in lines
    assert any(
        "error: backend 'triton' cannot run here: Triton serves CPU tensors only in its interpreter" in line
        for line in lines
    )


def test_without_triton(tmp_path):
    pure_copy(tmp_path)
    lines = run_python(PROGRAM, tmp_path, "triton", TRITON_INTERPRET="1").splitlines()
    assert any(line.startswith("error: backend 'triton' cannot run here: Triton does not import: ") for line in lines)


def test_importing_is_quiet():
    """No warning, no heavy optional dependency, no process-wide setting."""
    code = """
import sys, torch
before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
import pruneops
assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())
print(*({"triton", "transformers", "matplotlib", "skimage", "PIL", "pruneops.cli", "pruneops.demo"} & set(sys.modules)))
"""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_python(code, PYTHONWARNINGS="error::UserWarning").split() == []
