"""The training loop: one update, many updates, and the state between them."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ostro.core.errors import OstroError
from ostro.data.order.sequences import Batch
from ostro.models.lm_model import inference
from ostro.optim import Schedule
from ostro.runtime.phase import enter_phase
from ostro.runtime.throughput import Throughput
from ostro.tracker import Tracker
from ostro.trainer.backends.torch import Engine
from ostro.trainer.callbacks import Callback, StepInfo
from ostro.trainer.config import BatchPlan, TrainerConfig
from ostro.trainer.rollback import Spike, StepRange

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
    """Makes updates of a `TrainState` from batches; `fit` is the loop, `train_step` one update.

    Knows no concrete model, optimizer, tracker or command line.
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
        poll: Callable[[], object] = lambda: None,
        before_update: Callable[[], None] = lambda: None,
    ):
        """`poll` is called between micro-batches and may raise to stop; `before_update` when the
        gradients are made and the state is about to change.
        """
        self.config = config
        self.plan = plan
        self.engine = engine
        self.state = engine.state
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.tracker = tracker
        self.throughput = throughput
        self.poll = poll
        engine.before_update = before_update
        self._pending: list[tuple[int, dict[str, torch.Tensor] | None]] = []
        self._last_micro: Batch | None = None
        self._restart_clock()

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
                self.poll()
            number = engine.world.data_rank * len(starts) + index
            self.state.seed_dropout(step, number, engine.world.context_rank)
            micro = batch.rows(start, start + micro_size).to(device)
            loss += engine.backward(micro, num_targets, is_last=index == len(starts) - 1)
            self._last_micro = micro
        enter_phase("update")
        return engine.update(loss, self.schedule(step), self.max_grad_norm)

    def fit(self, batches: Iterator[Batch], callbacks: Sequence[Callback] = ()) -> None:
        """Make the updates that are left of `num_train_steps`, calling the hooks after each.

        `batches` has none for the steps that are left out; the hooks are called there too. Raises
        `TrainingDivergedError`; lets what `poll` and `batches` raise through, with the state of the
        last whole update.
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
                    figures = self.train_step(step, batch)
                self.state.step = step + 1
                self._pending.append((step, figures))

                if info.is_last or step % self.config.log_interval == 0:
                    self.flush()
                start = time.perf_counter()
                for callback in callbacks:
                    callback(info)
                self._hook_time += time.perf_counter() - start
        finally:
            gc.unfreeze()

    def flush(self, *, alone: bool = False) -> None:
        """Hand the figures of the steps since the last flush to the tracker.

        Hooks that read or save the state call it first, on all ranks. This is where the host waits
        for the device. A step that was not finite, or the end of a spike, is reported like any
        other and then raised, unless `crash_on_nan` is false. `alone`: the first rank calls it
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
        is none after the last update. All ranks call it, each with a micro-batch it has seen.
        """
        micro = self._last_micro
        if micro is None or not self.config.crash_on_nan:
            return
        with inference(self.state.model), torch.compiler.set_stance("force_eager"):
            loss = self.state.model(micro.tokens, micro.targets, segments=micro.segments)
        is_bad = torch.tensor(not math.isfinite(loss.item()), dtype=torch.int32)
        if int(self.engine.world.sum_all(is_bad)):
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
            values = self.engine.world.from_first(values)
        named = (dict(zip(names, row, strict=True)) for row in values)
        return dict(zip(figures, named, strict=True))

    def _rates(self, steps: Sequence[int]) -> dict[str, float]:
        """Throughput over the updates since the last flush, hooks left out."""
        seconds = time.perf_counter() - self._interval_start - self._hook_time
        hook_time, loading_time = self._hook_time, self._loading_time
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
            "throughput/hook_time": hook_time / len(steps),
        }

    def _restart_clock(self) -> None:
        self._interval_start = time.perf_counter()
        self._loading_time = self._hook_time = 0.0
