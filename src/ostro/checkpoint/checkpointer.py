"""The checkpointer of a run: asks the policy after every step, saves, and tidies up."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from ostro.checkpoint import storage
from ostro.checkpoint.discovery import scan
from ostro.checkpoint.policy import CheckpointInterval, Kind, Policy, keep_problems
from ostro.checkpoint.store import State, read_metadata, step_folder, write
from ostro.errors import CheckpointError, Problem

_log = logging.getLogger(__name__)
_RUN_ID = "${run_id}"


@dataclass(frozen=True)
class CheckpointerConfig:
    """Where and when checkpoints of the training state are saved."""

    base_path: str = f"checkpoints/{_RUN_ID}"
    """Folder or fsspec URL for checkpoints. `${run_id}` is replaced by the run's id; without it
    the id is appended as one more folder."""
    save_interval: timedelta | None = timedelta(minutes=15)
    """Time after which a temporary checkpoint is saved, replaced by the next save. Null: none."""
    keep: list[CheckpointInterval] = field(default_factory=lambda: [CheckpointInterval(10_000)])
    """Which steps to keep for good, as intervals with increasing `until`. Empty: the last only."""
    save_after_eval: Literal["never", "improved", "always"] = "never"
    """Also save after an evaluation: always, or when its loss is the lowest so far. The lowest
    one is kept until a lower one is saved; the others are temporary."""
    delete_old_temp_checkpoints: bool = True
    """After a restart, also delete the temporary checkpoints that the run left before it."""

    def problems(self) -> Iterator[Problem]:
        """Mistakes in these settings."""
        if not self.base_path.strip():
            yield Problem("base_path", "must name a folder or a URL")
        for name in re.findall(r"\$\{[^}]*\}", self.base_path):
            if name != _RUN_ID:
                yield Problem("base_path", f"{name} is unknown", f"only {_RUN_ID} is replaced")
        if self.save_interval is not None and self.save_interval <= timedelta(0):
            yield Problem("save_interval", "must be positive", "use null for no temporary ones")
        yield from keep_problems(self.keep)

    @property
    def policy(self) -> Policy:
        """The keep intervals and the save interval as a rule."""
        return Policy(tuple(self.keep), self.save_interval)

    def folder(self, run_id: str) -> str:
        """The folder of a run's own checkpoints."""
        if _RUN_ID in self.base_path:
            return self.base_path.replace(_RUN_ID, run_id).rstrip("/")
        return f"{self.base_path.rstrip('/')}/{run_id}"

    def build(
        self, run_id: str, run_name: str, clock: Callable[[], float] = time.monotonic
    ) -> "Checkpointer":
        """The checkpointer of one run; touches no file yet. `clock` gives seconds."""
        return Checkpointer(self, run_id, run_name, clock)


def disk_bytes(config: CheckpointerConfig, num_steps: int, size: int) -> tuple[int, int]:
    """How many checkpoints of `size` bytes a run of `num_steps` leaves for good, and the most
    bytes it has on disk at one time: a temporary one goes only once its successor is complete.
    """
    kept = len(config.policy.kept_steps(num_steps))
    best = config.save_after_eval != "never"
    return kept, (kept + (config.save_interval is not None) + best) * size


@dataclass(frozen=True)
class SaveReport:
    """One save that succeeded."""

    path: str  # the checkpoint's folder
    step: int
    kind: Kind
    seconds: float  # how long training waited for it
    bytes: int


class Checkpointer:
    """Saves the state of one run when it is due, on the one rank that writes."""

    def __init__(
        self, config: CheckpointerConfig, run_id: str, run_name: str, clock: Callable[[], float]
    ):
        self.folder = config.folder(run_id)
        self.last: SaveReport | None = None
        self._config, self._policy = config, config.policy
        self._run_id, self._run_name = run_id, run_name
        self._clock = clock
        self._last_save = clock()
        self._newest = 0.0  # commit time of the newest checkpoint in the folder
        self._temporaries: list[str] | None = None  # None: the folder was not looked at yet

    def on_step(
        self,
        step: int,
        make_state: Callable[[], State],
        *,
        force: bool = False,
        improved: bool | None = None,
        interrupted: bool = False,
    ) -> SaveReport | None:
        """Save after update `step` if that is due. Call it once a step, after the evaluation.

        `make_state` is called only when a save is due. `force` asks for a permanent checkpoint
        (the end of training), `interrupted` for one now, temporary unless a permanent one is
        due. `improved` is None where no evaluation took place, else whether its loss was the
        lowest so far. Returns what was saved. Raises `CheckpointError` where that failed:
        older checkpoints are intact then, training can go on, and the next attempt is made
        when the next save is due.
        """
        now = self._clock()
        if step == 0:  # the first step compiles and fills caches: it does not count
            self._last_save = now
        kind = self._policy.due(step, now - self._last_save, force=force)
        best = bool(improved) and self._config.save_after_eval != "never"
        after_eval = best or (improved is not None and self._config.save_after_eval == "always")
        if kind is None and (interrupted or (after_eval and step > 0)):
            kind = "temporary"
        if kind is None:
            return None
        if self.last and self.last.step == step and self.last.kind in (kind, "permanent"):
            return None  # it is there already; only a temporary one has to become permanent
        try:
            return self._save(step, kind, best, make_state())
        finally:  # also after a failure: a full disk is not asked again at every step
            self._last_save = self._clock()

    def _save(self, step: int, kind: Kind, best: bool, state: State) -> SaveReport:
        start = time.perf_counter()
        if self._temporaries is None:
            self._temporaries = self._tidy_up()
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
        )
        self._newest = timestamp
        path = step_folder(self.folder, step)
        kept = [old for old in self._temporaries if old != path and not self._drop(old, best)]
        self._temporaries = [*kept, path] if kind == "temporary" else kept
        seconds = time.perf_counter() - start
        self.last = SaveReport(path, step, kind, seconds, metadata.num_bytes)
        return self.last

    def _drop(self, path: str, new_best: bool) -> bool:
        """Delete a superseded temporary checkpoint if it still is one. False: it stays."""
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
        if not self._config.delete_old_temp_checkpoints:
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
        elif name.startswith((storage.ASIDE, storage.PARTIAL)):
            storage.remove(path)


def _is_complete(path: str) -> bool:
    try:
        read_metadata(path)
    except CheckpointError:
        return False
    return True
