"""Settings of a training run, and the batch arithmetic that follows from them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from ostro.checkpoint import CheckpointerConfig
from ostro.core.axes import (
    BATCH,
    CONTEXT,
    DATA,
    EMBED,
    MESH_AXES,
    MODEL,
    POSITION,
    REPLICA,
    AxisMapping,
    MeshSizes,
    map_axes,
)
from ostro.core.errors import ConfigError, Problem, did_you_mean, seed_problems
from ostro.core.redaction import Location
from ostro.core.units import Precision
from ostro.data.order.mixture import BatchSchedule
from ostro.distributed import DistributedConfig, RayConfig
from ostro.tracker import TrackerConfig, WandbConfig
from ostro.trainer.callbacks.callback import CallbackConfig
from ostro.trainer.resume_check import Policy
from ostro.trainer.spikes import RecoverConfig, StepRange


@dataclass(frozen=True)
class BatchStage:
    """One stage of a batch-size schedule."""

    start: int
    """First step of the stage; 0 for the first stage."""
    value: int
    """Examples in a batch from that step on."""


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train, on what, in which precision, and what to log, save and resume."""

    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    num_train_steps: int = 400_000
    """Updates to make."""
    train_batch_size: int | list[BatchStage] = 32
    """Examples in a batch: a number, or a list of `{start, value}` stages by step."""
    per_device_parallelism: int | None = None
    """Examples that a device computes at once; what is left of a batch is accumulated. Null (or
    -1) is the whole batch, split evenly over the devices."""
    per_device_eval_parallelism: int | None = None
    """Examples that a device computes at once in evaluation. Null (or -1) is the training value."""
    steps_per_eval: int | None = 1000
    """Evaluate after every so many updates, after the first, and at the end. Null: never."""
    eval_when: Literal["after", "before"] = "after"
    """after: evaluate after update k, when k is a multiple of `steps_per_eval`. before: before
    update k, as nanoGPT does; the first evaluation is then of the initial weights."""
    eval_only: bool = False
    """Evaluate once and stop; nothing is trained or saved."""
    max_eval_batches: int | None = None
    """Batches to evaluate of each validation set. Null is all of it."""
    mp: Precision = field(default_factory=Precision)
    """Precision of weights, computation and output: `f32`, or `p=f32,c=bfloat16`."""
    compile: bool | Literal["auto"] = False
    """Compile the blocks of the model with torch.compile: slower to start, faster on long runs.
    auto: when a few micro-batches, timed at the run's first start, say that it saves more time than
    it costs. What was chosen stands in the run's `config.yaml`, and is kept on resume."""
    num_threads: int | None = None
    """Threads that compute on a CPU. Null: as many as torch takes by itself at the run's first
    start, kept on resume as long as there are as many processes."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """What computes attention, linear layers and the loss on CPUs. native: kernels of
    ostro, made by the C++ compiler at their first use; torch: its operators. auto: native where
    the CPU and a compiler allow. They differ by rounding; `deterministic_reduction` takes torch."""
    device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU), or a torch device such as `cpu` or `cuda:1`."""
    require_accelerator: bool = False
    """Refuse to train on the CPU."""
    id: str | None = None
    """Name of the run in folders and trackers. Null: RUN_ID of the environment, the id of the
    wandb tracker, or eight random characters. A given id resumes its own checkpoints."""
    log_dir: Location = "logs/"
    """Folder of the run's log and metrics; the run id is appended, or replaces `${run_id}`. A
    folder that ends with `/.` is taken as it is."""
    log_file: str = "train.log"
    """Name of the log in that folder."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least important messages to show and to log."""
    log_interval: int = 10
    """Steps between two reports. The host waits for the device only then."""
    tracker: TrackerConfig | list[TrackerConfig] = field(default_factory=WandbConfig)
    """Where metrics go: one tracker or a list of several."""
    progress: bool = True
    """Show progress on the terminal, also when the console is not among the trackers."""
    crash_on_nan: bool = True
    """Stop when the loss or the gradient is not finite, with the weights before that update.
    False leaves such updates out and goes on."""
    skip_steps: list[StepRange] = field(default_factory=list)
    """Steps whose batches are left out, as a list of `{first, last}`, both inclusive: these batches
    are not read and nothing is updated. Step numbers, learning rate and data of all other steps
    stay as they are."""
    recover: RecoverConfig | None = None
    """Go back and leave batches out after a spike of the loss, or one that is not finite, in place
    of stopping. Null: never."""
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)
    """Where and when to save."""
    hang_timeout: timedelta | None = timedelta(minutes=15)
    """End the run, with a report of where every rank is, when none of them has begun any phase of
    the work for so long: a batch, an evaluation batch, a compilation, a part of a checkpoint.
    Null: wait for ever."""
    load_checkpoint: bool | None = None
    """Null: resume if there is a checkpoint, else start. True: must resume. False: never."""
    load_checkpoint_path: Location | None = None
    """Resume from the newest complete checkpoint below this path, until the run has its own."""
    initialize_from: Location | None = None
    """Take the full training state of this checkpoint when the run has none of its own."""
    resume_policy: dict[str, Policy] = field(default_factory=dict)
    """What becomes of a change since the checkpoint, by setting or section: accept, warn or refuse.
    What is not named here has a policy of its own."""
    batch_axis: str = "batch"
    """Logical axis of the examples, split over the data-parallel devices."""
    fsdp_axis: str | list[str] | None = "embed"
    """Logical axis or axes of the parameters that are sharded over the data-parallel devices."""
    tensor_parallel_axes: str | list[str] | None = None
    """Logical axes that are split over the `model` mesh axis."""
    model_axis_size: int = 1
    """Devices on the `model` mesh axis (tensor parallelism)."""
    context_axis_size: int = 1
    """Devices on the `context` mesh axis: each works on its part of every sequence."""
    replica_axis_size: int = 1
    """Devices on the `replica` mesh axis: so many copies of the parameters are kept, each sharded
    over the `data` axis."""
    axis_resources: dict[str, str | list[str]] = field(default_factory=dict)
    """Logical axis to mesh axis (replica, data, context, model), for parameters and computation.
    Of these settings the basic ones win."""
    parameter_axis_resources: dict[str, str | list[str]] = field(default_factory=dict)
    """Logical axis to mesh axis, for parameters at rest."""
    compute_axis_resources: dict[str, str | list[str]] = field(default_factory=dict)
    """Logical axis to mesh axis, during computation."""
    deterministic_reduction: bool = False
    """Give the same bits on 1, 2, 4, ... data-parallel devices and for every micro-batch size, for
    copies and for FSDP. Slow, for finding errors: sequences are computed one by one on one thread
    and their gradients summed in a fixed order."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a run meet."""
    deepspeed: dict[str, Any] | None = None
    """Train with DeepSpeed: the content of its JSON, where "auto" takes the value from here. Null:
    plain PyTorch."""
    callbacks: list[CallbackConfig] = field(default_factory=list)
    """What else to do beside the steps, as a list of `{type: ...}`, called in this order after
    evaluation and saving: `profile`, or callbacks of your own out of `imports`."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster that tokenises a corpus when a run spans hosts."""

    def problems(self) -> Iterator[Problem]:
        yield from seed_problems(self, "seed")
        axes = ("model_axis_size", "context_axis_size", "replica_axis_size")
        for name in ("num_train_steps", "log_interval", *axes):
            if getattr(self, name) < 1:
                yield Problem(name, "must be at least 1")
        if not self.log_dir.strip():
            yield Problem("log_dir", "must name a folder")
        if self.deepspeed is not None and self.deterministic_reduction:
            rule = "DeepSpeed sums gradients in its own order"
            yield Problem("deterministic_reduction", rule, "remove one of the two")
        if self.deepspeed is not None and self.compile == "auto":
            yield Problem("compile", "is not measured with DeepSpeed", "choose true or false")
        if self.num_threads is not None and self.num_threads < 1:
            yield Problem("num_threads", "must be at least 1", "null takes torch's own number")
        yield from self._recover_problems()
        for name in axes:
            if self.deepspeed is not None and getattr(self, name) > 1:
                rule = "DeepSpeed lays out the devices by itself"
                yield Problem(name, rule, "remove one of the two")
            if self.deterministic_reduction and getattr(self, name) > 1:
                rule = "deterministic_reduction holds for the data axis only"
                yield Problem(name, rule, "remove one of the two")
        yield from self._mapping_problems()
        if self.hang_timeout is not None and self.hang_timeout <= timedelta():
            yield Problem("hang_timeout", "must be longer than nothing", "null switches it off")
        for name in ("steps_per_eval", "max_eval_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, "must be at least 1", "null switches it off")
        for name in ("per_device_parallelism", "per_device_eval_parallelism"):
            value = getattr(self, name)
            if value is not None and value != -1 and value < 1:
                yield Problem(name, "must be at least 1", "null takes the default")
        yield from self._stage_problems()
        if self.load_checkpoint is False and self.load_checkpoint_path is not None:
            rule = "load_checkpoint: false never reads it"
            yield Problem("load_checkpoint_path", rule, "remove one of the two")
        for name in ("tensor_parallel_axes", "fsdp_axis"):
            if getattr(self, name) in ("", []):
                yield Problem(name, "must not be empty", "null switches it off")
        if self.id is not None:
            yield from run_id_problems(self.id)

    def _recover_problems(self) -> Iterator[Problem]:
        """What `recover` cannot be combined with."""
        if self.recover is None:
            return
        if self.deepspeed is not None:
            rule = "DeepSpeed keeps its state where a roll-back cannot reach it"
            yield Problem("recover", rule, "remove one of the two")
        if not self.crash_on_nan:
            rule = "crash_on_nan: false leaves updates that are not finite out and goes on"
            yield Problem("recover", rule, "remove one of the two")
        if self.checkpointer.format == "nanogpt":
            rule = "each ckpt.pt replaces the one before, so there is none to go back to"
            yield Problem("recover", rule, "set checkpointer.format: file or folder")

    def _mapping_problems(self) -> Iterator[Problem]:
        """Mesh axes that there are not, and splits that no model can do."""
        mapping, given = self.axis_mapping(), {}  # axis -> the setting that says where it goes
        for name in ("axis_resources", "parameter_axis_resources", "compute_axis_resources"):
            for axis, where in getattr(self, name).items():
                given[axis] = f"{name}.{axis}"
                for mesh_axis in [where] if isinstance(where, str) else where:
                    if mesh_axis not in MESH_AXES:
                        rule = f"is no mesh axis: {', '.join(MESH_AXES)} are"
                        yield Problem(f"{name}.{axis}", rule, did_you_mean(mesh_axis, MESH_AXES))
        if mapping.compute.get(BATCH, (REPLICA, DATA)) != (REPLICA, DATA):
            rule = "the examples of a batch are split over replica and data"
            yield Problem(given[BATCH], rule, "leave batch out")
        if mapping.is_split(EMBED, MODEL) and self.model_axis_size > 1:
            rule = "every device of the model axis needs the whole residual stream, embed"
            advice = "split mlp, heads or vocab, or use fsdp_axis: embed"
            yield Problem(given.get(EMBED, "tensor_parallel_axes"), rule, advice)
        if mapping.compute.get(POSITION, (CONTEXT,)) != (CONTEXT,):
            rule = "sequences are split over the mesh axis context"
            advice = "set context_axis_size, and leave position out of the mapping"
            yield Problem(given.get(POSITION, "tensor_parallel_axes"), rule, advice)

    def _stage_problems(self) -> Iterator[Problem]:
        if isinstance(self.train_batch_size, int):
            if self.train_batch_size < 1:
                yield Problem("train_batch_size", "must be at least 1")
            return
        if not self.train_batch_size or self.train_batch_size[0].start != 0:
            rule = "the first stage must start at step 0"
            yield Problem("train_batch_size", rule, "write [{start: 0, value: 32}, ...]")
        starts = [stage.start for stage in self.train_batch_size]
        if starts != sorted(set(starts)):
            yield Problem(
                "train_batch_size", f"stages must start at increasing steps, not {starts}"
            )
        for index, stage in enumerate(self.train_batch_size):
            if stage.value < 1:
                yield Problem(f"train_batch_size.{index}.value", "must be at least 1")

    def batch_schedule(self) -> BatchSchedule:
        """Batch size by step."""
        if isinstance(self.train_batch_size, int):
            return BatchSchedule(((0, self.train_batch_size),))
        stages = ((stage.start, stage.value) for stage in self.train_batch_size)
        return BatchSchedule(tuple(stages))

    def axis_mapping(self) -> AxisMapping:
        """Which mesh axes the logical axes are split over."""
        return map_axes(
            batch_axis=self.batch_axis,
            fsdp_axis=self.fsdp_axis,
            tensor_parallel_axes=self.tensor_parallel_axes,
            axis_resources=self.axis_resources,
            parameter_axis_resources=self.parameter_axis_resources,
            compute_axis_resources=self.compute_axis_resources,
        )

    @property
    def min_devices(self) -> int:
        """The fewest devices that the mesh can be laid out on."""
        return self.model_axis_size * self.context_axis_size * self.replica_axis_size

    def mesh_sizes(self, num_devices: int) -> MeshSizes:
        """So many devices as a mesh; `ConfigError` when they do not come out even."""
        unit = self.min_devices
        if num_devices % unit:
            given = [f"{axis}_axis_size" for axis in (MODEL, CONTEXT, REPLICA)]
            given = [name for name in given if getattr(self, name) > 1]
            rule = f"must divide the number of devices = {num_devices}"
            advice = "start more processes, with torchrun for example" if num_devices == 1 else ""
            name = f"trainer.{' * '.join(given)}"
            raise ConfigError(Problem(name, rule, advice, str(unit)))
        return MeshSizes(
            self.replica_axis_size,
            num_devices // unit,
            self.context_axis_size,
            self.model_axis_size,
        )

    def batch_plan(self, num_devices: int) -> "BatchPlan":
        """The batch arithmetic on so many devices; `ConfigError` when it does not come out even."""
        data_axis_size = self.mesh_sizes(num_devices).num_data_ranks
        schedule = self.batch_schedule()
        per_device = _given(self.per_device_parallelism)
        problems = []
        for start, size in schedule.stages:
            at = f" (from step {start})" if start else ""
            unit = (per_device or 1) * data_axis_size
            if size % unit:
                numbers = f"{per_device or 1} * {data_axis_size} = {unit}"
                rule = f"must be divisible by per_device_parallelism * data_axis_size = {numbers}"
                near = max(unit, round(size / unit) * unit)
                advice = f"use {near}, or change per_device_parallelism"
                value = f"{size}{at}"
                problems.append(Problem("trainer.train_batch_size", rule, advice, value))
        if problems:
            raise ConfigError(problems)
        largest = -(-schedule.max_size // data_axis_size)
        per_device_eval = _given(self.per_device_eval_parallelism) or per_device or largest
        eval_problem = self._eval_problem(schedule, per_device_eval * data_axis_size)
        if eval_problem is not None:
            raise ConfigError(eval_problem)
        return BatchPlan(schedule, per_device, per_device_eval, data_axis_size)

    def _eval_problem(self, schedule: BatchSchedule, unit: int) -> Problem | None:
        # A batch-size schedule has no one size that the evaluation batch could divide.
        if len(schedule.stages) > 1 or schedule.max_size % unit == 0:
            return None
        given = self.per_device_eval_parallelism
        rule = (
            f"train_batch_size = {schedule.max_size} must be divisible by"
            f" per_device_eval_parallelism * data_axis_size = {unit}"
        )
        advice = "use a divisor of the batch size, or null for the training value"
        return Problem("trainer.per_device_eval_parallelism", rule, advice, str(given))


def run_id_problems(run_id: str) -> Iterator[Problem]:
    """What a run's id violates, wherever it comes from."""
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", run_id):
        rule = "names folders: letters, digits, '.', '_' and '-' only"
        yield Problem("id", rule, "leave it out for a random one")


def _given(value: int | None) -> int | None:
    return None if value == -1 else value


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is cut: over devices, and on each device over micro-batches."""

    schedule: BatchSchedule
    """Examples in a batch, by step."""
    per_device_parallelism: int | None
    """Examples a device computes at once; None is its whole share."""
    per_device_eval_parallelism: int
    """Examples a device computes at once in evaluation."""
    data_axis_size: int
    """Devices over which a batch is split."""

    def micro_batch_size(self, step: int) -> int:
        """Examples that one device computes at once in this step."""
        return self.per_device_parallelism or self.schedule.size(step) // self.data_axis_size

    def num_micro_batches(self, step: int) -> int:
        """Micro-batches that each device accumulates in this step."""
        per_device = self.schedule.size(step) // self.data_axis_size
        return per_device // self.micro_batch_size(step)

    @property
    def eval_batch_size(self) -> int:
        """Examples in an evaluation batch, over all devices."""
        return self.per_device_eval_parallelism * self.data_axis_size
