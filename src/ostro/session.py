"""A run in progress: the loop with its hooks, and the way out of it."""

import contextlib
import dataclasses
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ostro.checkpoint import (
    Checkpointer,
    Due,
    ResumeSource,
    State,
    checkpoint_bytes,
    require_budget,
)
from ostro.checkpoint.stager import Stager
from ostro.config import dump_yaml
from ostro.core.errors import CheckpointError
from ostro.data.loader import Loader
from ostro.data.order.sequences import Batch
from ostro.data.text import LMData
from ostro.data.tokenizer import Tokenizer
from ostro.distributed import World
from ostro.distributed.rendezvous import Rendezvous
from ostro.evaluation.losses import evaluate
from ostro.generate.sampling import complete_all
from ostro.io.filesystem import PARTIAL
from ostro.lm_config import TrainLmConfig, vocab_size
from ostro.models.hf import read_weights
from ostro.runtime.heartbeat import Heartbeat, beating
from ostro.runtime.phase import current_phase, enter_phase
from ostro.runtime.signals import Interrupted, Signals
from ostro.runtime.throughput import Throughput
from ostro.runtime.watchdog import watching
from ostro.tracker import Tracker, run_folder
from ostro.trainer import (
    BatchPlan,
    Engine,
    Trainer,
    TrainingDivergedError,
    TrainState,
    reset_state,
    restore,
    resume_source,
)
from ostro.trainer.callbacks import StepInfo, is_due
from ostro.trainer.state import load_weights

log = logging.getLogger("ostro")

_LOOK = 1.0  # seconds between two looks at whether another rank has got a signal


def load_first_weights(
    config: TrainLmConfig, state: TrainState, tokenizer: Tokenizer, start: ResumeSource
) -> None:
    """The weights that a run starts from at step 0, if they are not random ones."""
    if start.saved is not None:
        load_weights(state.model, start.saved.tensors("model"), str(start.saved))
        return
    where = config.initialize_from_hf
    if isinstance(where, str):
        log.info("starting from the weights of %s", where)
        weights = read_weights(where, config.model, vocab_size(config, tokenizer))
        load_weights(state.model, weights, where)


@dataclass
class Session:
    """A run in progress: the loop with its hooks, and the way out of it."""

    config: TrainLmConfig
    plan: BatchPlan
    world: World
    data: LMData
    tokenizer: Tokenizer
    state: TrainState
    engine: Engine
    tracker: Tracker
    checkpointer: Checkpointer
    throughput: Throughput
    signals: Signals
    record: Mapping[str, Any]
    """What a checkpoint notes for the run that resumes from it: see `trainer.resume_check`."""
    has_checkpoint: bool = False
    """Whether the run has one of its own to resume from; kept up to date on the first rank."""

    def __post_init__(self) -> None:
        config = self.config
        self.trainer = Trainer(
            config.trainer,
            self.plan,
            self.engine,
            config.optimizer.schedule(config.trainer.num_train_steps),
            max_grad_norm=config.optimizer.max_grad_norm,
            tracker=self.tracker,
            throughput=self.throughput,
            poll=self.agree,
            before_update=self.before_update,
        )
        self._texts = {"config.yaml": dump_yaml(config), "tokenizer.json": self.tokenizer.to_text()}
        self._token_bytes = self.tokenizer.token_bytes()
        if self.engine.is_collective and self.world.num_ranks > 1:
            self.checkpointer.join()
        self._stager, self._snapshot = Stager(), None
        self._eval_metrics: dict[str, float] = {}
        self._improved: bool | None = None
        self._changing: int | None = None  # the step whose update may be half made
        self._heartbeat: Heartbeat | None = None
        self._is_saving = self._is_stopping = False
        self._ruined: int | None = None  # the step whose update left weights of no use
        saving = config.trainer.checkpointer
        # DeepSpeed's folders have no size before they are written.
        if saving.keep_bytes is not None and config.trainer.deepspeed is None:
            require_budget(saving, checkpoint_bytes(self.make_state(Path())))

    def fit(self) -> dict[str, float]:
        """Train to the end, or to a signal or divergence, and leave a checkpoint either way.

        Returns the metrics of the last evaluation. With `eval_only` that is all there is.
        """
        self._first_step = self.state.step
        trainer = self.config.trainer
        assert trainer.id is not None, "the run id is chosen before"
        rendezvous = Rendezvous.current if self.world.num_ranks > 1 else None
        with (
            self.signals.deferred(self._loses_nothing, self._leave, self._is_stuck),
            compilation_marked(self.signals.compilation),
            watching(trainer.hang_timeout, run_folder(trainer.log_dir, trainer.id), rendezvous),
            beating(rendezvous, self._saves) as self._heartbeat,
        ):
            return self._fit()

    def _fit(self) -> dict[str, float]:
        trainer, first_step = self.config.trainer, self._first_step
        num_steps = trainer.num_train_steps
        if trainer.eval_only or (trainer.eval_when == "before" and first_step == 0):
            self.evaluate(first_step)
            self._improved = None  # it sets the mark; the first weights are not saved
        if trainer.eval_only:
            return self._eval_metrics
        loader = Loader(
            self.data.train,
            self.plan.schedule,
            rank=self.world.data_rank,
            num_ranks=self.world.num_data_ranks,
            interleaved=trainer.deterministic_reduction,
        )
        saves = self.world.is_first or self.engine.is_collective
        if saves and trainer.deepspeed is None:
            self.checkpointer.prepare(self.state.tensors())
        try:
            while self.state.step < num_steps:
                with self._rolling_back():
                    self._make_updates(loader)
        except (Interrupted, TrainingDivergedError):
            self._is_stopping = True
            try:
                self._stop()
                self._report_save(wait=True)
            finally:
                self._wait_for_first()
            raise
        except Exception:
            with self.signals.compilation:  # another thread may be saving what this rank has
                pass
            raise
        finally:
            self._report_save(wait=True)
        return self._eval_metrics

    def _make_updates(self, loader: Loader) -> None:
        """Make the updates that are left, with the batches that are not left out."""
        steps = range(self.state.step, self.config.trainer.num_train_steps)
        kept = (step for step in steps if not self.state.recovery.skips(step))
        batches = loader.batches(kept, self.wait_for)
        hooks = [self.evaluate_if_due, self.save_if_due, self.snapshot_if_due]
        with contextlib.closing(batches):
            self.trainer.fit(batches, hooks)

    @contextlib.contextmanager
    def _rolling_back(self) -> Iterator[None]:
        """Answer a spike with a roll-back, where `recover` says so and some are left."""
        try:
            yield
        except TrainingDivergedError as error:
            recover, spike = self.config.trainer.recover, error.spike
            if recover is None:
                raise
            reached, windows = self.state.step, self.state.recovery.windows
            window = self.state.recovery.window(spike)
            self._go_back_to(window.first)
            self.state.recovery.windows = windows
            if len(windows) >= recover.max_rollbacks:
                raise TrainingDivergedError(spike, windows) from None
            self.state.recovery.windows = [*windows, window]
            step = self.state.step
            log.warning(
                "step %d: %s - rolled back from step %d to step %d (%d of at most %d); the batches"
                " of %s are left out",
                *(spike.step, spike.reason, reached, step, len(windows) + 1),
                *(recover.max_rollbacks, window),
            )
            values = {"from": reached, "to": step, "reason": spike.reason}
            values |= {"window": [window.first, window.last]}
            self.tracker.log_event("rollback", values, step)

    def _go_back_to(self, step: int) -> None:
        """Take over the newest state of at most `step` updates: the copy in memory, or what a new
        process would start from. Checkpoints of later ones are deleted first.

        A process that is killed before that resumes from one of them, remembers the same losses,
        and comes here as this one did.
        """
        enter_phase("rollback")
        self._report_save(wait=True)
        if self.world.is_first:
            self.checkpointer.discard(step)
        if self._snapshot is not None and self._snapshot.values["step"] <= step:
            self.state.restore(self._snapshot)
            return
        self._snapshot = None
        # That the run was not to resume, or had to, was about where its first process starts.
        trainer = dataclasses.replace(self.config.trainer, load_checkpoint=None)
        start = resume_source(trainer, self.checkpointer, self.world)
        reset_state(self.state, self.config.optimizer, trainer)
        if start.resumed is None:
            load_first_weights(self.config, self.state, self.tokenizer, start)
        else:
            restore(trainer, self.engine, start.resumed)

    def snapshot_if_due(self, info: StepInfo) -> None:
        """Copy the state into the CPU's memory, to go back to."""
        recover, recovery = self.config.trainer.recover, self.state.recovery
        if not recover or not recover.snapshot_every or self.state.step % recover.snapshot_every:
            return
        self.trainer.flush()
        if not recovery.suspects:
            self._stager.begin()
            self._snapshot = State(self._stager.copy(self.state.tensors()), self.state.values())

    def agree(self, ready: bool = True) -> bool:
        """Whether every rank is ready; raises `Interrupted`, on all, if any has got a signal."""
        if self.world.num_ranks == 1:
            if self.signals.received:
                raise Interrupted(self.signals.signum)
            return ready
        counts = torch.tensor([self.signals.received, not ready], dtype=torch.int32)
        num_signals, num_waiting = self.world.sum_all(counts).tolist()
        with self.signals.compilation:  # another thread may be leaving, as the others were late
            pass
        if num_signals:
            raise Interrupted(self.signals.signum)
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

    def _stop(self) -> None:
        """Save what was done in this attempt."""
        # It may find that the weights stopped changing earlier, or a spike.
        with contextlib.suppress(TrainingDivergedError), self._rolling_back():
            self.trainer.flush()
        if self.state.step > self._first_step and self._ruined != self.state.step - 1:
            self.save(self.state.step - 1, interrupted=True)
        num_steps = self.config.trainer.num_train_steps
        log.info("stopped after %d of %d steps", self.state.step, num_steps)

    def _wait_for_first(self) -> None:
        """Stay until the first rank has saved: a launcher ends all once one has left."""
        if (rendezvous := Rendezvous.current) is not None and self.world.num_ranks > 1:
            had_signal = self.signals.received
            rendezvous.wait_for_first(lambda: self.signals.received and not had_signal)

    def before_update(self) -> None:
        """The state is about to change: no other thread may save it from here on."""
        with self.signals.compilation:
            self._changing = self.state.step
        self.checkpointer.before_update()

    def _saves(self) -> bool:
        """Whether a checkpoint is being made, by the main thread or beside it."""
        return self._is_saving or self.checkpointer.is_saving

    def _is_stuck(self) -> bool:
        """Whether this rank waits for another that hangs."""
        if self._heartbeat is None or self._is_stopping:  # all have agreed, and wait for saves
            return False
        return self._heartbeat.finds_one_hanging(self.engine.is_collective and self._saves())

    def _leave(self) -> None:
        """Stop, from another thread, while the main one compiles or waits for other ranks."""
        if self.world.num_ranks == 1:
            self._stop()
        elif self._is_whole():
            self._save_alone()
        self.tracker.finish()

    def _is_whole(self) -> bool:
        """Whether this rank alone has a state to save, between two updates or before the next."""
        alone = self.world.is_first and not self.engine.is_collective
        # What moves it otherwise; the first compilation comes before the first update.
        moves = self._is_saving or current_phase().name in ("rollback", "compile")
        is_whole = self._changing != self.state.step and self.state.step > self._first_step
        return alone and is_whole and not moves and self.world.device.type == "cpu"

    def _save_alone(self) -> None:
        """Save the copy that this rank has, without the others, where all would save theirs."""
        try:
            self.trainer.flush(alone=True)
        except TrainingDivergedError as error:
            if self.config.trainer.recover is not None:
                log.warning("step %d: not saved, %s", self.state.step - 1, error.spike.reason)
                return
        self._report_save(wait=True)
        step = self.state.step - 1
        due = self.checkpointer.due(step, interrupted=True)
        if due is not None and step >= self._first_step:
            self._write(step, due, must=True)
        log.info("stopped after %d of %d steps", step + 1, self.config.trainer.num_train_steps)

    def _loses_nothing(self) -> bool:
        """Whether a signal may raise right here: alone and between updates, or before the first."""
        phase, is_alone = current_phase().name, self.world.num_ranks == 1
        if self.state.step == self._first_step:
            return is_alone or phase == "compile"
        return is_alone and phase in ("data", "ready", "compile")

    def evaluate_if_due(self, info: StepInfo) -> None:
        """Evaluate after update k, or before update k, when k is a multiple of `steps_per_eval`."""
        before = self.config.trainer.eval_when == "before"
        step = info.step + 1 if before else info.step
        if is_due(self.config.trainer.steps_per_eval, StepInfo(step, info.is_last)):
            self.evaluate(step)  # it may decide on saving

    def save_if_due(self, info: StepInfo) -> None:
        """Save after an update, if the policy says so."""
        self.save(info.step, force=info.is_last)

    def evaluate(self, step: int) -> None:
        """Evaluate on every validation set, draw samples if asked, and hand both to the tracker."""
        self.trainer.flush()
        if self.data.validation and self.config.trainer.steps_per_eval is not None:
            start = time.perf_counter()
            self._eval_metrics = evaluate(
                self.state.model,
                self.data.validation,
                batch_size=self.plan.eval_batch_size,
                token_bytes=self._token_bytes,
                world=self.world,
                max_batches=self.config.trainer.max_eval_batches,
                poll=self.agree,
            )
            elapsed = {"eval/total_time": time.perf_counter() - start}
            self.tracker.log(self._eval_metrics | elapsed, step=step)
            loss = self._eval_metrics.get("eval/loss", math.nan)
            self._improved = loss < self.state.best_eval_loss
            self.state.best_eval_loss = min(self.state.best_eval_loss, loss)
            self.state.eval_loss = loss
        if self.config.sample_prompts:
            self._sample(step)

    def _sample(self, step: int) -> None:
        if self.world.is_first or self.engine.is_collective:
            texts = complete_all(
                self.state.model,
                self.tokenizer,
                self.config.sample_prompts,
                self.config.sampling,
                poll=lambda: self.agree(ready=False),
            )
            for index, text in enumerate(texts):
                self.tracker.log_text(f"sample/{index}", text, step=step)
        while not self.agree():  # once for every token
            enter_phase("sample")

    def save(self, step: int, *, force: bool = False, interrupted: bool = False) -> None:
        """Save the state after update `step`, if the policy, `force` or `interrupted` says so.

        Where a save on the way fails, the run goes on: older checkpoints are intact.
        """
        must = force or interrupted
        self._report_save(wait=must)
        improved, self._improved = self._improved, None
        due = self.checkpointer.due(step, force=force, improved=improved, interrupted=interrupted)
        due = self.world.from_first(due)  # the clocks of the others may say something else
        if due is None:
            return
        self.trainer.flush()  # all ranks together: it may find a spike
        self._require_usable(step)
        self._write(step, due, must=must)

    def _write(self, step: int, due: Due, *, must: bool) -> None:
        """Save what is due, where this rank has something to save and nothing speaks against it."""
        if self.state.recovery.suspects and due.kind == "temporary":
            # It would replace a good one, to which the run may have to go back.
            log.warning("step %d: not saved, its loss may be the beginning of a spike", step)
            return
        if not (self.world.is_first or self.engine.is_collective):
            return
        with self.signals.compilation:  # another thread may be saving, and end the process then
            self._is_saving = True
        shards = Path(self.checkpointer.folder).expanduser() / f"{PARTIAL}shards-{step}"
        try:
            self._report_save(wait=True)
            self.checkpointer.save(step, due, lambda: self.make_state(shards))
            self._report_save(wait=must, must=must)
        finally:
            self._is_saving = False
            if self.world.is_first:
                shutil.rmtree(shards, ignore_errors=True)

    def _require_usable(self, step: int) -> None:
        """Raise `TrainingDivergedError` before weights are saved that nothing can come of."""
        if threading.current_thread() is not threading.main_thread():
            return  # which leaves while the main one is in the model
        try:
            self.trainer.require_usable(step)
        except TrainingDivergedError:
            self._ruined = step
            raise

    def _report_save(self, *, wait: bool, must: bool = False) -> None:
        """Say what became of a save if that is known, or once it is."""
        report = failure = None
        try:
            report = self.checkpointer.wait() if wait else self.checkpointer.poll()
        except CheckpointError as error:
            if must:
                raise
            failure = error
        if self.world.is_first and failure:  # the others say the same
            log.error("%s; training goes on", failure)
        if self.world.is_first and report:
            self.has_checkpoint = True
            log.info("saved %s (%s, %.1f s)", report.path, report.kind, report.seconds)

    def make_state(self, shards: Path) -> State:
        values = {
            **self.engine.values(),
            **self.record,
            "tracker": self.tracker.state(),
            "data": self.data.fingerprint,
            "eos_id": self.tokenizer.eos_id,
            "run_id": self.config.trainer.id,
        }
        tensors = self.engine.tensors()
        return State(tensors, values, self._texts, self.engine.write_shards(shards))


@contextlib.contextmanager
def compilation_marked(lock: threading.Lock) -> Iterator[None]:
    """Mark when torch compiles something, and go back to the phase before when it has; holding the
    lock, which a thread that leaves in the middle of it never gives back."""
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
