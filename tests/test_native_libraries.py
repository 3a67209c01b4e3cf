"""The native libraries ask for every symbol they need by the name of a library that has it, and load.

Needs neither a GPU nor a CUDA build of torch: libtorch_cuda's one symbol comes from a stub where there is no real one.
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


def compiled(source, library, *options):
    """A shared library from a line of C."""
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


def undefined(library):
    """Names of the dynamic symbols that a library needs; Python's own come from the process."""
    lines = [line.split() for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    names = {name.partition("@")[0] for kind, name in lines if kind == "U"}
    return {name for name in names if not re.match(r"_?Py[A-Z_]", name)}


def without_provider(library, *folders):
    """Symbols that neither a library it names nor one that those name has."""
    providers = []
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", library)):
        paths = [folder / name for folder in (*folders, TORCH_LIBRARIES) if (folder / name).exists()]
        providers.append(ctypes.CDLL(str(paths[0]) if paths else name))
    return {symbol for symbol in undefined(library) if not any(hasattr(own, symbol) for own in providers)}


def built(pattern):
    library = next(PACKAGE.glob(pattern), None)
    if library is None:
        pytest.skip(f"{pattern} was not built")
    return library


@pytest.fixture
def stub(tmp_path):
    return compiled(STUB, tmp_path / "libtorch_cuda.so", "-Wl,-soname,libtorch_cuda.so")


@pytest.mark.parametrize("pattern", ["_C.*so", "_cuda.*so"])
def test_every_symbol_has_a_provider(pattern, stub):
    folders = () if (TORCH_LIBRARIES / "libtorch_cuda.so").exists() else (stub.parent,)
    assert without_provider(built(pattern), *folders) == set()


def test_a_symbol_without_a_provider_is_found(tmp_path):
    library = compiled("int nobody_has_this(void); int f(void) { return nobody_has_this(); }", tmp_path / "libf.so")
    assert without_provider(library) == {"nobody_has_this"}


def test_cuda_library_loads_beside_libtorch_cuda(stub):
    """As on a machine with a card, where torch keeps libtorch_cuda's symbols to itself (RTLD_LOCAL)."""
    code = f"""
import ctypes, torch, pruneops
if torch.version.cuda is None:
    ctypes.CDLL({str(stub)!r})
torch.ops.load_library({str(built("_cuda.*so"))!r})
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr


# What is said when a library does not load


@pytest.fixture
def card(monkeypatch):
    """torch as on a machine with an sm_90 card; the libraries are those at hand."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    built("_cuda.*so")
    if backends.native_problem():
        pytest.skip(backends.native_problem())
    return SimpleNamespace(problem=backends.cuda_problem.__wrapped__)


def test_a_library_that_does_not_load_is_said_in_the_loader_s_words(card, monkeypatch):
    def fail(path):
        raise OSError(f"Could not load this library: {path}") from OSError("_cuda.so: undefined symbol: somebody")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    with pytest.warns(UserWarning, match="CUDA kernels built, but it does not load: .*undefined symbol: somebody"):
        problem = card.problem()
    assert problem == "built, but it does not load: _cuda.so: undefined symbol: somebody"


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
def test_a_card_without_code_is_named(card, monkeypatch, archs, capability, fits):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(backends, "build_record", lambda: {"archs": archs})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        problem = card.problem()
    assert (problem is None) == fits and len(said) == (not fits)
    if not fits:
        arch = "{}{}".format(*capability)
        assert (
            f"not for the sm_{arch} of H100" in problem and f'PRUNEOPS_CUDA_ARCHS="{";".join(archs)};{arch}"' in problem
        )


# Choice by record


@pytest.mark.parametrize(
    ("operator", "shape_class", "expected"),
    [
        ("kcenter", None, "cuda"),
        ("kcenter", "float32, one product", "triton"),
        ("attention_mass", "many rows", "triton"),
        ("pivot_cosine", None, "cuda"),
    ],
)
def test_auto_follows_the_record_on_cuda(operator, shape_class, expected, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, device: "it serves CPU tensors" if name == "cpu" else None)
    assert backends.choose("cuda", operator, backends.BACKENDS, shape_class) == expected
    monkeypatch.setattr(backends, "why_not", lambda name, device: f"no {name}" if name in ("cpu", "triton") else None)
    assert backends.choose("cuda", operator, backends.BACKENDS, shape_class) == "cuda"


def test_the_record_knows_real_operators_and_shape_classes():
    """Every entry of TRITON_FIRST is one that its operator's shapes can get."""
    kcenter = pruneops.ops.kcenter.__globals__["_shape_class"]
    rows = pruneops.ops.attention_mass.__globals__["rows_class"]
    x, query, key = torch.empty(2880, 8), torch.empty(1, 8, 3, 4), torch.empty(1, 1, 9, 4)
    assert ("kcenter", kcenter(x, 288)) in backends.TRITON_FIRST
    assert {(name, rows(query, key)) for name in ("attention_mass", "attention_received")} <= backends.TRITON_FIRST
    for other in (x.half(), x[:2048], torch.empty(4097, 1), torch.empty(64, 4096, 1)):
        assert kcenter(other, 288) is None
    assert rows(query[:, :, :2], key) is None
    assert {name for name, _ in backends.TRITON_FIRST} == {"kcenter", "attention_mass", "attention_received"}
