"""What `make gpu` runs: build, GPU tests, compute-sanitizer, operator benchmarks, under 10 minutes in all.

Works with the Python of the active environment and installs nothing: the libraries are built in
place. After every stage what is known so far is written to <device>-<date>-<commit>.json and .md,
so a stage that fails or an interruption costs only itself. Exit status: 0 if every stage passed,
1 if one did not, 2 without a GPU, 130 after an interruption. `--device cpu` rehearses the stages
on a machine without one.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from json import loads
from pathlib import Path

import torch

from pruneops import backends

from . import ROOT, machine, report

TOTAL_SECONDS = 540
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STAGES = ("build", "tests", "sanitize", "operators")
# Operators in this order, each with its share of the time that those before it left: those with goals come first.
SHARES = {
    "kcenter": 6,
    "attention_mass": 5,
    "exclusive_bottomk": 4,
    "kv_compact": 4,
    "pivot_cosine": 3,
    "attention_received": 2,
    "assign_ranks": 1,
    "paged_kv_compact": 1,
    "gather_tokens": 1,
}
FOUND = 9  # exit status that compute-sanitizer gives when it found an error
BAD = ("failed", "out of time", "not found")


class OutOfTime(Exception):
    """A command ran past its limit; holds what it had printed."""


class Run:
    """One run: its options, what is known so far, and where that is written."""

    def __init__(self, options):
        self.options = options
        self.device = torch.device(options.device)
        self.end = time.monotonic() + options.seconds
        self.document = machine.facts(self.device) | {"stages": [], "operators": {}, "complete": False}
        words = [self.document["device"], self.document["date"][:10], (self.document["commit"] or "unknown")[:12]]
        self.path = options.results / (
            "-".join(re.sub(r"[^a-z0-9]+", "-", w.lower()).strip("-") for w in words) + ".json"
        )

    def stage(self, name, limit, work):
        """Do one stage within its limit and what is left of the total; record how it ended."""
        begin = time.monotonic()
        limit = min(limit, self.end - begin)
        print(f"gpu: {name} (at most {max(limit, 0):.0f} s)", flush=True)
        try:
            if limit < 1:
                raise OutOfTime("the total was used up before it began")
            status, words, details = work(limit)
        except OutOfTime as error:
            status, words, details = "out of time", f"limit {max(limit, 0):.0f} s", {"output": str(error)[-2000:]}
        except Exception as error:
            status, words, details = "failed", f"{type(error).__name__}: {error}", {}
        seconds = round(time.monotonic() - begin, 1)
        entry = {"name": name, "status": status, "words": words, "seconds": seconds}
        self.document["stages"].append(entry | details)
        print(f"gpu: {name}: {status}, {words} ({seconds} s)", flush=True)
        if status == "failed" and details.get("output"):
            print(details["output"], flush=True)
        self.save()

    def save(self):
        report.write(self.path, self.document)
        report.write_text(self.path.with_suffix(".md"), markdown(self.document))


def launch(command, limit, **environment):
    """Exit status and output of a command and all it starts; OutOfTime past the limit."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise OutOfTime(process.communicate()[0]) from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, output


def build(run, limit):
    """Build in place for this card, or again for what an earlier build held; a rehearsal only looks."""
    status, output = 0, ""
    if run.device.type == "cuda":
        own = "{}{}".format(*torch.cuda.get_device_capability(run.device))
        built = backends.build_record().get("archs", [])
        archs = os.environ.get("PRUNEOPS_CUDA_ARCHS") or (";".join(built) if own in built else own)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, output = launch(command, limit, PRUNEOPS_CUDA_ARCHS=archs)
        backends.build_record.cache_clear()
    run.document["build"] = backends.build_record()
    reasons = {name: backends.why_not(name, run.device.type) for name in backends.BACKENDS}
    card = _nvidia_smi()
    run.document["machine"]["nvidia_smi"] = card
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


def tests(run, limit):
    """The tests marked gpu."""
    if run.device.type != "cuda":
        return "skipped", "they need a CUDA device", {}
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks", "-m", "gpu", "-q", f"--junitxml={junit}"]
        status, output = launch(command, limit)
        if not junit.exists():
            return "failed", f"pytest ended with {status}", {"output": output[-4000:]}
        suite = next(ElementTree.parse(junit).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    words = ", ".join(f"{count} {name}" for name, count in ({"passed": passed} | counts).items() if name != "tests")
    good = status == 0 and passed > 0
    return "passed" if good else "failed", words, {"counts": counts} | ({} if good else {"output": output[-4000:]})


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
    status, output = launch(command, limit, **environment)
    if status == 2 and run.device.type != "cuda":
        return "skipped", "no backend can run", {}
    checked = output.count(": ok\n")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    clean = bool(summaries) and not any(map(int, summaries)) if tool else True
    if status == 0 and clean and checked:
        absent = "".join(f", without {name}" for name in re.findall(r"sanitize: (\w+) not run", output))
        return "passed", f"{checked} calls{absent}", {}
    words = f"{sum(map(int, summaries))} errors" if summaries else "no summary" if tool else f"status {status}"
    return "failed", f"{words}, {checked} calls right, exit status {status}", {"output": output[-4000:]}


def operators(name, run, limit):
    """Operator benchmarks; what a run past its limit had finished is kept."""
    cases = run.options.cases or ("goals" if run.device.type == "cuda" else "tiny")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        seconds = f"{0.75 * limit:.0f}"
        command = [sys.executable, "-m", "benchmarks", "ops", name, "--device", run.device.type]
        command += ["--cases", cases, "--seconds", seconds, "--out", out]
        try:
            status, output = launch(command, limit)
        finally:
            if out.exists():
                run.document["operators"][name] = loads(out.read_text())
    if status == 0:
        print(report.text(run.document["operators"][name]), flush=True)
        return "passed", f"{len(run.document['operators'][name]['cases'])} cases", {}
    return "failed", f"exit status {status}", {"output": output[-4000:]}


def markdown(document):
    """Stages and operator tables, short."""
    commit = (document["commit"] or "unknown")[:12] + (" with changes" if document["dirty"] else "")
    lines = [f"# {document['device']}, {document['date'][:10]}, commit {commit}", ""]
    lines += ["| stage | status | | seconds |", "| --- | --- | --- | --- |"]
    lines += [f"| {s['name']} | {s['status']} | {s['words']} | {s['seconds']} |" for s in document["stages"]]
    for name, operator in document["operators"].items():
        lines += ["", f"## {name}", "", report.markdown(operator)]
    return "\n".join([*lines, *([] if document["complete"] else ["", "INCOMPLETE: the run did not end"])]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the stages")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all")
    parser.add_argument("--cases", help="of the operators; default: goals on CUDA, tiny on CPU")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything; default %(default)s")
    options = parser.parse_args(argv)
    stages = options.stages.split(",")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here; nothing was run", file=sys.stderr)
        return 2
    if not set(stages) <= set(STAGES):
        print(f"benchmarks.gpu: no stage {set(stages) - set(STAGES)}; there is: {', '.join(STAGES)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.results.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    try:
        if "build" in stages:
            run.stage("build", 100, lambda limit: build(run, limit))
        if "tests" in stages:
            run.stage("tests", 120, lambda limit: tests(run, limit))
        if "sanitize" in stages:
            run.stage("small shapes", 60, lambda limit: sanitize(None, run, limit))
            for tool in TOOLS:
                run.stage(tool, 30, lambda limit, tool=tool: sanitize(tool, run, limit))
        if "operators" in stages:
            for place, (name, share) in enumerate(SHARES.items()):
                limit = (run.end - time.monotonic()) * share / sum(list(SHARES.values())[place:])
                run.stage(f"benchmark {name}", limit, lambda limit, name=name: operators(name, run, limit))
        run.document["complete"] = True
    except KeyboardInterrupt:
        print("gpu: interrupted", file=sys.stderr)
    run.save()
    print(f"gpu: results in {run.path} and {run.path.with_suffix('.md').name}")
    if not run.document["complete"]:
        return 130
    return 1 if any(stage["status"] in BAD for stage in run.document["stages"]) else 0


if __name__ == "__main__":
    sys.exit(main())
