"""What `make gpu` runs, at most 300 s: build, GPU tests, sanitizers, random calls, and every operator on its goals.

    build         for this card alone; kernels that compile on first use do so beside it
    checks        GPU tests, the four tools of compute-sanitizer and random calls, all at once
    operators     alone on the card, each in a process of its own: a crash costs one line
    summary       at most 60 lines

Works with the Python of the active environment and installs nothing: the libraries are built in place. After every
step what is known so far is written to <device>-<date>-<commit>.json and .md; every limit ends all that a stage
started, and what the stage left unused goes to those after it. Exit status: 0 if no stage failed or ran out of time,
1 if one did, 2 without a GPU, 130 after an interruption. `--device cpu` rehearses everything without a card.
"""

import argparse
import contextlib
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from . import ROOT, machine, registry, report, stages, summary
from .guard import Guarded, OutOfTime, Process, Stopped

TOTAL_SECONDS = 300
BUILD = 0.3  # of all; it takes 42 to 57 s for one architecture
CHECKS = 0.55  # of what the build leaves; the operators have the rest
ALONE = 0.3  # of all, for compiling ahead where operators are all that is asked for
SOAK_SECONDS = 20
STAGES = ("build", "tests", "sanitize", "soak", "operators", "tune")  # the last only where there is no card
# Operators in this order, each with its share of the time that those before it left: those with goals come first.
SHARES = {
    "kcenter": 5,
    "attention_mass": 4,
    "exclusive_bottomk": 4,
    "kv_compact": 3,
    "pivot_cosine": 4,
    "attention_received": 3,
    "assign_ranks": 2,
    "paged_kv_compact": 2,
    "gather_tokens": 2,
}
BAD = ("failed", "out of time", "not found")


class Run:
    """One run: its options, what is known so far, and where that is written."""

    def __init__(self, options):
        self.options, self.device = options, torch.device(options.device)
        self.cases = options.cases or ("goals" if self.device.type == "cuda" else "tiny")
        self.operators = [name for name in SHARES if name in options.operators]
        self.begin, self.lock = time.monotonic(), threading.RLock()
        self.document = machine.facts(self.device) | {"stages": [], "operators": {}, "seconds": 0, "complete": False}
        words = [self.document["device"], self.document["date"][:10], (self.document["commit"] or "unknown")[:12]]
        self.path = options.results / f"{'-'.join(map(plain, words))}.json"

    def left(self):
        return self.begin + self.options.seconds - time.monotonic()

    def stage(self, name, limit, work):
        """Do one stage within its limit and what is left of the total; record how it ended."""
        begin, limit = time.monotonic(), min(limit, self.left())
        entry = {"name": name, "status": "running", "words": "", "seconds": 0}
        with self.lock:
            self.document["stages"].append(entry)
        print(f"gpu: {name} (at most {max(limit, 0):.0f} s)", flush=True)
        try:
            if limit < 1:
                raise OutOfTime("the total was used up before it began")
            status, words, details = work(limit)
        except OutOfTime as error:
            status, words, details = "out of time", f"limit {max(limit, 0):.0f} s", {"output": str(error)[-2000:]}
        except (KeyboardInterrupt, Stopped) as error:
            status, words, details = "interrupted", "the run was ended", {}
            if isinstance(error, KeyboardInterrupt):
                raise
        except Exception as error:
            status, words, details = "failed", f"{type(error).__name__}: {error}", {}
        finally:
            with self.lock:
                seconds = round(time.monotonic() - begin, 1)
                entry |= {"status": status, "words": words, "seconds": seconds} | details
                self.save()
        print(f"gpu: {name}: {status}, {words} ({seconds} s)", flush=True)
        if status == "failed" and details.get("output"):
            print(details["output"], flush=True)

    def know(self, name, document):
        """Record what an operator's benchmark has so far."""
        with self.lock:
            self.document["operators"][name] = document
            self.save()

    def save(self):
        with self.lock:
            self.document["seconds"] = round(time.monotonic() - self.begin, 1)
            report.write(self.path, self.document)
            report.write_text(self.path.with_suffix(".md"), markdown(self.document, self.path))


def plain(words):
    """Lower-case letters and digits joined by single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def markdown(document, path):
    """The summary, then the operators' tables."""
    title = summary.title(document)
    lines = [f"# {title}", "", "```", *summary.lines(document, path)[1:], "```"]
    for name, operator in document["operators"].items():
        lines += ["", f"## {name}", "", report.markdown(operator)]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def beside(run, works):
    """Stages (name, limit, work) that run in threads while the block does; leaving it waits for them."""
    threads = [threading.Thread(target=run.stage, args=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        while thread.is_alive():  # in pieces, so that an interruption is heard
            thread.join(0.1)


def checks(run, chosen, limit):
    """Tests, sanitizers and random calls, all at once."""
    works = []
    if "tests" in chosen:
        works.append(("tests", limit, lambda limit: stages.tests(run, limit)))
    if "sanitize" in chosen:
        for tool in (None, *stages.TOOLS):
            name = tool or "small shapes"
            works.append((name, limit, lambda limit, tool=tool: stages.sanitize(tool, run, limit)))
    if "soak" in chosen:
        works.append(("soak", limit, lambda limit: stages.soak(run, limit)))
    with beside(run, works):
        pass


def operators(run, folder):
    """One after another; the next one's process gets ready while one runs, and touches the card only then."""
    options = ["--device", run.device.type, "--cases", run.cases, "--backends-first"]
    guards = []
    for name in run.operators:
        own = Path(folder, name)
        own.mkdir()
        command = [sys.executable, "-m", "benchmarks", "ops", name, *options]
        guards.append(Guarded(command, own, lambda document, name=name: run.know(name, document)))
    shares = [SHARES[name] for name in run.operators]
    try:
        for place, (name, guarded) in enumerate(zip(run.operators, guards)):
            for waiting in guards[place : place + 2]:
                waiting.ready()
            limit = (run.left() - 1) * shares[place] / sum(shares[place:])
            run.stage(
                f"benchmark {name}",
                limit,
                lambda limit, name=name, guarded=guarded: stages.operator(name, guarded, run, limit),
            )
    finally:
        for guarded in guards:
            guarded.stop()


def everything(run, chosen):
    """All stages that were asked for."""
    enough, aheads = threading.Event(), []
    if "operators" in chosen:
        aheads = [("compile ahead", run.options.seconds, lambda limit: stages.ahead(run, limit, enough))]
    with beside(run, aheads) as compiling:
        try:
            if "build" in chosen:
                run.stage("build", BUILD * run.options.seconds, lambda limit: stages.build(run, limit))
            checks(run, chosen, run.left() * (CHECKS if "operators" in chosen else 1))
            if chosen == ["operators"]:  # nothing else to wait for
                compiling[0].join(ALONE * run.left())
        finally:
            enough.set()
    if "operators" in chosen:
        with tempfile.TemporaryDirectory() as folder:
            operators(run, folder)
    if "tune" in chosen and run.device.type != "cuda":
        run.stage("tune", run.left(), lambda limit: stages.tune(run, limit))


def parse(argv):
    """Options, or None after saying what is wrong with them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the stages")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all")
    parser.add_argument("--operators", default=",".join(SHARES), help="comma-separated; default: all")
    parser.add_argument("--cases", help="of the operators; default: goals on CUDA, tiny on CPU")
    parser.add_argument("--soak", type=float, default=SOAK_SECONDS, help="seconds of random calls; default %(default)s")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything; default %(default)s")
    options = parser.parse_args(argv)
    for what, known in (("stages", STAGES), ("operators", registry.names())):
        given = getattr(options, what).split(",")
        setattr(options, what, given)
        unknown = [name for name in given if name not in known]
        if unknown:
            print(f"benchmarks.gpu: no {what[:-1]} {unknown[0]!r}; there is: {', '.join(known)}", file=sys.stderr)
            return None
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here; nothing was run", file=sys.stderr)
        return None
    return options


def main(argv=None):
    options = parse(argv)
    if options is None:
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Process.stopped.clear()
    options.results.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    try:
        everything(run, options.stages)
        run.document["complete"] = True
    except KeyboardInterrupt:
        Process.stop_all()
        print("gpu: interrupted", file=sys.stderr)
        _settle(run)
    run.save()
    print("\n".join(summary.lines(run.document, run.path)))
    if not run.document["complete"]:
        return 130
    return 1 if any(stage["status"] in BAD for stage in run.document["stages"]) else 0


def _settle(run):
    """Wait for stages in threads, whose processes are gone, to say so."""
    end = time.monotonic() + 5
    while time.monotonic() < end and any(stage["status"] == "running" for stage in run.document["stages"]):
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
