"""Where files of remote checkpoints lie while a process reads them.

Each folder in the temporary folder is locked by the process that made it. The lock goes when the
process ends, in whatever way; a folder without one was left by a process that was killed, and is
deleted by the next that makes one.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_PREFIX = "ostro-checkpoint-locked-"
_BEGUN = "ostro-checkpoint-new-"  # empty, and not locked yet


class Downloads:
    """A temporary folder that is deleted with this object, with the process, or by the next one."""

    def __init__(self) -> None:
        delete_left_behind()
        begun = tempfile.mkdtemp(prefix=_BEGUN)
        descriptor = os.open(begun, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system that locks no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = begun.replace(_BEGUN, _PREFIX)
            os.rename(begun, locked)
            begun = locked
        self.folder = begun
        self._end = weakref.finalize(self, _delete, self.folder, descriptor)


def _delete(folder: str, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def delete_left_behind() -> None:
    """Delete such folders of processes that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or deleted by another process
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
