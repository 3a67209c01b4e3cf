"""A pytest plugin: one JSON line per test to $PRUNEOPS_TALLY as it ends, so that a killed run leaves them."""

import json
import os
from collections import Counter
from pathlib import Path


class Tally:
    def __init__(self, path):
        self.file = open(path, "a", buffering=1)  # noqa: SIM115, open as long as the session

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
    """{"counts": by outcome, "bad": tests that failed or had an error, "slowest": [[test, seconds], ...]}."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    tests = {}
    for entry in map(json.loads, lines):
        before = tests.get(entry["test"])
        if before is None or before["outcome"] not in ("failed", "error"):
            tests[entry["test"]] = entry
    counts = Counter(entry["outcome"] for entry in tests.values())
    bad = [name for name, entry in tests.items() if entry["outcome"] in ("failed", "error")]
    slowest = sorted(((name, round(entry["seconds"], 1)) for name, entry in tests.items()), key=lambda pair: -pair[1])
    return {
        "counts": {outcome: counts[outcome] for outcome in ("passed", "failed", "error", "skipped")},
        "bad": bad,
        "slowest": [list(pair) for pair in slowest[:10]],
    }
