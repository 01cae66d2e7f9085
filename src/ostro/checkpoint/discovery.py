"""Finding checkpoints: the newest intact one to start from, and all that lie below a folder.

A start reads the marker of every checkpoint, and nothing else: their order follows from the commit
time and the step in it. Only the newest is then opened and compared with its checksums, and the
one before it where that is damaged.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ostro.checkpoint.metadata import Metadata, parse_metadata
from ostro.checkpoint.retention import Entry, to_delete, total_bytes
from ostro.checkpoint.saved import WEIGHTS, Saved, load, read_metadata
from ostro.checkpoint.single_file import (
    INTERRUPTED,
    LATEST,
    NANOGPT,
    WANTED,
    SavedFile,
    load_file,
    pointed_folder,
    read_stamp,
)
from ostro.checkpoint.stamp import Stamp
from ostro.core.errors import CheckpointError
from ostro.core.redaction import local_path
from ostro.core.units import format_bytes
from ostro.distributed import World
from ostro.io import filesystem
from ostro.io.retry import UnreachableError

_log = logging.getLogger(__name__)
ALONE = World(torch.device("cpu"))
_MOST_LISTED = 8


@dataclass
class Found:
    """What looks like a checkpoint at or below a path."""

    folders: list[tuple[str, Metadata]] = field(default_factory=list)
    files: list[tuple[str, Stamp]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What is wrong with each that does not even say which step it is of."""

    @property
    def newest_first(self) -> list[str]:
        """All of them, by commit time, then by step."""
        ages = [(metadata.timestamp, metadata.step, path) for path, metadata in self.folders]
        ages += [(stamp.timestamp, stamp.step, path) for path, stamp in self.files]
        return [path for *_, path in sorted(ages, reverse=True)]


def look(path: str) -> Found:
    """Read what says which step and of when, of every checkpoint at or below a folder."""
    tree, found = filesystem.look(path, WANTED), Found()
    for folder, marker in tree.markers:
        where = f"{folder}/{filesystem.MARKER}"
        try:
            if isinstance(marker, Exception):
                raise CheckpointError(f"{where} - cannot be read: {marker}")
            found.folders.append((folder, parse_metadata(marker, where)))
        except CheckpointError as error:
            found.faults.append(str(error))
    for folder in tree.unmarked:
        found.faults.append(f"{folder}/{filesystem.MARKER} - is missing from the checkpoint")
    stamps: dict[str, Stamp] = {}
    for file in tree.files:
        try:
            if not _is_pointer(file):
                stamps[file] = read_stamp(file)
        except CheckpointError as error:
            found.faults.append(str(error))
    found.files = list(_distinct(stamps).items())
    return found


def _is_pointer(file: str) -> bool:
    return file.endswith(f"/{LATEST}") and pointed_folder(Path(file).expanduser()) is not None


def _distinct(stamps: dict[str, Stamp]) -> dict[str, Stamp]:
    """The stamps without those of files that are another's copy, comparable within a folder."""
    known = {(os.path.dirname(f), s) for f, s in stamps.items() if not f.endswith(f"/{LATEST}")}
    kept = {}
    for file, stamp in stamps.items():
        folder, name = os.path.split(file)
        if name == LATEST and (folder, stamp) in known:
            continue
        other = {NANOGPT: INTERRUPTED, INTERRUPTED: NANOGPT}.get(name)
        beside = stamps.get(f"{folder}/{other}")
        if beside is not None and not stamp.timestamp:
            # nanoGPT writes down no time: between these two the step decides.
            stamp = replace(stamp, timestamp=beside.timestamp)
        kept[file] = stamp
    return kept


def scan(path: str) -> list[tuple[str, Metadata]]:
    """Every complete checkpoint folder at or below `path`, newest first.

    A damaged one is named in a warning and skipped; contents are not compared with checksums.
    """
    return _complete(look(path))


def _complete(found: Found) -> list[tuple[str, Metadata]]:
    complete, faults = [], list(found.faults)
    for folder, _ in found.folders:
        try:
            complete.append((folder, read_metadata(folder)))
        except CheckpointError as error:
            faults.append(str(error))
    _warn(faults)
    return sorted(complete, key=lambda pair: (pair[1].timestamp, pair[1].step), reverse=True)


def _warn(faults: Sequence[str]) -> None:
    for fault in faults[:_MOST_LISTED]:
        _log.warning("skipping a damaged checkpoint: %s", fault)
    if len(faults) > _MOST_LISTED:
        _log.warning("and %d more damaged checkpoints", len(faults) - _MOST_LISTED)


def entries(path: str) -> list[Entry]:
    """Every complete checkpoint at or below `path`, folders and files, newest first.

    Contents are not compared with checksums. A damaged one is named in a warning and skipped.
    """
    found = look(path)
    all_of_them = [
        Entry(
            folder,
            m.step,
            filesystem.size(folder),
            m.timestamp,
            m.is_temporary,
            m.is_best,
            m.run_id,
        )
        for folder, m in _complete(found)
    ]
    all_of_them += [
        Entry(file, s.step, filesystem.size(file), s.timestamp, s.is_temporary, s.is_best, s.run_id)
        for file, s in found.files
    ]
    return sorted(all_of_them, key=lambda entry: (entry.timestamp, entry.step), reverse=True)


def open_entry(entry: Entry) -> Saved | SavedFile:
    """Open a checkpoint that was found; its tensors are not compared with their checksums yet."""
    is_file = entry.path.endswith(".pt")
    return load_file(entry.path, check=False) if is_file else load(entry.path)


@dataclass(frozen=True)
class Verdict:
    """What comparing a checkpoint with its checksums came to."""

    path: str
    fault: str = ""  # empty: it is intact
    has_weights: bool = True  # those are intact whatever else is not


def verified(path: str) -> Iterator[Verdict]:
    """Every checkpoint at or below `path` and what is wrong with it, checksums compared.

    A folder named as one that never became complete, or no longer is, counts too.
    """
    path = path.rstrip("/") or path
    if _is_file(path):
        yield _verdict(path)
        return
    tree = filesystem.look(path, WANTED)
    folders = {folder for folder, _ in tree.markers} | set(tree.unmarked)
    for parent in {path, *(folder.rpartition("/")[0] or "." for folder in folders - {path})}:
        names = filesystem.names(parent)
        folders |= {f"{parent}/{name}" for name in names if filesystem.STEP.fullmatch(name)}
    if not folders and filesystem.STEP.fullmatch(path.rpartition("/")[2]):
        folders.add(path)
    files = [file for file in tree.files if not file.endswith(f"/{LATEST}")]
    for place in sorted(folders, key=lambda name: (name.rpartition("/")[0], len(name), name)):
        yield _verdict(place)
    for file in files:
        yield _verdict(file)


def _verdict(place: str) -> Verdict:
    fault = ""
    for weights in (False, True):
        try:
            _open(place, weights=weights)
        except CheckpointError as error:
            fault = fault or str(error)
        else:
            return Verdict(place, fault)
    return Verdict(place, fault, has_weights=False)


def delete(entry: Entry, why: str) -> None:
    """Delete a checkpoint, and say so."""
    try:
        if entry.path.endswith(".pt"):
            os.unlink(entry.path)
        else:
            filesystem.remove(entry.path)
    except OSError as error:
        raise CheckpointError(f"{entry.path} - cannot be deleted: {error}") from error
    size = format_bytes(entry.bytes)
    _log.info(
        "deleted %s (step %d, %d bytes, %s): %s", entry.path, entry.step, entry.bytes, size, why
    )


def make_room(folder: str, run_id: str, keep_bytes: int, need: int, step: int) -> None:
    """Delete what has to go so that a run's checkpoints and `need` more bytes take `keep_bytes`.

    Where that cannot be had nothing is deleted, and a `CheckpointError` says what to do.
    """
    own = [entry for entry in entries(folder) if entry.run_id == run_id]
    doomed = to_delete(own, keep_bytes - need, step)
    left = total_bytes(own) - total_bytes(doomed)
    if left + need > keep_bytes:
        raise CheckpointError(
            f"checkpointer.keep_bytes = {keep_bytes} - {folder} needs {left + need} bytes"
            f" ({format_bytes(left + need)}) for this checkpoint and those that always stay, the"
            " newest and the best - raise it to that, or to null; nothing was deleted"
        )
    for entry in doomed:
        delete(entry, f"checkpointer.keep_bytes = {keep_bytes}")


@dataclass(frozen=True)
class Search:
    """What a search for the newest checkpoint came to."""

    saved: Saved | SavedFile | None
    faults: Sequence[str] = ()
    """What is wrong with those that had to be skipped, newest first."""

    def complaint(self, path: str, purpose: str) -> str:
        """What each of several checkpoints lacks that cannot be used for a purpose."""
        if self.faults == [self.faults[0]] and self.faults[0].startswith(f"{path} - "):
            return self.faults[0]
        count = len(self.faults)
        what = "1 checkpoint, and it" if count == 1 else f"{count} checkpoints, and none of them"
        lines = [f"{path} - holds {what} can{'not' if count == 1 else ''} be {purpose}:"]
        lines += self.faults[:_MOST_LISTED]
        if count > _MOST_LISTED:
            lines.append(f"and {count - _MOST_LISTED} more")
        return "\n  ".join(lines)


def search(path: str, world: World = ALONE, *, weights: bool = False) -> Search:
    """Look for the newest intact checkpoint at or anywhere below `path`, checksums compared.

    The ranks of a `world` call it together: they share the work and agree on the answer.

    `path` may be a checkpoint, folder or file, a run's folder, or one further up. Where there is
    no such folder its last part is taken for a run's name, looked up in the checkpoints below its
    parent. `weights`: what lacks all but intact weights will do.
    """
    path = local_path(path).rstrip("/") or path
    outcome: Any = None
    if world.is_first:
        try:
            outcome = _candidates(path)
        except CheckpointError as error:
            outcome = error
    outcome = world.from_first(outcome)
    if isinstance(outcome, CheckpointError):
        raise outcome
    candidates, faults = outcome
    skipped: list[str] = []
    for candidate in candidates:
        saved, fault, known = None, "", True
        try:
            saved = _open(candidate, world, weights=weights)
        except CheckpointError as error:
            fault, known = str(error), not isinstance(error, UnreachableError)
        if found := [pair for pair in world.gather((fault, known)) if pair[0]]:
            for fault, known in found:
                if not known:  # an older one would lose what may well be there
                    raise UnreachableError(fault)
            skipped.append(found[0][0])
        else:
            _warn([*skipped, *faults])
            return Search(saved, [*skipped, *faults])
    return Search(None, [*skipped, *faults])


def find_latest(
    path: str, world: World = ALONE, *, weights: bool = False
) -> Saved | SavedFile | None:
    """The newest intact checkpoint that `search` finds; None where there is none at all.

    A damaged checkpoint is named in a warning and the one before it is taken. Raises a
    `CheckpointError` that lists what is wrong where there are checkpoints and all are damaged.
    """
    found = search(path, world, weights=weights)
    if found.saved is None and found.faults:
        raise CheckpointError(found.complaint(path, "used"))
    return found.saved


def _open(path: str, world: World = ALONE, *, weights: bool) -> Saved | SavedFile:
    """Open a checkpoint and compare this rank's share of it with its checksums."""
    if _is_file(path):
        saved = load_file(path)
    else:
        saved = load(path, weights=weights)
        saved.verify(world.rank, world.num_ranks, [WEIGHTS] if weights else [])
    if saved.lacks and not weights:
        raise CheckpointError(saved.lacks)
    return saved


def _is_file(path: str) -> bool:
    return filesystem.is_local(path) and Path(path).expanduser().is_file()


def _candidates(path: str) -> tuple[list[str], list[str]]:
    """Folders and files that are checkpoints, newest first, and what is wrong with others."""
    if _is_file(path):
        return [pointed_folder(Path(path).expanduser()) or path], []
    if filesystem.is_folder(path):
        found = look(path)
        return found.newest_first, found.faults
    parent, _, name = path.rpartition("/")
    parent = parent if parent or path.startswith("/") else "."
    found = look(parent) if filesystem.is_folder(parent or "/") else Found()
    named = [(folder, m) for folder, m in found.folders if m.run_name == name]
    return Found(named).newest_first, []
