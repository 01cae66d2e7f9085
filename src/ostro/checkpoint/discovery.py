"""Finding the checkpoint to start from: the newest complete one, and which folder counts."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ostro.checkpoint import storage
from ostro.checkpoint.metadata import Metadata
from ostro.checkpoint.retention import Entry, to_delete, total_bytes
from ostro.checkpoint.saved import Saved, load, read_metadata
from ostro.checkpoint.single_file import SavedFile, files_below, load_file, pointed_folder
from ostro.checkpoint.store import STEP
from ostro.distributed import World
from ostro.errors import CheckpointError
from ostro.secrets import local_path
from ostro.units import format_bytes

_log = logging.getLogger(__name__)
_ALONE = World(torch.device("cpu"))


def scan(path: str) -> list[tuple[str, Metadata]]:
    """Every complete checkpoint at or below `path`, newest first: by commit time, then step.

    A damaged one is named in a warning and left out; contents are not compared with checksums.
    """
    found = []
    for folder in storage.below(path):
        try:
            found.append((folder, read_metadata(folder)))
        except CheckpointError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
    return sorted(found, key=lambda pair: (pair[1].timestamp, pair[1].step), reverse=True)


def entries(path: str) -> list[Entry]:
    """Every complete checkpoint at or below `path`, folders and files, newest first.

    Contents are not compared with checksums. A damaged one is named in a warning and left out.
    """
    found = [
        Entry(
            folder, m.step, storage.size(folder), m.timestamp, m.is_temporary, m.is_best, m.run_id
        )
        for folder, m in scan(path)
    ]
    for timestamp, file in files_below(path):
        try:
            saved = load_file(file, check=False)
        except CheckpointError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
            continue
        marks = {name: bool(saved.values.get(name)) for name in ("is_temporary", "is_best")}
        run_id = str(saved.values.get("run_id", ""))
        found.append(Entry(file, saved.step, storage.size(file), timestamp, run_id=run_id, **marks))
    return sorted(found, key=lambda entry: (entry.timestamp, entry.step), reverse=True)


def open_entry(entry: Entry) -> Saved | SavedFile:
    """Open a checkpoint that was found; its tensors are not compared with their checksums yet."""
    is_file = entry.path.endswith(".pt")
    return load_file(entry.path, check=False) if is_file else load(entry.path)


def verified(path: str) -> Iterator[tuple[str, str | None]]:
    """Every checkpoint at or below `path` and what is wrong with it, checksums compared.

    A folder named as one that never became complete, or no longer is, counts too.
    """
    path = path.rstrip("/") or path
    folders = set(storage.below(path))
    for parent in {path, *(folder.rpartition("/")[0] or "." for folder in folders - {path})}:
        folders |= {f"{parent}/{name}" for name in storage.names(parent) if STEP.fullmatch(name)}
    if not folders and STEP.fullmatch(path.rpartition("/")[2]):
        folders.add(path)
    files = [file for _, file in files_below(path)]
    places = sorted(folders, key=lambda name: (name.rpartition("/")[0], len(name), name))
    for place in [*places, *files]:
        try:
            if place in files:
                load_file(place)
            else:
                load(place).verify()
        except CheckpointError as error:
            yield place, str(error)
        else:
            yield place, None


def delete(entry: Entry, why: str) -> None:
    """Delete a checkpoint, and say so."""
    try:
        if entry.path.endswith(".pt"):
            os.unlink(entry.path)
        else:
            storage.remove(entry.path)
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


def find_latest(path: str, world: World = _ALONE) -> Saved | SavedFile | None:
    """The newest intact checkpoint at or anywhere below `path`, checksums compared.

    The ranks of a `world` call it together: they share the work and agree on the answer.

    `path` may be a checkpoint, folder or file, a run's folder, or one further up. Where there is
    no such folder its last part is taken for a run's name, looked up in the checkpoints below its
    parent. A damaged checkpoint is named in a warning and the one before it is taken.
    """
    path = local_path(path).rstrip("/") or path
    if storage.is_local(path) and Path(path).expanduser().is_file():
        folder = pointed_folder(Path(path).expanduser())
        return load_file(path) if folder is None else load(folder)
    for candidate in world.from_first(_candidates(path) if world.is_first else []):
        saved, fault = None, ""
        try:
            saved = load_file(candidate) if candidate.endswith(".pt") else load(candidate)
            if isinstance(saved, Saved):
                saved.verify(world.rank, world.num_ranks)
        except CheckpointError as error:
            fault = str(error)
        if faults := [fault for fault in world.gather(fault) if fault]:
            _log.warning("skipping a damaged checkpoint: %s", faults[0])
        else:
            return saved
    return None


def _candidates(path: str) -> list[str]:
    """Folders and files that look like checkpoints, newest first."""
    if not storage.is_folder(path):
        parent, _, name = path.rpartition("/")
        parent = parent if parent or path.startswith("/") else "."
        found = scan(parent) if storage.is_folder(parent or "/") else []
        return [folder for folder, metadata in found if metadata.run_name == name]
    found = [(metadata.timestamp, metadata.step, folder) for folder, metadata in scan(path)]
    found += [(timestamp, 0, file) for timestamp, file in files_below(path)]
    return [place for *_, place in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Decision:
    """What a run starts from, and what to tell the user about it."""

    saved: Saved | SavedFile | None  # whose full state is restored; None: a start from scratch
    source: Literal["own", "load_checkpoint_path", "initialize_from", "scratch"]
    message: str  # one line for the log
    warnings: tuple[str, ...] = ()  # what did not happen as the settings may have meant


def which_checkpoint(
    own: str,
    *,
    world: World = _ALONE,
    load_checkpoint: bool | None = None,
    load_checkpoint_path: str | None = None,
    initialize_from: str | None = None,
) -> Decision:
    """Decide, on all ranks of `world` together, what a run starts from.

    The run's `own` folder comes first, so that a run that was interrupted goes on whatever it
    once started from; then `load_checkpoint_path`, then `initialize_from`, then nothing.
    `load_checkpoint` true makes it an error to find nothing to resume, false skips both
    searches. Raises `CheckpointError` naming every place that was looked at.
    """
    warnings: list[str] = []
    if load_checkpoint is False:
        if load_checkpoint_path is not None:
            warnings.append(
                f"load_checkpoint_path = {load_checkpoint_path} - not used, for load_checkpoint is "
                "false"
            )
        if initialize_from is None and _candidates(own):
            warnings.append(
                f"{own} holds checkpoints of an earlier run; this one starts anew and replaces"
                " those of the same name"
            )
    else:
        if (saved := find_latest(own, world)) is not None:
            return Decision(saved, "own", f"resuming from {saved}")
        if load_checkpoint_path is not None:
            if (saved := find_latest(load_checkpoint_path, world)) is not None:
                return Decision(saved, "load_checkpoint_path", f"continuing from {saved}")
            warnings.append(
                f"load_checkpoint_path = {load_checkpoint_path} - no complete checkpoint there"
            )
        if load_checkpoint:
            places = [own] if load_checkpoint_path is None else [own, load_checkpoint_path]
            raise CheckpointError(
                f"load_checkpoint = true - no complete checkpoint below {' or '.join(places)} - "
                "give another load_checkpoint_path, or load_checkpoint: null to start anew"
            )
    if initialize_from is None:
        return Decision(None, "scratch", "starting from scratch", tuple(warnings))
    if (saved := find_latest(initialize_from, world)) is None:
        raise CheckpointError(
            f"initialize_from = {initialize_from} - no complete checkpoint there or below - "
            "give a checkpoint's folder (step-<k>) or one that contains some"
        )
    return Decision(saved, "initialize_from", f"initialising from {saved}", tuple(warnings))
