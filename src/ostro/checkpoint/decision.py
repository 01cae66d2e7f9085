"""What a run starts from: its own checkpoints, another run's, or nothing."""

from dataclasses import dataclass
from typing import Literal

from ostro.checkpoint.discovery import ALONE, Search, look, search
from ostro.checkpoint.saved import Saved
from ostro.checkpoint.single_file import SavedFile
from ostro.core.errors import CheckpointError
from ostro.distributed import World


@dataclass(frozen=True)
class ResumeSource:
    """What a run starts from, and what to tell the user about it."""

    saved: Saved | SavedFile | None  # None: a start from scratch
    source: Literal["own", "load_checkpoint_path", "initialize_from", "scratch"]
    message: str  # one line for the log
    warnings: tuple[str, ...] = ()  # what did not happen as the settings may have meant
    weights_only: bool = False  # there is no more in it: a fresh optimizer, at step 0

    @property
    def resumed(self) -> Saved | SavedFile | None:
        """The checkpoint whose full state is restored."""
        return None if self.weights_only else self.saved


def find_resume_source(
    own: str,
    *,
    world: World = ALONE,
    load_checkpoint: bool | None = None,
    load_checkpoint_path: str | None = None,
    initialize_from: str | None = None,
    elsewhere: str = "--trainer.id with another name",
) -> ResumeSource:
    """Decide, on all ranks of `world` together, what a run starts from.

    The run's `own` folder comes first, so that a run that was interrupted goes on whatever it
    once started from; then `load_checkpoint_path`, then `initialize_from`, then nothing.
    `load_checkpoint` true makes it an error to find nothing to resume, false skips both
    searches. Raises `CheckpointError` naming every place that was looked at, and where there are
    checkpoints none of which can be used: what is in them is not to be overwritten. `elsewhere`:
    the flag with which the run would save in another folder.
    """
    warnings: list[str] = []
    if load_checkpoint is False:
        if load_checkpoint_path is not None:
            warnings.append(
                f"load_checkpoint_path = {load_checkpoint_path} - not used, for load_checkpoint is "
                "false"
            )
        if initialize_from is None and look(own).newest_first:
            warnings.append(
                f"{own} holds checkpoints of an earlier run; this one starts anew and replaces"
                " those of the same name"
            )
    else:
        if (saved := _resumable(own, world, elsewhere, is_own=True)) is not None:
            return ResumeSource(saved, "own", f"resuming from {saved}")
        if load_checkpoint_path is not None:
            saved = _resumable(load_checkpoint_path, world, elsewhere, is_own=False)
            if saved is not None:
                return ResumeSource(saved, "load_checkpoint_path", f"continuing from {saved}")
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
        return ResumeSource(None, "scratch", "starting from scratch", tuple(warnings))
    return _initialized(initialize_from, own, world, elsewhere, tuple(warnings))


def _resumable(
    path: str, world: World, elsewhere: str, *, is_own: bool
) -> Saved | SavedFile | None:
    """The newest checkpoint there; an error that names the ways on where none can be resumed."""
    found = search(path, world)
    if found.saved is None and found.faults:
        weights = search(path, world, weights=True).saved
        raise CheckpointError(_stuck(path, found, weights, elsewhere, is_own=is_own))
    return found.saved


def _stuck(
    path: str,
    found: Search,
    weights: Saved | SavedFile | None,
    elsewhere: str,
    *,
    is_own: bool,
) -> str:
    """What the checkpoints of a run lack, and what can be done."""
    ways = ["put back what is missing, from a backup, and run the same command again"]
    if weights is not None:
        flags = f"{elsewhere} --trainer.initialize_from {weights}"
        where = "" if is_own else " and without --trainer.load_checkpoint_path"
        ways.append(f"start at step 0 from these weights alone{where}, with {flags}")
    if is_own:
        ways.append(f"start from scratch in another folder, with {elsewhere}")
        ways.append(f"start from scratch in this one: delete {path} first")
    else:
        ways.append("start from scratch: leave out --trainer.load_checkpoint_path")
    lines = [found.complaint(path, "resumed"), "nothing was changed; the ways on:"]
    return "\n".join([lines[0], "\n  - ".join([lines[1], *ways])])


def _initialized(
    path: str, own: str, world: World, elsewhere: str, warnings: tuple[str, ...]
) -> ResumeSource:
    """Start from the full state of another run, or from the weights if there is no more."""
    found = search(path, world)
    if found.saved is not None:
        message = f"initialising from {found.saved}"
        return ResumeSource(found.saved, "initialize_from", message, warnings)
    if not found.faults:
        raise CheckpointError(
            f"initialize_from = {path} - no complete checkpoint there or below - "
            "give a checkpoint's folder (step-<k>) or one that contains some"
        )
    weights = search(path, world, weights=True).saved
    if weights is None:
        fault = found.complaint(f"initialize_from = {path}", "used")
        raise CheckpointError(f"{fault}\n  - no weights are intact: give another checkpoint")
    if f"{weights}/".startswith(f"{own.rstrip('/')}/"):
        # It would be replaced by what begins with it.
        raise CheckpointError(_stuck(own, found, weights, elsewhere, is_own=True))
    why = weights.lacks or found.faults[0]
    message = f"initialising from the weights of {weights}, optimizer and step start fresh: {why}"
    return ResumeSource(weights, "initialize_from", message, warnings, weights_only=True)
