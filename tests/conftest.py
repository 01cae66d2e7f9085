"""Settings for all tests."""

import os

# Before torch is imported, here and in the processes that tests start: workers of pytest-xdist
# share the cores, and threads that wait for one another make tiny runs several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from ostro import kernels


@pytest.fixture(autouse=True)
def _kernels_as_at_the_start():
    """What a run in this process chose is not for the tests after it."""
    yield
    kernels.enable(None)
