"""The training loop: one update, many updates, and the state between them."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ostro.callbacks import Callback, StepInfo
from ostro.data.sequences import Batch
from ostro.errors import OstroError
from ostro.optim import Schedule
from ostro.phases import mark
from ostro.throughput import Throughput
from ostro.tracker import Tracker
from ostro.trainer.config import BatchPlan, TrainerConfig
from ostro.trainer.engine import Engine


class TrainingDivergedError(OstroError):
    """The loss or the gradient was not finite, and the run was told to stop for that."""

    def __init__(self, step: int, loss: float, norm: float):
        self.step = step
        super().__init__(
            f"step {step}: loss = {loss}, gradient norm = {norm} - training diverged; the weights"
            " are those before this update - lower optimizer.learning_rate, lengthen"
            " optimizer.warmup, set optimizer.skip_bad_steps: true, or go on regardless with"
            " trainer.crash_on_nan: false"
        )


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
        self.before_update = before_update
        self._pending: list[tuple[int, float, dict[str, torch.Tensor]]] = []
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
        mark("update")
        self.before_update()
        return engine.update(loss, self.schedule(step), self.max_grad_norm)

    def fit(self, batches: Iterator[Batch], callbacks: Sequence[Callback] = ()) -> None:
        """Make the updates that are left of `num_train_steps`, calling the hooks after each.

        Raises `TrainingDivergedError`; lets what `poll` and `batches` raise through, with the
        state of the last whole update.
        """
        num_steps = self.config.num_train_steps
        self._restart_clock()
        for step in range(self.state.step, num_steps):
            info = StepInfo(step, is_last=step == num_steps - 1)
            start = time.perf_counter()
            mark("data", step)
            batch = next(batches)
            self._loading_time += time.perf_counter() - start
            figures = self.train_step(step, batch)
            self.state.step = step + 1
            self._pending.append((step, self.schedule(step), figures))

            if info.is_last or step % self.config.log_interval == 0:
                self.flush()
            start = time.perf_counter()
            for callback in callbacks:
                callback(info)
            self._hook_time += time.perf_counter() - start

    def flush(self) -> None:
        """Hand the figures of the steps since the last flush to the tracker.

        Hooks that read or save the state call it first. This is where the host waits for the
        device. A step that was not finite is reported like any other, and then ends the run,
        unless `crash_on_nan` is false.
        """
        if not self._pending:
            return
        names = list(self._pending[0][2])
        rows = torch.stack(
            [torch.stack([f[n].float() for n in names]) for _, _, f in self._pending]
        )
        values = rows.tolist()  # the one wait for the device
        pending, self._pending = self._pending, []
        rates = self._rates(pending[0][0], pending[-1][0])
        diverged = None
        for (step, lr, _), row in zip(pending, values, strict=True):
            metrics = dict(zip(names, row, strict=True))
            loss, norm = metrics["train/loss"], metrics["grad/norm/total"]
            metrics |= {
                "optim/learning_rate": lr,
                "global_step": step,
                "run_progress": (step + 1) / self.config.num_train_steps,
            }
            if step == pending[-1][0]:
                metrics |= rates
            if metrics.pop("diverged") and diverged is None:
                diverged = TrainingDivergedError(step, loss, norm)
            self.tracker.log(metrics, step=step)
        if diverged is not None and self.config.crash_on_nan:
            self.state.step = diverged.step  # later updates were masked too
            raise diverged

    def _rates(self, first: int, last: int) -> dict[str, float]:
        """Throughput over the steps since the last flush, hooks left out."""
        schedule, num_steps = self.plan.schedule, last - first + 1
        seconds = time.perf_counter() - self._interval_start - self._hook_time
        rates = self.throughput.metrics(
            num_examples=schedule.offset(last + 1) - schedule.offset(first),
            num_steps=num_steps,
            seconds=seconds,
            total_examples=schedule.offset(last + 1),
        ) | {
            "throughput/loading_time": self._loading_time / num_steps,
            "throughput/hook_time": self._hook_time / num_steps,
        }
        self._restart_clock()
        return rates

    def _restart_clock(self) -> None:
        self._interval_start = time.perf_counter()
        self._loading_time = self._hook_time = 0.0
