"""Builds the two native libraries with ninja: pruneops._C (C++) and pruneops._cuda (nvcc).

Both are optional. pruneops/_build.json records what was built and the reason for each failure, for `pruneops info`.
Both use libtorch's stable ABI (torch >= 2.10) and no ATen, so the CUDA part compiles on a machine that has nvcc but
neither a GPU nor a CUDA build of torch.

CUDA architectures: those of the GPUs that nvidia-smi lists; without a GPU all supported ones, or in a checkout
(editable, --inplace) the two that the tests use.

Environment: PRUNEOPS_NO_NATIVE=1, PRUNEOPS_NO_CUDA=1, PRUNEOPS_CUDA_ARCHS="90;120" or "all",
PRUNEOPS_REQUIRE_NATIVE=1 (fail instead of installing without), CXX, CUDA_HOME.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ALL_ARCHS = ["80", "86", "89", "90", "100", "120"]
TESTED_ARCHS = ["80", "90"]  # without clusters and with them
TARGETS = {"90": "90a"}  # every GPU of compute capability 9.0 runs sm_90a, which has wgmma
VERSION = "0.1.0"


class Unbuildable(Exception):
    """A library cannot be built; the message is the reason."""


def env_flag(variable):
    return os.environ.get(variable, "0") == "1"


def cxx():
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise Unbuildable("no C++ compiler found (looked for $CXX, g++, clang++)")


def nvcc():
    if env_flag("PRUNEOPS_NO_CUDA"):
        raise Unbuildable("PRUNEOPS_NO_CUDA=1 was set")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    path = path or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        raise Unbuildable("nvcc not found (looked in $CUDA_HOME/bin, PATH, /usr/local/cuda/bin)")
    return path


def torch_paths():
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise Unbuildable("torch was not importable; install with pip install --no-build-isolation") from error
    return include_paths(), library_paths()


def ninja():
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if path is None:
        raise Unbuildable("ninja not found (pip install ninja)")
    return path


def cuda_archs():
    """Compute capabilities to build for."""
    requested = os.environ.get("PRUNEOPS_CUDA_ARCHS", "").replace(",", ";").strip(";")
    if requested:
        return ALL_ARCHS if requested == "all" else requested.split(";")
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        detected = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        detected = []
    archs = {arch.replace(".", "") for arch in detected if re.fullmatch(r"\d+\.\d", arch)}
    checkout = {"editable_wheel", "develop", "--inplace", "-i"} & set(sys.argv)
    return sorted(archs, key=int) or (TESTED_ARCHS if checkout else ALL_ARCHS)


def torch_cuda_stub(compiler, folder):
    """A stub of libtorch_cuda.so to link against, since a CPU build of torch has none; at run time the real library is
    loaded. It defines the one symbol that csrc/cuda/host.cuh uses."""
    source, library = folder / "torch_cuda.c", folder / "libtorch_cuda.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    command = [compiler, "-xc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", library]
    if subprocess.run(command).returncode:
        raise Unbuildable(
            "the stub of libtorch_cuda did not compile; its messages are in the build log (pip install -v)"
        )
    return folder


def common_flags(includes):
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f'-DPRUNEOPS_VERSION=\\"{VERSION}\\"']
    return ["-O3", "-std=c++20", *defines, f"-I{ROOT / 'csrc'}", *(f"-isystem {path}" for path in includes)]


def rules_cpu(target, folder):
    """Ninja lines that build pruneops._C."""
    if env_flag("PRUNEOPS_NO_NATIVE"):
        raise Unbuildable("PRUNEOPS_NO_NATIVE=1 was set")
    compiler, (includes, libraries) = cxx(), torch_paths()
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], *includes]  # before torch's own pybind11
    flags = [*common_flags(includes), "-fPIC", "-fvisibility=hidden", "-Wall"]
    link = ["-shared", *(f"-L{path}" for path in libraries), "-ltorch_cpu", "-lc10"]
    sources = sorted([ROOT / "csrc/bindings.cpp", *ROOT.glob("csrc/cpu/*.cpp")])
    return rules("cxx", compiler, [*flags, "-MMD", "-MF", "$out.d"], link, sources, target)


def rules_cuda(target, folder):
    """Ninja lines that build pruneops._cuda; -z defs makes an undefined symbol a link error."""
    if env_flag("PRUNEOPS_NO_NATIVE"):
        raise Unbuildable("PRUNEOPS_NO_NATIVE=1 was set")
    compiler, (includes, libraries) = nvcc(), torch_paths()
    stub = torch_cuda_stub(cxx(), folder)  # nvcc needs a C++ compiler too
    archs = cuda_archs()
    targets = [TARGETS.get(arch, arch) for arch in archs]
    gencode = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    flags = [*common_flags(includes), "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [f"--threads={min(len(archs), os.cpu_count() or 1)}", *gencode]
    link = ["-shared", "-Xlinker=-z,defs", f"-L{stub}", *(f"-L{path}" for path in libraries)]
    link += ["-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    if not sources:
        raise Unbuildable("csrc/cuda holds no sources")
    return rules("nvcc", compiler, [*flags, "-MD", "-MF", "$out.d"], link, sources, target)


def rules(name, compiler, flags, link, sources, target):
    lines = [
        f"rule {name}",
        f"  command = {compiler} {' '.join(flags)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  description = {name} $in",
        f"rule {name}_link",
        f"  command = {compiler} $in {' '.join(link)} -o $out",
    ]
    objects = [f"{name}_{source.stem}.o" for source in sources]
    lines += [f"build {out}: {name} {source}" for out, source in zip(objects, sources)]
    lines += [f"build {target}: {name}_link {' '.join(objects)}", f"default {target}"]
    return "\n".join(lines) + "\n"


class NativeBuild(build_ext):
    """One ninja file per library, so that the C++ kernels are built even if nvcc fails."""

    def run(self):
        record = {}
        for extension, part, make_rules in zip(self.extensions, ("cpu", "cuda"), (rules_cpu, rules_cuda)):
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            try:
                self.build(part, target, make_rules)
                record[part] = {"built": True}
            except Unbuildable as error:
                if env_flag("PRUNEOPS_REQUIRE_NATIVE") and part == "cpu":
                    raise SystemExit(f"pruneops: the C++ kernels were required but not built: {error}") from None
                print(f"pruneops: {part} kernels not built: {error}", file=sys.stderr)
                target.unlink(missing_ok=True)
                record[part] = {"built": False, "reason": str(error)}
        record["archs"] = cuda_archs() if record["cuda"]["built"] else []
        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(record, indent=1))

    def build(self, part, target, make_rules):
        folder = Path(self.build_temp).resolve() / part
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(make_rules(target, folder))
        if subprocess.run([ninja(), "-C", str(folder)]).returncode:
            raise Unbuildable("the compiler failed; its messages are in the build log (pip install -v)")


setup(
    version=VERSION,
    packages=[
        "pruneops",
        *(
            f"pruneops.{name}"
            for name in (
                "reference",
                "ops",
                "methods",
                "adapters",
                "adapters.transformers",
                "demo",
                "training",
                "triton_kernels",
            )
        ),
    ],
    package_dir={"pruneops": "pruneops", "pruneops.triton_kernels": "triton_kernels"},
    package_data={"pruneops": ["py.typed", "_build.json"], "pruneops.demo": ["weights/*", "learned/*"]},
    ext_modules=[Extension("pruneops._C", sources=[]), Extension("pruneops._cuda", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
