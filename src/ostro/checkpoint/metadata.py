"""`metadata.json`: what a checkpoint is and which files belong to it. Pure: text in, value out."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ostro.errors import CheckpointError

FORMAT = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file of a checkpoint."""

    bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of its content, as 64 hexadecimal digits."""


@dataclass(frozen=True)
class Metadata:
    """The commit marker of a checkpoint, written after everything else."""

    step: int
    """0-based index of the last update in the state; a resumed run goes on with the next."""
    timestamp: float
    """When it was committed, in seconds since 1970 UTC: the newest one is resumed from."""
    is_temporary: bool
    """Whether the next save replaces it."""
    is_best: bool
    """Whether it was saved because an evaluation improved; only a better one replaces it then."""
    run_id: str
    """The id of the run that wrote it."""
    run_name: str
    """The name of that run: `load_checkpoint_path` finds runs by it."""
    files: Mapping[str, FileRecord]
    """Every other file of the checkpoint, by its name in the folder."""

    @property
    def num_bytes(self) -> int:
        """Size of all files but this one."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> str:
        """The text of `metadata.json`."""
        fields = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _FIELDS},
            "saved_at": datetime.fromtimestamp(self.timestamp, UTC).isoformat(timespec="seconds"),
            "files": {name: vars(record) for name, record in self.files.items()},
        }
        return json.dumps(fields, indent=2) + "\n"


_FIELDS = {
    "step": int, "timestamp": float, "is_temporary": bool, "is_best": bool, "run_id": str,
    "run_name": str,
}  # fmt: skip


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or a `CheckpointError` that names the file and what is wrong with it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} - is damaged, it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} - is damaged, it is not a JSON object")
    return value


def parse_metadata(data: bytes, where: str) -> Metadata:
    """Read `metadata.json`, trusting nothing in it: types, ranges and file names are checked."""
    value = read_json(data, where)
    version = value.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{where} - has format {version} of a newer ostro; this one reads 1")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(f"{where} - is not a checkpoint's: it has no format number")
    for name, kind in _FIELDS.items():
        if type(value.get(name)) is not kind:
            raise CheckpointError(f"{where} - is damaged: {name} is not of type {kind.__name__}")
    if value["step"] < 0 or not math.isfinite(value["timestamp"]):
        raise CheckpointError(f"{where} - is damaged: step or timestamp is out of range")
    files = value.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{where} - is damaged: files is not an object")
    records = {name: _parse_record(name, record, where) for name, record in files.items()}
    return Metadata(**{name: value[name] for name in _FIELDS}, files=records)


def _parse_record(name: str, record: Any, where: str) -> FileRecord:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{where} - is damaged: {name!r} is no plain file name")
    fields = record if isinstance(record, dict) else {}
    size, digest = fields.get("bytes"), fields.get("sha256")
    if type(size) is not int or size < 0:
        raise CheckpointError(f"{where} - is damaged: the record of {name} has no size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CheckpointError(f"{where} - is damaged: the record of {name} has no checksum")
    return FileRecord(size, digest)


def is_plain_name(name: str) -> bool:
    """Whether a file of a checkpoint may have this name: letters, digits, `_`, `-` and `.`."""
    return bool(_FILE_NAME.fullmatch(name))
