"""The checkpointer of a run: asks the policy after every step, saves, and tidies up."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ostro.checkpoint.discovery import delete, entries, make_room
from ostro.checkpoint.folders import FileStore, FolderStore
from ostro.checkpoint.policy import CheckpointInterval, Kind, Policy, keep_problems
from ostro.checkpoint.retention import planned_deletions
from ostro.checkpoint.sharded import Tensors
from ostro.checkpoint.stager import Stager
from ostro.checkpoint.store import State
from ostro.core.errors import ConfigError, Problem, at_least
from ostro.core.redaction import Location, local_path
from ostro.core.units import ByteSize, format_bytes, in_run_folder

_RUN_ID = "${run_id}"


@dataclass(frozen=True)
class CheckpointerConfig:
    """Where and when checkpoints of the training state are saved."""

    base_path: Location = f"checkpoints/{_RUN_ID}"
    """Folder or fsspec URL for checkpoints. `${run_id}` is replaced by the run's id; without it
    the id is appended as one more folder, unless the path ends with `/.`."""
    save_interval: timedelta | None = timedelta(minutes=15)
    """Time after which a temporary checkpoint is saved, replaced by the next save. Null: none."""
    keep: list[CheckpointInterval] = field(default_factory=lambda: [CheckpointInterval(10_000)])
    """Which steps to keep for good, as intervals with increasing `until`. Empty: the last only."""
    save_every: int | None = None
    """Steps after which a temporary checkpoint is saved, whatever time has passed. Null: by time
    alone."""
    keep_bytes: ByteSize | None = None
    """The most that all checkpoints of the run may take, such as `200GB`, the one being written
    included: others are deleted before it is written, temporary ones first, then permanent ones so
    that the rest lies evenly; never the newest and the best. Null: no permanent one is deleted."""
    save_after_eval: Literal["never", "improved", "always"] = "never"
    """Also save after an evaluation: always, or when its loss is the lowest so far. The lowest
    one is kept until a lower one is saved; the others are temporary."""
    save_last: bool = True
    """Save at the end of training, whatever the other settings say."""
    delete_old_temp_checkpoints: bool = True
    """After a restart, also delete the temporary checkpoints that the run left before it."""
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy of the state in the CPU's memory; the
    copy is made while the gradients of the next update are computed."""
    format: Literal["folder", "file", "nanogpt"] = "folder"
    """folder: `step-<k>/` of safetensors files. file: `step_<k>.pt`, with `latest_checkpoint.pt`
    always the newest, for `torch.load`. nanogpt: `ckpt.pt`, as nanoGPT reads and writes it; each
    save replaces the one before. Files are local only. With DeepSpeed all but nanogpt are folders,
    and `latest_checkpoint.pt` names the newest."""

    def problems(self) -> Iterator[Problem]:
        if not self.base_path.strip():
            yield Problem("base_path", "must name a folder or a URL")
        if self.save_interval is not None and self.save_interval <= timedelta(0):
            yield Problem("save_interval", "must be positive", "use null for no temporary ones")
        yield from at_least(1, self, "save_every", advice="null saves by time alone")
        yield from keep_problems(self.keep)
        if self.keep_bytes is not None and self.format == "nanogpt":
            rule = "format: nanogpt keeps one checkpoint, so there is nothing to choose from"
            yield Problem("keep_bytes", rule, "remove it")
        if self.format != "folder" and "://" in self.base_path:
            yield Problem("base_path", f"must be a local folder with format: {self.format}")

    @property
    def policy(self) -> Policy:
        """The keep intervals and the save interval as a rule."""
        return Policy(tuple(self.keep), self.save_interval, self.save_every)

    def folder(self, run_id: str) -> str:
        """The folder of a run's own checkpoints."""
        return local_path(in_run_folder(self.base_path, run_id))

    def build(
        self,
        run_id: str,
        run_name: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        in_folders: bool = False,
    ) -> "Checkpointer":
        """The checkpointer of one run; touches no file yet. `clock` gives seconds.

        `in_folders`: one file cannot hold a state; `format: file` then is a file that points to
        the newest folder.
        """
        folder, delete_old = self.folder(run_id), self.delete_old_temp_checkpoints

        def room(need: int, step: int) -> None:
            if self.keep_bytes is not None:
                make_room(folder, run_id, self.keep_bytes, need, step)

        if self.format == "folder" or in_folders:
            store = FolderStore(folder, run_id, run_name, delete_old, in_folders, room)
        else:
            only_best = self.save_after_eval == "improved"
            store = FileStore(folder, self.format, run_id, only_best, delete_old, room)
        return Checkpointer(self, store, clock)


def disk_bytes(config: CheckpointerConfig, num_steps: int, size: int) -> tuple[int, int]:
    """How many checkpoints of `size` bytes a run of `num_steps` leaves for good, and the most
    bytes it has on disk at one time: a temporary one goes only once its successor is complete.
    """
    if config.format == "nanogpt":  # one file, beside it the stopped run's, or its successor
        return 1, (2 + (config.save_after_eval == "improved")) * size
    kept = config.policy.kept_steps(num_steps)
    for _, deleted in deletions(config, num_steps, size):
        kept = [step for step in kept if step not in deleted]
    count = len(config.policy.kept_steps(num_steps)) + _num_beside(config)
    most = min(count * size, int(config.keep_bytes or count * size))
    return len(kept), most


def deletions(
    config: CheckpointerConfig, num_steps: int, size: int
) -> Iterator[tuple[int, list[int]]]:
    """Before which permanent steps `keep_bytes` deletes which others, each of `size` bytes."""
    if config.keep_bytes is None:
        return
    require_budget(config, size)
    budget = config.keep_bytes - _num_beside(config) * size
    yield from planned_deletions(config.policy.kept_steps(num_steps), size, budget)


def require_budget(config: CheckpointerConfig, size: int) -> None:
    """Raise a `ConfigError` where `keep_bytes` is too little for checkpoints of `size` bytes."""
    least = (2 + (config.save_after_eval != "never")) * size
    if config.keep_bytes is not None and config.keep_bytes < least:
        rule = f"the newest, the best if there is one, and the one being written take {least} bytes"
        advice = f"raise it to {format_bytes(1.01 * least)}, or to null"
        raise ConfigError(Problem("trainer.checkpointer.keep_bytes", rule, advice))


def _num_beside(config: CheckpointerConfig) -> int:
    """How many there can be that no step's number calls for: a temporary one and the best."""
    has_temporary = config.save_interval is not None or config.save_every is not None
    return has_temporary + (config.save_after_eval != "never")


@dataclass(frozen=True)
class SaveReport:
    """One save that succeeded."""

    path: str  # the checkpoint's folder
    step: int
    kind: Kind
    seconds: float  # how long training waited for it


@dataclass(frozen=True)
class Due:
    """A save to be made."""

    kind: Kind
    best: bool  # its evaluation was the best so far


class Checkpointer:
    """Saves the state of one run when it is due: on the first rank, or together if it has a group.

    One save is under way at a time. With `async_save` it goes on in a thread of its own, which
    first copies the state: call `before_update` before anything changes that.
    """

    group: ProcessGroup | None = None
    """All ranks, where each holds a part of the state; for the saving thread only."""

    def __init__(
        self, config: CheckpointerConfig, store: FolderStore | FileStore, clock: Callable[[], float]
    ):
        self.folder = store.folder
        self.last: SaveReport | None = None
        self._config, self._policy, self._store = config, config.policy, store
        self._clock = clock
        self._last_save = clock()
        self._under_way: Future[str] | None = None
        self._begun: tuple[int, Kind, float] = (0, "temporary", 0.0)  # its step, kind, and seconds
        self._stager = Stager()
        self._thread: threading.Thread | None = None

    def join(self) -> None:
        """Save together with the other ranks from now on; all of them call it."""
        # The fastest writer waits for the slowest. That a rank is gone is seen at once.
        self.group = dist.new_group(
            backend="gloo", timeout=timedelta(days=1), group_desc="checkpoint"
        )

    def due(
        self,
        step: int,
        *,
        force: bool = False,
        improved: bool | None = None,
        interrupted: bool = False,
    ) -> Due | None:
        """What is to be saved after update `step`. Call it once a step, after the evaluation.

        `force` asks for a permanent checkpoint (the end of training), `interrupted` for one now,
        temporary unless a permanent one is due. `improved` is None where no evaluation took
        place, else whether its loss was the lowest so far.
        """
        now = self._clock()
        if step == 0:  # the first step compiles and fills caches: it does not count
            self._last_save = now
        force = force and self._config.save_last
        kind = self._policy.due(step, now - self._last_save, force=force)
        if kind == "temporary" and self._under_way is not None:
            kind = None  # saving takes longer than the interval
        best = bool(improved) and self._config.save_after_eval != "never"
        after_eval = best or (improved is not None and self._config.save_after_eval == "always")
        counts = step > 0 or self._config.format == "nanogpt"  # which evaluates before updates
        if kind is None and (interrupted or (after_eval and counts)):
            kind = "temporary"
        if kind is None:
            return None
        if self.last and self.last.step == step and self.last.kind in (kind, "permanent"):
            return None  # it is there already; only a temporary one has to become permanent
        return Due(kind, best)

    def save(self, step: int, due: Due, make_state: Callable[[], State]) -> None:
        """Save what is due; `poll` and `wait` say what became of it.

        Where that fails, older checkpoints are intact, training can go on, and the next attempt
        is made when the next save is due.
        """
        assert self._under_way is None, "wait for the save before"
        start = time.perf_counter()
        try:
            if self.group is None or dist.get_rank() == 0:
                self._store.prepare()
            state = self._store.gather(make_state(), self.group)
        finally:  # also after a failure: a full disk is not asked again at every step
            self._last_save = self._clock()
        # A backend's own folders are of this moment; what they are made from goes on.
        is_async = self._config.async_save and not state.folders
        self._under_way = future = Future()

        def write() -> None:
            try:
                copy = (
                    replace(state, tensors=self._stager.copy(state.tensors)) if is_async else state
                )
                future.set_result(self._store.save(copy, step, due.kind, due.best, self.group))
            except BaseException as error:
                future.set_exception(error)

        if is_async:  # a daemon: a run that crashes ends, and leaves a partial folder
            self._stager.begin()
            self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
        self._begun = (step, due.kind, time.perf_counter() - start)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return (future := self._under_way) is not None and not future.done()

    def prepare(self, tensors: Tensors) -> None:
        """Make room for copies of these tensors, in a thread, that saving is to find ready."""
        if self._config.async_save:
            self._stager.prepare(tensors)

    def before_update(self) -> None:
        """Return once the save under way has its copy of the state, which may change then."""
        if self._thread is None:
            return
        start = time.perf_counter()
        self._stager.wait()
        step, kind, seconds = self._begun
        self._begun = (step, kind, seconds + time.perf_counter() - start)

    def discard(self, step: int) -> None:
        """Delete the newest checkpoints, down to one from before update `step`.

        None may be under way. Raises `CheckpointError` where one cannot be deleted.
        """
        if self.last is not None and self.last.step >= step:
            self.last = None  # an update that is made again is saved again
        for entry in entries(self.folder):
            if entry.step < step:
                break
            delete(entry, "the run goes back to before it")
        self._store.point()

    def poll(self) -> SaveReport | None:
        """The save that was under way if it has ended since; raises `CheckpointError` if it failed.

        Each save is told of once.
        """
        return self.wait() if self._under_way is not None and self._under_way.done() else None

    def wait(self) -> SaveReport | None:
        """The same, once the save under way has ended; None where there is none."""
        self._stager.settle()  # Python must not end before it has
        if self._under_way is None:
            return None
        start = time.perf_counter()
        try:
            path = self._under_way.result()
        finally:
            self._under_way = None
            if self._thread is not None:  # nor while this one runs
                self._thread.join()
                self._thread = None
        step, kind, seconds = self._begun
        self.last = SaveReport(path, step, kind, seconds + time.perf_counter() - start)
        return self.last
