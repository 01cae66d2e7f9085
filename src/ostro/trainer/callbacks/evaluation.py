"""Evaluate the model on the validation sets."""

import math
import time
from collections.abc import Mapping

import numpy as np

from ostro.data.order.sequences import EvalData
from ostro.evaluation.losses import evaluate
from ostro.trainer.callbacks.callback import Callback, StepInfo, is_due
from ostro.trainer.trainer import Trainer


class Evaluation(Callback):
    """Evaluates every `trainer.steps_per_eval` steps, and tells the other callbacks."""

    def __init__(self, sets: Mapping[str, EvalData], token_bytes: np.ndarray):
        """`token_bytes`: how many bytes of text each token stands for."""
        self.sets, self.token_bytes = sets, token_bytes
        self.metrics: dict[str, float] = {}
        """Those of the last evaluation."""
        self._improved: bool | None = None

    def on_start(self, trainer: Trainer) -> None:
        config, step = trainer.config, trainer.state.step
        if config.eval_only or (config.eval_when == "before" and step == 0):
            self.run(trainer, step)
            self._improved = None  # this sets the mark; the first weights are not saved

    def after_step(self, trainer: Trainer, info: StepInfo) -> None:
        """Evaluate after step k, or before it, when k is a multiple of `steps_per_eval`."""
        before = trainer.config.eval_when == "before"
        step = info.step + 1 if before else info.step
        if is_due(trainer.config.steps_per_eval, StepInfo(step, info.is_last)):
            self.run(trainer, step)

    def run(self, trainer: Trainer, step: int) -> None:
        """Evaluate on every set, and hand the metrics to the tracker and the callbacks."""
        trainer.flush()
        config, state = trainer.config, trainer.state
        if self.sets and config.steps_per_eval is not None:
            start = time.perf_counter()
            self.metrics = evaluate(
                state.model,
                self.sets,
                batch_size=trainer.plan.eval_batch_size,
                token_bytes=self.token_bytes,
                world=trainer.world,
                max_batches=config.max_eval_batches,
                poll=trainer.interruption.agree,
            )
            elapsed = {"eval/total_time": time.perf_counter() - start}
            trainer.tracker.log(self.metrics | elapsed, step=step)
            loss = self.metrics.get("eval/loss", math.nan)
            self._improved = loss < state.best_eval_loss
            state.best_eval_loss = min(state.best_eval_loss, loss)
            state.eval_loss = loss
        for callback in trainer.callbacks:
            callback.after_evaluation(trainer, step, self.metrics)

    def take_improved(self) -> bool | None:
        """Whether the loss was the lowest so far; None where nothing was evaluated since."""
        improved, self._improved = self._improved, None
        return improved
