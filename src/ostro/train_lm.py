"""Pre-training a language model: the whole run as a story, top to bottom."""

import contextlib
import dataclasses
import logging
import os
import random
import shlex
import string
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ostro.allocator import keep_freed_memory
from ostro.callbacks import Callback, StepInfo, every
from ostro.checkpoint import Checkpointer, State, which_checkpoint
from ostro.config import check, dump_yaml, encode
from ostro.data.loader import Loader
from ostro.data.text import LMData, LMDatasetConfig
from ostro.data.tokenizer import Tokenizer
from ostro.distributed import World, join
from ostro.errors import CheckpointError, ConfigError, Problem
from ostro.evaluate import evaluate
from ostro.hf import read_model, read_weights
from ostro.models import Gpt2Config
from ostro.models.lm_model import LmConfig, initialize
from ostro.nn import axes_of
from ostro.optim import AdamConfig, LossScaler, OptimizerConfig
from ostro.sample import SamplingConfig, complete_all
from ostro.signals import Interrupted, Signals
from ostro.throughput import Throughput, device_peak
from ostro.tracker import (
    ConsoleConfig,
    RunInfo,
    TensorboardConfig,
    Tracker,
    TrackerConfig,
    WandbConfig,
    build_trackers,
    run_folder,
)
from ostro.trainer import BatchPlan, Trainer, TrainerConfig, TrainingDivergedError, TrainState
from ostro.trainer.state import load_weights
from ostro.units import format_bytes, format_count

log = logging.getLogger("ostro")


@dataclass(frozen=True)
class TrainLmConfig:
    """A pre-training run."""

    data: LMDatasetConfig = field(default_factory=LMDatasetConfig)
    """What to train and evaluate on, and how it is tokenised."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long, on what device, in which precision; logging, saving, resuming."""
    model: LmConfig = field(default_factory=Gpt2Config)
    """The architecture; `type` picks the family."""
    initialize_from_hf: str | None = None
    """Start from the weights of a Hugging Face model, with a fresh optimizer at step 0: a folder,
    or `organisation/name[@revision]` on the hub. Checkpoints of the run come first."""
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
        if self.vocab_size is not None and self.vocab_size < 1:
            yield Problem("vocab_size", "must be at least 1", "null takes the tokenizer's")
        if self.epoch < 0:
            yield Problem("epoch", "must not be negative", "0 goes on until num_train_steps")
        if self.initialize_from_hf is not None and self.trainer.initialize_from is not None:
            rule = "trainer.initialize_from is set too"
            yield Problem("initialize_from_hf", rule, "remove one of the two")
        if self.use_hf_model_config and self.initialize_from_hf is None:
            yield Problem("use_hf_model_config", "needs initialize_from_hf", "name the model there")
        for problem in self.optimizer.problems_for(self.trainer.num_train_steps):
            yield dataclasses.replace(problem, setting=f"optimizer.{problem.setting}")


@dataclass(frozen=True)
class RunPaths:
    """Where a run leaves things."""

    log_dir: Path
    """Folder of the log, the metrics and the resolved configuration."""

    @property
    def log(self) -> Path:
        """The Python log."""
        return self.log_dir / "train.log"

    @property
    def config(self) -> Path:
        """The resolved configuration; running it again resumes the run."""
        return self.log_dir / "config.yaml"


def choose_run_id(config: TrainLmConfig, environ: Mapping[str, str] = os.environ) -> str:
    """`trainer.id`, else RUN_ID, else the wandb tracker's id, else 8 random characters.

    The random ones are drawn from the system, so two runs of one seed do not collide.
    """
    wandb_ids = [tracker.id for tracker in trackers(config) if isinstance(tracker, WandbConfig)]
    letters = string.ascii_lowercase + string.digits
    drawn = "".join(random.SystemRandom().choices(letters, k=8))
    given = [config.trainer.id, environ.get("RUN_ID"), *wandb_ids]
    return next((name for name in given if name), drawn)


def run(config: TrainLmConfig, signals: Signals | None = None) -> None:
    """Train as `config` says: data, model, optimizer, resume, fit, report.

    Raises an `OstroError` for what the user can mend and `Interrupted` when stopped by a
    signal, with a checkpoint of the last whole update in place.
    """
    signals = signals or Signals()
    config = _replace_trainer(with_hf_model(config), id=choose_run_id(config))
    check(config)
    world = join(
        config.trainer.distributed, config.trainer.device, config.trainer.require_accelerator
    )
    plan = config.trainer.batch_plan(world.num_ranks)
    if world.device.type == "cpu":
        keep_freed_memory()
    paths = RunPaths(run_folder(config.trainer.log_dir, config.trainer.id))
    with logging_to(paths.log):
        log.info("run %s on %s", config.trainer.id, world.device)
        tokenizer = config.data.build_tokenizer()
        data = build_data(config, tokenizer)
        config = _with_epochs(config, plan, data)
        paths.config.write_text(dump_yaml(config))

        num_tokens = vocab_size(config, tokenizer)
        state = build_state(config, num_tokens, world)
        throughput = Throughput(
            config.model.seq_len,
            config.model.flops_per_token(num_tokens),
            device_peak(world.device, getattr(torch, config.trainer.mp.compute)),
            world.num_ranks,
        )
        checkpointer = config.trainer.checkpointer.build(config.trainer.id, run_name(config))
        restore(config, checkpointer, state)
        _announce(config, plan, state, throughput)
        info = RunInfo(
            config.trainer.id,
            config.trainer.log_dir,
            encode(config),
            resume=state.step > 0,
            num_steps=config.trainer.num_train_steps,
            start_step=state.step,
        )
        tracker = build_trackers(trackers(config), info)
        start, first_step = time.perf_counter(), state.step
        parts = (config, plan, data, tokenizer, state, tracker, checkpointer, throughput, signals)
        try:
            tracker.log_summary(_summary(state, world, throughput))
            metrics = Session(*parts).fit()
        except (Interrupted, TrainingDivergedError) as stop:
            go_on = f"go on with: ostro train --config_path {paths.config}"
            log.info("%s", go_on)
            if isinstance(stop, Interrupted):
                stop.go_on = go_on
            raise
        finally:
            tracker.finish()
        seconds = time.perf_counter() - start
        log.info("made %d updates in %.0f s", state.step - first_step, seconds)
        _report(config, paths, checkpointer.folder, metrics)


def with_hf_model(config: TrainLmConfig) -> TrainLmConfig:
    """`use_hf_model_config` carried out."""
    if not config.use_hf_model_config or config.initialize_from_hf is None:
        return config
    checkpointing = getattr(config.model, "gradient_checkpointing", True)
    model = read_model(config.initialize_from_hf, checkpointing)
    return dataclasses.replace(config, model=model, use_hf_model_config=False)


def build_data(config: TrainLmConfig, tokenizer: Tokenizer) -> LMData:
    """Training and validation data; says every few seconds how far tokenising has come."""
    reported = time.monotonic()

    def progress(name: str, done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= 5:
            reported = time.monotonic()
            of = f" of {format_bytes(total)}" if total else ""
            log.info("%s: tokenised %s%s", name, format_bytes(done), of)

    seed = config.trainer.seed if config.data_seed is None else config.data_seed
    return config.data.build(tokenizer, config.model.seq_len, seed, progress=progress)


def build_state(config: TrainLmConfig, num_tokens: int, world: World) -> TrainState:
    """The model with its initial weights, its optimizer and guards, on this rank's device."""
    precision = config.trainer.mp
    compute_dtype = getattr(torch, precision.compute)
    with torch.device(world.device):
        model = config.model.build(num_tokens, compute_dtype=compute_dtype)
    initialize(model, config.trainer.seed)
    if precision.params != "float32":
        model.to(getattr(torch, precision.params))
    axes = axes_of(model)
    parameters = {name: (p, axes[name]) for name, p in model.named_parameters()}
    if config.trainer.compile:
        for block in model.blocks:
            block.compile()
    skip_step = config.optimizer.skip_step
    return TrainState(
        model,
        config.optimizer.build(parameters),
        seed=config.trainer.seed,
        device=world.device,
        skip_step=skip_step.build(world.device) if skip_step else None,
        loss_scaler=LossScaler(world.device) if precision.compute == "float16" else None,
        crash_on_nan=config.trainer.crash_on_nan,
    )


def restore(config: TrainLmConfig, checkpointer: Checkpointer, state: TrainState) -> None:
    """Load the checkpoint this run should go on from, if there is one."""
    trainer = config.trainer
    decision = which_checkpoint(
        checkpointer.folder,
        load_checkpoint=trainer.load_checkpoint,
        load_checkpoint_path=trainer.load_checkpoint_path,
        initialize_from=trainer.initialize_from,
    )
    for warning in decision.warnings:
        log.warning("%s", warning)
    saved, hf_name = decision.saved, config.initialize_from_hf
    if saved is None and hf_name is not None:
        log.info("starting from the weights of %s", hf_name)
        weights = read_weights(hf_name, config.model, len(state.model.head_weight()))
        return load_weights(state.model, weights, hf_name)
    log.info("%s", decision.message)
    if saved is None:
        return
    tensors = {group: saved.tensors(group) for group in ("model", "optimizer", "state")}
    state.load(tensors, saved.values, str(saved.path))
    if state.step >= trainer.num_train_steps:
        raise CheckpointError(
            f"trainer.num_train_steps = {trainer.num_train_steps} - {saved.path} has made"
            f" {state.step} updates already - raise it to train on, or take another trainer.id"
        )


class Session:
    """A run in progress: the loop with its hooks, and the way out of it."""

    def __init__(
        self,
        config: TrainLmConfig,
        plan: BatchPlan,
        data: LMData,
        tokenizer: Tokenizer,
        state: TrainState,
        tracker: Tracker,
        checkpointer: Checkpointer,
        throughput: Throughput,
        signals: Signals,
    ):
        self.config, self.plan, self.data, self.tokenizer = config, plan, data, tokenizer
        self.state, self.tracker, self.checkpointer = state, tracker, checkpointer
        self.signals = signals
        self.trainer = Trainer(
            config.trainer,
            plan,
            state,
            config.optimizer.schedule(config.trainer.num_train_steps),
            max_grad_norm=config.optimizer.max_grad_norm,
            tracker=tracker,
            throughput=throughput,
            poll=signals.poll,
        )
        self._texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer.to_text()}
        self._token_bytes = tokenizer.token_bytes()
        self._eval_metrics: dict[str, float] = {}
        self._improved: bool | None = None

    def fit(self) -> dict[str, float]:
        """Train to the end, or to a signal or divergence, and leave a checkpoint either way.

        Returns the metrics of the last evaluation.
        """
        num_steps, first_step = self.config.trainer.num_train_steps, self.state.step
        loader = Loader(self.data.train, self.plan.schedule)
        hooks: list[Callback] = [
            every(self.config.trainer.steps_per_eval, self.evaluate),  # it may decide on saving
            lambda info: self.save(info.step, force=info.is_last),
        ]
        batches = loader.batches(first_step, num_steps)
        try:
            with self.signals.deferred(), contextlib.closing(batches):
                self.trainer.fit(batches, hooks)
        except (Interrupted, TrainingDivergedError):
            with contextlib.suppress(TrainingDivergedError):
                self.trainer.flush()  # may find that the weights stopped changing earlier
            if self.state.step > first_step:
                self.save(self.state.step - 1, interrupted=True)
            log.info("stopped after %d of %d updates", self.state.step, num_steps)
            raise
        return self._eval_metrics

    def evaluate(self, info: StepInfo) -> None:
        """Evaluate on every validation set, draw samples if asked, and hand both to the tracker."""
        self.trainer.flush()
        if self.data.validation and self.config.trainer.steps_per_eval is not None:
            start = time.perf_counter()
            self._eval_metrics = evaluate(
                self.state.model,
                self.data.validation,
                batch_size=self.plan.eval_batch_size,
                token_bytes=self._token_bytes,
                device=self.state.device,
                max_batches=self.config.trainer.max_eval_batches,
                poll=self.signals.poll,
            )
            elapsed = {"eval/total_time": time.perf_counter() - start}
            self.tracker.log(self._eval_metrics | elapsed, step=info.step)
            loss = self._eval_metrics["eval/loss"]
            self._improved = loss < self.state.best_eval_loss
            self.state.best_eval_loss = min(loss, self.state.best_eval_loss)
        if prompts := self.config.sample_prompts:
            texts = complete_all(self.state.model, self.tokenizer, prompts, self.config.sampling)
            for index, text in enumerate(texts):
                self.tracker.log_text(f"sample/{index}", text, step=info.step)

    def save(self, step: int, *, force: bool = False, interrupted: bool = False) -> None:
        """Save the state after update `step`, if the policy, `force` or `interrupted` says so.

        Where a save on the way fails, the run goes on: older checkpoints are intact.
        """
        improved, self._improved = self._improved, None
        try:
            report = self.checkpointer.on_step(
                step, self._make_state, force=force, improved=improved, interrupted=interrupted
            )
        except CheckpointError as error:
            if force or interrupted:
                raise
            log.error("%s; training goes on", error)
            return
        if report is not None:
            log.info("saved %s (%s, %.1f s)", report.path, report.kind, report.seconds)

    def _make_state(self) -> State:
        self.trainer.flush()
        values = self.state.values() | {
            "tracker": self.tracker.state(),
            "data": self.data.fingerprint,
            "eos_id": self.tokenizer.eos_id,
        }
        return State(self.state.tensors(), values, self._texts)


def trackers(config: TrainLmConfig) -> list[TrackerConfig]:
    """The trackers of the run, the console among them where progress is to be shown."""
    given = config.trainer.tracker
    listed = given if isinstance(given, list) else [given]
    if config.trainer.progress and not any(isinstance(t, ConsoleConfig) for t in listed):
        return [*listed, ConsoleConfig()]
    return listed


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


def _with_epochs(config: TrainLmConfig, plan: BatchPlan, data: LMData) -> TrainLmConfig:
    """`num_train_steps` cut to `epoch` passes over the data, if that is shorter."""
    if not config.epoch:
        return config
    limit, step = config.epoch * data.train.num_windows, 0
    while step < config.trainer.num_train_steps and plan.schedule.offset(step + 1) <= limit:
        step += 1
    return _replace_trainer(config, num_train_steps=max(step, 1))


def _replace_trainer(config: TrainLmConfig, **changes: object) -> TrainLmConfig:
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes))


def _summary(state: TrainState, world: World, throughput: Throughput) -> dict[str, float | str]:
    """Facts about the run that no step changes."""
    return throughput.summary() | {
        "parameter_count": state.num_parameters,
        "num_devices": world.num_ranks,
        "num_hosts": 1,  # one process, so one host
        "backend": world.device.type,
    }


def _announce(
    config: TrainLmConfig, plan: BatchPlan, state: TrainState, throughput: Throughput
) -> None:
    batch, micro = plan.schedule.size(state.step), plan.micro_batch_size(state.step)
    peak = throughput.peak
    log.info("model: %s parameters", format_count(state.num_parameters))
    log.info(
        "batch: %d examples of %d tokens in micro-batches of %d; %d steps",
        *(batch, config.model.seq_len, micro, config.trainer.num_train_steps),
    )
    for warning in config.optimizer.schedule(config.trainer.num_train_steps).warnings:
        log.warning("%s", warning)
    log.info("%s peak: %.0f GFLOP/s (%s)", peak.kind, peak.flops / 1e9, peak.source)


def _report(
    config: TrainLmConfig, paths: RunPaths, checkpoints: str, metrics: Mapping[str, float]
) -> None:
    """Say where everything lies and what to type next."""
    if metrics:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        log.info("last evaluation: %s", shown)
    prompt = config.sample_prompts[0] if config.sample_prompts else "Once"
    log.info("where everything lies:")
    log.info("  checkpoints  %s", checkpoints)
    log.info("  config       %s", paths.config)
    log.info("  metrics, log %s", paths.log_dir)
    log.info("what to type next:")
    more = config.trainer.num_train_steps * 2
    resume = f"ostro train --config_path {paths.config} --trainer.num_train_steps {more}"
    log.info("  train on:    %s", resume)
    sample = f"ostro sample --checkpoint {checkpoints} --prompt {shlex.quote(prompt)}"
    log.info("  sample:      %s", sample)
    for tracker in trackers(config):
        if isinstance(tracker, TensorboardConfig):
            folder = tracker.logdir.partition("${run_id}")[0] or "."
            log.info("  TensorBoard: tensorboard --logdir %s", folder)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send what ostro logs to `path` and to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(to_file)
    try:
        with logging_to_terminal():
            yield
    finally:
        log.removeHandler(to_file)
        to_file.close()


@contextlib.contextmanager
def logging_to_terminal() -> Iterator[None]:
    """Print what ostro logs, from INFO up."""
    handler, level = _PrintHandler(), log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _PrintHandler(logging.Handler):
    """Prints to whatever standard output is now: a progress bar redirects it while it lives."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(prefix + record.getMessage(), file=sys.stdout, flush=True)
