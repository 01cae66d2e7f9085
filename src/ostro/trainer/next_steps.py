"""What a run says when it ends: what it left, and the commands to type next."""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ostro.core.errors import DataError
from ostro.core.redaction import REDACTED
from ostro.data.tokenizer import Tokenizer
from ostro.runtime.commands import Dialect, NativeDialect, RunFacts
from ostro.tracker import TensorboardConfig, TrackerConfig
from ostro.trainer.config import TrainerConfig

log = logging.getLogger("ostro")


@dataclass(frozen=True)
class NextSteps:
    """The end of one run, in the words of the command line that started it."""

    trainer: TrainerConfig
    """As it was resolved."""
    config_path: Path
    """Where the whole configuration lies, as it was resolved."""
    checkpoints: str
    """The folder of the run's checkpoints."""
    tokenizer: Tokenizer
    dialect: Dialect
    trackers: Sequence[TrackerConfig]
    imports: Sequence[str] = ()
    """Modules that whoever reads the checkpoints has to import, too."""
    epoch: int = 0
    """Passes over the data after which the run ends, if it does."""
    prompts: Sequence[str] = ()
    """What the user lets the model continue."""
    has_documents: bool = True
    """Whether its batches are made of documents that `ostro why` can show."""

    @property
    def facts(self) -> RunFacts:
        """What the commands have to know."""
        trainer = self.trainer
        assert trainer.id is not None, "the run id is chosen before"
        return RunFacts(
            trainer.id,
            str(self.config_path),
            self.checkpoints,
            never_loads=trainer.load_checkpoint is False,
            imports=tuple(self.imports),
            is_complete=REDACTED not in self.config_path.read_text(encoding="utf-8"),
        )

    def after_a_stop(self, has_checkpoint: bool) -> str:
        """How a run goes on that was interrupted."""
        if has_checkpoint:
            return f"Resume with: {self.dialect.resume(self.facts)}"
        again = self.dialect.again(self.facts)
        return f"nothing was saved since it started. Start again with: {again}"

    def report_batch(self, step: int) -> None:
        """Log how to see the documents of a batch, where its data is made of documents."""
        if self.has_documents:
            command = NativeDialect().why(self.facts, step)
            log.info("See the documents of that batch with: %s", command)

    def report(self, metrics: Mapping[str, float], has_checkpoint: bool) -> None:
        """Log where everything lies and what to type next."""
        if metrics:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log.info("last evaluation: %s", shown)
        log.info("Outputs:")
        if has_checkpoint:
            log.info("  checkpoints  %s", self.checkpoints)
        log.info("  config       %s", self.config_path)
        log.info("  metrics, log %s", self.config_path.parent)
        if commands := dict(self._commands(has_checkpoint)):
            log.info("Next steps:")
        for name, command in commands.items():
            log.info("  %-12s %s", f"{name}:", command)

    def _commands(self, has_checkpoint: bool) -> Iterator[tuple[str, str]]:
        trainer, epoch = self.trainer, self.epoch
        if has_checkpoint and not trainer.eval_only:
            command = self.dialect.train_on(self.facts, trainer.num_train_steps * 2, epoch * 2)
            yield "train on", str(command)
        if has_checkpoint:
            yield "sample", str(self.dialect.sample(self.facts, self._prompt()))
        for tracker in self.trackers:
            if isinstance(tracker, TensorboardConfig):
                folder = tracker.logdir.partition("${run_id}")[0].removesuffix("/.") or "."
                yield "TensorBoard", shlex.join(["tensorboard", "--logdir", folder])

    def _prompt(self) -> str:
        """A prompt that the tokenizer has tokens for."""
        for prompt in [*self.prompts[:1], "Once"]:
            try:
                self.tokenizer.encode_prompt(prompt)
            except DataError:
                continue
            return prompt
        some = (self.tokenizer.decode([token]) for token in range(self.tokenizer.vocab_size))
        return next(filter(str.isalnum, some), "")
