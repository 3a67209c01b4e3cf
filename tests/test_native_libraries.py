"""The native libraries load, and every undefined symbol has a provider among the libraries they link.

Needs neither a GPU nor a CUDA build of torch: a stub provides the one symbol of libtorch_cuda.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pruneops
from pruneops import backends

TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
STUB = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
PACKAGE = Path(pruneops.__file__).parent


def compile_library(source, library, *options):
    """Compile C source to a shared library."""
    command = [
        shutil.which("gcc") or shutil.which("cc") or "cc",
        "-xc",
        "-",
        "-shared",
        "-fPIC",
        "-o",
        library,
        *options,
    ]
    subprocess.run(command, input=source, text=True, check=True)
    return library


def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols(library):
    """Undefined dynamic symbols of a library, without those of Python, which the process provides."""
    lines = [line.split() for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    names = {name.partition("@")[0] for kind, name in lines if kind == "U"}
    return {name for name in names if not re.match(r"_?Py[A-Z_]", name)}


def unresolved_symbols(library, *folders):
    """Undefined symbols that no linked library provides."""
    providers = []
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", library)):
        paths = [folder / name for folder in (*folders, TORCH_LIBRARIES) if (folder / name).exists()]
        providers.append(ctypes.CDLL(str(paths[0]) if paths else name))
    return {symbol for symbol in undefined_symbols(library) if not any(hasattr(p, symbol) for p in providers)}


def built_library(pattern):
    library = next(PACKAGE.glob(pattern), None)
    if library is None:
        pytest.skip(f"{pattern} was not built")
    return library


@pytest.fixture
def stub(tmp_path):
    return compile_library(STUB, tmp_path / "libtorch_cuda.so", "-Wl,-soname,libtorch_cuda.so")


@pytest.mark.parametrize("pattern", ["_C.*so", "_cuda.*so"])
def test_every_symbol_has_a_provider(pattern, stub):
    folders = () if (TORCH_LIBRARIES / "libtorch_cuda.so").exists() else (stub.parent,)
    assert unresolved_symbols(built_library(pattern), *folders) == set()


def test_unresolved_symbol_is_detected(tmp_path):
    library = compile_library("int missing(void); int f(void) { return missing(); }", tmp_path / "libf.so")
    assert unresolved_symbols(library) == {"missing"}


def test_cuda_library_loads_beside_libtorch_cuda(stub):
    """As with a CUDA build of torch, which loads libtorch_cuda with RTLD_LOCAL."""
    code = f"""
import ctypes, torch, pruneops
if torch.version.cuda is None:
    ctypes.CDLL({str(stub)!r})
torch.ops.load_library({str(built_library("_cuda.*so"))!r})
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr


# Messages when a library does not load


@pytest.fixture
def gpu(monkeypatch):
    """Emulates an sm_90 GPU in torch, with the installed libraries."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    built_library("_cuda.*so")
    if backends.native_problem():
        pytest.skip(backends.native_problem())
    return SimpleNamespace(problem=backends.cuda_problem.__wrapped__)


def test_load_failure_reports_the_loader_error(gpu, monkeypatch):
    def fail(path):
        raise OSError(f"Could not load this library: {path}") from OSError("_cuda.so: undefined symbol: missing")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    with pytest.warns(UserWarning, match="CUDA kernels built, but it does not load: .*undefined symbol: missing"):
        problem = gpu.problem()
    assert problem == "built, but it does not load: _cuda.so: undefined symbol: missing"


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (["90"], (9, 0), True),
        (["80"], (8, 6), True),
        (["80", "90"], (8, 9), True),
        (["80", "90"], (12, 0), False),
        (["86"], (8, 0), False),
    ],
)
def test_gpu_without_matching_code_is_reported(gpu, monkeypatch, archs, capability, fits):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(backends, "build_record", lambda: {"archs": archs})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem = gpu.problem()
    assert (problem is None) == fits and len(caught) == (not fits)
    if not fits:
        arch = "{}{}".format(*capability)
        assert (
            f"not for the sm_{arch} of H100" in problem and f'PRUNEOPS_CUDA_ARCHS="{";".join(archs)};{arch}"' in problem
        )


# Choice of backend by benchmark record


@pytest.mark.parametrize(
    ("operator", "shape_class", "expected"),
    [
        ("kcenter", None, "cuda"),
        ("attention_mass", "many rows", "triton"),
        ("pivot_cosine", None, "cuda"),
    ],
)
def test_auto_follows_the_record_on_cuda(operator, shape_class, expected, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, device: "it serves CPU tensors" if name == "cpu" else None)
    assert backends.choose("cuda", operator, backends.BACKENDS, shape_class) == expected
    monkeypatch.setattr(backends, "why_not", lambda name, device: f"no {name}" if name in ("cpu", "triton") else None)
    assert backends.choose("cuda", operator, backends.BACKENDS, shape_class) == "cuda"


def test_triton_first_has_valid_operators_and_shape_classes(monkeypatch):
    """Every entry of TRITON_FIRST is a shape class that its operator returns."""
    module = pruneops.ops.attention_mass.__globals__
    few, many, query = torch.empty(1, 8, 2, 64), torch.empty(1, 8, 40, 64), torch.empty(1, 8, 32, 64).half()
    key = torch.empty(1, 1, 9, 64)
    for rows in (module["rows_class"], module["_mass_class"]):
        assert rows(few, key) is None and rows(many, key) == "many rows" == rows(query, key)
    received = pruneops.ops.attention_received.__globals__
    assert received["_received_class"](query, key, query_mask=torch.ones(1, 32)) == "many rows"
    for namespace in (module, received):
        monkeypatch.setitem(namespace, "is_hopper", lambda device: True)
    long_key = torch.empty(1, 1, 90, 64)
    assert received["_received_class"](query, long_key, query_mask=torch.ones(1, 32)) is None
    assert received["_received_class"](query, long_key) == received["_received_class"](query, key) == "many rows"
    assert module["_mass_class"](query, key) is None
    for other in (query.float(), query[..., :60], query[:, :, :30]):
        assert module["_mass_class"](other, key) == "many rows"
    assert module["_mass_class"](query, key, lse=torch.empty(1, 8, 32)) == "many rows"
    assert {shape_class for _, shape_class in backends.TRITON_FIRST} == {"many rows"}
    assert {name for name, _ in backends.TRITON_FIRST} == {"attention_mass", "attention_received"}
