"""The training loop: one update, many updates, and the state between them."""

import gc
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from typing import TYPE_CHECKING

import torch

from ostro.core.errors import OstroError
from ostro.data.loader import Loader
from ostro.data.order.sequences import Batch, TrainData
from ostro.models.lm_model import inference
from ostro.optim import Schedule
from ostro.runtime.phase import enter_phase
from ostro.runtime.signals import Interrupted, Signals
from ostro.runtime.throughput import Throughput
from ostro.tracker import Tracker
from ostro.trainer.backends.torch import Engine
from ostro.trainer.callbacks import Callback, StepInfo
from ostro.trainer.config import BatchPlan, TrainerConfig
from ostro.trainer.interruption import Interruption
from ostro.trainer.spikes import Spike, StepRange

if TYPE_CHECKING:
    from ostro.trainer.callbacks.saving import Saving
    from ostro.trainer.rollback import RollBack

log = logging.getLogger("ostro")


class TrainingDivergedError(OstroError):
    """The loss or the gradient was not finite, or spiked, and the run was told to act on that."""

    def __init__(self, spike: Spike, windows: Sequence[StepRange] = (), *, is_made: bool = False):
        """`windows`: what roll-backs left out before, if no more of them are allowed. `is_made`:
        the update itself was finite, and what it has made of the weights is not usable.
        """
        self.spike = spike
        advice = "lower optimizer.learning_rate, lengthen optimizer.warmup"
        if windows:
            left_out = ", ".join(map(str, windows))
            what = (
                f"training diverged again after {len(windows)} roll-backs that left out {left_out}"
            )
            advice += ", or raise trainer.recover.max_rollbacks"
        elif is_made:
            what = "training diverged; these weights are not saved, older checkpoints stay"
            advice += ", or set trainer.recover: {}"
        else:
            what = "training diverged; the weights are those before this update"
            advice += ", set optimizer.skip_bad_steps: true or trainer.recover: {}, or go on"
            advice += " regardless with trainer.crash_on_nan: false"
        super().__init__(f"step {spike.step}: {spike.reason} - {what} - {advice}")


class Trainer:
    """Owns the loop of a run: `train` makes all steps that are left, `train_step` one.

    Beside the steps it calls `callbacks`, in their order: see `trainer.callbacks`. It knows no
    concrete model, optimizer, tracker or command line.
    """

    def __init__(
        self,
        config: TrainerConfig,
        plan: BatchPlan,
        engine: Engine,
        schedule: Schedule,
        *,
        max_grad_norm: float | None,
        tracker: Tracker,
        throughput: Throughput,
        train_data: TrainData | None = None,
        signals: Signals | None = None,
        rollback: "RollBack | None" = None,
    ):
        """`train_data`: what `train` takes its batches from. `signals`: those to heed; None: none.
        `rollback`: what answers a spike of the loss.
        """
        self.config = config
        self.plan = plan
        self.engine = engine
        self.state = engine.state
        self.world = engine.world
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.tracker = tracker
        self.throughput = throughput
        self.train_data = train_data
        self.rollback = rollback
        self.callbacks: list[Callback] = []
        """Called in this order."""
        self.saving: Saving | None = None
        """The one among them that saves, if one does."""
        self.first_step = self.state.step
        """The first step of this process's part of the run."""
        self.interruption = Interruption(self, signals or Signals())
        engine.before_update = self.interruption.before_update
        self._pending: list[tuple[int, dict[str, torch.Tensor] | None]] = []
        self._last_micro: Batch | None = None
        self._ruined: int | None = None  # the step whose update left weights of no use
        self._restart_clock()

    def train(self) -> None:
        """Make the steps that are left, calling the callbacks.

        Raises `Interrupted` after a signal and `TrainingDivergedError` where the loss or the
        gradient says so, with a checkpoint of the last whole step saved.
        """
        assert self.train_data is not None, "it was given when the trainer was made"
        with self.interruption.heeded():
            try:
                for callback in self.callbacks:
                    callback.on_start(self)
                if self.config.eval_only:
                    return
                loader = Loader(
                    self.train_data,
                    self.plan.schedule,
                    rank=self.world.data_rank,
                    num_ranks=self.world.num_data_ranks,
                    interleaved=self.config.deterministic_reduction,
                )
                while self.state.step < self.config.num_train_steps:
                    batches = loader.batches(self._steps_left(), self.interruption.wait_for)
                    with self._answering(), closing(batches):
                        self.fit(batches)
            except (Interrupted, TrainingDivergedError):
                self.interruption.stop()
                raise
            except Exception:
                with self.interruption.lock:  # a thread may be saving what this rank has
                    pass
                raise
            finally:
                for callback in self.callbacks:
                    callback.on_end(self)

    def _steps_left(self) -> Iterator[int]:
        """The steps still to make, without those whose batches are skipped."""
        steps = range(self.state.step, self.config.num_train_steps)
        return (step for step in steps if not self.state.recovery.skips(step))

    def _answering(self) -> AbstractContextManager[None]:
        """Inside, a spike of the loss is answered with a roll-back, if one is to be made."""
        return nullcontext() if self.rollback is None else self.rollback.answering(self)

    def save_what_was_done(self) -> None:
        """Save the last whole step of this process's part of the run, all ranks together."""
        # It may find that the weights stopped changing earlier, or a spike.
        with suppress(TrainingDivergedError), self._answering():
            self.flush()
        step = self.state.step - 1
        if self.saving is not None and step >= self.first_step and self._ruined != step:
            self.saving.save(self, step, interrupted=True)
        self._log_stop()

    def save_alone(self) -> None:
        """The same by the first rank without the others, which hold copies of the state."""
        try:
            self.flush(alone=True)
        except TrainingDivergedError as error:
            if self.config.recover is not None:  # it would go back, together with the others
                log.warning("step %d: not saved, %s", self.state.step - 1, error.spike.reason)
                return
        if self.saving is not None:
            self.saving.save_alone(self)
        self._log_stop()

    def _log_stop(self) -> None:
        log.info("stopped after %d of %d steps", self.state.step, self.config.num_train_steps)

    def train_step(self, step: int, batch: Batch) -> dict[str, torch.Tensor]:
        """Update the weights once, from this rank's examples of batch `step`.

        The loss is the mean over all target tokens of the batch, however many ranks and
        micro-batches it is computed in. Nothing here waits for the device: the update is masked on
        the device when the loss or gradient is not finite or skip-step says so, and the figures
        come back as device scalars. Polls for signals before anything is updated.
        """
        engine, device = self.engine, self.state.device
        num_targets = engine.count_targets(batch)
        loss = torch.zeros((), device=device)
        micro_size = self.plan.micro_batch_size(step)
        starts = range(0, len(batch.tokens), micro_size)
        for index, start in enumerate(starts):
            if index:
                self.interruption.agree()
            number = self.world.data_rank * len(starts) + index
            self.state.seed_dropout(step, number, self.world.context_rank)
            micro = batch.rows(start, start + micro_size).to(device)
            loss += engine.backward(micro, num_targets, is_last=index == len(starts) - 1)
            self._last_micro = micro
        enter_phase("update")
        return engine.update(loss, self.schedule(step), self.max_grad_norm)

    def fit(self, batches: Iterator[Batch]) -> None:
        """Make the steps that are left with these batches, calling the callbacks after each.

        `batches` has none for the steps that are skipped; the callbacks are called there too. What
        a poll for signals, `batches` or a callback raises leaves the state of the last whole step.
        """
        num_steps = self.config.num_train_steps
        self._restart_clock()
        gc.freeze()  # what is there now outlives the loop: collections need not walk it every time
        try:
            for step in range(self.state.step, num_steps):
                info = StepInfo(step, is_last=step == num_steps - 1)
                figures = None
                if not self.state.recovery.skips(step):
                    start = time.perf_counter()
                    enter_phase("data", step)
                    batch = next(batches)
                    self._loading_time += time.perf_counter() - start
                    self._call("before_step", step)
                    figures = self.train_step(step, batch)
                self.state.step = step + 1
                self._pending.append((step, figures))
                if info.is_last or step % self.config.log_interval == 0:
                    self.flush()
                self._call("after_step", info)
        finally:
            gc.unfreeze()

    def _call(self, method: str, argument: object) -> None:
        """Call a method of every callback; its time is no training time."""
        start = time.perf_counter()
        for callback in self.callbacks:
            getattr(callback, method)(self, argument)
        self._callback_time += time.perf_counter() - start

    def flush(self, *, alone: bool = False) -> None:
        """Hand the figures of the steps since the last flush to the tracker.

        Callbacks that read or save the state call it first, on all ranks. This is where the host
        waits for the device. A step that was not finite, or the end of a spike, is reported like
        any other and then raised, unless `crash_on_nan` is false. `alone`: the first rank calls it
        without the others.
        """
        if not self._pending:
            return
        made = self._read({step: f for step, f in self._pending if f is not None}, alone)
        pending, self._pending = self._pending, []
        rates, last = self._rates(list(made)), max(made, default=None)
        spike = None
        for step, _ in pending:
            metrics: dict[str, float] = made.get(step, {})
            if step in made:
                diverged = bool(metrics.pop("diverged")) and self.config.crash_on_nan
                loss, norm = metrics["train/loss"], metrics["grad/norm/total"]
                spike = spike or self.state.recovery.observe(step, loss, norm, diverged)
                metrics |= {"optim/learning_rate": self.schedule(step)}
            else:
                metrics["train/skipped_batch"] = 1.0
                log.info("step %d: its batch is left out", step)
            metrics |= {
                "global_step": step,
                "run_progress": (step + 1) / self.config.num_train_steps,
            }
            self.tracker.log(metrics | rates if step == last else metrics, step=step)
        if spike is not None:
            if self.config.recover is None:
                self.state.step = spike.step  # later updates were masked too
            raise TrainingDivergedError(spike)

    def require_usable(self, step: int) -> None:
        """Raise `TrainingDivergedError` where the update that was made last has ruined the weights.

        Its own loss and gradient were finite: that shows in the next forward pass only, and there
        is none after the last update. All ranks call it, each with a micro-batch it has seen. It
        does nothing in a thread, which saves while the main one is in the model.
        """
        micro, is_main = self._last_micro, threading.current_thread() is threading.main_thread()
        if micro is None or not self.config.crash_on_nan or not is_main:
            return
        with inference(self.state.model), torch.compiler.set_stance("force_eager"):
            loss = self.state.model(micro.tokens, micro.targets, segments=micro.segments)
        is_bad = torch.tensor(not math.isfinite(loss.item()), dtype=torch.int32)
        if int(self.world.sum_all(is_bad)):
            self._ruined = step
            reason = "the weights that this update made give a loss that is not finite"
            raise TrainingDivergedError(Spike(step, reason), is_made=True)

    def _read(
        self, figures: dict[int, dict[str, torch.Tensor]], alone: bool
    ) -> dict[int, dict[str, float]]:
        """Figures by step as numbers: the first rank's on all, which have to decide alike."""
        if not figures:
            return {}
        names = list(next(iter(figures.values())))
        rows = torch.stack([torch.stack([f[n].float() for n in names]) for f in figures.values()])
        values = rows.tolist()  # the one wait for the device
        if not alone:
            values = self.world.from_first(values)
        named = (dict(zip(names, row, strict=True)) for row in values)
        return dict(zip(figures, named, strict=True))

    def _rates(self, steps: Sequence[int]) -> dict[str, float]:
        """Throughput over the updates since the last flush, without the callbacks' time."""
        seconds = time.perf_counter() - self._interval_start - self._callback_time
        callback_time, loading_time = self._callback_time, self._loading_time
        self._restart_clock()
        if not steps:
            return {}
        schedule = self.plan.schedule
        return self.throughput.metrics(
            num_examples=sum(schedule.size(step) for step in steps),
            num_steps=len(steps),
            seconds=seconds,
            total_examples=self.state.recovery.num_examples(schedule, steps[-1] + 1),
        ) | {
            "throughput/loading_time": loading_time / len(steps),
            "throughput/hook_time": callback_time / len(steps),
        }

    def _restart_clock(self) -> None:
        self._interval_start = time.perf_counter()
        self._loading_time = self._callback_time = 0.0
