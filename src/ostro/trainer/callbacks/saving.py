"""Save checkpoints: when the policy says so, after an improvement, at the end, at a stop."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostro.checkpoint import Checkpointer, Due, State, checkpoint_bytes, require_budget
from ostro.core.errors import CheckpointError
from ostro.data.tokenizer import Tokenizer
from ostro.io.filesystem import PARTIAL
from ostro.trainer.callbacks.callback import Callback, StepInfo
from ostro.trainer.callbacks.evaluation import Evaluation
from ostro.trainer.trainer import Trainer

log = logging.getLogger("ostro")


class Saving(Callback):
    """Saves the state of the run with its `Checkpointer`: the first rank alone, or all together
    where each holds a shard of it."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        evaluation: Evaluation,
        tokenizer: Tokenizer,
        config: str,
        values: Mapping[str, Any],
        *,
        has_checkpoint: bool = False,
    ):
        """`config`, the YAML of the run, and `values`, which a resume is checked against, are saved
        beside the state. `has_checkpoint`: the run has some of its own already.
        """
        self.checkpointer = checkpointer
        self.has_checkpoint = has_checkpoint
        """Whether the run has a checkpoint of its own to resume from; up to date on rank 0."""
        self.evaluation, self.tokenizer = evaluation, tokenizer
        self._texts = {"config.yaml": config, "tokenizer.json": tokenizer.to_text()}
        self._values = {**values, "eos_id": tokenizer.eos_id}
        self._is_writing = False

    def on_start(self, trainer: Trainer) -> None:
        engine, config = trainer.engine, trainer.config
        if config.eval_only:
            return
        if config.deepspeed is None and (trainer.world.is_first or engine.is_collective):
            self.checkpointer.prepare(trainer.state.tensors())

    def after_step(self, trainer: Trainer, info: StepInfo) -> None:
        self.save(trainer, info.step, force=info.is_last)

    def on_end(self, trainer: Trainer) -> None:
        self.report(trainer, wait=True)

    def require_room(self, trainer: Trainer) -> None:
        """Raise a `ConfigError` where `keep_bytes` is too little for this state."""
        config = trainer.config
        # DeepSpeed's folders have no size before they are written.
        if config.checkpointer.keep_bytes is not None and config.deepspeed is None:
            size = checkpoint_bytes(self.make_state(trainer, Path()))
            require_budget(config.checkpointer, size)

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint is being made, by the main thread or beside it."""
        return self._is_writing or self.checkpointer.is_saving

    @property
    def is_writing(self) -> bool:
        """Whether the main thread makes one."""
        return self._is_writing

    def save(
        self, trainer: Trainer, step: int, *, force: bool = False, interrupted: bool = False
    ) -> None:
        """Save the state after `step`, if the policy, `force` or `interrupted` says so.

        All ranks call it. Where a save on the way fails, the run continues: older checkpoints are
        intact.
        """
        must = force or interrupted
        self.report(trainer, wait=must)
        improved = self.evaluation.take_improved()
        due = self.checkpointer.due(step, force=force, improved=improved, interrupted=interrupted)
        due = trainer.world.from_first(due)  # the clocks of the others may say something else
        if due is None:
            return
        trainer.flush()  # all ranks together: it may find a spike
        trainer.require_usable(step)
        self._write(trainer, step, due, must=must)

    def save_alone(self, trainer: Trainer) -> None:
        """Save the copy that this rank has, without the others, where all would save theirs.

        Called from a thread, while the main one waits for a rank that hangs.
        """
        self.report(trainer, wait=True)
        step = trainer.state.step - 1
        due = self.checkpointer.due(step, interrupted=True)
        if due is not None and step >= trainer.first_step:
            self._write(trainer, step, due, must=True)

    def _write(self, trainer: Trainer, step: int, due: Due, *, must: bool) -> None:
        """Save what is due, where this rank has something to save and nothing speaks against it."""
        if trainer.state.recovery.suspects and due.kind == "temporary":
            # It would replace a good one, to which the run may have to go back.
            log.warning("step %d: not saved, its loss may be the beginning of a spike", step)
            return
        if not (trainer.world.is_first or trainer.engine.is_collective):
            return
        with trainer.interruption.lock:  # a thread may be saving, and end the process then
            self._is_writing = True
        shards = Path(self.checkpointer.folder).expanduser() / f"{PARTIAL}shards-{step}"
        try:
            self.report(trainer, wait=True)
            self.checkpointer.save(step, due, lambda: self.make_state(trainer, shards))
            self.report(trainer, wait=must, must=must)
        finally:
            self._is_writing = False
            if trainer.world.is_first:
                shutil.rmtree(shards, ignore_errors=True)

    def report(self, trainer: Trainer, *, wait: bool, must: bool = False) -> None:
        """Log what became of a save if that is known, or with `wait` once it is.

        One that failed is an error in the log; with `must` its `CheckpointError` is raised.
        """
        report = failure = None
        try:
            report = self.checkpointer.wait() if wait else self.checkpointer.poll()
        except CheckpointError as error:
            if must:
                raise
            failure = error
        if trainer.world.is_first and failure:  # the others say the same
            log.error("%s; training goes on", failure)
        if report is None:
            return
        if trainer.world.is_first:
            self.has_checkpoint = True
            log.info("saved %s (%s, %.1f s)", report.path, report.kind, report.seconds)
        for callback in trainer.callbacks:
            callback.after_save(trainer, report)

    def make_state(self, trainer: Trainer, shards: Path) -> State:
        """What a checkpoint holds; a backend's own files are written below `shards`."""
        engine = trainer.engine
        values = {**engine.values(), **self._values, "tracker": trainer.tracker.state()}
        return State(engine.tensors(), values, self._texts, engine.write_shards(shards))
