"""The folder of a run's checkpoints, a folder or a file each, tidied up as newer ones come."""

import contextlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed import ProcessGroup

from ostro.checkpoint import single_file
from ostro.checkpoint.discovery import entries, look
from ostro.checkpoint.policy import Kind
from ostro.checkpoint.saved import read_metadata
from ostro.checkpoint.sharded import full_tensors, on_first
from ostro.checkpoint.stamp import Stamp
from ostro.checkpoint.store import State, step_folder, write
from ostro.core.errors import CheckpointError
from ostro.io import filesystem

_log = logging.getLogger(__name__)
MakeRoom = Callable[[int, int], None]
"""Called with the bytes that are about to be written, and for which step."""


@dataclass
class FolderStore:
    """Saves each state as `<folder>/step-<k>` and deletes the temporary ones before it."""

    folder: str
    run_id: str
    run_name: str
    delete_old: bool  # of the temporary ones that earlier attempts left
    points: bool  # `latest_checkpoint.pt` names the newest one
    make_room: MakeRoom
    _newest: float = 0.0  # commit time of the newest checkpoint in the folder
    _temporaries: list[str] | None = None  # None: the folder was not looked at yet

    def prepare(self) -> None:
        """Tidy up what earlier attempts left, before the first save."""
        if self._temporaries is None:
            self._temporaries = self._tidy_up()

    def point(self) -> None:
        """Folders are found without a pointer."""

    def gather(self, state: State, group: ProcessGroup | None) -> State:
        """What `save` needs of a state: each rank writes the shards it has."""
        return state

    def save(
        self, state: State, step: int, kind: Kind, best: bool, group: ProcessGroup | None
    ) -> str:
        """Write a checkpoint; returns its path."""
        # Later than what is there, whatever this machine's clock says: newest wins on resume.
        timestamp = max(time.time(), self._newest + 1e-3)
        metadata = write(
            self.folder,
            state,
            step=step,
            is_temporary=kind == "temporary",
            is_best=best,
            run_id=self.run_id,
            run_name=self.run_name,
            timestamp=timestamp,
            group=group,
            make_room=self.make_room,
        )
        path = step_folder(self.folder, step)
        if metadata is None:  # the first rank looks after the folder
            return path
        assert self._temporaries is not None, "prepare comes before save"
        self._newest = timestamp
        if self.points:
            single_file.point_to(Path(path).expanduser())
        kept = [old for old in self._temporaries if old != path and not self._drop(old, best)]
        self._temporaries = [*kept, path] if kind == "temporary" else kept
        return path

    def _drop(self, path: str, new_best: bool) -> bool:
        """Delete a superseded temporary checkpoint if it still is one. False: it stays."""
        if not filesystem.is_folder(path):  # `make_room` was faster
            return True
        try:
            metadata = read_metadata(path)
            if metadata.is_best and not new_best:
                return False
            if metadata.is_temporary:
                filesystem.remove(path)
        except (CheckpointError, OSError) as error:
            _log.warning("could not delete the superseded checkpoint %s: %s", path, error)
        return True

    def _tidy_up(self) -> list[str]:
        """Look at what earlier attempts of this run left; the temporary checkpoints among it."""
        tidy_up(self.folder)
        found = look(self.folder).folders
        self._newest = max((metadata.timestamp for _, metadata in found), default=0.0)
        if not self.delete_old:
            return []
        return [p for p, m in found if m.is_temporary and m.run_id == self.run_id]


def tidy_up(folder: str) -> None:
    """Delete what attempts that were killed left half-written, and put back what they replaced.

    What is not called as ours are stays, and what cannot be deleted keeps nothing else.
    """
    try:
        names = filesystem.names(folder)
    except (CheckpointError, OSError) as error:
        _log.warning("could not tidy up %s: %s", folder, error)
        return
    with contextlib.suppress(CheckpointError, OSError):
        filesystem.abort_uploads(folder, lambda name: bool(_STEP_OR_REMAINS.fullmatch(name)))
    for name in names:
        path = f"{folder}/{name}"
        try:
            if _REMAINS.fullmatch(name):
                _tidy(folder, name)
            elif _is_begun(path):
                filesystem.remove(path)
        except (CheckpointError, OSError) as error:
            _log.warning("could not tidy up %s: %s", path, error)


_REMAINS = re.compile(
    r"\.(tmp|old|new)-(deleted-(\.old-)?)?(shards-\d+|step-\d+"
    r"|(step_\d+|ckpt|ckpt_interrupted|latest_checkpoint)\.pt)(-\d+)*"
)
"""What a save calls the folders and files that it writes, replaces, and deletes."""
_STEP_OR_REMAINS = re.compile(f"{filesystem.STEP.pattern}|{_REMAINS.pattern}")


def _tidy(folder: str, name: str) -> None:
    path = f"{folder}/{name}"
    original = f"{folder}/{name[len(filesystem.ASIDE) :].rpartition('-')[0]}"
    if name.startswith(filesystem.ASIDE) and _is_complete(path) and not _is_complete(original):
        if filesystem.is_folder(original) and filesystem.is_local(original):
            filesystem.remove(original)
        filesystem.move(path, original)
    elif name.startswith(filesystem.NEW) and _is_complete(path) and _is_newer(path, original):
        filesystem.move(path, original)
    else:
        filesystem.remove(path)


def _is_newer(path: str, original: str) -> bool:
    if not _is_complete(original):
        return True
    return read_metadata(path).timestamp > read_metadata(original).timestamp


def _is_begun(path: str) -> bool:
    """Whether this is a step on an object store whose upload never came to its marker."""
    if filesystem.is_local(path) or not filesystem.STEP.fullmatch(path.rpartition("/")[2]):
        return False
    names = filesystem.names(path)
    return filesystem.BEGUN in names and filesystem.MARKER not in names


def _is_complete(path: str) -> bool:
    try:
        read_metadata(path)
    except CheckpointError:
        return False
    return True


@dataclass
class FileStore:
    """Saves each state as a file of its own, or over the one before; as `FolderStore` does."""

    folder: str
    format_name: str
    run_id: str
    only_best: bool = False  # what is not the best so far must not replace it
    delete_old: bool = True
    make_room: MakeRoom = lambda need, step: None
    _newest: float = 0.0  # commit time of the newest checkpoint in the folder
    _temporaries: dict[str, bool] | None = None  # whether each was the best so far

    def prepare(self) -> None:
        if self._temporaries is not None:
            return
        self._temporaries = {}
        tidy_up(self.folder)
        found = look(self.folder)
        ages = [age.timestamp for _, age in (*found.files, *found.folders)]
        self._newest = max(ages, default=0.0)
        if self.format_name == "file" and self.delete_old:
            own = [(file, stamp) for file, stamp in found.files if stamp.run_id == self.run_id]
            self._temporaries = {file: stamp.is_best for file, stamp in own if stamp.is_temporary}

    def point(self) -> None:
        """Make `latest_checkpoint.pt` the newest of the files that are there."""
        paths = (Path(entry.path) for entry in entries(self.folder))
        # Itself does not count: what it was a link to may just have been deleted.
        newest = next((path for path in paths if path.name != single_file.LATEST), None)
        if newest is not None:
            single_file.point_to(newest)
        else:
            (Path(self.folder).expanduser() / single_file.LATEST).unlink(missing_ok=True)

    def gather(self, state: State, group: ProcessGroup | None) -> State:
        return state if group is None else replace(state, tensors=full_tensors(state.tensors))

    def save(
        self, state: State, step: int, kind: Kind, best: bool, group: ProcessGroup | None
    ) -> str:
        return on_first(group, lambda: self._save(state, step, kind, best))

    def _save(self, state: State, step: int, kind: Kind, best: bool) -> str:
        folder = Path(self.folder).expanduser()
        # Later than what is there, whatever this machine's clock says: newest wins on resume.
        self._newest = max(time.time(), self._newest + 1e-3)
        marks = {"run_id": self.run_id, "is_temporary": kind == "temporary", "is_best": best}
        stamp = Stamp(step, self._newest, **marks)
        state = replace(state, values={**state.values, **marks, "timestamp": self._newest})
        if self.format_name == "nanogpt":
            content = single_file.format_called(self.format_name).pack(state)
            aside = self.only_best and not best
            path = folder / (single_file.INTERRUPTED if aside else single_file.NANOGPT)
            single_file.write_file(path, content, stamp)
            if not aside:
                (folder / single_file.INTERRUPTED).unlink(missing_ok=True)
            return str(path)
        content = single_file.FORMATS["file"].pack(state)
        self.make_room(single_file.space_for(content), step)
        path = folder / f"step_{step}.pt"
        single_file.write_file(path, content, stamp)
        single_file.point_to(path)
        self._drop_superseded(str(path), best)
        if kind == "temporary":
            assert self._temporaries is not None, "prepare comes before save"
            self._temporaries[str(path)] = best
        return str(path)

    def _drop_superseded(self, new: str, new_best: bool) -> None:
        """Delete the temporary ones before `new`, the best until a better one is there."""
        assert self._temporaries is not None, "prepare comes before save"
        for path, was_best in list(self._temporaries.items()):
            if was_best and not new_best and path != new:
                continue
            del self._temporaries[path]
            if path != new:
                try:
                    Path(path).unlink(missing_ok=True)
                except OSError as error:
                    _log.warning("could not delete the superseded checkpoint %s: %s", path, error)
