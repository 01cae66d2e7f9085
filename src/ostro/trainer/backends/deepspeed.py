"""DeepSpeed behind the interface of `Engine`: its settings filled in, its optimizer, its shards."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from math import nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ostro.checkpoint import Saved, SavedFile
from ostro.core.errors import CheckpointError, ConfigError, Problem
from ostro.core.units import format_bytes
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.optim import OptimizerConfig, gradient_norm, set_learning_rate
from ostro.runtime.phase import enter_phase
from ostro.trainer.backends.torch import Engine
from ostro.trainer.config import BatchPlan, TrainerConfig
from ostro.trainer.state import TrainState

_log = logging.getLogger(__name__)

SHARDS = "deepspeed"
"""The folder of a checkpoint that DeepSpeed writes, and its name in `values.json`."""

_SAME = 'write "auto", or the same value in both'


def deepspeed_settings(
    trainer: TrainerConfig,
    optimizer: OptimizerConfig,
    plan: BatchPlan,
    *,
    has_fp16: bool,
) -> tuple[dict[str, Any], list[str]]:
    """The content of DeepSpeed's JSON with our values for every "auto", and notices.

    A value there that contradicts ours, and what does not go together with DeepSpeed, is a
    `ConfigError`. `has_fp16`: whether DeepSpeed computes in float16 on the device of the run.
    """
    given = trainer.deepspeed
    assert given is not None, "trainer.deepspeed is not set"
    problems = list(_unsupported(trainer, optimizer, plan, has_fp16))
    if importlib.util.find_spec("deepspeed") is None:
        advice = 'pip install "ostro[deepspeed]"'
        problems.append(Problem("trainer.deepspeed", "DeepSpeed is not installed", advice))
    settings, notices = _copy(given), []
    compute = trainer.mp.compute
    if _get(settings, "fp16.enabled") is True and not has_fp16 and compute == "bfloat16":
        notices.append(
            "trainer.deepspeed.fp16.enabled = true: DeepSpeed has no float16 on this device;"
            " bfloat16 is used instead"
        )
        settings["fp16"], settings["bf16"] = {"enabled": False}, {"enabled": True}
    for path, (name, value) in _ours(trainer, optimizer, plan).items():
        theirs = _get(settings, path)
        if theirs not in (None, "auto") and theirs != value:
            rule = f"contradicts {name} = {_text(value)}"
            problems.append(Problem(f"trainer.deepspeed.{path}", rule, _SAME, _text(theirs)))
        _set(settings, path, value)
    problems += _schedule_problems(given)
    if problems:
        raise ConfigError(problems)
    # The optimizer and the learning rate are ours; what they say there was compared above.
    settings.pop("optimizer")
    settings.pop("scheduler", None)
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("steps_per_print", 10**9)  # the trackers report
    return _without_auto(settings), notices


def _ours(
    trainer: TrainerConfig, optimizer: OptimizerConfig, plan: BatchPlan
) -> dict[str, tuple[str, Any]]:
    """Path in DeepSpeed's JSON -> the setting of ours that decides, and its value."""
    size, ranks = plan.schedule.size(0), plan.data_axis_size
    micro, per_update = plan.micro_batch_size(0), plan.num_micro_batches(0)
    betas = [getattr(optimizer, "beta1", None), getattr(optimizer, "beta2", None)]
    compute = trainer.mp.compute
    return {
        "train_batch_size": ("trainer.train_batch_size", size),
        "train_micro_batch_size_per_gpu": ("trainer.per_device_parallelism", micro),
        "gradient_accumulation_steps": (
            f"trainer.train_batch_size / (per_device_parallelism * processes)"
            f" = {size} / ({micro} * {ranks})",
            per_update,
        ),
        "gradient_clipping": ("optimizer.max_grad_norm", optimizer.max_grad_norm or 0.0),
        "bf16.enabled": (f"trainer.mp = {trainer.mp}, bf16", compute == "bfloat16"),
        "fp16.enabled": (f"trainer.mp = {trainer.mp}, fp16", compute == "float16"),
        "optimizer.type": ("optimizer.type: adam, DeepSpeed's", "AdamW"),
        "optimizer.params.lr": ("optimizer.learning_rate", optimizer.learning_rate),
        "optimizer.params.betas": ("optimizer.beta1, beta2", betas),
        "optimizer.params.eps": ("optimizer.epsilon", getattr(optimizer, "epsilon", None)),
        "optimizer.params.weight_decay": ("optimizer.weight_decay", optimizer.weight_decay),
    }


def _unsupported(
    trainer: TrainerConfig, optimizer: OptimizerConfig, plan: BatchPlan, has_fp16: bool
) -> Iterator[Problem]:
    """What works without DeepSpeed only."""
    if optimizer.skip_step is not None:
        rule, advice = "DeepSpeed cannot hold an update back", "set it to false"
        yield Problem("optimizer.skip_bad_steps", rule, advice, str(optimizer.skip_bad_steps))
    if optimizer.needs_matrices:
        rule = "DeepSpeed hands optimizers flat parts of the weights, and this one needs matrices"
        yield Problem("optimizer.type", rule, "use adam, or fsdp_axis without DeepSpeed")
    if len(plan.schedule.stages) > 1:
        rule = "DeepSpeed needs one batch size for the whole run"
        yield Problem("trainer.train_batch_size", rule, "give a number")
    if trainer.mp.params != "float32":
        rule = "DeepSpeed keeps the weights it updates in float32"
        advice = f"use p=f32,c={trainer.mp.compute}"
        yield Problem("trainer.mp", rule, advice, str(trainer.mp))
    if trainer.mp.compute == "float16" and not has_fp16:
        rule, advice = "DeepSpeed has no float16 on this device", "use p=f32,c=bf16"
        yield Problem("trainer.mp", rule, advice, str(trainer.mp))
    checkpoints = trainer.checkpointer
    if checkpoints.format == "nanogpt":
        rule, advice = "DeepSpeed's shards do not fit in one file", "use folder or file"
        yield Problem("trainer.checkpointer.format", rule, advice, checkpoints.format)
    if "://" in checkpoints.base_path:
        rule = "DeepSpeed writes to local folders only"
        yield Problem("trainer.checkpointer.base_path", rule, "", checkpoints.base_path)


def _schedule_problems(given: Mapping[str, Any]) -> Iterator[Problem]:
    """The learning rate is ours: a scheduler may stand in the JSON, but say nothing."""
    for name, value in _get(given, "scheduler.params", {}).items():
        if value != "auto":
            path = f"trainer.deepspeed.scheduler.params.{name}"
            rule = "the learning rate follows optimizer.learning_rate, warmup and lr_schedule"
            yield Problem(path, rule, 'write "auto", or remove the scheduler', _text(value))


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(child) for key, child in value.items()}
    return value


def _get(tree: Mapping[str, Any], path: str, default: Any = None) -> Any:
    node: Any = tree
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return default if node is None else node


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _without_auto(value: Any) -> Any:
    """What is left of "auto" goes: DeepSpeed takes its own default."""
    if isinstance(value, Mapping):
        return {k: _without_auto(child) for k, child in value.items() if child != "auto"}
    return value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine around our model and optimizer.

    DeepSpeed leaves an update out when the gradient is not finite, at the price of a wait for the
    device in every step, as its clipping does. A loss that is not finite makes such a gradient.
    """

    is_collective = True

    def __init__(self, state: TrainState, world: World, settings: dict[str, Any]):
        super().__init__(state, world)
        os.environ["DS_ACCELERATOR"] = world.device.type  # read when it is imported
        os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
        if not dist.is_initialized():  # it needs a group even of one process
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        import deepspeed

        # On CPUs it would compile a C++ kernel for sums over processes at the first start and
        # print that; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        warnings.filterwarnings("ignore", r"`torch.distributed", FutureWarning)  # its own calls
        level = logging.DEBUG if _log.isEnabledFor(logging.DEBUG) else logging.WARNING
        logging.getLogger("DeepSpeed").setLevel(level)
        # Moments as large as the model: DeepSpeed makes its own, of this rank's part.
        state.optimizer.state.clear()
        set_learning_rate(state.optimizer, 0.0)  # stage 0 makes an update to allocate its moments
        deepspeed.init_distributed(dist_init_required=False)
        try:
            deepspeed.DeepSpeedConfig(_copy(settings))
        except Exception as error:  # assertions, pydantic's, its own
            reason = " ".join(str(error).partition("For further")[0].split())
            raise ConfigError(
                Problem("trainer.deepspeed", f"DeepSpeed refuses it: {reason}")
            ) from error
        self.engine, *_ = deepspeed.initialize(
            model=state.model,
            optimizer=state.optimizer,
            config=settings,
            dist_init_required=False,
        )
        self.stage = int(self.engine.zero_optimization_stage())
        if self.stage == 0:
            state.optimizer.state.clear()  # that update is not one of the run's
        self._is_plain = self.engine.optimizer is state.optimizer  # stage 0 in float32
        self._halted = self._told = False

    def backward(self, micro: Batch, num_targets: Tensor | int, *, is_last: bool) -> Tensor:
        """See `Engine.backward`."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed divides by the number of ranks. After a divergence nothing is updated any
        # more: a gradient that is not finite is what it leaves out.
        scale = nan if self._halted else self.world.num_ranks
        enter_phase("forward")
        loss = self.engine(
            micro.tokens, micro.targets, segments=micro.segments, scale=scale / num_targets
        )
        enter_phase("backward")
        # Another tensor than the model's output: a hook on that one divides by the number of
        # micro-batches.
        self.engine.backward(loss * 1, scale_wrt_gas=False)
        return loss.detach() / scale

    def update(
        self, loss: Tensor, learning_rate: float, max_grad_norm: float | None
    ) -> dict[str, Tensor]:
        """See `Engine.update`. Clipping is in DeepSpeed's settings."""
        loss = self.world.sum(loss)
        self.before_update()
        set_learning_rate(self.state.optimizer, learning_rate)
        if self._is_plain:  # DeepSpeed neither says nor looks at the norm then
            norm = gradient_norm(p.grad for p in self.state.parameters.values())
            is_made = bool(torch.isfinite(norm))
            (self.engine.step if is_made else self.engine.zero_grad)()
        else:
            self.engine.step()
            norm, is_made = self.engine.get_global_grad_norm(), self.engine.was_step_applied()
        figures = {}
        diverged = not is_made
        if self.engine.fp16_enabled():  # too large a loss scale overflows the gradient alone
            diverged = diverged and not bool(torch.isfinite(loss))
            figures["optim/loss_scale"] = _scalar(self.engine.optimizer.loss_scale, loss)
        self._halted |= diverged and self.state.crash_on_nan
        self._tell()
        return figures | {
            "train/loss": loss,
            "grad/norm/total": _scalar(norm, loss),
            "diverged": _scalar(diverged, loss),
        }

    def _tell(self) -> None:
        """Say once, after the first update has made them, how large the moments here are."""
        if self._told:
            return
        self._told = True
        moments = [
            value
            for values in self.engine.basic_optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        size = sum(tensor.numel() * tensor.element_size() for tensor in moments)
        _log.info(
            "DeepSpeed ZeRO stage %d: optimizer state %s (%d bytes) on this rank",
            *(self.stage, format_bytes(size), size),
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """See `Engine.tensors`: the weights in float32, on the CPU of the first rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        optimizer, masters = self.engine.optimizer, {}
        if self.stage == 0 and not self._is_plain:
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                masters |= dict(zip(low, high, strict=True))
        weights = {}
        for name, parameter in self.state.model.named_parameters():
            if self.stage == 0:
                full = masters.get(parameter, parameter)
            else:
                full = safe_get_full_fp32_param(parameter)
            if self.world.is_first:
                weights[name] = full.detach().cpu()
        return {"model": weights}

    def values(self) -> dict[str, Any]:
        """See `Engine.values`: what must be the same to load the shards again."""
        return super().values() | {SHARDS: self._marks()}

    def _marks(self) -> dict[str, Any]:
        dtype = str(self.engine.get_data_types()[0]).removeprefix("torch.")
        return {"stage": self.stage, "processes": self.world.num_ranks, "precision": dtype}

    def write_shards(self, folder: Path) -> dict[str, Path]:
        """See `Engine.write_shards`."""
        self.engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)
        for file in (folder / SHARDS).iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        self.world.barrier()
        return {SHARDS: folder / SHARDS}

    def load(self, saved: Saved | SavedFile) -> None:
        """See `Engine.load`.

        DeepSpeed's files are pickles, which can run code when they are loaded: only those in a
        folder are taken whose `metadata.json` and `values.json` say that ostro wrote them.
        """
        marks, own = saved.values.get(SHARDS), self._marks()
        if marks is None or not isinstance(saved, Saved):
            raise CheckpointError(
                f"{saved} - was saved without DeepSpeed, so there is no optimizer state for it -"
                " remove trainer.deepspeed, or start a run with another trainer.id"
            )
        if self.stage == 0:  # everything is on every rank: any number of them can go on
            marks = marks | {"processes": own["processes"]}
        for name, value in own.items():
            if marks.get(name) != value:
                raise CheckpointError(
                    f"{saved} - DeepSpeed saved it with {name} = {marks.get(name)}, this run has"
                    f" {name} = {value}, and it cannot convert - go on with {marks.get(name)}"
                )
        path = str(Path(saved.path).expanduser())
        try:
            loaded, _ = self.engine.load_checkpoint(path, tag=SHARDS)
        except Exception as error:  # pickles fail in every way
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{saved}/{SHARDS} - cannot be loaded: {reason}") from error
        if loaded is None:
            raise CheckpointError(f"{saved}/{SHARDS} - DeepSpeed finds nothing to load there")
        self.state.load_values(saved.values)


def _scalar(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=like.device)
