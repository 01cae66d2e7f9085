"""The folder of a run's checkpoints in single files, tidied up as newer ones come."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.distributed import ProcessGroup

from ostro.checkpoint import storage
from ostro.checkpoint.discovery import entries
from ostro.checkpoint.policy import Kind
from ostro.checkpoint.sharded import full_tensors, on_first
from ostro.checkpoint.single_file import (
    FORMATS,
    INTERRUPTED,
    LATEST,
    NANOGPT,
    point_to,
    space_for,
    write_file,
)
from ostro.checkpoint.store import State

_log = logging.getLogger(__name__)


class FileStore:
    """Saves each state as a file of its own, or over the one before."""

    def __init__(
        self,
        folder: str,
        format_name: str,
        *,
        run_id: str = "",
        only_best: bool = False,
        delete_old: bool = True,
        make_room: Callable[[int, int], None] = lambda need, step: None,
    ):
        """`only_best`: what is not the best so far must not replace it. `make_room(need, step)` is
        called before so many bytes are written for a step."""
        self.folder = folder
        self._format_name, self._only_best = format_name, only_best
        self._run_id, self._delete_old, self._make_room = run_id, delete_old, make_room
        self._temporaries: dict[str, bool] | None = None  # whether each was the best so far

    def prepare(self) -> None:
        """Tidy up what earlier attempts left, before the first save."""
        if self._temporaries is not None:
            return
        self._temporaries = {}
        for left in Path(self.folder).expanduser().glob(f"{storage.PARTIAL}*.pt-*"):
            left.unlink(missing_ok=True)
        if self._format_name == "file" and self._delete_old:
            found = [e for e in entries(self.folder) if e.run_id == self._run_id]
            self._temporaries = {e.path: e.is_best for e in found if e.is_temporary}

    def point(self) -> None:
        """Make `latest_checkpoint.pt` the newest of the files that are there."""
        found = entries(self.folder)
        if found:
            point_to(Path(found[0].path))
        else:
            (Path(self.folder).expanduser() / LATEST).unlink(missing_ok=True)

    def gather(self, state: State, group: ProcessGroup | None) -> State:
        """What `save` needs of a state: whole tensors on the first rank."""
        return state if group is None else replace(state, tensors=full_tensors(state.tensors))

    def save(
        self, state: State, step: int, kind: Kind, best: bool, group: ProcessGroup | None
    ) -> tuple[str, int]:
        """Write a checkpoint on the first rank; returns its path and size in bytes."""
        return on_first(group, lambda: self._save(state, step, kind, best))

    def _save(self, state: State, step: int, kind: Kind, best: bool) -> tuple[str, int]:
        folder = Path(self.folder).expanduser()
        if self._format_name == "nanogpt":
            content = FORMATS[self._format_name].pack(state)
            aside = self._only_best and not best
            path = folder / (INTERRUPTED if aside else NANOGPT)
            size = write_file(path, content)
            if not aside:
                (folder / INTERRUPTED).unlink(missing_ok=True)
            return str(path), size
        marks = {"run_id": self._run_id, "is_temporary": kind == "temporary", "is_best": best}
        content = FORMATS["file"].pack(replace(state, values={**state.values, **marks}))
        self._make_room(space_for(content), step)
        path = folder / f"step_{step}.pt"
        size = write_file(path, content)
        point_to(path)
        self._drop_superseded(str(path), best)
        if kind == "temporary":
            assert self._temporaries is not None, "prepare comes before save"
            self._temporaries[str(path)] = best
        return str(path), size

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
