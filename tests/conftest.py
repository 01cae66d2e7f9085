"""Settings for all tests."""

import os
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: workers of pytest-xdist
# share the cores, and threads that wait for one another make tiny runs several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from ostro import kernels

FAST = (
    "core",
    "config",
    "io",
    "nn",
    "optim",
    "models",
    "tracker",
    "generate",
    "checkpoint",
    "data",
)
"""Folders whose tests take milliseconds, but for those below."""
SLOW = {
    "checkpoint/test_kill.py": "kills processes",
    "data/test_on_ray.py": "starts a cluster",
    "data/test_prepare.py": "starts the scripts",
    "models/test_hf.py": "loads transformers",
    "models/test_parity.py": "loads transformers",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `pytest -m fast` runs: no processes, no commands, nothing that takes seconds."""
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests)
        is_slow = str(path) in SLOW or any(map(item.get_closest_marker, ("dist", "cli", "gpu")))
        if not is_slow and (path.parts[0] in FAST or path.name == "test_architecture.py"):
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def _kernels_as_at_the_start():
    """What a run in this process chose is not for the tests after it."""
    yield
    kernels.enable(None)
