"""`TrainLmConfig`: all settings of a pre-training run, and what follows from them alone."""

import dataclasses
import os
import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ostro.checkpoint import entries
from ostro.checkpoint.single_file import LATEST
from ostro.config.fields import dotted_names
from ostro.core.errors import ConfigError, Problem, at_least, seed_problems
from ostro.core.redaction import Location, local_path
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer import Tokenizer
from ostro.distributed.rendezvous import shared_choice
from ostro.generate.sampling import SamplingConfig
from ostro.models import Gpt2Config
from ostro.models.hf import read_model
from ostro.models.lm_model import LmConfig
from ostro.optim import AdamConfig, OptimizerConfig
from ostro.tracker import ConsoleConfig, TrackerConfig, WandbConfig
from ostro.trainer import TrainerConfig
from ostro.trainer.config import run_id_problems
from ostro.trainer.resume_check import policy_problems


@dataclass(frozen=True)
class TrainLmConfig:
    """A pre-training run."""

    data: LMDatasetConfig = field(default_factory=LMDatasetConfig)
    """What to train and evaluate on, and how it is tokenised."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long, on what device, in which precision; logging, saving, resuming."""
    model: LmConfig = field(default_factory=Gpt2Config)
    """The architecture; `type` picks the family."""
    initialize_from_hf: Location | bool | None = None
    """Start from the weights of a Hugging Face model, with a fresh optimizer at step 0: a folder,
    or `organisation/name[@revision]` on the hub; true is the model that the family is known by,
    such as openai-community/gpt2. Checkpoints of the run come first."""
    use_hf_model_config: bool = False
    """Take the model section from that model, all but `gradient_checkpointing`."""
    optimizer: OptimizerConfig = field(default_factory=AdamConfig)
    """The optimizer and its learning-rate schedule; `type` picks the optimizer."""
    vocab_size: int | None = None
    """Rows of the embedding. Null is the tokenizer's vocabulary; larger values leave rows that
    no token uses."""
    data_seed: int | None = None
    """Seed of the order of the data. Null is `trainer.seed`."""
    epoch: int = 0
    """Stop after so many passes over the data, if that comes before `num_train_steps`. 0: never."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts for the model to go on with at each evaluation. None by default."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How those samples are drawn."""
    imports: list[str] = field(default_factory=list)
    """Python modules to import first: they may register models, optimizers, trackers, sources."""

    def problems(self) -> Iterator[Problem]:
        yield from seed_problems(self, "data_seed")
        yield from at_least(1, self, "vocab_size", advice="null takes the tokenizer's")
        if self.epoch < 0:
            yield Problem("epoch", "must not be negative", "0 goes on until num_train_steps")
        if self.initialize_from_hf and self.trainer.initialize_from is not None:
            rule = "trainer.initialize_from is set too"
            yield Problem("initialize_from_hf", rule, "remove one of the two")
        if self.initialize_from_hf is True and self.model.reference_checkpoint is None:
            rule = "is true, and the model's type has no checkpoint that it is known by"
            yield Problem("initialize_from_hf", rule, "name a folder, or organisation/name")
        if self.use_hf_model_config and not self.initialize_from_hf:
            yield Problem("use_hf_model_config", "needs initialize_from_hf", "name the model there")
        if self.trainer.checkpointer.format == "nanogpt" and type(self.optimizer) is not AdamConfig:
            rule = "a ckpt.pt of nanoGPT's holds AdamW's moments"
            advice = "set trainer.checkpointer.format: file, or folder"
            yield Problem("optimizer.type", rule, advice)
        pieces = 2 * self.trainer.context_axis_size
        if pieces > 2 and self.model.seq_len % pieces:
            rule = f"sequences are cut into {pieces} pieces, and seq_len = {self.model.seq_len}"
            yield Problem("trainer.context_axis_size", rule, "change one of the two")
        if self.trainer.resume_policy:
            yield from policy_problems(self.trainer.resume_policy, list(dotted_names(type(self))))
        for problem in self.optimizer.problems_for(self.trainer.num_train_steps):
            yield dataclasses.replace(problem, setting=f"optimizer.{problem.setting}")


def choose_run_id(config: TrainLmConfig, environ: Mapping[str, str] = os.environ) -> str:
    """`trainer.id`, else RUN_ID, else the wandb tracker's id, else that of the run which this one
    continues in its own folder, else 8 random characters.

    The random ones are drawn from the system, so two runs of one seed do not collide; a process
    that an elastic launcher has restarted gets the first one's.
    """
    letters = string.ascii_lowercase + string.digits
    if config.trainer.id:
        return config.trainer.id
    candidates = [("RUN_ID in the environment", environ.get("RUN_ID"))]
    candidates += [
        ("the id of trainer.tracker", tracker.id)
        for tracker in trackers(config)
        if isinstance(tracker, WandbConfig)
    ]
    for origin, given in candidates:
        if given:
            wrong = [
                dataclasses.replace(problem, setting="trainer.id", value=given, origin=origin)
                for problem in run_id_problems(given)
            ]
            if wrong:
                raise ConfigError(wrong)
            return given
    if continued := _continued(config.trainer):
        return continued
    return shared_choice("run id", "".join(random.SystemRandom().choices(letters, k=8)), environ)


def _continued(trainer: TrainerConfig) -> str | None:
    """The id of the run whose newest checkpoint is named as the start, in the folder that this run
    saves to. It is the same run then, and looks after the temporary checkpoints of before."""
    start, folder = trainer.initialize_from, trainer.checkpointer.folder("a")
    if start is None or "://" in folder or folder != trainer.checkpointer.folder("b"):
        return None
    path, own = Path(local_path(start)).expanduser().resolve(), Path(folder).expanduser().resolve()
    if not path.is_relative_to(own) or not (found := entries(str(own))):
        return None
    newest = path == own or path.name == LATEST or path == Path(found[0].path).resolve()
    return found[0].run_id or None if newest else None


def with_hf_model(config: TrainLmConfig) -> TrainLmConfig:
    """`use_hf_model_config` carried out, and `initialize_from_hf: true` made a name."""
    if isinstance(config.initialize_from_hf, bool):
        name = config.model.reference_checkpoint if config.initialize_from_hf else None
        config = dataclasses.replace(config, initialize_from_hf=name)
    if not config.use_hf_model_config or not isinstance(config.initialize_from_hf, str):
        return config
    checkpointing = getattr(config.model, "gradient_checkpointing", True)
    model = read_model(config.initialize_from_hf, checkpointing)
    return dataclasses.replace(config, model=model, use_hf_model_config=False)


def trackers(config: TrainLmConfig) -> list[TrackerConfig]:
    """The trackers of the run. The console is among them, for the lines of the run's log file at
    least; on the terminal where progress is to be shown."""
    given = config.trainer.tracker
    listed = given if isinstance(given, list) else [given]
    if any(isinstance(tracker, ConsoleConfig) for tracker in listed):
        return listed
    return [*listed, ConsoleConfig(on_terminal=config.trainer.progress)]


def run_name(config: TrainLmConfig) -> str:
    """The name people gave the run: the wandb tracker's, else its id."""
    for tracker in trackers(config):
        if name := getattr(tracker, "name", None):
            return name
    assert config.trainer.id is not None, "the run id is chosen before the name is asked for"
    return config.trainer.id


def vocab_size(config: TrainLmConfig, tokenizer: Tokenizer) -> int:
    """Rows of the embedding; `ConfigError` where the tokenizer needs more than were asked for."""
    if config.vocab_size is None:
        return tokenizer.vocab_size
    if config.vocab_size < tokenizer.vocab_size:
        rule = f"must be at least the tokenizer's vocabulary = {tokenizer.vocab_size}"
        raise ConfigError(Problem("vocab_size", rule, "or null, to take just that"))
    return config.vocab_size


def replace_trainer(config: TrainLmConfig, **changes: object) -> TrainLmConfig:
    """The configuration with some fields of `trainer` changed."""
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes))
