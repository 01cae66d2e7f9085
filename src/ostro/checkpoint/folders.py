"""The folder of a run's checkpoints: one folder each, tidied up as newer ones come."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed import ProcessGroup

from ostro.checkpoint import storage
from ostro.checkpoint.discovery import scan
from ostro.checkpoint.policy import Kind
from ostro.checkpoint.single_file import point_to
from ostro.checkpoint.store import STEP, State, read_metadata, step_folder, write
from ostro.errors import CheckpointError

_log = logging.getLogger(__name__)


class FolderStore:
    """Saves each state as `<folder>/step-<k>` and deletes the temporary ones before it."""

    def __init__(
        self,
        folder: str,
        run_id: str,
        run_name: str,
        delete_old: bool,
        points: bool = False,
        make_room: Callable[[int, int], None] = lambda need, step: None,
    ):
        """`points`: `latest_checkpoint.pt` names the newest one. `make_room(need, step)` is called
        before so many bytes are written for a step."""
        self.folder = folder
        self._points, self._make_room = points, make_room
        self._run_id, self._run_name, self._delete_old = run_id, run_name, delete_old
        self._newest = 0.0  # commit time of the newest checkpoint in the folder
        self._temporaries: list[str] | None = None  # None: the folder was not looked at yet

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
    ) -> tuple[str, int]:
        """Write a checkpoint; returns its path and, on the first rank, its size in bytes."""
        # Later than what is there, whatever this machine's clock says: newest wins on resume.
        timestamp = max(time.time(), self._newest + 1e-3)
        metadata = write(
            self.folder,
            state,
            step=step,
            is_temporary=kind == "temporary",
            is_best=best,
            run_id=self._run_id,
            run_name=self._run_name,
            timestamp=timestamp,
            group=group,
            make_room=self._make_room,
        )
        path = step_folder(self.folder, step)
        if metadata is None:  # the first rank looks after the folder
            return path, 0
        assert self._temporaries is not None, "prepare comes before save"
        self._newest = timestamp
        if self._points:
            point_to(Path(path).expanduser())
        kept = [old for old in self._temporaries if old != path and not self._drop(old, best)]
        self._temporaries = [*kept, path] if kind == "temporary" else kept
        return path, metadata.num_bytes

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
        if not self._delete_old:
            return []
        return [p for p, m in found if m.is_temporary and m.run_id == self._run_id]

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
    if storage.is_local(path) or not STEP.fullmatch(path.rpartition("/")[2]):
        return False
    return storage.MARKER not in storage.names(path)


def _is_complete(path: str) -> bool:
    try:
        read_metadata(path)
    except CheckpointError:
        return False
    return True
