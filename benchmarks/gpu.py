"""What `make gpu` runs, at most 300 s: build, GPU tests, sanitizers, random calls, and every operator on its goals.

    build         for this GPU alone; what compiles on first use does so meanwhile
    checks        GPU tests, the four tools of compute-sanitizer and random calls, all at once
    operators     alone on the GPU, each in a process of its own: a crash costs one line. The backends of all operators
                  come before any baseline
    summary       at most 60 lines, one for every case

Works with the Python of the active environment and installs nothing: the libraries are built in place. After every
step what is known so far is written to <device>-<date>-<commit>.json and .md; every limit ends all that a stage
started, and what the stage left unused goes to those after it. Exit status: 0 if no stage failed or ran out of time,
1 if one did, 2 without a GPU, 130 after an interruption. `--device cpu` rehearses everything without a GPU.
"""

import contextlib
import functools
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import machine, record, registry, report, stages, summary
from .__main__ import LAST_PHASE
from .guard import OutOfTime, Stopped, Supervisor, run_in_sequence, stopped_at_the_end

TOTAL_SECONDS = 300
BUILD = 0.4  # of all; it took 42 to 57 s for one architecture
CHECKS = 0.55  # of what the build leaves; the operators have the rest
ALONE = 0.3  # of all, for compiling ahead if operators are all that is asked for
SOAK_SECONDS = 20
STAGES = ("build", "tests", "sanitize", "soak", "operators")
BAD = ("failed", "out of time", "not found")


class Run(record.Run):
    """One run of `make gpu`."""

    def __init__(self, options):
        super().__init__(options, stages=[], expected={}, operators={})
        self.cases = options.cases or ("goals" if self.device.type == "cuda" else "tiny")
        self.operators = by_share(options.operators)
        if "operators" in options.stages:
            self.document["expected"] = {name: self.cases_of(name) for name in self.operators}

    def cases_of(self, name):
        """Names of the cases of an operator."""
        return [case.name for case in registry.operator(name).select(self.cases, self.device)]

    def stage(self, name, limit, work):
        """Do one stage within its limit and what is left of the total; record how it ended."""
        begin, limit = time.monotonic(), min(limit, self.left())
        entry = {"name": name, "status": "running", "message": "", "seconds": 0}
        with self.lock:
            self.document["stages"].append(entry)
        print(f"gpu: {name} (at most {max(limit, 0):.0f} s)", flush=True)
        try:
            if limit < 1:
                raise OutOfTime("the total was used up before it began")
            status, message, details = work(limit)
        except OutOfTime as error:
            status, message, details = "out of time", f"limit {max(limit, 0):.0f} s", {"output": str(error)[-2000:]}
        except (KeyboardInterrupt, Stopped) as error:
            status, message, details = "interrupted", "the run was ended", {}
            if isinstance(error, KeyboardInterrupt):
                raise
        except Exception as error:
            status, message, details = "failed", f"{type(error).__name__}: {error}", {}
        finally:
            with self.lock:
                seconds = round(time.monotonic() - begin, 1)
                entry |= {"status": status, "message": message, "seconds": seconds} | details
                self.save()
        print(f"gpu: {name}: {status}, {message} ({seconds} s)", flush=True)
        if status == "failed" and details.get("output"):
            print(details["output"], flush=True)

    def markdown(self):
        """The summary, then the operators' tables."""
        title, *lines = summary.lines(self.document, self.path)
        lines = [f"# {title}", "", "```", *lines, "```"]
        for name, operator in self.document["operators"].items():
            lines += ["", f"## {name}", "", report.markdown(operator)]
        return "\n".join(lines) + "\n"

    def settle(self):
        """Wait for the stages in threads, whose processes were ended, to record that."""
        end = time.monotonic() + 5
        while time.monotonic() < end and any(stage["status"] == "running" for stage in self.document["stages"]):
            time.sleep(0.05)


def by_share(names):
    """Operators by their share of the GPU's time, the largest first."""
    return sorted(names, key=lambda name: (-registry.operator(name).gpu_time_share, name))


@contextlib.contextmanager
def concurrent(run, works):
    """Stages (name, limit, work) that run in threads while the block does; leaving it waits for them."""
    threads = [threading.Thread(target=run.stage, args=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        while thread.is_alive():  # in pieces, so that an interruption is noticed
            thread.join(0.1)


def checks(run, chosen, limit):
    """Tests, sanitizers and random calls, all at once."""
    works = {}
    if "tests" in chosen:
        works["tests"] = stages.tests
    if "sanitize" in chosen:
        works |= {tool or "small shapes": functools.partial(stages.sanitize, tool) for tool in (None, *stages.TOOLS)}
    if "soak" in chosen:
        works["soak"] = stages.soak
    with concurrent(run, [(name, limit, functools.partial(work, run)) for name, work in works.items()]):
        pass


def benchmark_processes(run, folder):
    """A supervisor for each operator."""
    options = ["--device", run.device.type, "--cases", run.cases, "--backends-first", "--rates", Path(folder, "rates")]
    options += ["--backends", run.options.backends] if run.options.backends else []
    return [
        Supervisor(
            [sys.executable, "-m", "benchmarks", "ops", name, *options],
            Path(folder, name),
            functools.partial(run.know, "operators", name),
            TORCHINDUCTOR_COMPILE_THREADS="1",  # no pool of processes beside what is timed
        )
        for name in run.operators
    ]


def wait_for_quiet(seconds=5):
    """Until other processes rest, or so many seconds: those that were killed take a moment to end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load = machine.BackgroundLoad()
        time.sleep(0.25)
        if (load.share() or 0) < report.BUSY:
            break


def operators(run, supervisors):
    """The backends of one operator after another, then what they are compared with; the only ones on the GPU."""
    if run.device.type == "cuda":
        wait_for_quiet()
    counts = [len(run.cases_of(name)) for name in run.operators]
    shares = [registry.operator(name).gpu_time_share for name in run.operators]
    passes = [("benchmark", 0, counts), ("baselines", LAST_PHASE, shares)]
    for what, last_phase, weights in passes[: 1 if run.options.backends else 2]:

        def work(place, limit, what=what, last_phase=last_phase):
            name = run.operators[place]
            stage = functools.partial(stages.operator, name, supervisors[place], run, last_phase=last_phase)
            run.stage(f"{what} {name}", limit, stage)
            if last_phase == LAST_PHASE:
                supervisors[place].stop()

        run_in_sequence(supervisors, weights, run.left, work)


def everything(run):
    """All stages that were asked for."""
    chosen, enough, ahead = run.options.stages, threading.Event(), []
    if "operators" in chosen and "triton" in (run.options.backends or "triton"):
        ahead = [("compile ahead", run.options.seconds, functools.partial(stages.compile_ahead, run, enough))]
    with (
        tempfile.TemporaryDirectory() as folder,
        stopped_at_the_end(benchmark_processes(run, folder) if "operators" in chosen else []) as supervisors,
    ):
        with concurrent(run, ahead) as compiling:
            try:
                if "build" in chosen:
                    run.stage("build", BUILD * run.options.seconds, functools.partial(stages.build, run))
                for supervisor in supervisors:
                    supervisor.start()  # it imports while others check, and nothing while another is timed
                checks(run, chosen, run.left() * (CHECKS if "operators" in chosen else 1))
                if chosen == ["operators"] and compiling:  # nothing else to wait for
                    compiling[0].join(ALONE * run.left())
            finally:
                enough.set()
        if "operators" in chosen:
            operators(run, supervisors)


def is_bad(stage):
    """Whether a stage makes the run fail; baselines may run out of time."""
    return stage["status"] in BAD and not (stage["name"].startswith("baselines ") and stage["status"] == "out of time")


def main(argv=None):
    parser = record.parser("gpu", __doc__, TOTAL_SECONDS)
    parser.add_argument("--cases", help="of the operators; default: goals on CUDA, tiny on CPU")
    parser.add_argument("--backends", help="of the operators, comma-separated, without baselines; default: all")
    parser.add_argument("--soak", type=float, default=SOAK_SECONDS, help="seconds of random calls; default %(default)s")
    run = Run(record.parse(parser, argv, stages=STAGES, operators=registry.names()))
    run.execute(lambda: everything(run))
    print("\n".join(summary.lines(run.document, run.path)))
    if not run.document["complete"]:
        return 130
    return 1 if any(map(is_bad, run.document["stages"])) else 0


if __name__ == "__main__":
    sys.exit(main())
