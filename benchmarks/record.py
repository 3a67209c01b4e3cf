"""What `make gpu` and `make gpu-tune` share: options, and a record that is written after every step."""

import argparse
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from . import ROOT, machine, report
from .guard import Process


class Run:
    """A run on a device: its options, its deadline, what is known so far, and where that is written.

    `<prefix><device>-<date>-<commit>.json` holds the document, the .md beside it what `markdown` returns.
    """

    prefix = ""

    def __init__(self, options, **document):
        self.options, self.device = options, torch.device(options.device)
        self.begin, self.lock = time.monotonic(), threading.RLock()
        self.document = machine.facts(self.device) | document | {"seconds": 0, "complete": False}
        parts = self.document["device"], self.document["date"][:10], (self.document["commit"] or "unknown")[:12]
        name = "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
        self.path = options.results / f"{self.prefix}{name}.json"

    def left(self):
        return self.begin + self.options.seconds - time.monotonic()

    def know(self, section, name, value):
        """Add what is known of an operator or a space."""
        with self.lock:
            self.document[section][name] = value
            self.save()

    def save(self):
        with self.lock:
            self.document["seconds"] = round(time.monotonic() - self.begin, 1)
            report.write(self.path, self.document)
            report.write_text(self.path.with_suffix(".md"), self.markdown())

    def execute(self, work):
        """Do all work; an interruption ends its processes and leaves what is known."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        Process.stopped.clear()
        self.options.results.mkdir(parents=True, exist_ok=True)
        self.save()
        try:
            work()
            self.document["complete"] = True
        except KeyboardInterrupt:
            Process.stop_all()
            print("interrupted", file=sys.stderr)
            self.settle()
        self.save()

    def settle(self):
        """After an interruption."""


def parser(name, description, seconds):
    """Options of every run."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.partition("\n")[0])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to")
    options.add_argument("--seconds", type=float, default=seconds, help="for everything; default %(default)s")
    return options


def parse(options, argv, **lists):
    """Parsed options; `lists` are those that take a comma-separated list of known names, all by default.

    Exits with status 2 and one line for an unknown name, or without a GPU.
    """
    for key, known in lists.items():
        options.add_argument(f"--{key}", default=",".join(known), help=f"comma-separated; default: {', '.join(known)}")
    parsed, module = options.parse_args(argv), options.prog.rpartition(" ")[2]
    for key, known in lists.items():
        setattr(parsed, key, getattr(parsed, key).split(","))
        for name in getattr(parsed, key):
            if name not in known:
                options.exit(2, f"{module}: no {key[:-1]} {name!r}; there is: {', '.join(known)}\n")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        options.exit(2, f"{module}: PyTorch sees no GPU here; nothing was run\n")
    return parsed
