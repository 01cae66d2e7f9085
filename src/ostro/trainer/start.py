"""Where a run starts: its model with the first weights, its engine, and what it resumes from."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ostro.checkpoint import (
    Checkpointer,
    ResumeSource,
    Saved,
    SavedFile,
    find_latest,
    find_resume_source,
)
from ostro.core.errors import CheckpointError, ConfigError, Problem
from ostro.distributed import World
from ostro.io.filesystem import is_folder
from ostro.models.lm_model import LmConfig, LmModel, initialize
from ostro.nn import axes_of
from ostro.nn.collectives import local
from ostro.optim import LossScaler, OptimizerConfig, has_state, require_resumable
from ostro.parallel import Mesh, arrange, compile_blocks, shard
from ostro.runtime.compile_cache import unusable_cache
from ostro.trainer.backends.deepspeed import DeepSpeedEngine, deepspeed_settings
from ostro.trainer.backends.deterministic import DeterministicEngine
from ostro.trainer.backends.torch import Engine, TorchEngine
from ostro.trainer.config import BatchPlan, TrainerConfig
from ostro.trainer.spikes import Recovery
from ostro.trainer.state import TrainState

log = logging.getLogger("ostro")


def init_mesh(trainer: TrainerConfig, world: World) -> tuple[World, Mesh | None]:
    """Lay the ranks out as the settings say; `ConfigError` where these do not fit together."""
    mapping, sizes = trainer.axis_mapping(), trainer.mesh_sizes(world.num_ranks)
    for warning in mapping.warnings:
        log.warning("trainer: %s", warning)
    if trainer.deterministic_reduction and sizes.data & (sizes.data - 1):
        rule = f"there are {sizes.data} data-parallel devices, and it needs a power of two"
        raise ConfigError(Problem("trainer.deterministic_reduction", rule, "", "true"))
    if trainer.deepspeed is not None:  # it shards by itself
        return world, None
    return arrange(world, sizes, shards=bool(mapping.fsdp))


def choose_engine(
    trainer: TrainerConfig,
    optimizer: OptimizerConfig,
    plan: BatchPlan,
    world: World,
    mesh: Mesh | None,
) -> Callable[[TrainState], Engine]:
    """What makes the engine of a run, its settings checked: `ConfigError` comes before the data."""
    if trainer.deepspeed is None:
        kind = DeterministicEngine if trainer.deterministic_reduction else TorchEngine
        return lambda state: kind(state, world, mesh)
    has_fp16 = world.device.type != "cpu"
    settings, notices = deepspeed_settings(trainer, optimizer, plan, has_fp16=has_fp16)
    for notice in notices:
        log.warning("%s", notice)
    return lambda state: DeepSpeedEngine(state, world, settings)


def build_state(
    model_config: LmConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    num_tokens: int,
    device: torch.device,
    mesh: Mesh | None = None,
) -> TrainState:
    """The model with its initial weights, its optimizer and guards, on a device.

    With a `mesh` no device ever holds more of the model than its part.
    """
    model = build_model(model_config, trainer, num_tokens, mesh)
    return allocate(model, optimizer, trainer, device)


def build_model(
    model_config: LmConfig, trainer: TrainerConfig, num_tokens: int, mesh: Mesh | None
) -> LmModel:
    """The model on the meta device, laid out over the mesh."""
    compute_dtype = getattr(torch, trainer.mp.compute)
    with torch.device("meta"):
        model = model_config.build(num_tokens, compute_dtype=compute_dtype)
    model.to(getattr(torch, trainer.mp.params))
    compiles = trainer.compile is True and has_compiler()
    if mesh is not None:
        shard(model, trainer.axis_mapping(), mesh, compute_dtype, compiles=compiles)
    elif compiles:
        compile_blocks(model)
    return model


def allocate(
    model: LmModel, optimizer: OptimizerConfig, trainer: TrainerConfig, device: torch.device
) -> TrainState:
    """Memory and initial weights for a model of `build_model`, and what trains it."""
    model.to_empty(device=device)
    initialize(model, trainer.seed)
    with torch.no_grad():
        parameters = {name: _part(parameter) for name, parameter in model.named_parameters()}
    return TrainState(
        model,
        parameters,
        seed=trainer.seed,
        device=device,
        crash_on_nan=trainer.crash_on_nan,
        **_fresh(model, parameters, optimizer, trainer, device),
    )


def reset_state(state: TrainState, optimizer: OptimizerConfig, trainer: TrainerConfig) -> None:
    """Make the state what `allocate` made it, in the same memory."""
    state.reshard()
    initialize(state.model, trainer.seed)
    state.optimizer.state.clear()  # not both moments at a time
    state.begin(**_fresh(state.model, state.parameters, optimizer, trainer, state.device))


def _fresh(
    model: LmModel,
    parameters: Mapping[str, nn.Parameter],
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    device: torch.device,
) -> dict[str, Any]:
    """An optimizer and guards that have seen nothing."""
    axes, skip_step = axes_of(model), optimizer.skip_step
    named = {name: (p, axes[name]) for name, p in parameters.items()}
    split = {name: p for name, p in model.named_parameters() if p is not parameters[name]}
    built = optimizer.build(named, split)
    if trainer.deepspeed is None and not has_state(built):  # one of the user's own
        require_resumable(optimizer, named)
    # DeepSpeed scales by itself.
    scales = trainer.mp.compute == "float16" and trainer.deepspeed is None
    return {
        "optimizer": built,
        "skip_step": skip_step.build(device) if skip_step else None,
        "loss_scaler": LossScaler(device) if scales else None,
        "recovery": Recovery(trainer.recover, trainer.skip_steps),
    }


def _part(parameter: nn.Parameter) -> nn.Parameter:
    """This rank's part, in the same memory: optimizers work on plain tensors."""
    part = local(parameter)
    return parameter if part is parameter else nn.Parameter(part)


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs, a C++ compiler and folders that it can write to;
    says so where it does not."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        log.warning("trainer.compile: no C++ compiler here, so nothing is compiled - install g++")
        return False
    if fault := unusable_cache():
        log.warning(
            f"trainer.compile: {fault}, so nothing is compiled - correct the variable, or unset it"
        )
        return False
    return True


def resume_source(trainer: TrainerConfig, checkpointer: Checkpointer, world: World) -> ResumeSource:
    """The checkpoint this run should go on from, if there is one; says why."""
    decision = find_resume_source(
        checkpointer.folder,
        world=world,
        load_checkpoint=trainer.load_checkpoint,
        load_checkpoint_path=trainer.load_checkpoint_path,
        initialize_from=trainer.initialize_from,
        elsewhere=_elsewhere(trainer),
    )
    own = checkpointer.folder
    if trainer.recover and trainer.load_checkpoint is False and find_latest(own, world):
        raise CheckpointError(
            f"trainer.load_checkpoint = false - {own} holds checkpoints of an earlier run, to which"
            " trainer.recover must not go back - take another trainer.id, or delete them"
        )
    for warning in decision.warnings:
        log.warning("%s", warning)
    log.info("%s", decision.message)
    return decision


def _elsewhere(trainer: TrainerConfig) -> str:
    """The flags with which the same command saves into a folder that is not there yet."""
    saving, run_id, number = trainer.checkpointer, str(trainer.id), 2
    depends = saving.folder("a") != saving.folder("b")
    own = saving.folder(run_id).rstrip("/")
    while is_folder(saving.folder(f"{run_id}-{number}") if depends else f"{own}-{number}"):
        number += 1
    flag = f"--trainer.id {run_id}-{number}"
    if not depends:
        flag = f"--trainer.checkpointer.base_path {own}-{number}/."
    return f"{flag} --trainer.load_checkpoint null" if trainer.load_checkpoint else flag


def restore(
    trainer: TrainerConfig, engine: Engine, saved: Saved | SavedFile, epoch: int = 0
) -> None:
    """Load a checkpoint; `CheckpointError` where it has made more steps than the run is to.

    `epoch`: the passes over the data that the run ends after, if any.
    """
    if saved.values.get("is_foreign"):
        log.warning("%s holds no random state, loss scale or skip window: these start anew", saved)
    engine.load(saved)
    step, num_steps = engine.state.step, trainer.num_train_steps
    limit, it = f"trainer.num_train_steps = {num_steps}", "it"
    if epoch:
        limit, it = f"{limit} and epoch = {epoch}", "both"
    said = f"{limit} - {saved.path} has made {step} steps already"
    advice = f"raise {it} to train on, or take another trainer.id"
    if step > num_steps and not trainer.eval_only:
        raise CheckpointError(f"{said} - {advice}")
    if step == num_steps and not trainer.eval_only:
        # No error: a scheduler may start a run again that was killed after its last save.
        log.info("%s: nothing is left to train - %s", said, advice)
