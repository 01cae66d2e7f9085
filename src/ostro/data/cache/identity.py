"""What a file's content is known by, and when it has to be read again to be sure.

A source file is hashed whole while it is tokenised. Its stamp (size, times of change, inode) then
stands for that hash: while the stamp is the same, later starts do not read the file; when anything
differs, it is hashed again and its content decides. For example, `touch a.txt` costs one reading of
`a.txt` at the next start, and an edit that keeps the size is noticed.

Stamps are kept beside the cache, in `.stamps.json`; what stands for all of them together when the
files were last compared one by one, in `.listing`. They are not part of it: they say something
about this machine's files, and without them every file is hashed again.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ostro.core.errors import DataError

Stamp = tuple[int, int, int, int]
"""Size, modification and change time in nanoseconds, inode."""

STAMPS = ".stamps.json"
LISTING = ".listing"
_WHOLE = "whole:"  # begins the fingerprint of a large file of which every byte was read
_SMALL_FILE = 16 << 20  # bytes up to which earlier versions read a file whole, too
_BLOCK = 1 << 16
_TICK, _COARSE_TICK = 20_000_000, 2_000_000_000  # ns within which two changes may look like one


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class ContentHash:
    """The fingerprint of a file of which all bytes are passed by in their order."""

    def __init__(self, size: int):
        self._digest = hashlib.sha256(str(size).encode())
        self._prefix = _WHOLE if size > _SMALL_FILE else ""

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._digest.update(data)

    def fingerprint(self) -> str:
        """The fingerprint of what was passed by."""
        return self._prefix + self._digest.hexdigest()[:32]


def whole_hash(file: BinaryIO, size: int) -> str:
    """The fingerprint of an open file."""
    content = ContentHash(size)
    while block := file.read(1 << 20):
        content.update(block)
    return content.fingerprint()


def sampled_hash(file: BinaryIO, size: int) -> str:
    """As earlier versions knew a file: large ones by size and evenly spaced blocks."""
    if size <= _SMALL_FILE:
        return whole_hash(file, size)
    digest = hashlib.sha256(str(size).encode())
    for index in range(64):
        file.seek(index * (size - _BLOCK) // 63)
        digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def is_sampled(fingerprint: str, size: int) -> bool:
    """Whether a fingerprint is one by which changes between the sampled blocks go unseen."""
    return size > _SMALL_FILE and not fingerprint.startswith(_WHOLE)


def hash_of(path: str, *, sampled: bool = False) -> str:
    """The fingerprint of a file; `OSError` where it cannot be read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return sampled_hash(file, size) if sampled else whole_hash(file, size)


def combined(fingerprints: Sequence[str]) -> str:
    """One fingerprint of several files."""
    prefix = _WHOLE if any(each.startswith(_WHOLE) for each in fingerprints) else ""
    return prefix + hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:32]


def require_unchanged(path: str, stamp: Stamp) -> None:
    """`DataError` where a file is no longer as it was listed."""
    if stamp_of(os.stat(path)) != stamp:
        raise DataError(
            f"{path} - changed while it was read - start again once nothing writes to it; what was"
            " made of the files before it is kept"
        )


class Stamps:
    """Fingerprints by the stamps of the files they were made from, kept in a folder."""

    def __init__(self, folder: Path):
        self._path = folder / STAMPS
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}
        self.were_kept = False
        self._since = time.time_ns()
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known: Any = json.loads(self._path.read_bytes())
            if isinstance(known, dict) and all(type(each) is str for each in known.values()):
                known.pop("listing", None)  # of a version that kept it here
                self._known, self.were_kept = known, True

    def get(self, stamps: Sequence[Stamp]) -> str | None:
        """The fingerprint of files with these stamps."""
        key = _key(stamps)
        fingerprint = self._known.get(key)
        if fingerprint is not None:
            self._new[key] = fingerprint
        return fingerprint

    def put(self, stamps: Sequence[Stamp], fingerprint: str) -> None:
        """Note the fingerprint of files that were read since this object was made.

        One that was changed just before might be changed again within the same tick of the clock,
        and no stamp would show it: it is hashed again the next time.
        """
        for _, modified, changed, _ in stamps:
            is_coarse = modified % 1_000_000_000 == changed % 1_000_000_000 == 0
            if max(modified, changed) + (_COARSE_TICK if is_coarse else _TICK) > self._since:
                return
        self._new[_key(stamps)] = fingerprint

    def save(self) -> None:
        """Keep what was asked for or noted, if the folder lets us."""
        if self._new != self._known:
            with contextlib.suppress(OSError):
                write_whole(self._path, json.dumps(self._new).encode())


def _key(stamps: Sequence[Stamp]) -> str:
    if len(stamps) == 1:
        return "{:x}.{:x}.{:x}.{:x}".format(*stamps[0])
    return hashlib.sha256(repr(list(stamps)).encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write beside and move into place, durable when it returns.

    Several processes may do so at once: each writes a file of its own, and the last one stands.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
