"""Processes that may hang or crash: each in a process group of its own, which is killed as a whole.

A benchmark that loses its CUDA context loses its process. `Supervisor` reads from a file which implementation was in
flight, records it as crashed and starts another process for the rest. `Worker` is that process's side.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import ROOT

# An implementation hangs after so many seconds without progress, or after this share of the limit if that is longer.
MIN_HANG_SECONDS, HANG_SHARE = 8, 0.5
WORKER_SHARE = 0.85  # of its limit that a worker gets; the rest is for what it does not foresee
MIN_RESTART_SECONDS = 4  # with less left no worker is started again
MAX_CRASHES = 2  # an implementation that crashed in so many cases is skipped in the others
PROGRESS = re.compile(r"^(  \S+ .*: [\d.]+ s|\S+ \(\d+/\d+\))$")  # lines that a benchmark prints as it goes


class OutOfTime(Exception):
    """A command ran past its limit; holds what it had printed."""


class Stopped(Exception):
    """A command was ended because the run was interrupted."""


class Process:
    """A command and all that it starts. Output goes to a file, so that a process that survives blocks no pipe."""

    running, stopped = set(), threading.Event()

    def __init__(self, command, niceness=0, stdin=False, **environment):
        self.raise_if_stopped()
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        self.file = tempfile.TemporaryFile()  # noqa: SIM115, read when the process has ended
        self.popen = subprocess.Popen(
            [*(("nice", "-n", str(niceness)) if niceness else ()), *map(str, command)],
            cwd=ROOT,
            env=inherited | {"PYTHONPATH": paths} | environment,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.add(self)

    def send(self, line):
        """Write a line to the standard input."""
        with contextlib.suppress(OSError):  # it may have ended
            self.popen.stdin.write(line.encode())
            self.popen.stdin.flush()

    def wait(self, seconds):
        """Whether it ended within so many seconds."""
        try:
            self.popen.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self):
        """End the whole group, whether or not its first process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.running.discard(self)

    def output(self):
        self.file.seek(0)
        return self.file.read().decode(errors="replace")

    @classmethod
    def stop_all(cls):
        """End what runs, and let nothing start; for an interruption."""
        cls.stopped.set()
        for process in list(cls.running):
            process.kill()

    @classmethod
    def raise_if_stopped(cls):
        if cls.stopped.is_set():
            raise Stopped("the run was ended")


def launch(command, limit, **environment):
    """Exit status and output of a command; OutOfTime past the limit, Stopped when the run was ended."""
    process = Process(command, **environment)
    try:
        ended = process.wait(limit)
    finally:
        process.kill()
    Process.raise_if_stopped()
    if not ended:
        raise OutOfTime(process.output())
    return process.popen.returncode, process.output()


def run_together(commands, limit, niceness=0, enough=None, **environment):
    """(ended, outputs): run commands at once until all ended, the limit is over or the event `enough` is set."""
    end, processes = time.monotonic() + limit, []
    try:
        for command in commands:
            processes.append(Process(command, niceness, **environment))
        while not all(process.wait(0) for process in processes) and time.monotonic() < end:
            if enough is not None and enough.is_set():
                break
            time.sleep(0.1)
        ended = sum(process.wait(0) for process in processes)
    finally:
        for process in processes:
            process.kill()
    Process.raise_if_stopped()
    return ended, [process.output() for process in processes]


class Supervisor:
    """A command that works through cases and implementations, restarted without the one in flight when it died.

    Its process starts ahead of its time, imports what it needs and waits. One that has done what it was asked for waits
    again, so that the passes of a benchmark share a process.

    Parameters
    ----------
    command : list
        It takes the options of `add_options`.
    folder : Path
        For the files that both sides share.
    record : callable (dict)
        Called with what --out holds whenever that changes.
    """

    def __init__(self, command, folder, record, **environment):
        folder.mkdir(exist_ok=True)
        self.out, self.in_flight_file, self.skip = (folder / name for name in ("out.json", "in_flight", "skip.json"))
        options = ["--out", self.out, "--in-flight", self.in_flight_file, "--skip", self.skip, "--resume", "--wait"]
        self.command, self.record = [*command, *options], record
        self.environment = {"PYTHONFAULTHANDLER": "1"} | environment
        self.crashes = []  # [case, implementation, "crashed" or "hung", message]
        self.recorded, self.complete, self.process = None, False, None

    def start(self):
        """Start a worker, unless one waits."""
        if self.process is None:
            self.in_flight_file.unlink(missing_ok=True)
            self.process = Process(self.command, stdin=True, **self.environment)

    def run(self, limit, *words):
        """("ended" | "out of time" | "failed", exit status, output of the last worker) within a limit.

        The worker is sent how many seconds it has, and the words.
        """
        end, hang_seconds = time.monotonic() + limit, max(MIN_HANG_SECONDS, HANG_SHARE * limit)
        while True:
            ended, status, output = self._run_once(end, hang_seconds, words)
            if ended == "out of time" or (ended == "ended" and (status == 0 or self.complete)):
                return ended, status, output
            at = self._in_flight()
            if at is None or at in [crash[:2] for crash in self.crashes]:
                return "failed", status, output
            hung = "hung", f"no end after {hang_seconds:.0f} s"
            how, message = hung if ended == "hung" else ("crashed", exit_message(status, output))
            self.crashes.append([*at, how, message])
            print(f"  {' '.join(at)}: {how}: {message}", flush=True)
            if end - time.monotonic() < MIN_RESTART_SECONDS:
                return "out of time", status, output

    def stop(self):
        """End a worker that waits."""
        if self.process:
            self.process.kill()
            self.process = None

    def _run_once(self, end, hang_seconds, words):
        self.start()
        process, self.complete, waits = self.process, False, False
        self.skip.write_text(json.dumps(self.crashes + self._skip_everywhere()))
        process.send(" ".join([f"{WORKER_SHARE * (end - time.monotonic()):.2f}", *map(str, words)]) + "\n")
        try:
            ended = self._wait(process, end, hang_seconds)
            waits = ended == "complete"
        finally:
            if not waits:
                self.stop()
            self._record()
        Process.raise_if_stopped()
        return ("ended", 0, process.output()) if waits else (ended, process.popen.returncode, process.output())

    def _wait(self, process, end, hang_seconds):
        while not process.wait(min(0.1, end - time.monotonic())):
            self._record()
            if self.complete:
                return "complete"
            if time.monotonic() >= end:
                return "out of time"
            if self._in_flight() and time.time() - self.in_flight_file.stat().st_mtime > hang_seconds:
                return "hung"
        return "ended"

    def _record(self):
        """Pass on what --out holds, if that is new."""
        if self.out.exists() and self.out.stat().st_mtime_ns != self.recorded:
            self.recorded = self.out.stat().st_mtime_ns
            document = json.loads(self.out.read_text())
            self.complete = document.get("complete", False)
            self.record(document)

    def _in_flight(self):
        """[case, implementation] that the worker runs; None between them."""
        try:
            at = json.loads(self.in_flight_file.read_text() or "null")
        except OSError:
            return None
        return at if at and at[1] else None

    def _skip_everywhere(self):
        """Implementations to be skipped in every case."""
        names = [name for _, name, _, _ in self.crashes]
        often = {name for name in names if names.count(name) >= MAX_CRASHES}
        return [[None, name, "crashed", f"in {names.count(name)} other cases"] for name in sorted(often)]


def run_in_sequence(supervisors, weights, left, work):
    """work(place, limit) for one supervisor after another; the worker of the next one starts while one runs.

    The limits divide the seconds that are left by weight: what one leaves goes to those after it.
    """
    for place in range(len(supervisors)):
        for supervisor in supervisors[place : place + 2]:
            supervisor.start()
        work(place, (left() - 1) * weights[place] / sum(weights[place:]))


@contextlib.contextmanager
def stopped_at_the_end(supervisors):
    """The supervisors, whose workers end with the block."""
    try:
        yield supervisors
    finally:
        for supervisor in supervisors:
            supervisor.stop()


def exit_message(status, output):
    """How a process died, in one line: its signal or exit status, and its last error message."""
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    lines = [line.strip() if not PROGRESS.match(line) else None for line in output.splitlines() if line.strip()]
    last = lines[len(lines) - lines[::-1].index(None) :] if None in lines else lines
    fatal = [line for line in last if line.startswith("Fatal Python error")]
    errors = [line for line in last if re.search(r"error|assert|lost", line, re.IGNORECASE)]
    chosen = fatal[:1] or errors[-1:] or last[-1:]
    return f"{how}: {chosen[0][:160]}" if chosen else how


class Worker:
    """A supervised process's side: waits for its time, writes what is in flight, knows what crashed before."""

    def __init__(self, options):
        self.options, self.skip, path = options, [], options.in_flight
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if path else None

    def passes(self):
        """Once; with --wait every time that the supervisor asks: sets the seconds, yields the words that it sent."""
        for line in iter(sys.stdin.readline, "") if self.options.wait else [""]:
            seconds, *words = line.split() or [self.options.seconds]
            self.options.seconds, skip = float(seconds), self.options.skip
            self.skip = json.loads(skip.read_text()) if skip and skip.exists() else []
            yield words

    def progress(self, case=None, implementation=None):
        """Write what runs next; without arguments, nothing."""
        if self.file is not None:
            os.pwrite(self.file, json.dumps([case, implementation]).ljust(240).encode(), 0)

    def crashed(self, case):
        """Implementation -> part of its entry in a case."""
        return {
            name: {"name": name, "status": how, "reason": message}
            for where, name, how, message in reversed(self.skip)
            if where in (case, None)
        }


def add_options(parser):
    """Options by which a supervisor controls a worker; hidden from users."""
    for name in ("--in-flight", "--skip"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    for name in ("--resume", "--wait"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
