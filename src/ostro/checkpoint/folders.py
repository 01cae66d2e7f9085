"""The folder of a run's checkpoints, a folder or a file each, tidied up as newer ones come."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed import ProcessGroup

from ostro.checkpoint import single_file, storage
from ostro.checkpoint.discovery import entries, scan
from ostro.checkpoint.policy import Kind
from ostro.checkpoint.saved import read_metadata
from ostro.checkpoint.sharded import full_tensors, on_first
from ostro.checkpoint.store import STEP, State, step_folder, write
from ostro.errors import CheckpointError

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
        if not storage.is_folder(path):  # `make_room` was faster
            return True
        try:
            metadata = read_metadata(path)
            if metadata.is_best and not new_best:
                return False
            if metadata.is_temporary:
                storage.remove(path)
        except (CheckpointError, OSError) as error:
            _log.warning("could not delete the superseded checkpoint %s: %s", path, error)
        return True

    def _tidy_up(self) -> list[str]:
        """Look at what earlier attempts of this run left; the temporary checkpoints among it."""
        try:
            for name in storage.names(self.folder):
                self._tidy_remains(name)
        except OSError as error:
            _log.warning("could not tidy up %s: %s", self.folder, error)
        found = scan(self.folder)
        self._newest = max((metadata.timestamp for _, metadata in found), default=0.0)
        if not self.delete_old:
            return []
        return [p for p, m in found if m.is_temporary and m.run_id == self.run_id]

    def _tidy_remains(self, name: str) -> None:
        """Delete a half-written folder; put back a checkpoint whose successor never came."""
        path = f"{self.folder}/{name}"
        original = f"{self.folder}/{name.removeprefix(storage.ASIDE).rpartition('-')[0]}"
        if name.startswith(storage.ASIDE) and _is_complete(path) and not _is_complete(original):
            if storage.is_folder(original):
                storage.remove(original)
            storage.move(path, original)
        elif name.startswith((storage.ASIDE, storage.PARTIAL)) or _is_begun(path):
            storage.remove(path)


def _is_begun(path: str) -> bool:
    """Whether this is a step on an object store whose upload never came to its marker."""
    is_remote_step = not storage.is_local(path) and STEP.fullmatch(path.rpartition("/")[2])
    return bool(is_remote_step) and storage.MARKER not in storage.names(path)


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
    _temporaries: dict[str, bool] | None = None  # whether each was the best so far

    def prepare(self) -> None:
        if self._temporaries is not None:
            return
        self._temporaries = {}
        for left in Path(self.folder).expanduser().glob(f"{storage.PARTIAL}*.pt-*"):
            left.unlink(missing_ok=True)
        if self.format_name == "file" and self.delete_old:
            found = [e for e in entries(self.folder) if e.run_id == self.run_id]
            self._temporaries = {e.path: e.is_best for e in found if e.is_temporary}

    def point(self) -> None:
        """Make `latest_checkpoint.pt` the newest of the files that are there."""
        found = entries(self.folder)
        if found:
            single_file.point_to(Path(found[0].path))
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
        if self.format_name == "nanogpt":
            content = single_file.FORMATS[self.format_name].pack(state)
            aside = self.only_best and not best
            path = folder / (single_file.INTERRUPTED if aside else single_file.NANOGPT)
            single_file.write_file(path, content)
            if not aside:
                (folder / single_file.INTERRUPTED).unlink(missing_ok=True)
            return str(path)
        marks = {"run_id": self.run_id, "is_temporary": kind == "temporary", "is_best": best}
        content = single_file.FORMATS["file"].pack(replace(state, values={**state.values, **marks}))
        self.make_room(single_file.space_for(content), step)
        path = folder / f"step_{step}.pt"
        single_file.write_file(path, content)
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
