"""Keep a copy of the state in the CPU's memory, to roll back to."""

from ostro.checkpoint import State
from ostro.checkpoint.stager import Stager
from ostro.trainer.callbacks.callback import Callback, StepInfo
from ostro.trainer.trainer import Trainer


class Snapshots(Callback):
    """Copies the state every `trainer.recover.snapshot_every` steps; only the newest is kept."""

    def __init__(self, every: int):
        self.newest: State | None = None
        self._every, self._stager = every, Stager()

    def after_step(self, trainer: Trainer, info: StepInfo) -> None:
        state = trainer.state
        if state.step % self._every:
            return
        trainer.flush()
        if not state.recovery.suspects:
            self._stager.begin()
            self.newest = State(self._stager.copy(state.tensors()), state.values())
