"""A pytest plugin for `make gpu`: tests of CUDA C++ come first, then Triton's, then the reference's.

One JSON line per test goes to $PRUNEOPS_TALLY as it ends, so that a killed run leaves them; the first line says how
many tests there are of each kind.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

KINDS = ("cuda", "other", "triton", "reference")  # in this order


def kind(test):
    """What a test is of, by its name, as `contract.on_targets` makes it."""
    return next((name for name in KINDS if f"{name}-cuda" in test), "other")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: KINDS.index(kind(item.nodeid)))


class Tally:
    def __init__(self, path):
        self.file = open(path, "a", buffering=1)  # noqa: SIM115, open as long as the session
        self.counted = False

    def count(self, tests):
        if not self.counted and tests:
            self.counted = True
            print(json.dumps({"kinds": Counter(map(kind, tests))}), file=self.file)

    def pytest_collection_finish(self, session):
        self.count([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.count(ids)

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if outcome == "failed" and report.when != "call":
            outcome = "error"  # in a fixture, or of a worker that died
        bad = outcome in ("failed", "error")
        if report.when == "call" or bad or (report.when == "setup" and outcome == "skipped"):
            print(json.dumps({"test": report.nodeid, "outcome": outcome, "seconds": report.duration}), file=self.file)


def pytest_configure(config):
    path = os.environ.get("PRUNEOPS_TALLY")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers send their reports to the controller
        config.pluginmanager.register(Tally(path), "pruneops-tally")


def read(path):
    """{"counts": by outcome, "kinds": kind -> [ended, all], "bad": tests that failed or had an error, "slowest":
    [[test, seconds], ...]}."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    tests, kinds = {}, {}
    for entry in map(json.loads, lines):
        if "kinds" in entry:
            kinds = entry["kinds"]
            continue
        before = tests.get(entry["test"])
        if before is None or before["outcome"] not in ("failed", "error"):
            tests[entry["test"]] = entry
    counts, ended = Counter(entry["outcome"] for entry in tests.values()), Counter(map(kind, tests))
    bad = [name for name, entry in tests.items() if entry["outcome"] in ("failed", "error")]
    slowest = sorted(((name, round(entry["seconds"], 1)) for name, entry in tests.items()), key=lambda pair: -pair[1])
    return {
        "counts": {outcome: counts[outcome] for outcome in ("passed", "failed", "error", "skipped")},
        "kinds": {name: [ended[name], kinds[name]] for name in KINDS if name in kinds},
        "bad": bad,
        "slowest": [list(pair) for pair in slowest[:10]],
    }
