"""Step and commit time of a checkpoint file, in the comment that ends its zip archive.

`torch.load` and `zipfile` pass over the comment. A run with thousands of files finds the newest
without unpickling each: the last few hundred bytes of a file say what it is. They have a checksum
of their own; a file without them, as nanoGPT writes it, has to be opened.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ostro.checkpoint.metadata import YEAR_9999
from ostro.io.json_schema import matches_schema

_END = b"PK\x05\x06"  # the record that ends a zip archive: 22 bytes, then the comment
_END_BYTES = 22
_MOST = 1024
_SHAPE = {"step": int, "timestamp": float, "is_temporary": bool, "is_best": bool, "run_id": str}


@dataclass(frozen=True)
class Stamp:
    """What discovery and retention need to know of a checkpoint file."""

    step: int  # 0-based index of the last update
    timestamp: float = 0.0  # of the commit, in seconds since 1970; 0: the file does not say
    is_temporary: bool = False
    is_best: bool = False
    run_id: str = ""

    def write(self, path: Path) -> None:
        """Append it to a zip archive that has no comment yet."""
        text = json.dumps(asdict(self)).encode()
        comment = text + b"\n" + hashlib.sha256(text).hexdigest().encode()
        with open(path, "r+b") as file:
            end = file.seek(-_END_BYTES, os.SEEK_END)
            if len(comment) > _MOST - _END_BYTES or file.read(4) != _END:
                return  # found all the same, by opening the file
            file.seek(end + _END_BYTES - 2)
            file.write(len(comment).to_bytes(2, "little") + comment)

    @classmethod
    def read(cls, path: Path) -> "Stamp | None":
        """The stamp of a file; None where it has none, or not an intact one."""
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST))
            tail = file.read(_MOST)
        _, found, rest = tail.rpartition(_END)
        comment = rest[_END_BYTES - len(_END) :]
        length = int.from_bytes(rest[_END_BYTES - len(_END) - 2 :][:2], "little")
        text, _, digest = comment.rpartition(b"\n")
        if not found or length != len(comment) or not text:
            return None
        if digest != hashlib.sha256(text).hexdigest().encode():
            return None
        try:
            value = json.loads(text)
        except ValueError:
            return None
        if not matches_schema(value, _SHAPE) or not 0 <= value["timestamp"] < YEAR_9999:
            return None
        return cls(**{name: value[name] for name in _SHAPE})
