"""The stages of `make gpu`. Each takes the run and a limit in seconds and returns (status, message, details).

Status: "passed", "failed", "incomplete" (cut off by its limit with nothing found), "skipped", "not found" (a tool is
missing). A stage that raises OutOfTime is "out of time".
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pruneops import backends
from tests import tally

from . import registry, report
from .__main__ import LAST_PHASE
from .guard import OutOfTime, launch, run_together

# Tools of compute-sanitizer and what each watches. Triton's own code generator is trusted not to race.
TOOLS = {"memcheck": ("cuda", "triton"), "racecheck": ("cuda",), "initcheck": ("cuda",), "synccheck": ("cuda",)}
RACECHECK_TOKENS = 10000  # in a call at most: it follows every access to memory, and larger ones take minutes
# Threads of a parallel region wait for each other: 13 times as slow with twice as many threads as cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# Every file that has tests marked gpu.
GPU_TESTS = ("tests/ops", "tests/methods/test_host_sync.py", "tests/test_benchmarks.py", "tests/test_demo.py")
FOUND = 9  # exit status of compute-sanitizer if it found an error
FINDING = re.compile(r"^========= .*(Error|error:|Invalid|Race|hazard|Uninitialized|Barrier|Divergent).*", re.MULTILINE)
CPU_TESTS = ("tests/ops/test_assign_ranks.py", "-k", "known and reference")  # a rehearsal runs these
BAD = ("WRONG", "failed", "crashed", "hung")  # statuses of an implementation
OUTPUT = 4000  # characters of a failed stage's output that are kept


def build(run, limit):
    """Build in place for this GPU alone, unless PRUNEOPS_CUDA_ARCHS is set; on a CPU only check what can run."""
    status, output = 0, ""
    if run.device.type == "cuda":
        arch = "{}{}".format(*torch.cuda.get_device_capability(run.device))
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, output = launch(command, limit, PRUNEOPS_CUDA_ARCHS=os.environ.get("PRUNEOPS_CUDA_ARCHS") or arch)
        backends.build_record.cache_clear()
    run.document["build"] = backends.build_record()
    run.document["machine"]["nvidia_smi"] = _nvidia_smi()
    reasons = {name: backends.why_not(name, run.device.type) for name in backends.BACKENDS}
    print("\n".join(f"gpu:   {name}: {reason or 'can run'}" for name, reason in reasons.items()), flush=True)
    expected = ("triton", "cuda") if run.device.type == "cuda" else ("reference",)
    missing = [name for name in expected if reasons[name]]
    if status or missing:
        message = f"cannot run: {', '.join(missing)}" if missing else f"setup.py: exit status {status}"
        return "failed", message, {"backends": reasons, "output": output[-OUTPUT:]}
    return "passed", f"{', '.join(expected)} can run", {"backends": reasons}


def _nvidia_smi():
    if not shutil.which("nvidia-smi"):
        return "not found"
    fields = "name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    lines = done.stdout.strip().splitlines()
    return dict(zip(fields.split(","), map(str.strip, lines[0].split(",")))) if lines else done.stderr.strip()


def compile_ahead(run, enough, limit):
    """Compile on idle cores, beside build and tests, until the event `enough` is set."""
    count = max(2, (os.cpu_count() or 1) - 4) if run.device.type == "cuda" else 1
    command = [sys.executable, "-m", "benchmarks.compile_ahead", "--device", run.device.type, "--cases", run.cases]
    commands = [[*command, "--operators", ",".join(run.operators), "--slice", f"{i}/{count}"] for i in range(count)]
    ended, outputs = run_together(commands, limit, niceness=15, enough=enough, **ONE_THREAD)
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("compiled: ")]
    bad = [line.removeprefix("compiled: ") for line in lines if not line.endswith(": ok")]
    message = f"{len(lines) - len(bad)} kernels and baselines, {len(bad)} failed, {ended} of {count} processes complete"
    return "passed", message, {"failures": bad[:20]}


def tests(run, limit):
    """The tests marked gpu, those of CUDA C++ first, in as many processes as the cores carry beside the sanitizers."""
    cuda = run.device.type == "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.tally", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", *GPU_TESTS] if cuda else ["-m", "not gpu", *CPU_TESTS]
    if importlib.util.find_spec("xdist"):
        count = max(2, (os.cpu_count() or 1) - 3) if cuda else 2
        command += ["-n", str(count), "--dist", "load", "--maxschedchunk", "4"]  # in order
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tally")
        try:
            status, output = launch(command, limit, PRUNEOPS_TALLY=str(path), **ONE_THREAD)
        except OutOfTime as error:
            status, output = None, str(error)
        results = tally.read(path)
    message = ", ".join(f"{count} {outcome}" for outcome, count in results["counts"].items())
    message += "".join(f"; {name} {ended} of {total}" for name, (ended, total) in results["kinds"].items())
    if status == 0 and results["counts"]["passed"]:
        return "passed", message, results
    if status is None:
        message = f"out of time after {message}"
    elif not results["bad"]:
        message += f", pytest ended with {status}"
    ended = "out of time" if status is None and not results["bad"] else "failed"
    return ended, message, results | {"output": output[-OUTPUT:]}


def sanitize(tool, run, limit):
    """One tool of compute-sanitizer over every operator's small shapes; with None, these alone."""
    cuda = run.device.type == "cuda"
    command, environment = [sys.executable, "-m", "tests.sanitize", "--device", run.device.type], dict(ONE_THREAD)
    if tool:
        command += ["--backends", ",".join(TOOLS[tool])]
        command += ["--max-tokens", str(RACECHECK_TOKENS)] if tool == "racecheck" else []
    if tool and not cuda:
        return "skipped", "it needs a CUDA device", {}
    if tool:
        folders = [os.environ.get("PATH", ""), str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))]
        sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
        if sanitizer is None:
            return "not found", "compute-sanitizer is not on PATH nor in $CUDA_HOME/bin", {}
        options = ["--target-processes", "application-only", "--error-exitcode", FOUND]
        command = [sanitizer, "--tool", tool, *options, *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that every tensor has bounds of its own
    try:
        status, output = launch(command, limit, **environment)
    except OutOfTime as error:
        return _cut_off(str(error))
    if status == 2 and not cuda:
        return "skipped", "no backend can run", {}
    calls, summaries = output.count(": ok\n"), re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    clean = not tool or (summaries and not any(map(int, summaries)))
    if status == 0 and clean and calls:
        absent = "".join(f", without {name}" for name in re.findall(r"sanitize: (\w+) not run", output))
        absent += f", of at most {RACECHECK_TOKENS} tokens" * (tool == "racecheck")
        return "passed", f"{calls}{_of_all(output)} calls{_by_backend(output)}{absent}", {}
    errors = f"{sum(map(int, summaries))} errors" if summaries else "no summary" if tool else f"status {status}"
    return "failed", f"{errors}, {calls} calls right, exit status {status}", {"output": output[-OUTPUT:]}


def _cut_off(output):
    """Findings of a tool that was killed; OutOfTime if it had not begun."""
    found = [match[0] for match in FINDING.finditer(output)]
    found += re.findall(r"^sanitize: .*(?:: WRONG|Error: .*)$", output, re.MULTILINE)
    calls = output.count(": ok\n")
    if found:
        return "failed", f"out of time after {calls} calls: {found[0]}", {"output": output[-OUTPUT:]}
    if not calls:
        raise OutOfTime(output)
    return "incomplete", f"{calls}{_of_all(output)} clean calls{_by_backend(output)}, then out of time", {}


def _of_all(output):
    """How many calls there were to make."""
    found = re.search(r"^sanitize: (\d+) calls$", output, re.MULTILINE)
    return f" of {found[1]}" if found else ""


def _by_backend(output):
    """Calls of every backend."""
    names = re.findall(r"^sanitize: \w+ (\w+) .*: ok$", output, re.MULTILINE)
    counts = [f"{name} {names.count(name)}" for name in dict.fromkeys(names)]
    return f" ({', '.join(counts)})" if counts else ""


def soak(run, limit):
    """Random calls of the kernels against oracles for so many seconds; on a GPU no large ones."""
    seconds = run.options.soak
    if seconds <= 0:
        return "skipped", "--soak 0", {}
    command = [sys.executable, "-m", "tests.soak", "--seconds", f"{min(seconds, 0.8 * limit):g}"]
    command += ["--device", run.device.type]
    command += ["--backends", "cuda,triton", "--no-large"] if run.device.type == "cuda" else []
    status, output = launch(command, min(limit, seconds + 60), **ONE_THREAD)
    last = (output.strip().splitlines() or [f"exit status {status}"])[-1]
    if status == 2 and run.device.type != "cuda":
        return "skipped", last, {}
    return ("failed", last, {"output": output[-OUTPUT:]}) if status else ("passed", last, {})


def operator(name, supervisor, run, limit, last_phase=LAST_PHASE):
    """One operator's cases, up to a phase, in a process of its own; what one past its limit had finished is kept."""
    ended, status, output = supervisor.run(limit, last_phase)
    document = run.document["operators"].get(name, {"cases": []})
    total, done = len(registry.operator(name).select(run.cases, run.device)), len(document["cases"])
    entries = [(case["name"], entry) for case, entry in report.entries(document)]
    bad = [(case, entry["name"], entry["status"]) for case, entry in entries if _is_bad_backend(entry)]
    recorded = {(case, entry["name"]) for case, entry in entries}
    crashed = [crash[:3] for crash in supervisor.crashes if tuple(crash[:2]) not in recorded]
    named = "".join(f"; {' '.join(each)}" for each in [*bad[:2], *crashed])
    message = f"{done} of {total} cases{named}{f' and {len(bad) - 2} more' if len(bad) > 2 else ''}"
    if ended == "failed":
        return "failed", f"{message}; exit status {status}", {"output": output[-OUTPUT:]}
    if bad or status == 1 or any(implementation.split()[0] in backends.BACKENDS for _, implementation, _ in crashed):
        return "failed", message, {}
    if ended == "ended":
        return "passed", message, {}
    if done == total:
        return "incomplete", f"{message}, cut off among baselines", {}
    return "out of time", f"{message}, cut off", {}


def _is_bad_backend(entry):
    return entry["kind"] == "backend" and entry["status"] in BAD
