"""Where and how the tests run: Triton's interpreter where there is no GPU, repeatable hypothesis runs."""

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this when it is first imported. Tests that compile start a process without it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# Workers with OpenMP threads on the same cores would wait for each other most of the time.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=80,
    report_multiple_bugs=False,  # shrinking each takes minutes under Triton's interpreter
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_configure(config):
    # NumPy reports infinities and NaN, which kernels compute on purpose.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    # Triton 3.6 converts arrays to scalars in a way that NumPy deprecates.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU"))


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped, a line for each reason."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped, {reason.removeprefix('Skipped: ')}")
