"""A run in progress: the loop with its hooks, and the way out of it."""

import contextlib
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ostro.callbacks import StepInfo, is_due
from ostro.checkpoint import Checkpointer, State
from ostro.checkpoint.storage import PARTIAL
from ostro.config import dump_yaml
from ostro.data.loader import Loader
from ostro.data.text import LMData
from ostro.data.tokenizer import Tokenizer
from ostro.distributed import World
from ostro.errors import CheckpointError
from ostro.evaluate import evaluate
from ostro.lm_config import TrainLmConfig
from ostro.sample import complete_all
from ostro.signals import Interrupted, Signals
from ostro.throughput import Throughput
from ostro.tracker import Tracker
from ostro.trainer import BatchPlan, Engine, Trainer, TrainingDivergedError, TrainState

log = logging.getLogger("ostro")


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
            poll=self.poll,
            before_update=self.checkpointer.before_update,
        )
        self._texts = {"config.yaml": dump_yaml(config), "tokenizer.json": self.tokenizer.to_text()}
        self._token_bytes = self.tokenizer.token_bytes()
        if self.engine.is_collective and self.world.num_ranks > 1:
            self.checkpointer.join()
        self._eval_metrics: dict[str, float] = {}
        self._improved: bool | None = None

    def fit(self) -> dict[str, float]:
        """Train to the end, or to a signal or divergence, and leave a checkpoint either way.

        Returns the metrics of the last evaluation. With `eval_only` that is all there is.
        """
        trainer, first_step = self.config.trainer, self.state.step
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
        batches = loader.batches(first_step, num_steps)
        try:
            with self.signals.deferred(), contextlib.closing(batches):
                self.trainer.fit(batches, [self.evaluate_if_due, self.save_if_due])
        except (Interrupted, TrainingDivergedError):
            with contextlib.suppress(TrainingDivergedError):
                self.trainer.flush()  # may find that the weights stopped changing earlier
            if self.state.step > first_step:
                self.save(self.state.step - 1, interrupted=True)
            log.info("stopped after %d of %d updates", self.state.step, num_steps)
            raise
        finally:
            self._report_save(wait=True)
        return self._eval_metrics

    def poll(self, whole_step: bool) -> None:
        """Raise `Interrupted` if a signal has come, on all ranks after the same update."""
        if self.world.num_ranks == 1:
            self.signals.poll()
        elif whole_step and self.world.any(self.signals.received):
            raise Interrupted(self.signals.signum)

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
                poll=self.signals.poll if self.world.num_ranks == 1 else lambda: None,
            )
            elapsed = {"eval/total_time": time.perf_counter() - start}
            self.tracker.log(self._eval_metrics | elapsed, step=step)
            loss = self._eval_metrics.get("eval/loss", math.nan)
            self._improved = loss < self.state.best_eval_loss
            self.state.best_eval_loss = min(self.state.best_eval_loss, loss)
        writes = self.world.is_first or self.engine.is_collective
        if (prompts := self.config.sample_prompts) and writes:
            texts = complete_all(self.state.model, self.tokenizer, prompts, self.config.sampling)
            for index, text in enumerate(texts):
                self.tracker.log_text(f"sample/{index}", text, step=step)

    def save(self, step: int, *, force: bool = False, interrupted: bool = False) -> None:
        """Save the state after update `step`, if the policy, `force` or `interrupted` says so.

        Where a save on the way fails, the run goes on: older checkpoints are intact.
        """
        must = force or interrupted
        self._report_save(wait=must)
        improved, self._improved = self._improved, None
        due = self.checkpointer.due(step, force=force, improved=improved, interrupted=interrupted)
        if self.engine.is_collective:
            due = self.world.from_first(due)  # the clocks of the others may say something else
        if due is None or not (self.world.is_first or self.engine.is_collective):
            return
        self._report_save(wait=True)
        shards = Path(self.checkpointer.folder).expanduser() / f"{PARTIAL}shards-{step}"
        try:
            self.checkpointer.save(step, due, lambda: self.make_state(shards))
            self._report_save(wait=must, must=must)
        finally:
            if self.world.is_first:
                shutil.rmtree(shards, ignore_errors=True)

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
            log.info("saved %s (%s, %.1f s)", report.path, report.kind, report.seconds)

    def make_state(self, shards: Path) -> State:
        self.trainer.flush()
        values = self.engine.values() | {
            "tracker": self.tracker.state(),
            "data": self.data.fingerprint,
            "eos_id": self.tokenizer.eos_id,
            "run_id": self.config.trainer.id,
            "num_ranks": self.world.num_ranks,
        }
        tensors = self.engine.tensors()
        return State(tensors, values, self._texts, self.engine.write_shards(shards))
