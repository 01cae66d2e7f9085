"""`metadata.json`: what a checkpoint is and which files belong to it. Pure: text in, value out."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from ostro.config.files import MAX_BYTES
from ostro.core.errors import CheckpointError
from ostro.io.json_schema import FILE_NAME, matches_schema, read_object

FORMAT = 3
VALUES = "values.json"
"""What is no tensor: step, best loss, tracker ids ..."""
SHARDS = "shards.json"
"""Where the pieces of tensors lie that several ranks saved."""
_CHECKSUM = b',\n  "sha256": "'
"""Stands between the text and the checksum of all that comes before it; since format 3."""
YEAR_9999 = 253_370_764_800  # later ones cannot be written as a date
_LONGEST_NUMBER = 100  # characters
_RECORD = {"bytes": int, "sha256": re.compile(r"[0-9a-f]{64}")}


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 (64 hexadecimal digits) of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Metadata:
    """The commit marker of a checkpoint, written after everything else."""

    step: int  # 0-based index of the last update in the state; resuming goes on with the next
    timestamp: float  # of the commit, in seconds since 1970 UTC; resuming takes the newest
    is_temporary: bool  # the next save replaces it
    is_best: bool  # an evaluation improved: if temporary, only a better one replaces it
    run_id: str
    run_name: str  # `load_checkpoint_path` finds runs by it
    files: Mapping[str, FileRecord]  # every other file, by its name in the folder

    def to_json(self) -> str:
        """The text of `metadata.json`."""
        fields = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _FIELDS},
            "saved_at": datetime.fromtimestamp(self.timestamp, UTC).isoformat(timespec="seconds"),
            "files": {name: vars(record) for name, record in self.files.items()},
        }
        return sealed(fields)


_FIELDS = {
    "step": int, "timestamp": float, "is_temporary": bool, "is_best": bool, "run_id": str,
    "run_name": str,
}  # fmt: skip


def sealed(fields: Mapping[str, Any]) -> str:
    """A JSON object as text, with a checksum of that text as its last entry."""
    text = json.dumps(fields, indent=2).removesuffix("\n}")
    own = hashlib.sha256(text.encode()).hexdigest()
    return f'{text}{_CHECKSUM.decode()}{own}"\n}}\n'


class _PlainLoader(yaml.SafeLoader):
    """Reads what we write: no aliases, which could stand for 2**60 values, no endless numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias, and ostro writes none")
        node = super().compose_node(parent, index)
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"it holds a number of {len(node.value)} digits")
        return node


def read_settings(text: str, where: str) -> dict[str, Any]:
    """The `config.yaml` of a checkpoint as plain values, or a `CheckpointError`."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        value = _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} - its config.yaml is damaged: {error}") from error
    sections = isinstance(value, dict) and [value.get("model"), value.get("trainer")]
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise CheckpointError(f"{where} - its config.yaml is damaged: it lacks model or trainer")
    return value


def parse_metadata(data: bytes, where: str) -> Metadata:
    """Read `metadata.json`, trusting nothing in it: types, ranges and file names are checked."""
    value = read_object(data, where, CheckpointError)
    version = value.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where} - is not a checkpoint's: it has no format number")
    if version > FORMAT:
        raise CheckpointError(f"{where} - has format {version} of a newer ostro")
    if version >= 3 or "sha256" in value:  # older ones have no checksum of their own
        text, _, own = data.rpartition(_CHECKSUM)
        if own != f'{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode():
            raise CheckpointError(f"{where} - is damaged: its content differs from its checksum")
    if not matches_schema(value, _FIELDS | {"files": {FILE_NAME: _RECORD}}):
        raise CheckpointError(f"{where} - is damaged: not what ostro writes there")
    files = {name: FileRecord(r["bytes"], r["sha256"]) for name, r in value["files"].items()}
    numbers = [value["step"], *(record.bytes for record in files.values())]
    if min(numbers) < 0 or not 0 <= value["timestamp"] < YEAR_9999:
        raise CheckpointError(f"{where} - is damaged: step, timestamp or a size is out of range")
    return Metadata(**{name: value[name] for name in _FIELDS}, files=files)
