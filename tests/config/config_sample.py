"""A small configuration with every kind of field, shared by the tests of this folder."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from ostro.config import Alias, Choice
from ostro.core.errors import Problem
from ostro.core.units import Precision


class TrackerConfig(Choice):
    default_type = "wandb"


@TrackerConfig.register_subclass("wandb")
@dataclass(frozen=True)
class WandbConfig(TrackerConfig):
    project: str | None = None
    """The project to log to."""
    name: str | None = None
    """Name of the run."""
    group: str | None = None
    """Group of the run."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    resume: bool | str | None = None
    """Whether to resume."""
    save_dumps: bool = False
    """Whether to keep dumps."""


@TrackerConfig.register_subclass("tensorboard")
@dataclass(frozen=True)
class TensorboardConfig(TrackerConfig):
    logdir: str = "logs"
    """Folder of the event files."""


@TrackerConfig.register_subclass("console")
@dataclass(frozen=True)
class ConsoleConfig(TrackerConfig):
    pass


class ModelConfig(Choice):
    default_type = "gpt2"


@ModelConfig.register_subclass("gpt2")
@dataclass(frozen=True)
class Gpt2(ModelConfig):
    hidden_dim: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Number of attention heads."""
    num_layers: int = 12
    """Number of blocks."""
    dropout: float = 0.0
    """Dropout probability."""

    def problems(self) -> Iterator[Problem]:
        if self.num_heads <= 0 or self.hidden_dim % self.num_heads:
            rule = f"must divide model.hidden_dim = {self.hidden_dim}"
            yield Problem("num_heads", rule, "choose a divisor")


@ModelConfig.register_subclass("llama")
@dataclass(frozen=True)
class Llama(ModelConfig):
    hidden_dim: int = 4096
    """Width of the residual stream."""
    num_kv_heads: int = 8
    """Number of key and value heads."""


class ScheduleConfig(Choice):
    default_type = "cosine"


@ScheduleConfig.register_subclass("cosine")
@dataclass(frozen=True)
class Cosine(ScheduleConfig):
    floor: float = 0.1
    """Where it ends."""


@ScheduleConfig.register_subclass("inv_sqrt")
@dataclass(frozen=True)
class InverseRoot(ScheduleConfig):
    timescale: float = 10000
    """Steps after which it bends."""


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup: int | float = 0.01
    """Steps (integer) or a fraction of the run."""
    cycles: int | list[int] | None = None
    """Number of cycles, or their minima."""
    schedule: ScheduleConfig = field(default_factory=Cosine)
    """How the rate decays."""

    def problems(self) -> Iterator[Problem]:
        if self.learning_rate <= 0:
            yield Problem("learning_rate", "must be positive")


@dataclass(frozen=True)
class Keep:
    every: int
    """Steps between checkpoints."""
    until: int | None = None
    """Last step of this rule; null for no end."""


@dataclass(frozen=True)
class Trainer:
    seed: int = 0
    """Random seed."""
    id: str | None = None
    """Run id."""
    log_dir: str = "logs/"
    """Folder of the logs."""
    precision: Precision = field(default_factory=Precision)
    """Mixed-precision policy."""
    save_interval: timedelta = timedelta(minutes=15)
    """Time between temporary checkpoints."""
    keep: list[Keep] = field(default_factory=lambda: [Keep(10000)])
    """Which checkpoints stay."""
    axes: dict[str, str | list[str]] = field(default_factory=dict)
    """Logical to physical axes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    crash_on_nan: bool = True
    """Whether to stop at a loss that is not a number."""
    tracker: TrackerConfig | list[TrackerConfig] = field(default_factory=WandbConfig)
    """Where metrics go."""


@dataclass(frozen=True)
class RunConfig:
    """A run."""

    imports: list[str] = field(default_factory=list)
    """Modules that register components."""
    model: ModelConfig = field(default_factory=Gpt2)
    """The model."""
    trainer: Trainer = field(default_factory=Trainer)
    """The training loop."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""


def as_fraction(text: str) -> float:
    """A ratio is a fraction even where it is written without a point."""
    return float(text)


ALIASES = [
    Alias("trainer.wandb", "trainer.tracker", entry_type="wandb"),
    Alias("trainer.tracker.save_old_dumps", "trainer.tracker.save_dumps"),
    Alias("trainer.learning_rate", "optimizer.learning_rate"),
    Alias("trainer.warmup_ratio", "optimizer.warmup", as_fraction),
]
