"""Go back to the state before a spike of the loss, skip the batches that led to it, and train on.

Which step is bad and which batches are skipped is decided in `trainer.spikes`, from the losses
alone; here is what has to happen to the state and to the checkpoints.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

from ostro.checkpoint import ResumeSource
from ostro.optim import OptimizerConfig
from ostro.runtime.phase import enter_phase
from ostro.trainer.callbacks.snapshots import Snapshots
from ostro.trainer.start import reset_state, restore, resume_source
from ostro.trainer.state import TrainState
from ostro.trainer.trainer import Trainer, TrainingDivergedError

log = logging.getLogger("ostro")


class RollBack:
    """Answers a spike as `trainer.recover` says."""

    def __init__(
        self,
        optimizer: OptimizerConfig,
        load_first_weights: Callable[[TrainState, ResumeSource], None],
    ):
        """`load_first_weights`: takes over the weights that a run starts from at step 0."""
        self._optimizer, self._load_first_weights = optimizer, load_first_weights

    @contextlib.contextmanager
    def answering(self, trainer: Trainer) -> Iterator[None]:
        """Answer a `TrainingDivergedError` from inside with a roll-back, if some are left."""
        try:
            yield
        except TrainingDivergedError as error:
            recover, spike, state = trainer.config.recover, error.spike, trainer.state
            if recover is None:
                raise
            reached, windows = state.step, state.recovery.windows
            window = state.recovery.window(spike)
            self._go_back_to(window.first, trainer)
            state.recovery.windows = windows
            if len(windows) >= recover.max_rollbacks:
                raise TrainingDivergedError(spike, windows) from None
            state.recovery.windows = [*windows, window]
            count = f"{len(windows) + 1} of at most {recover.max_rollbacks}"
            log.warning(
                f"step {spike.step}: {spike.reason} - rolled back from step {reached} to step"
                f" {state.step} ({count}); the batches of {window} are left out"
            )
            values = {"from": reached, "to": state.step, "reason": spike.reason}
            values |= {"window": [window.first, window.last]}
            trainer.tracker.log_event("rollback", values, state.step)

    def _go_back_to(self, step: int, trainer: Trainer) -> None:
        """Take over the newest state of at most `step` updates: the copy in memory, or what a new
        process would start from. Checkpoints of later steps are deleted first.

        A process that is killed before that resumes from one of them, remembers the same losses,
        and comes here as this one did.
        """
        enter_phase("rollback")
        saving, state = trainer.saving, trainer.state
        assert saving is not None, "a run that rolls back saves"
        saving.report(trainer, wait=True)
        if trainer.world.is_first:
            saving.checkpointer.discard(step)
        snapshots = next((c for c in trainer.callbacks if isinstance(c, Snapshots)), None)
        if snapshots is not None and snapshots.newest is not None:
            if snapshots.newest.values["step"] <= step:
                state.restore(snapshots.newest)
                return
            snapshots.newest = None
        # That the run was not to resume, or had to, was about where its first process starts.
        config = replace(trainer.config, load_checkpoint=None)
        source = resume_source(config, saving.checkpointer, trainer.world)
        reset_state(state, self._optimizer, config)
        if source.resumed is None:
            self._load_first_weights(state, source)
        else:
            restore(config, trainer.engine, source.resumed)
