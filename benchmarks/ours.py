"""What a run builds from its configuration, without data, trackers and checkpoints."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch

from ostro.cli.arguments import load_run
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.lm_config import TrainLmConfig
from ostro.runtime.malloc import keep_freed_memory
from ostro.runtime.throughput import DevicePeak, Throughput
from ostro.tracker import CompositeTracker
from ostro.trainer import Trainer, build_state, choose_kernels
from ostro.trainer.backends.torch import TorchEngine

CONFIGS = Path(__file__).parent / "configs"
CASES = ("gpt2_124m", "gpt2_6x384", "gpt2_4x128", "llama_110m")


def load_case(name: str, flags: Sequence[str] = ()) -> TrainLmConfig:
    """The configuration `configs/<name>.yaml` with flags, as `ostro train` reads it."""
    return load_run(str(CONFIGS / f"{name}.yaml"), flags).config


def build_trainer(config: TrainLmConfig) -> Trainer:
    """The trainer of a run on the CPU, with the first weights of its seed."""
    keep_freed_memory()
    cpu = torch.device("cpu")
    choose_kernels(config.trainer, cpu)
    assert config.vocab_size is not None
    state = build_state(config.model, config.optimizer, config.trainer, config.vocab_size, cpu)
    return Trainer(
        config.trainer,
        config.trainer.batch_plan(1),
        TorchEngine(state, World(cpu), None),
        config.optimizer.schedule(config.trainer.num_train_steps),
        max_grad_norm=config.optimizer.max_grad_norm,
        tracker=CompositeTracker([]),
        throughput=Throughput(config.model.seq_len, 1, DevicePeak("cpu", 1.0, "")),
    )


def random_batch(config: TrainLmConfig, seed: int = 0) -> Batch:
    """A batch of random tokens; the last position of each row has nothing to predict."""
    size = config.trainer.batch_plan(1).schedule.size(0)
    generator = torch.Generator().manual_seed(seed)
    shape = (size, config.model.seq_len)
    tokens = torch.randint(config.vocab_size or 2, shape, generator=generator)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    return Batch(tokens, targets)


def fit(trainer: Trainer, batch: Batch, num_steps: int) -> None:
    """Make so many more updates, in the loop that a run makes them in."""
    last = trainer.state.step + num_steps
    trainer.config = replace(trainer.config, num_train_steps=last)
    trainer.fit(repeat(batch))
