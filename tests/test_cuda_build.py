"""Every CUDA kernel on every architecture: built, no register spills, fits the shared memory."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pruneops import backends

ROOT = Path(__file__).parent.parent
# opt-in maximum per block; 163 on 80, which stands for 86 and 89 where these are not built
SHARED_KB = {80: 99, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SYSTEM_BYTES = 1024  # reserved per block, counted as static shared memory from compute capability 9.0
ELEMENTS = ("float", "__half", "__nv_bfloat16")
KERNELS = {
    "kcenter_greedy",
    *(f"kcenter_rounds<{element}>" for element in ELEMENTS),
    *(f"kcenter_gram_wgmma<{element}, {tile}>" for element in ELEMENTS[1:] for tile in (64, 128, 192)),
    *(f"kcenter_gram<{element}, {aligned}>" for element in ELEMENTS for aligned in ("false", "true")),
    *(f"pivot_cosine_pass<{element}, 1, 4>" for element in ELEMENTS),
    *(f"pivot_cosine_pass<{element}, {4 if element == 'float' else 8}, 4>" for element in ELEMENTS),
    *(f"exclusive_bottomk_select<{element}, {use_lists}>" for element in ELEMENTS for use_lists in ("false", "true")),
    *(f"assign_ranks_select<{element}>" for element in ELEMENTS),
    *(f"attention_{kernel}<{element}>" for kernel in ("sums", "combine", "received_sums") for element in ELEMENTS),
    *(
        f"decode::received<{element}, {D}, {lse}>"
        for element in ELEMENTS[1:]
        for D in (64, 128)
        for lse in ("false", "true")
    ),
    *(
        f"decode::{kernel}<{element}, {D}>"
        for kernel in ("mass", "mass_with_lse")
        for element in ELEMENTS[1:]
        for D in (64, 128)
    ),
    *(f"prefill::{kernel}<{element}>" for kernel in ("lists", "reduce") for element in ELEMENTS[1:]),
    *(f"prefill::sums<{element}, 4, {D}, false>" for element in ELEMENTS[1:] for D in (64, 128)),
    "copy_tokens<false>",
    "copy_tokens<true>",
}
# Dynamic shared memory of launches; assign_ranks, kcenter_rounds and attention_decode plan theirs by the GPU.
DYNAMIC_BYTES = {
    "kcenter_gram<.*": "kPipelineBytes",
    "kcenter_greedy": "sizeof(GreedyShared)",
    "exclusive_bottomk_select<.*": "sizeof(BottomkShared)",
    **{f"attention_sums<{element}>": f"sizeof(MassShared<{element}>)" for element in ELEMENTS},
    "attention_combine<.*": "sizeof(CombineShared)",
    "attention_received_sums<.*": "kMaxReceivedBytes",
    "copy_tokens<true>": "3 * 2 * 8 * 256",  # kOffsetStages * sizeof(TileOffsets); that header needs torch
    **{f"pivot_cosine_pass<.*, {groups}, 4>": f"sizeof(PivotShared<{groups}, 4>)" for groups in (1, 4, 8)},
}


def tool(name):
    """Path of a CUDA binary utility, from the toolkit or from Triton's wheel."""
    folders = [None, "/usr/local/cuda/bin"]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


@pytest.fixture(scope="module")
def resources():
    """{architecture: {kernel: {"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...}}} of the built library."""
    library = next((ROOT / "pruneops").glob("_cuda*.so"), None)
    if library is None:
        reason = backends.build_record().get("cuda", {}).get("reason", "")
        assert "nvcc not found" in reason or "PRUNEOPS_NO_" in reason, f"the CUDA library was not built: {reason}"
        pytest.skip(f"no CUDA library: {reason}")
    cuobjdump, cxxfilt = tool("cuobjdump"), shutil.which("c++filt")
    if not (cuobjdump and cxxfilt):
        pytest.skip("needs cuobjdump (CUDA toolkit or Triton) and c++filt")
    dump = subprocess.run([cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    text = subprocess.run([cxxfilt], input=dump.stdout, capture_output=True, text=True, check=True).stdout
    resources, arch, kernel = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            arch = resources.setdefault(int(match[1]), {})
        elif match := re.match(r"\s*Function (?:void )?pruneops::(.*?)\((?!\*)", line):
            kernel = arch.setdefault(match[1].replace("(bool)1", "true").replace("(bool)0", "false"), {})
        if kernel is not None:
            kernel.update((name, int(value)) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line))
    return resources


def built_archs():
    return [int(arch) for arch in backends.build_record().get("archs", [])] or [*SHARED_KB]


@pytest.mark.parametrize("arch", built_archs())
def test_every_kernel_is_built_without_spills(resources, arch):
    assert not KERNELS - set(resources[arch])
    for kernel, used in resources[arch].items():
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel} for sm_{arch}: {used}"


@pytest.mark.parametrize("arch", built_archs())
def test_shared_memory_fits(resources, arch, dynamic_bytes):
    for kernel, used in resources[arch].items():
        static = used["SHARED"] - (SYSTEM_BYTES if arch >= 90 else 0)
        need = static + sum(size for name, size in dynamic_bytes.items() if re.fullmatch(name, kernel))
        assert need <= SHARED_KB[arch] * 1024, f"{kernel} for sm_{arch} needs {need} bytes"


@pytest.fixture(scope="module")
def dynamic_bytes(tmp_path_factory):
    """DYNAMIC_BYTES evaluated with the kernels' headers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("shared")
    headers = (
        "hopper.h",
        *(f"cuda/{op}.cuh" for op in ("kcenter_gram", "exclusive_bottomk", "pivot_cosine", "attention")),
    )
    (folder / "sizes.cpp").write_text(
        "\n".join(f'#include "{header}"' for header in headers)
        + "\nusing namespace pruneops;\nint main() { for (size_t size : {"
        + ", ".join(f"size_t({size})" for size in DYNAMIC_BYTES.values())
        + '}) printf("%zu ", size); }\n'
    )
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_emulation'}"]
    subprocess.run([compiler, "-std=c++20", "-w", *includes, "sizes.cpp", "-o", "sizes"], cwd=folder, check=True)
    return dict(zip(DYNAMIC_BYTES, map(int, subprocess.check_output([folder / "sizes"]).split())))
