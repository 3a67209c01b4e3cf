"""Processes that may hang or crash: each in a group that is killed whole, each case of theirs at the price of one line.

A benchmark that loses its CUDA context loses its process. `Guarded` knows from a file what the process was at, notes
it as crashed and starts another for the rest. `Watch` is the other side, in that process.
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

# Without a sign of life for so many seconds, or for this share of all that a process may take, a contender hangs.
LEAST_PATIENCE, PATIENCE = 8, 0.5
SHARE = 0.85  # of its limit that a process is told; the rest is for what it does not foresee
LEAST_START = 4  # seconds; with less left no process is started again
TWICE = 2  # a contender that crashed in so many cases is left out of the others
PROGRESS = re.compile(r"^(  \S+ .*: [\d.]+ s|\S+ \(\d+/\d+\))$")  # lines that a benchmark prints as it goes


class OutOfTime(Exception):
    """A command ran past its limit; holds what it had printed."""


class Stopped(Exception):
    """A command was ended because the whole run was."""


class Process:
    """A command and all that it starts. Its output goes to a file: who outlives it can hold nobody up."""

    running, stopped = set(), threading.Event()

    def __init__(self, command, niceness=0, told=False, **environment):
        if self.stopped.is_set():
            raise Stopped("the run was ended")
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        self.file = tempfile.TemporaryFile()  # noqa: SIM115, read when the process has ended
        self.popen = subprocess.Popen(
            [*(("nice", "-n", str(niceness)) if niceness else ()), *map(str, command)],
            cwd=ROOT,
            env=inherited | {"PYTHONPATH": paths} | environment,
            stdin=subprocess.PIPE if told else subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.add(self)

    def tell(self, line):
        """Write a line to the standard input of a process that was started with `told`, and close it."""
        with contextlib.suppress(OSError):  # it may have ended
            self.popen.stdin.write(line.encode())
            self.popen.stdin.close()

    def wait(self, seconds):
        """Whether it ended within so many seconds."""
        try:
            self.popen.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self):
        """End the whole group, whether or not its first process has."""
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


def launch(command, limit, niceness=0, **environment):
    """Exit status and output of a command; OutOfTime past the limit, Stopped when the run was ended."""
    process = Process(command, niceness, **environment)
    try:
        ended = process.wait(limit)
    finally:
        process.kill()
    if Process.stopped.is_set():
        raise Stopped("the run was ended")
    if not ended:
        raise OutOfTime(process.output())
    return process.popen.returncode, process.output()


class Guarded:
    """A command that works through cases and their contenders, started again without the one that it died at.

    Parameters
    ----------
    command : list
        It takes the options of `add_options` and --out.
    folder : Path
        For the files that both sides share; must exist.
    record : callable (dict)
        Told what --out holds whenever that changes.
    """

    def __init__(self, command, folder, record, **environment):
        self.out, self.doing, self.skip = (Path(folder, name) for name in ("out.json", "doing", "skip.json"))
        files = ["--out", self.out, "--doing", self.doing, "--skip", self.skip, "--resume", "--wait"]
        self.command, self.record = [*command, *files], record
        self.environment = {"PYTHONFAULTHANDLER": "1"} | environment
        self.crashes = []  # [case, contender, "crashed" or "hung", words]
        self.seen, self.complete, self.process = None, False, None

    def start(self):
        """Have a process get ready: it imports what it needs and waits."""
        self.doing.unlink(missing_ok=True)
        self.skip.write_text(json.dumps(self.crashes + self._everywhere()))
        self.process = Process(self.command, told=True, **self.environment)

    def ready(self):
        """Have a process started, if none is."""
        if self.process is None:
            self.start()

    def run(self, limit):
        """("ended" | "out of time" | "failed", exit status, output of the last process) within a limit."""
        end = time.monotonic() + limit
        patience = max(LEAST_PATIENCE, PATIENCE * limit)
        while True:
            self.ready()
            process, self.process = self.process, None
            process.tell(f"{SHARE * (end - time.monotonic()):.2f}\n")
            try:
                ended = self._watch(process, end, patience)
            finally:
                process.kill()
                self._record()
            if Process.stopped.is_set():
                raise Stopped("the run was ended")
            status, output = process.popen.returncode, process.output()
            if ended == "out of time" or (ended == "ended" and (status == 0 or self.complete)):
                return ended, status, output
            at = self._at()
            if at is None or at in [crash[:2] for crash in self.crashes]:
                return "failed", status, output
            hung = "hung", f"no end after {patience:.0f} s"
            how, words = hung if ended == "hung" else ("crashed", last_words(status, output))
            self.crashes.append([*at, how, words])
            print(f"  {' '.join(at)}: {how}: {words}", flush=True)
            if end - time.monotonic() < LEAST_START:
                return "out of time", status, output

    def stop(self):
        """End a process that waits, of a command that is not run after all."""
        if self.process:
            self.process.kill()

    def _watch(self, process, end, patience):
        while not process.wait(min(0.1, end - time.monotonic())):
            self._record()
            if time.monotonic() >= end:
                return "out of time"
            if self._at() and time.time() - self.doing.stat().st_mtime > patience:
                return "hung"
        return "ended"

    def _record(self):
        """Hand on what --out holds, if that is new."""
        if self.out.exists() and self.out.stat().st_mtime_ns != self.seen:
            self.seen = self.out.stat().st_mtime_ns
            known = json.loads(self.out.read_text())
            self.complete = known.get("complete", False)
            self.record(known)

    def _at(self):
        """[case, contender] that the process is at; None between them."""
        try:
            at = json.loads(self.doing.read_text() or "null")
        except OSError:
            return None
        return at if at and at[1] else None

    def _everywhere(self):
        """Contenders to be left out of every case."""
        names = [contender for _, contender, _, _ in self.crashes]
        often = {name for name in names if names.count(name) >= TWICE}
        return [[None, name, "crashed", f"in {names.count(name)} other cases"] for name in sorted(often)]


def last_words(status, output):
    """How a process died, in one line: its signal or exit status, and what it said last."""
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    lines = [line.strip() if not PROGRESS.match(line) else None for line in output.splitlines() if line.strip()]
    own = lines[len(lines) - lines[::-1].index(None) :] if None in lines else lines
    fatal = [line for line in own if line.startswith("Fatal Python error")]
    telling = [line for line in own if re.search(r"error|assert|lost", line, re.IGNORECASE)]
    words = fatal[:1] or telling[-1:] or own[-1:]
    return f"{how}: {words[0][:160]}" if words else how


class Watch:
    """What a guarded process does for its guard: waits for its time, tells what it is at, leaves out what crashed."""

    def __init__(self, options):
        if options.wait:
            line = sys.stdin.readline()
            if not line.strip():  # nobody wants it any more
                raise SystemExit(0)
            options.seconds = float(line)
        self.file = os.open(options.doing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if options.doing else None
        self.skip = json.loads(options.skip.read_text()) if options.skip and options.skip.exists() else []

    def doing(self, case=None, contender=None):
        """Note what comes next; without arguments, nothing."""
        if self.file is not None:
            os.pwrite(self.file, json.dumps([case, contender]).ljust(240).encode(), 0)

    def crashed(self, case):
        """Contender -> part of its entry in a case."""
        return {
            contender: {"name": contender, "status": how, "reason": words}
            for own, contender, how, words in reversed(self.skip)
            if own in (case, None)
        }


def add_options(parser):
    """Options by which a guard speaks with the process; users have no need of them."""
    parser.add_argument("--doing", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
