"""Pre-training a language model: the whole run as a story, top to bottom."""

import contextlib
import dataclasses
import logging
import math
import os
import random
import shlex
import shutil
import string
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ostro.allocator import keep_freed_memory
from ostro.callbacks import StepInfo, is_due
from ostro.checkpoint import Checkpointer, State
from ostro.checkpoint.storage import PARTIAL
from ostro.config import check, dump_yaml, encode
from ostro.data.loader import Loader
from ostro.data.text import LMData, LMDatasetConfig
from ostro.data.tokenizer import Tokenizer
from ostro.distributed import World, joined
from ostro.errors import CheckpointError, ConfigError, Problem
from ostro.evaluate import evaluate
from ostro.models import Gpt2Config
from ostro.models.lm_model import LmConfig
from ostro.optim import AdamConfig, OptimizerConfig
from ostro.run_log import logging_to
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
from ostro.trainer import (
    BatchPlan,
    Engine,
    Trainer,
    TrainerConfig,
    TrainingDivergedError,
    TrainState,
    build_state,
    choose_engine,
    restore,
)
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
        for problem in self.optimizer.problems_for(self.trainer.num_train_steps):
            yield dataclasses.replace(problem, setting=f"optimizer.{problem.setting}")


@dataclass(frozen=True)
class RunPaths:
    """Where a run leaves things."""

    log_dir: Path
    """Folder of the log, the metrics and the resolved configuration."""
    log: Path
    """The Python log."""

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
    check(config)
    trainer = config.trainer
    with joined(trainer.distributed, trainer.device, trainer.require_accelerator) as world:
        run_id = world.from_first(choose_run_id(config))
        config = _replace_trainer(config, id=run_id)
        check(config)  # the id may come from the environment
        plan = config.trainer.batch_plan(world.num_ranks)
        if world.device.type == "cpu":
            keep_freed_memory()
        log_dir = run_folder(config.trainer.log_dir, run_id)
        paths = RunPaths(log_dir, log_dir / config.trainer.log_file)
        with logging_to(paths.log if world.is_first else None, config.trainer.log_level):
            log.info("run %s on %s%s", run_id, world.device, _of(world))
            session = build_session(config, plan, world, paths, signals or Signals())
            start, first_step = time.perf_counter(), session.state.step
            try:
                session.tracker.log_summary(_summary(session.state, world, session.throughput))
                metrics = session.fit()
            except (Interrupted, TrainingDivergedError) as stop:
                go_on = f"go on with: ostro train --config_path {paths.config}"
                log.info("%s", go_on)
                if isinstance(stop, Interrupted):
                    stop.go_on = go_on
                raise
            finally:
                session.tracker.finish()
            seconds = time.perf_counter() - start
            log.info("made %d updates in %.0f s", session.state.step - first_step, seconds)
            _report(config, paths, session.checkpointer.folder, metrics)


def build_session(
    config: TrainLmConfig, plan: BatchPlan, world: World, paths: RunPaths, signals: Signals
) -> "Session":
    """Everything a run needs, resumed where there is something to resume from."""
    make_engine = choose_engine(config.trainer, config.optimizer, plan, world)
    tokenizer = config.data.build_tokenizer()
    data = build_data(config, tokenizer)
    config = _with_epochs(config, plan, data)
    if world.is_first:
        paths.config.write_text(dump_yaml(config))

    num_tokens = vocab_size(config, tokenizer)
    trainer = config.trainer
    state = build_state(config.model, config.optimizer, trainer, num_tokens, world.device)
    throughput = Throughput(
        config.model.seq_len,
        config.model.flops_per_token(num_tokens),
        device_peak(world.device, getattr(torch, config.trainer.mp.compute)),
        world.num_ranks,
    )
    assert trainer.id is not None, "the run id is chosen before"
    engine = make_engine(state)
    checkpointer = trainer.checkpointer.build(
        trainer.id, run_name(config), in_folders=trainer.deepspeed is not None
    )
    restore(trainer, checkpointer, engine)
    _announce(config, plan, state, throughput)
    info = RunInfo(
        config.trainer.id,
        config.trainer.log_dir,
        encode(config),
        resume=state.step > 0,
        num_steps=config.trainer.num_train_steps,
        start_step=state.step,
    )
    return Session(
        config=config,
        plan=plan,
        world=world,
        data=data,
        tokenizer=tokenizer,
        state=state,
        engine=engine,
        tracker=build_trackers(trackers(config) if world.is_first else [], info),
        checkpointer=checkpointer,
        throughput=throughput,
        signals=signals,
    )


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


@dataclass
class Session:
    """A run in progress: the loop with its hooks, and the way out of it."""

    config: TrainLmConfig
    plan: BatchPlan
    world: World
    data: LMData
    tokenizer: Tokenizer
    state: TrainState
    engine: Engine
    tracker: Tracker
    checkpointer: Checkpointer
    throughput: Throughput
    signals: Signals

    def __post_init__(self) -> None:
        config = self.config
        self.trainer = Trainer(
            config.trainer,
            self.plan,
            self.engine,
            config.optimizer.schedule(config.trainer.num_train_steps),
            max_grad_norm=config.optimizer.max_grad_norm,
            tracker=self.tracker,
            throughput=self.throughput,
            poll=self.poll,
        )
        self._texts = {"config.yaml": dump_yaml(config), "tokenizer.json": self.tokenizer.to_text()}
        self._token_bytes = self.tokenizer.token_bytes()
        self._eval_metrics: dict[str, float] = {}
        self._improved: bool | None = None

    def fit(self) -> dict[str, float]:
        """Train to the end, or to a signal or divergence, and leave a checkpoint either way.

        Returns the metrics of the last evaluation. With `eval_only` that is all there is.
        """
        trainer, first_step = self.config.trainer, self.state.step
        num_steps = trainer.num_train_steps
        if trainer.eval_only or (trainer.eval_when == "before" and first_step == 0):
            self.evaluate(first_step)
        if trainer.eval_only:
            return self._eval_metrics
        loader = Loader(
            self.data.train,
            self.plan.schedule,
            rank=self.world.rank,
            num_ranks=self.world.num_ranks,
        )
        batches = loader.batches(first_step, num_steps)
        try:
            with self.signals.deferred(), contextlib.closing(batches):
                self.trainer.fit(batches, [self.evaluate_if_due, self.save_if_due])
        except (Interrupted, TrainingDivergedError):
            with contextlib.suppress(TrainingDivergedError):
                self.trainer.flush()  # may find that the weights stopped changing earlier
            if self.state.step > first_step:
                self.save(self.state.step - 1, interrupted=True)
            log.info("stopped after %d of %d updates", self.state.step, num_steps)
            raise
        return self._eval_metrics

    def poll(self, whole_step: bool) -> None:
        """Raise `Interrupted` if a signal has come, on all ranks after the same update."""
        if self.world.num_ranks == 1:
            self.signals.poll()
        elif whole_step and self.world.any(self.signals.received):
            raise Interrupted(self.signals.signum)

    def evaluate_if_due(self, info: StepInfo) -> None:
        """Evaluate after update k, or before update k, when k is a multiple of `steps_per_eval`."""
        before = self.config.trainer.eval_when == "before"
        step = info.step + 1 if before else info.step
        if is_due(self.config.trainer.steps_per_eval, StepInfo(step, info.is_last)):
            self.evaluate(step)  # it may decide on saving

    def save_if_due(self, info: StepInfo) -> None:
        """Save after an update, if the policy says so."""
        self.save(info.step, force=info.is_last)

    def evaluate(self, step: int) -> None:
        """Evaluate on every validation set, draw samples if asked, and hand both to the tracker."""
        self.trainer.flush()
        if self.data.validation and self.config.trainer.steps_per_eval is not None:
            start = time.perf_counter()
            self._eval_metrics = evaluate(
                self.state.model,
                self.data.validation,
                batch_size=self.plan.eval_batch_size,
                token_bytes=self._token_bytes,
                world=self.world,
                max_batches=self.config.trainer.max_eval_batches,
                poll=self.signals.poll if self.world.num_ranks == 1 else lambda: None,
            )
            elapsed = {"eval/total_time": time.perf_counter() - start}
            self.tracker.log(self._eval_metrics | elapsed, step=step)
            loss = self._eval_metrics.get("eval/loss", math.nan)
            self._improved = loss < self.state.best_eval_loss
            self.state.best_eval_loss = min(self.state.best_eval_loss, loss)
        writes = self.world.is_first or self.engine.is_collective
        if (prompts := self.config.sample_prompts) and writes:
            texts = complete_all(self.state.model, self.tokenizer, prompts, self.config.sampling)
            for index, text in enumerate(texts):
                self.tracker.log_text(f"sample/{index}", text, step=step)

    def save(self, step: int, *, force: bool = False, interrupted: bool = False) -> None:
        """Save the state after update `step`, if the policy, `force` or `interrupted` says so.

        Where a save on the way fails, the run goes on: older checkpoints are intact.
        """
        improved, self._improved = self._improved, None
        due = self.checkpointer.due(step, force=force, improved=improved, interrupted=interrupted)
        if self.engine.is_collective:
            due = self.world.from_first(due)  # the clocks of the others may say something else
        if due is None or not (self.world.is_first or self.engine.is_collective):
            return
        shards = Path(self.checkpointer.folder).expanduser() / f"{PARTIAL}shards-{step}"
        try:
            if self.world.is_first:
                report = self.checkpointer.save(step, due, lambda: self._make_state(shards))
                log.info("saved %s (%s, %.1f s)", report.path, report.kind, report.seconds)
            else:
                self._make_state(shards)
        except CheckpointError as error:
            if force or interrupted:
                raise
            log.error("%s; training goes on", error)
        finally:
            if self.world.is_first:
                shutil.rmtree(shards, ignore_errors=True)

    def _make_state(self, shards: Path) -> State:
        self.trainer.flush()
        values = self.engine.values() | {
            "tracker": self.tracker.state(),
            "data": self.data.fingerprint,
            "eos_id": self.tokenizer.eos_id,
            "run_id": self.config.trainer.id,
        }
        tensors = self.engine.tensors()
        return State(tensors, values, self._texts, self.engine.write_shards(shards))


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
        "num_hosts": world.num_hosts,
        "backend": world.device.type,
    }


def _of(world: World) -> str:
    return "" if world.num_ranks == 1 else f", one of {world.num_ranks} processes"


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
