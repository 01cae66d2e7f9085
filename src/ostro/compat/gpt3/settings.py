"""GPT-3 style settings: a model file, a training file and flags; and what each means natively."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ostro.compat.translation import Translation, ratio
from ostro.config import Loaded, encode
from ostro.core.errors import ConfigError, Problem, at_least, seed_problems
from ostro.core.redaction import local_path
from ostro.data.text import LMDatasetConfig

MICRO_BATCH_TOKENS = 16_384
"""Tokens that a device computes at once where the training file does not say."""


@dataclass(frozen=True)
class Gpt3ModelConfig:
    """A model file, such as `configs/model_configs/1.3B.yaml`."""

    n_layers: int
    """Transformer blocks."""
    d_model: int
    """Width; a multiple of `n_heads`."""
    n_heads: int
    """Attention heads of a block."""
    context_length: int = 2048
    """Longest sequence the model may be trained on."""
    vocab_size: int = 50257
    """Tokens of the vocabulary; GPT-2's has 50,257."""
    learning_rate: float = 6e-4
    """Peak learning rate, where the training file says null."""
    batch_size: int = 256
    """Sequences of an update, where the training file says null."""
    training_tokens: int = 300_000_000_000
    """Tokens to train on, where the training file's `max_steps` is null; the paper's budget."""
    warmup_tokens: int = 375_000_000
    """Tokens of the warm-up, where the training file's `scheduler.warmup_steps` is null."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(1, self, "batch_size", "training_tokens")
        yield from at_least(0, self, "warmup_tokens")
        if self.n_heads < 1 or self.d_model % self.n_heads:
            yield Problem("d_model", f"must be divisible by n_heads = {self.n_heads}", "change one")


@dataclass(frozen=True)
class Gpt3OptimizerConfig:
    """The `optimizer` section of a training file."""

    type: Literal["AdamW", "Muon"] = "AdamW"
    """AdamW; or Muon for the matrices of the blocks, with AdamW for the rest."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay of the mean of gradients, and of their squares."""
    eps: float = 1e-8
    """AdamW's: added to the root of the squared gradients."""
    weight_decay: float = 0.1
    """Decoupled decay of all weights but biases, norms and embeddings."""

    def problems(self) -> Iterator[Problem]:
        if len(self.betas) != 2:
            yield Problem("betas", "must be two numbers", "for example [0.9, 0.95]")


@dataclass(frozen=True)
class Gpt3SchedulerConfig:
    """The `scheduler` section of a training file."""

    type: Literal["CosineAnnealingLR"] = "CosineAnnealingLR"
    """CosineAnnealingLR is what there is."""
    warmup_steps: int | None = 0
    """Steps of the linear climb from 0 to the peak; null = the model file's `warmup_tokens`, at
    most a tenth of the run."""
    T_max: int | None = None
    """Step at which the decay ends; null = `max_steps`."""
    eta_min: float | None = 0.0
    """Learning rate at the end of the decay; null = a tenth of the peak."""


@dataclass(frozen=True)
class Gpt3LoggingConfig:
    """The `logging` section of a training file."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least important messages to show and to log."""


@dataclass(frozen=True)
class Gpt3TrainingConfig:
    """A training file, such as `configs/training_configs/large_scale.yaml`."""

    data: LMDatasetConfig
    """What to train on: a native `data` section."""
    experiment_name: str | None = None
    """Folder under `experiments/`; null = the name of the model file."""
    seed: int = 0
    """Seed of the initial weights, the data and dropout."""
    max_steps: int | None = 300
    """Updates to make; null = as many as the model file's `training_tokens` take."""
    eval_interval: int = 100
    """Steps between two evaluations."""
    log_interval: int = 10
    """Steps between two reports."""
    save_interval: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep_interval: int | None = None
    """Steps between checkpoints that are kept for good: the others are deleted once the next one is
    saved. Null keeps them all."""
    learning_rate: float | None = None
    """Peak learning rate; null = the model file's."""
    batch_size: int | None = None
    """Sequences of an update, on all devices together; null = the model file's."""
    micro_batch_size: int | None = None
    """Sequences that a device computes at once; null = as many as divide the batch evenly and
    hold at most 16,384 tokens."""
    sequence_length: int | None = None
    """Tokens of a sequence; null = the model file's `context_length`."""
    optimizer: Gpt3OptimizerConfig = field(default_factory=Gpt3OptimizerConfig)
    """AdamW or Muon."""
    scheduler: Gpt3SchedulerConfig = field(default_factory=Gpt3SchedulerConfig)
    """Warm-up and cosine decay."""
    dropout: float = 0.0
    """Dropout probability everywhere."""
    gradient_clipping: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    fp16: bool = False
    """Compute in float16, with a gradient scaler."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more work."""
    logging: Gpt3LoggingConfig = field(default_factory=Gpt3LoggingConfig)
    """What is logged."""

    def problems(self) -> Iterator[Problem]:
        intervals = ("eval_interval", "log_interval", "save_interval", "keep_interval")
        yield from seed_problems(self, "seed")
        yield from at_least(1, self, "max_steps", "batch_size", "micro_batch_size", *intervals)


@dataclass(frozen=True)
class Gpt3Flags:
    """Flags of `src/train.py`. Native settings are taken too, as `--trainer.log_interval 5`."""

    config: str | None = None
    """Model file."""
    training_config: str | None = None
    """Training file; without one, configs/training_configs/small_scale.yaml."""
    model_size: str | None = None
    """125M, 350M, 760M, 1.3B, 2.7B, 6.7B, 13B or 175B, in place of `--config`."""
    seed: int | None = None
    """Random seed."""
    output_dir: str | None = None
    """Folder of this run, in place of `experiments/<name>`."""
    fp16: bool = False
    """Compute in float16."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Library that joins the processes."""
    num_nodes: int | None = None
    """Machines of the run."""
    gpus_per_node: int | None = None
    """Processes to start on each machine, one for each GPU."""
    resume_from_checkpoint: str | None = None
    """A checkpoint, `latest_checkpoint.pt`, or a folder of checkpoints to go on from."""
    deepspeed_config: str | None = None
    """Train with DeepSpeed, as this JSON file says; `auto` takes the other files' values."""
    local_rank: int | None = None
    """Set by launchers."""

    def problems(self) -> Iterator[Problem]:
        yield from seed_problems(self, "seed")


@dataclass(frozen=True)
class Gpt3Run:
    """All that a command line names, each with the origin of its settings."""

    model: Loaded[Gpt3ModelConfig]
    training: Loaded[Gpt3TrainingConfig]
    flags: Loaded[Gpt3Flags]
    model_name: str
    """The model file without folder and `.yaml`."""

    @property
    def merged(self) -> Loaded[Any]:
        """All three as one, for the places that settings came from."""
        origins = self.model.origins | self.training.origins
        typed = {k: v for k, v in self.flags.origins.items() if v != "default"}
        return Loaded(self.training.config, origins | typed, [])

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self.training.config.experiment_name or self.model_name

    @property
    def batch_size(self) -> int:
        """Sequences of an update."""
        training, model = self.training.config, self.model.config
        return model.batch_size if training.batch_size is None else training.batch_size

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.training.config.sequence_length or self.model.config.context_length

    @property
    def max_steps(self) -> int:
        """Updates to make."""
        given = self.training.config.max_steps
        return self.steps_of(self.model.config.training_tokens) if given is None else given

    def steps_of(self, num_tokens: int) -> int:
        """So many tokens in updates."""
        return max(1, round(num_tokens / (self.batch_size * self.sequence_length)))


# Training file -> native, where the value is the same.
_SAME = {
    "eval_interval": "trainer.steps_per_eval",
    "log_interval": "trainer.log_interval",
}
_ALWAYS = {
    "trainer.checkpointer.format": "file",
    "trainer.checkpointer.save_interval": None,
    "trainer.log_file": "training.log",
    "trainer.fsdp_axis": None,  # DistributedDataParallel
    "model.type": "gpt2",
    "optimizer.lr_schedule": "cosine",
}


def translate(run: Gpt3Run, num_ranks: int = 1) -> Translation:
    """The native settings of a GPT-3 style command line on so many processes.

    Raises `ConfigError`.
    """
    made = Translation(run.merged)
    training, flags = run.training.config, run.flags.config
    for path, value in _ALWAYS.items():
        made.set(path, value)
    made.set("data", encode(training.data), "data")
    for key, path in _SAME.items():
        made.set(path, getattr(training, key), key)
    made.set("trainer.seed", training.seed if flags.seed is None else flags.seed, "seed")
    made.set("trainer.log_level", training.logging.level, "logging.level")
    tokens = () if training.max_steps else ("training_tokens",)
    made.set("trainer.num_train_steps", run.max_steps, "max_steps", *tokens)
    made.notices += replaced(run)
    _outputs(run, made)
    _model(run, made)
    _optimizer(run, made)
    _batch(run, made, num_ranks)
    _precision(run, made)
    if flags.distributed_backend is not None:
        made.set("trainer.distributed.backend", flags.distributed_backend, "distributed_backend")
    if flags.deepspeed_config is not None:
        made.set("trainer.deepspeed", read_deepspeed(flags.deepspeed_config), "deepspeed_config")
    for key in ("num_nodes", "gpus_per_node", "local_rank"):
        made.ignored[key] = "it says how processes are started, not how they train"
    return made


def _outputs(run: Gpt3Run, made: Translation) -> None:
    flags, training = run.flags.config, run.training.config
    root = flags.output_dir or f"experiments/{run.name}"
    key = "output_dir" if flags.output_dir else "experiment_name"
    made.set("trainer.log_dir", f"{root}/logs/.", key)
    trackers = [{"type": "json_logger"}, {"type": "tensorboard", "logdir": f"{root}/logs/."}]
    made.set("trainer.tracker", trackers, key)
    made.set("trainer.checkpointer.base_path", f"{root}/checkpoints/.", key)
    every, keep = training.save_interval, training.keep_interval
    if keep is None:
        made.set("trainer.checkpointer.keep", [{"every": every}], "save_interval")
    else:
        made.set("trainer.checkpointer.keep", [{"every": keep}], "keep_interval")
        made.set("trainer.checkpointer.save_every", every, "save_interval")
    # No flag: a fresh start. With it just that checkpoint, even where newer ones lie beside it.
    made.set("trainer.load_checkpoint", False, "resume_from_checkpoint")
    if flags.resume_from_checkpoint is not None:
        made.set("trainer.initialize_from", flags.resume_from_checkpoint, "resume_from_checkpoint")


def _model(run: Gpt3Run, made: Translation) -> None:
    model, training = run.model.config, run.training.config
    made.set("model.num_layers", model.n_layers, "n_layers")
    made.set("model.hidden_dim", model.d_model, "d_model")
    made.set("model.num_heads", model.n_heads, "n_heads")
    made.set("vocab_size", model.vocab_size, "vocab_size")
    length = run.sequence_length
    if length > model.context_length:
        rule = f"must be at most the model file's context_length = {model.context_length}"
        origin = run.training.origins["sequence_length"]
        raise ConfigError(Problem("sequence_length", rule, "", str(length), origin))
    made.set("model.seq_len", length, "sequence_length", "context_length")
    for name in ("embed_pdrop", "resid_pdrop", "attn_pdrop"):
        made.set(f"model.{name}", training.dropout, "dropout")
    recompute = training.gradient_checkpointing or run.flags.config.gradient_checkpointing
    made.set("model.gradient_checkpointing", recompute, "gradient_checkpointing")


def _optimizer(run: Gpt3Run, made: Translation) -> None:
    training, model = run.training.config, run.model.config
    peak = model.learning_rate if training.learning_rate is None else training.learning_rate
    kind = {"AdamW": "adam", "Muon": "muon"}[training.optimizer.type]
    made.set("optimizer.type", kind, "optimizer.type")
    made.set("optimizer.learning_rate", peak, "learning_rate")
    for name, value in zip(("beta1", "beta2"), training.optimizer.betas, strict=True):
        made.set(f"optimizer.{name}", value, "optimizer.betas")
    made.set("optimizer.epsilon", training.optimizer.eps, "optimizer.eps")
    made.set("optimizer.weight_decay", training.optimizer.weight_decay, "optimizer.weight_decay")
    clip = training.gradient_clipping if training.gradient_clipping else None
    made.set("optimizer.max_grad_norm", clip, "gradient_clipping")
    schedule = training.scheduler
    warmup, keys = schedule.warmup_steps, ["scheduler.warmup_steps"]
    if warmup is None:
        warmup = min(run.steps_of(model.warmup_tokens), run.max_steps // 10)
        keys.append("warmup_tokens")
    made.set("optimizer.warmup", warmup, *keys)
    made.set("optimizer.schedule_steps", schedule.T_max, "scheduler.T_max")
    lowest = 0.1
    if schedule.eta_min is not None:
        if not 0 <= schedule.eta_min <= peak:
            rule = f"must be between 0 and the learning rate = {peak}"
            origin, advice = run.training.origins["scheduler.eta_min"], "null takes a tenth of it"
            value = str(schedule.eta_min)
            raise ConfigError(Problem("scheduler.eta_min", rule, advice, value, origin))
        lowest = ratio(schedule.eta_min, peak)
    made.set("optimizer.min_lr_ratio", lowest, "scheduler.eta_min")


def replaced(run: Gpt3Run) -> list[str]:
    """A line for each value of the model file in whose place the training file has another."""
    lines = []
    pairs = {"learning_rate": "learning_rate", "batch_size": "batch_size"}
    for key, below in (pairs | {"sequence_length": "context_length"}).items():
        value = getattr(run.training.config, key)
        old, origin = getattr(run.model.config, below), run.model.origins[below]
        if value is not None and value != old and origin != "default":
            place = run.training.origins[key]
            lines.append(f"{key} = {value} ({place}) replaces {below} = {old} ({origin})")
    return lines


def _batch(run: Gpt3Run, made: Translation, num_ranks: int) -> None:
    size = run.batch_size
    made.set("trainer.train_batch_size", size, "batch_size")
    micro = run.training.config.micro_batch_size
    if micro is None:
        largest = max(1, MICRO_BATCH_TOKENS // run.sequence_length)
        micro = micro_batch(size // num_ranks, largest)
    made.set("trainer.per_device_parallelism", micro, "micro_batch_size", "batch_size")
    made.set("trainer.per_device_eval_parallelism", micro, "micro_batch_size", "batch_size")


def micro_batch(batch_size: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides the batch."""
    size = 1
    while batch_size and size * 2 <= largest and batch_size % (size * 2) == 0:
        size *= 2
    return size


def _precision(run: Gpt3Run, made: Translation) -> None:
    typed, asked = run.flags.config.fp16, run.training.config.fp16
    is_cpu = not torch.cuda.is_available()
    compute = "float16" if typed or asked else "float32"
    if run.flags.config.deepspeed_config and is_cpu and compute == "float16":
        if typed:
            rule = "DeepSpeed's CPU device has no float16"
            raise ConfigError(Problem("fp16", rule, "leave --fp16 out", "true", "--fp16"))
        compute = "bfloat16"
        made.notices.append("DeepSpeed's CPU device has no float16; computing in bfloat16")
    made.set("trainer.mp", f"p=float32,c={compute}", "fp16")


def read_deepspeed(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON file."""
    try:
        content = json.loads(Path(local_path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        rule = f"cannot be read as JSON: {error}"
        origin = "--deepspeed_config"
        raise ConfigError(Problem("deepspeed_config", rule, "", path, origin)) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem("deepspeed_config", "must hold a JSON object", "", path))
    return content
