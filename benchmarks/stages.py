"""The stages of `make gpu`. Each takes the run and a limit in seconds and returns (status, words, details).

Status: "passed", "failed", "incomplete" (cut off by its time with nothing found), "skipped", "not there" (what it
needs is not in this tree), "not found" (a tool is missing). A stage that raises OutOfTime is "out of time".
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pruneops import backends

from . import registry, tally
from .guard import OutOfTime, Process, Stopped, launch

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # exit status that compute-sanitizer gives when it found an error
COMPLAINT = re.compile(
    r"^========= .*(Error|error:|Invalid|Race|hazard|Uninitialized|Barrier|Divergent).*", re.MULTILINE
)
# Without a card these stand for the sweep and for the tests that need one.
REHEARSED_SPACE = "kcenter gram half"
REHEARSED_TESTS = ("tests/ops/test_assign_ranks.py", "-k", "known and reference")


def build(run, limit):
    """Build in place for this card alone, unless PRUNEOPS_CUDA_ARCHS says otherwise; a rehearsal only looks."""
    status, output = 0, ""
    if run.device.type == "cuda":
        own = "{}{}".format(*torch.cuda.get_device_capability(run.device))
        archs = os.environ.get("PRUNEOPS_CUDA_ARCHS") or own
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, output = launch(command, limit, PRUNEOPS_CUDA_ARCHS=archs)
        backends.build_record.cache_clear()
    run.document["build"] = backends.build_record()
    reasons = {name: backends.why_not(name, run.device.type) for name in backends.BACKENDS}
    run.document["machine"]["nvidia_smi"] = _nvidia_smi()
    print("\n".join(f"gpu:   {name}: {reason or 'can run'}" for name, reason in reasons.items()), flush=True)
    expected = ("triton", "cuda") if run.device.type == "cuda" else ("reference",)
    missing = [name for name in expected if reasons[name]]
    words = f"cannot run: {', '.join(missing)}" if missing else f"{', '.join(expected)} can run"
    failed = status or missing
    details = {"backends": reasons} | ({"output": output[-2000:]} if failed else {})
    return "failed" if failed else "passed", words, details


def _nvidia_smi():
    if not shutil.which("nvidia-smi"):
        return "not found"
    fields = "name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    lines = done.stdout.strip().splitlines()
    return dict(zip(fields.split(","), map(str.strip, lines[0].split(",")))) if lines else done.stderr.strip()


def ahead(run, limit, enough):
    """Have every operator's kernels compiled once beside build and tests, until `enough` is set.

    Caches on disk hold them then, so that the operators' time on the card goes to measuring. Nothing fails here: what
    does not compile is found where it counts.
    """
    kind = run.device.type
    chosen = ["--backends", "triton"] if kind == "cuda" else ["--peers", "none", "--backends", "cpu"]
    command = [sys.executable, "-m", "benchmarks", "ops"]
    options = ["--device", kind, "--cases", run.cases, "--compile-only", *chosen]
    names = run.operators if kind == "cuda" else run.operators[:1]
    end = time.monotonic() + limit
    processes = []
    try:
        processes += [Process([*command, name, *options], niceness=15) for name in names]
        while any(not process.wait(0) for process in processes) and not enough.wait(0.1):
            if time.monotonic() > end:
                break
        ended = sum(process.wait(0) for process in processes)
    finally:
        for process in processes:
            process.kill()
    if Process.stopped.is_set():
        raise Stopped("the run was ended")
    calls = sum(process.output().count("compiled: ") for process in processes)
    return "passed", f"{calls} calls, {ended} of {len(names)} operators whole", {}


def tests(run, limit):
    """The tests marked gpu, in as many processes as the cores carry beside the sanitizers."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "tally")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks", "-p", "benchmarks.tally"]
        command += ["-p", "no:cacheprovider", *_workers(run.device)]
        command += ["-m", "gpu"] if run.device.type == "cuda" else ["-m", "not gpu", *REHEARSED_TESTS]
        status = output = None
        try:
            status, output = launch(command, limit, PRUNEOPS_TALLY=str(lines))
        except OutOfTime as error:
            output = str(error)
        found = tally.read(lines)
    counts = found["counts"]
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    if status is None:
        words = f"out of time after {words}"
    elif status and not found["bad"]:
        words += f", pytest ended with {status}"
    good = status == 0 and counts["passed"] > 0
    ended = "passed" if good else "out of time" if status is None and not found["bad"] else "failed"
    return ended, words, found | ({} if good else {"output": output[-4000:]})


def _workers(device):
    """Options of pytest-xdist, where it is installed; three cores are left to the sanitizers."""
    if importlib.util.find_spec("xdist") is None:
        return []
    count = max(2, (os.cpu_count() or 1) - 3) if device.type == "cuda" else 2
    return ["-n", str(count), "--dist", "worksteal"]


def sanitize(tool, run, limit):
    """One tool of compute-sanitizer over every operator; without a tool, the bare script."""
    if run.device.type != "cuda" and tool:
        return "skipped", "it needs a CUDA device", {}
    command = [sys.executable, "-m", "benchmarks.sanitize", "--device", run.device.type]
    environment = {}
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
    if status == 2 and run.device.type != "cuda":
        return "skipped", "no backend can run", {}
    checked = output.count(": ok\n")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    clean = bool(summaries) and not any(map(int, summaries)) if tool else True
    if status == 0 and clean and checked:
        absent = "".join(f", without {name}" for name in re.findall(r"sanitize: (\w+) not run", output))
        return "passed", f"{_calls(output)}{absent}", {}
    words = f"{sum(map(int, summaries))} errors" if summaries else "no summary" if tool else f"status {status}"
    return "failed", f"{words}, {checked} calls right, exit status {status}", {"output": output[-4000:]}


def _cut_off(output):
    """What a tool that was killed had found: nothing in so many calls, or something."""
    wrong = re.findall(r"^sanitize: .*(?:: WRONG|Error: .*)$", output, re.MULTILINE)
    complaints = [match[0] for match in COMPLAINT.finditer(output)]
    checked = output.count(": ok\n")
    if wrong or complaints:
        return "failed", f"out of time after {checked} calls: {(complaints + wrong)[0]}", {"output": output[-4000:]}
    if not checked:
        raise OutOfTime(output)
    return "incomplete", f"out of time after {checked} clean calls{_by_backend(output)}", {}


def _calls(output):
    return f"{output.count(': ok' + chr(10))} calls{_by_backend(output)}"


def _by_backend(output):
    """Of which backends, where there are several."""
    names = re.findall(r"^sanitize: \w+ (\w+) .*: ok$", output, re.MULTILINE)
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return f" ({', '.join(f'{name} {count}' for name, count in counts.items())})" if len(counts) > 1 else ""


def soak(run, limit):
    """Random calls against oracles for so many seconds; `tests.soak` says what it found."""
    seconds = run.options.soak
    if seconds <= 0:
        return "skipped", "--soak 0", {}
    if importlib.util.find_spec("tests.soak") is None:
        return "not there", "this tree has no tests.soak", {}
    command = [sys.executable, "-m", "tests.soak", "--seconds", f"{min(seconds, 0.8 * limit):g}"]
    status, output = launch([*command, "--device", run.device.type], min(limit, seconds + 60))
    lines = output.strip().splitlines() or [f"exit status {status}"]
    if status == 2 and run.device.type != "cuda":
        return "skipped", lines[-1], {}
    return ("failed", lines[-1], {"output": output[-4000:]}) if status else ("passed", lines[-1], {})


def operator(name, guarded, run, limit):
    """One operator's cases in a process of its own; what a process past its limit had finished is kept."""
    ended, status, output = guarded.run(limit)
    known = run.document["operators"].get(name, {"cases": []})
    total = len(registry.operator(name).select(run.cases, run.device))
    entries = [(case, entry) for case in known["cases"] for entry in case["contenders"]]
    bad = [
        (c, e) for c, e in entries if e["kind"] == "backend" and e["status"] in ("WRONG", "failed", "crashed", "hung")
    ]
    crashed = [crash for crash in guarded.crashes if not _noted(crash, entries)]
    words = f"{len(known['cases'])} of {total} cases"
    words += "".join(f"; {c['name']} {e['name']} {e['status']}" for c, e in bad[:2])
    words += "".join(f"; {case} {contender} {how}" for case, contender, how, _ in crashed)
    words += f" and {len(bad) - 2} more" if len(bad) > 2 else ""
    if ended == "failed":
        return "failed", f"{words}; exit status {status}", {"output": output[-4000:]}
    if bad or status == 1 or any(own in backends.BACKENDS for own in (c[1].split()[0] for c in crashed)):
        return "failed", words, {}
    if ended == "out of time":
        whole = len(known["cases"]) == total
        return "incomplete" if whole else "out of time", f"{words}, cut off{' among peers' if whole else ''}", {}
    return "passed", words, {}


def _noted(crash, entries):
    return any(case["name"] == crash[0] and entry["name"] == crash[1] for case, entry in entries)


def tune(run, limit):
    """A rehearsal of `make gpu-tune`, of one of its spaces."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tune", "--device", run.device.type, "--results", folder]
        status, output = launch([*command, "--spaces", REHEARSED_SPACE, "--seconds", f"{0.8 * limit:.0f}"], limit)
        written = [json.loads(path.read_text()) for path in Path(folder).glob("tune-*.json")]
    lines = output.strip().splitlines() or [f"exit status {status}"]
    good = status == 0 and len(written) == 1
    return ("passed", lines[-1], {}) if good else ("failed", lines[-1], {"output": output[-4000:]})
