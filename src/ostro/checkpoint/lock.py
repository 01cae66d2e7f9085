"""One run at a time in a folder of checkpoints: each would tidy up what the other is writing."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ostro.core.errors import CheckpointError
from ostro.distributed import World
from ostro.io import filesystem

_PATIENCE = 5.0  # seconds


@contextlib.contextmanager
def alone_in(folder: str, world: World) -> Iterator[None]:
    """Hold a run's folder on the first rank; `CheckpointError` on all says which process has it.

    The lock goes with the process, however that ends. Object stores, and file systems that lock no
    folders, are not held.
    """
    descriptor = fault = None
    if world.is_first and filesystem.is_local(folder):
        path = filesystem.locate(folder)[1]
        try:
            os.makedirs(path, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY)
            if not _lock(descriptor):
                advice = "wait for it or stop it, or give this run a trainer.id of its own"
                fault = f"{folder} - {_holder(path)} trains this run already - {advice}"
        except OSError as error:
            if descriptor is None:
                fault = f"{folder} - cannot be opened: {error} - change checkpointer.base_path"
    try:
        if fault := world.from_first(fault):
            raise CheckpointError(fault)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the folder is ours now. A process that was killed a moment ago may still hold it."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)


def _holder(path: str) -> str:
    """The process that holds the lock, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].endswith(f":{os.stat(path).st_ino}"):
                return f"process {fields[4]}"
    return "another process"
