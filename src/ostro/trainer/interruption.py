"""How a run is stopped by a signal: all ranks agree, save the last whole step, and leave.

One rank gets SIGTERM. Between two micro-batches (or evaluation batches, or sampled tokens, or once
a second while one waits for data) the ranks sum up who has got a signal, and all of them raise
`Interrupted` at the same point. Where the main thread cannot come to that point, a thread leaves
for it: in a compilation, and in a collective with a rank that hangs, see `runtime.heartbeat`.
"""

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import torch

from ostro.data.order.sequences import Batch
from ostro.distributed.rendezvous import Rendezvous
from ostro.runtime.heartbeat import Heartbeat, beating
from ostro.runtime.phase import current_phase, enter_phase
from ostro.runtime.signals import Interrupted, Signals
from ostro.runtime.watchdog import watching
from ostro.tracker import run_folder

if TYPE_CHECKING:
    from ostro.trainer.trainer import Trainer

log = logging.getLogger("ostro")

_LOOK = 1.0  # seconds between two looks at whether another rank has got a signal


class Interruption:
    """What one rank does about signals while it trains."""

    def __init__(self, trainer: "Trainer", signals: Signals):
        self.signals = signals
        self.lock = signals.compilation
        """Taken before the state changes or is saved: a thread that leaves for the main one never
        gives it back."""
        self._trainer = trainer
        self._heartbeat: Heartbeat | None = None
        self._is_stopping = False
        self._changing: int | None = None  # the step whose update may be half made

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Heed signals inside, and end the run where it hangs."""
        trainer, config = self._trainer, self._trainer.config
        assert config.id is not None, "the run id is chosen before"
        rendezvous = Rendezvous.current if trainer.world.num_ranks > 1 else None
        with (
            self.signals.deferred(self._loses_nothing, self._leave, self._is_stuck),
            compilation_marked(self.lock),
            watching(config.hang_timeout, run_folder(config.log_dir, config.id), rendezvous),
            beating(rendezvous, self._saves) as self._heartbeat,
        ):
            yield

    def agree(self, ready: bool = True) -> bool:
        """Whether every rank is ready; raises `Interrupted`, on all, if any has got a signal."""
        world, signals = self._trainer.world, self.signals
        if world.num_ranks == 1:
            if signals.received:
                raise Interrupted(signals.signum)
            return ready
        counts = torch.tensor([signals.received, not ready], dtype=torch.int32)
        num_signals, num_waiting = world.sum_all(counts).tolist()
        with self.lock:  # another thread may be leaving, as the others were late
            pass
        if num_signals:
            raise Interrupted(signals.signum)
        return not num_waiting

    def wait_for(self, coming: Future[Batch]) -> Batch:
        """The batch, once every rank has its own: a signal is heeded while one has to wait."""
        while True:
            if not coming.done():
                wait([coming], _LOOK)
            if coming.done() and current_phase().name == "data":
                enter_phase("ready")
            if self.agree(coming.done()):
                return coming.result()

    def before_update(self) -> None:
        """The state is about to change: no other thread may save it from here on."""
        with self.lock:
            self._changing = self._trainer.state.step
        if (saving := self._trainer.saving) is not None:
            saving.checkpointer.before_update()

    def stop(self) -> None:
        """All ranks have agreed to stop, or the run has diverged: save, and leave together."""
        self._is_stopping = True
        try:
            self._trainer.save_what_was_done()
            if (saving := self._trainer.saving) is not None:
                saving.report(self._trainer, wait=True)
        finally:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        """Stay until the first rank has saved: a launcher ends all once one has left."""
        rendezvous = Rendezvous.current
        if rendezvous is not None and self._trainer.world.num_ranks > 1:
            had_signal = self.signals.received
            rendezvous.wait_for_first(lambda: self.signals.received and not had_signal)

    def _saves(self) -> bool:
        saving = self._trainer.saving
        return saving is not None and saving.is_under_way

    def _is_stuck(self) -> bool:
        """Whether this rank waits for another that hangs."""
        if self._heartbeat is None or self._is_stopping:  # all have agreed, and wait for saves
            return False
        saves_together = self._trainer.engine.is_collective and self._saves()
        return self._heartbeat.finds_one_hanging(saves_together)

    def _leave(self) -> None:
        """Stop, from another thread, while the main one compiles or waits for other ranks."""
        trainer = self._trainer
        if trainer.world.num_ranks == 1:
            trainer.save_what_was_done()
        elif self._is_whole():
            trainer.save_alone()
        trainer.tracker.finish()

    def _is_whole(self) -> bool:
        """Whether this rank alone has a state to save, between two updates or before the next."""
        trainer, state = self._trainer, self._trainer.state
        alone = trainer.world.is_first and not trainer.engine.is_collective
        # What changes it otherwise; the first compilation comes before the first update.
        moves = current_phase().name in ("rollback", "compile")
        moves = moves or (trainer.saving is not None and trainer.saving.is_writing)
        is_whole = self._changing != state.step and state.step > trainer.first_step
        return alone and is_whole and not moves and trainer.world.device.type == "cpu"

    def _loses_nothing(self) -> bool:
        """Whether a signal may raise right here: alone and between updates, or before the first."""
        trainer, phase = self._trainer, current_phase().name
        is_alone = trainer.world.num_ranks == 1
        if trainer.state.step == trainer.first_step:
            return is_alone or phase == "compile"
        return is_alone and phase in ("data", "ready", "compile")


@contextlib.contextmanager
def compilation_marked(lock: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter the phase `compile` while torch compiles something, then the phase before again.

    That needs the lock, which a thread that leaves in the middle of a compilation keeps.
    """
    from torch._dynamo.callback import callback_handler  # makes folders at import

    before = current_phase().name

    def begin(_: object) -> None:
        nonlocal before
        before = current_phase().name
        enter_phase("compile")

    def end(_: object) -> None:
        with lock:
            enter_phase(before)

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)
