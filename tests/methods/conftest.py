"""Methods run on the default backend and on the reference."""

import pytest

import pruneops


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with pruneops.backend(request.param):
        yield request.param
