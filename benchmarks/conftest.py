"""`pytest benchmarks --benchmark-only` overrides the --benchmark-skip that pyproject.toml sets for the tests."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.getoption("benchmark_only", False):
        config.option.benchmark_skip = False
