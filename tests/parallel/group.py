"""Training in one process and in a spawned group, for comparison."""

import fcntl
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.models.gpt2 import Gpt2Config
from ostro.models.llama import LlamaConfig
from ostro.models.lm_model import LmConfig
from ostro.optim import AdamConfig, OptimizerConfig, SkipStepConfig
from ostro.parallel import Mesh
from ostro.trainer import Engine, TrainerConfig, build_state, choose_engine

SEQ_LEN, VOCAB, BATCH_SIZE = 24, 61, 12  # all but the vocabulary can be cut into 2, 3 and 4
NUM_STEPS = 8

SIZES: dict[str, Any] = {
    "seq_len": SEQ_LEN, "num_layers": 2, "hidden_dim": 24, "initializer_range": 0.2
}  # fmt: skip
MODELS: dict[str, LmConfig] = {
    "gpt2": Gpt2Config(num_heads=12, mlp_scale=2, **SIZES),
    "llama": LlamaConfig(
        num_heads=24, num_kv_heads=12, head_dim=2, intermediate_dim=24,
        gradient_checkpointing=False, **SIZES,
    ),
    "tied llama": LlamaConfig(
        num_heads=12, num_kv_heads=12, intermediate_dim=24, tie_word_embeddings=True, **SIZES
    ),
}  # fmt: skip
OPTIMIZER = AdamConfig(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, epsilon=1e-4,
    skip_bad_steps=SkipStepConfig(rolling_interval_length=4, sigma_factor=1.5),
)  # fmt: skip
ALONE = World(torch.device("cpu"))


def trainer_config(micro_batch_size: int | None = None, **settings: Any) -> TrainerConfig:
    return TrainerConfig(
        train_batch_size=BATCH_SIZE, per_device_parallelism=micro_batch_size, **settings
    )


def batch_of(step: int) -> Batch:
    """A whole batch; some targets are missing, and one step is much harder."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (BATCH_SIZE, SEQ_LEN + 1), generator=generator)
    if step != 6:
        tokens %= 7
    targets = tokens[:, 1:].clone()
    targets[:3, ::3] = -100
    return Batch(tokens[:, :-1], targets, None)


def train(
    model: LmConfig,
    trainer: TrainerConfig,
    world: World,
    num_steps: int = NUM_STEPS,
    mesh: Mesh | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> tuple[dict[str, list[float]], Engine]:
    """Figures of each step, and the engine afterwards; `world` and `mesh` are laid out."""
    plan = trainer.batch_plan(world.num_ranks)
    state = build_state(model, optimizer, trainer, VOCAB, world.device, mesh)
    engine = choose_engine(trainer, optimizer, plan, world, mesh)(state)
    rows = BATCH_SIZE // world.num_data_ranks
    figures: dict[str, list[float]] = {}
    for step in range(num_steps):
        state.step = step
        batch = batch_of(step)
        if trainer.deterministic_reduction:
            batch = batch.rows(world.data_rank, BATCH_SIZE, world.num_data_ranks)
        else:
            batch = batch.rows(world.data_rank * rows, (world.data_rank + 1) * rows)
        num_targets = engine.count_targets(batch)
        loss = torch.zeros(())
        size = plan.micro_batch_size(step)
        for start in range(0, rows, size):
            micro = batch.rows(start, start + size)
            loss += engine.backward(micro, num_targets, is_last=start + size == rows)
        for name, value in engine.update(loss, 1e-2, optimizer.max_grad_norm).items():
            figures.setdefault(name, []).append(float(value))
    return figures, engine


def spawned(function: Callable, num_ranks: int, *args: Any) -> Any:
    """What `function(world, *args)` returns on the first of so many new processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lock = Path(tempfile.gettempdir(), f"ostro-tests-{os.getuid()}.lock")
    with tempfile.TemporaryDirectory() as folder, open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two groups on the same cores would slow each other down
        path = Path(folder, "found.pickle")
        mp.spawn(_enter, (num_ranks, port, path, function, args), nprocs=num_ranks)
        return pickle.loads(path.read_bytes())


def _enter(
    rank: int, num_ranks: int, port: int, path: Path, function: Callable, args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    world = World(torch.device("cpu"), rank, num_ranks, data_rank=rank, num_data_ranks=num_ranks)
    found = function(world, *args)
    if rank == 0:
        path.write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
