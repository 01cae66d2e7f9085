"""Pre-training a language model: the whole run as a story, top to bottom."""

import contextlib
import dataclasses
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch

from ostro import kernels
from ostro.checkpoint import Saved, SavedFile, alone_in, read_settings
from ostro.config import check, dump_yaml, public
from ostro.core.errors import ConfigError, Problem
from ostro.core.units import format_bytes, format_count, format_duration
from ostro.data.text import LMData
from ostro.data.tokenizer import Tokenizer
from ostro.distributed import World, open_process_group
from ostro.distributed.rendezvous import Rendezvous
from ostro.lm_config import (
    TrainLmConfig,
    choose_run_id,
    replace_trainer,
    run_name,
    trackers,
    vocab_size,
    with_hf_model,
)
from ostro.next_steps import NextSteps
from ostro.parallel import Mesh
from ostro.runtime.commands import Dialect, NativeDialect
from ostro.runtime.compile_cache import unusable_cache
from ostro.runtime.malloc import keep_freed_memory
from ostro.runtime.phase import current_phase
from ostro.runtime.run_log import folder_fault, logging_to
from ostro.runtime.signals import Interrupted, Signals
from ostro.runtime.throughput import Throughput, device_peak, measure_peak
from ostro.session import Session, compilation_marked, load_first_weights
from ostro.tracker import RunInfo, build_trackers, run_folder
from ostro.trainer import (
    BatchPlan,
    Engine,
    TrainerConfig,
    TrainingDivergedError,
    TrainState,
    allocate,
    build_model,
    choose,
    choose_engine,
    compile_pays_off,
    has_compiler,
    init_mesh,
    restore,
    resume_check,
    resume_source,
)
from ostro.trainer.rank_check import Fact, agreeing, facts_of_data, require_agreement

log = logging.getLogger("ostro")

_LONG = 1800  # seconds, of a run on a CPU
_CONFIG = "config.yaml"  # the resolved configuration; running it again resumes the run


def run(
    config: TrainLmConfig,
    signals: Signals | None = None,
    on_ready: Callable[[Session], None] = lambda session: None,
    origins: Mapping[str, str] | None = None,
    dialect: Dialect | None = None,
) -> None:
    """Train as `config` says: data, model, optimizer, resume, fit, report.

    `on_ready` is called before the first update, when everything has been restored. `origins`:
    where each setting comes from, as `ostro.config.load` says, for what is told of a resume.
    `dialect`: the command line it came from, in whose words the run speaks; None: `ostro train`.

    Raises an `OstroError` for what the user can mend and `Interrupted` when stopped by a
    signal, with a checkpoint of the last whole update in rank_info.
    """
    unusable_cache()  # before anything imports all of torch
    config = with_hf_model(config)
    check(config)
    dialect = dialect or NativeDialect()
    trainer = config.trainer
    signals, origins = signals or Signals(), origins or {}
    agree = agreeing(config, origins)
    joining = open_process_group(
        trainer.distributed, trainer.device, trainer.require_accelerator, agree
    )
    with kernels.restored(), joining as world:
        run_id = world.from_first(choose_run_id(config))
        config = replace_trainer(config, id=run_id)
        check(config)  # the id may come from the environment
        plan = config.trainer.batch_plan(world.num_ranks)
        if world.device.type == "cpu":
            keep_freed_memory()
        choose_kernels(config.trainer, world.device)
        log_dir = run_folder(config.trainer.log_dir, run_id)
        log_file = log_dir / trainer.log_file if world.is_first else None
        fault = folder_fault(log_dir) if world.is_first else ""
        if fault := world.from_first(fault):
            rule, advice = f"cannot be written to: {fault}", "name another folder"
            origin = origins.get("trainer.log_dir")
            raise ConfigError(Problem("trainer.log_dir", rule, advice, trainer.log_dir, origin))
        saves_to = trainer.checkpointer.folder(run_id)
        with (
            contextlib.nullcontext() if trainer.eval_only else alone_in(saves_to, world),
            logging_to(log_file, trainer.log_level, dialect.spoken),
        ):
            world, mesh = init_mesh(config.trainer, world)
            log.info("run %s on %s%s", run_id, world.device, _of(world, mesh))
            session = build_session(config, plan, world, mesh, signals, origins, dialect.spoken)
            if world.is_first:  # not before: what was there stays if nothing could be resumed
                (log_dir / _CONFIG).write_text(dump_yaml(session.config))
            ending = NextSteps(
                session.config,
                log_dir / _CONFIG,
                session.checkpointer.folder,
                session.tokenizer,
                dialect,
            )
            _fit(session, ending, on_ready)


def _fit(session: Session, ending: NextSteps, on_ready: Callable[[Session], None]) -> None:
    """Train to the end, and say what to type next however that comes."""
    start, first_step = time.perf_counter(), session.state.step
    session.signals.go_on = lambda: _after_a_stop(session, ending)
    try:
        summary = _summary(session.state, session.world, session.throughput)
        session.tracker.log_summary(summary)
        on_ready(session)
        metrics = session.fit()
    except (Interrupted, TrainingDivergedError) as stop:
        go_on = session.signals.go_on()
        log.info("%s", go_on)
        if isinstance(stop, TrainingDivergedError):
            ending.report_batch(stop.spike.step)
        if isinstance(stop, Interrupted):
            stop.go_on = go_on
        raise
    finally:
        session.tracker.finish()
    seconds = time.perf_counter() - start
    steps = range(first_step, session.state.step)
    num_steps = sum(not session.state.recovery.skips(step) for step in steps)
    if not session.config.trainer.eval_only:
        log.info("Trained %d steps in %.0f s", num_steps, seconds)
    if session.world.is_first:
        ending.report(metrics, session.has_checkpoint)


def _after_a_stop(session: Session, ending: NextSteps) -> str:
    """What to type next; the first rank alone says it, and knows what was saved."""
    return ending.after_a_stop(session.has_checkpoint) if session.world.is_first else ""


def choose_kernels(trainer: TrainerConfig, device: torch.device) -> None:
    """Take what `trainer.kernels` says; `ConfigError` where that cannot run."""
    # Bits that do not depend on how a batch is split are a promise about torch's operators.
    wanted = trainer.kernels != "torch" and not trainer.deterministic_reduction
    wanted = wanted and device.type == "cpu"
    kernels.use(wanted)
    if wanted and trainer.kernels == "native" and kernels.why_not():
        raise ConfigError(
            f"trainer.kernels = native - {kernels.why_not()} - otherwise take trainer.kernels: auto"
        )


def build_session(
    config: TrainLmConfig,
    plan: BatchPlan,
    world: World,
    mesh: Mesh | None,
    signals: Signals,
    origins: Mapping[str, str],
    spoken: Callable[[str], str] = str,
) -> Session:
    """Everything a run needs, resumed where there is something to resume from.

    `spoken`: what the log makes of a message.
    """
    make_engine = choose_engine(config.trainer, config.optimizer, plan, world, mesh)
    tokenizer = config.data.build_tokenizer()
    num_tokens = vocab_size(config, tokenizer)
    model = build_model(config.model, config.trainer, num_tokens, mesh)  # errors before the data
    data = build_data(config, tokenizer, world)
    agree_on_data(config, world, facts_of_data(tokenizer, num_tokens, data))
    trainer = (config := with_epochs(config, data)).trainer
    assert trainer.id is not None, "the run id is chosen before"
    checkpointer = trainer.checkpointer.build(
        trainer.id, run_name(config), in_folders=trainer.deepspeed is not None
    )
    start = resume_source(trainer, checkpointer, world)
    config = choose_settings(config, plan, world, mesh, num_tokens, start.resumed, signals)
    if config.trainer.compile != trainer.compile:
        model = build_model(config.model, config.trainer, num_tokens, mesh)
    trainer = config.trainer
    if config.epoch:
        origins = {**origins, "trainer.num_train_steps": "epoch"}
    record = resume_check.record(world, num_tokens, tokenizer.fingerprint, data.contents, origins)
    if start.resumed is not None:
        keep_contract(start.resumed, config, record, origins, world, spoken)
    state = allocate(model, config.optimizer, trainer, world.device)
    throughput = _throughput(config, num_tokens, world)
    if start.resumed is None:
        load_first_weights(config, state, tokenizer, start)
    engine = make_engine(state)
    if start.resumed is not None:
        restore(trainer, engine, start.resumed, config.epoch)
    _announce(config, plan, state, throughput)
    return Session(
        config=config,
        plan=plan,
        world=world,
        data=data,
        tokenizer=tokenizer,
        state=state,
        engine=engine,
        tracker=build_trackers(
            trackers(config) if world.is_first else [], _run_info(config, state.step)
        ),
        checkpointer=checkpointer,
        throughput=throughput,
        signals=signals,
        record=record,
        has_checkpoint=start.source == "own",
    )


def agree_on_data(config: TrainLmConfig, world: World, facts: Mapping[str, Fact]) -> None:
    """Refuse ranks that have found other texts; `ConfigError` on all of them."""
    if world.num_ranks > 1 and Rendezvous.current is not None:
        timeout = config.trainer.distributed.timeout
        require_agreement(Rendezvous.current, "the data", facts, timeout)


def choose_settings(
    config: TrainLmConfig,
    plan: BatchPlan,
    world: World,
    mesh: Mesh | None,
    num_tokens: int,
    saved: Saved | SavedFile | None,
    signals: Signals,
) -> TrainLmConfig:
    """The configuration with a value for every setting that was left to the run to choose."""

    def measure(trainer: TrainerConfig) -> bool:
        if trainer.eval_only or trainer.deterministic_reduction or not has_compiler():
            return False
        trainer = dataclasses.replace(trainer, compile=True)
        choose_kernels(trainer, world.device)
        make_engine = choose_engine(trainer, config.optimizer, plan, world, mesh)

        def build() -> Engine:
            model = build_model(config.model, trainer, num_tokens, mesh)
            return make_engine(allocate(model, config.optimizer, trainer, world.device))

        left = trainer.num_train_steps - (saved.step if saved else 0)
        stoppable = signals.deferred(
            unless=lambda: current_phase().name != "compile", leave=lambda: None
        )
        with stoppable, compilation_marked(signals.compilation):
            pays = compile_pays_off(build, plan, config.model.seq_len, num_tokens, left)
        torch.compiler.reset()  # what was seen there must not decide how the run is compiled
        return pays

    def kernels(trainer: TrainerConfig) -> str:
        wanted = world.device.type == "cpu" and not trainer.deterministic_reduction
        if wanted and kernels.why_not():
            log.info("trainer.kernels = auto: torch, slower - %s", kernels.why_not())
        return kernels.in_use()

    choices = {
        "num_threads": lambda _: torch.get_num_threads(),
        "kernels": kernels,
        "compile": measure,
    }
    trainer = choose(config.trainer, world, saved, choices)
    choose_kernels(trainer, world.device)
    return dataclasses.replace(config, trainer=trainer)


def keep_contract(
    saved: Saved | SavedFile,
    config: TrainLmConfig,
    record: Mapping[str, Any],
    origins: Mapping[str, str],
    world: World,
    spoken: Callable[[str], str] = str,
) -> None:
    """Say what has changed since a checkpoint; `CheckpointError` where it is too much.

    The first rank compares, and all ranks agree.
    """
    changes: list[resume_check.Change] = []
    if world.is_first and "config.yaml" in saved.texts:
        saved_config = read_settings(saved.texts["config.yaml"], str(saved))
        changes = resume_check.compare(config, record, saved_config, saved.values, origins)
        if "made_by" not in saved.values:
            log.warning(
                f"{saved} has no environment record: cannot check that code, tokenizer and data"
                " are unchanged"
            )
    resume_check.report(world.from_first(changes), str(saved), spoken)


def build_data(
    config: TrainLmConfig,
    tokenizer: Tokenizer,
    world: World | None = None,
    *,
    must_exist: bool = False,
    verify: bool = False,
) -> LMData:
    """Training and validation data; says every few seconds how far tokenising has come.

    `must_exist`: from finished caches only. `verify`: all of them is compared with its checksums.
    """
    reported = time.monotonic()

    def progress(name: str, done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= 5:
            reported = time.monotonic()
            of = f" of {format_bytes(total)}" if total else ""
            log.info("%s: tokenised %s%s", name, format_bytes(done), of)

    seed = config.trainer.seed if config.data_seed is None else config.data_seed
    with config.trainer.ray.cluster(world or World(torch.device("cpu"))) as address:
        return config.data.build(
            tokenizer,
            config.model.seq_len,
            seed,
            progress=progress,
            ray_address=address,
            must_exist=must_exist,
            verify=verify,
        )


def with_epochs(config: TrainLmConfig, data: LMData) -> TrainLmConfig:
    """`num_train_steps` cut to `epoch` passes over the data, if that is shorter."""
    if not config.epoch:
        return config
    schedule = config.trainer.batch_schedule()
    steps = range(1, config.trainer.num_train_steps + 1)
    step = bisect_right(steps, config.epoch * data.train.num_windows, key=schedule.offset)
    return replace_trainer(config, num_train_steps=max(step, 1))


def _throughput(config: TrainLmConfig, num_tokens: int, world: World) -> Throughput:
    flops = config.model.flops_per_token(num_tokens)
    peak = device_peak(world.device, getattr(torch, config.trainer.mp.compute))
    return Throughput(config.model.seq_len, flops, peak, world.num_ranks)


def _run_info(config: TrainLmConfig, start_step: int) -> RunInfo:
    """What trackers are told of the run."""
    trainer = config.trainer
    assert trainer.id is not None, "the run id is chosen before"
    return RunInfo(
        trainer.id,
        trainer.log_dir,
        public(config),
        resume=start_step > 0,
        num_steps=trainer.num_train_steps,
        start_step=start_step,
    )


def _summary(state: TrainState, world: World, throughput: Throughput) -> dict[str, float | str]:
    """Facts about the run that no step changes."""
    return throughput.summary() | {
        "parameter_count": state.num_parameters,
        "num_devices": world.num_ranks,
        "num_hosts": world.num_hosts,
        "backend": world.device.type,
    }


def _of(world: World, mesh: Mesh | None) -> str:
    laid_out = "" if mesh is None else f" ({mesh.sizes})"
    return "" if world.num_ranks == 1 else f", one of {world.num_ranks} processes{laid_out}"


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
    num_steps = config.trainer.num_train_steps
    left = plan.schedule.offset(num_steps) - plan.schedule.offset(state.step)
    seconds = throughput.least_seconds(left)
    if peak.kind == "cpu" and seconds > _LONG and not config.trainer.eval_only:
        least = format_duration(timedelta(minutes=round(seconds / 60)))
        advice = shorten_on_a_cpu(config.trainer.mp.compute, peak.flops)
        log.warning(
            f"on this CPU the run takes more than {least}: that is its arithmetic at the peak;"
            f" {advice}"
        )


def shorten_on_a_cpu(compute: str, flops: float) -> str:
    """What makes a run shorter on a CPU that does so many operations per second of that type."""
    if compute != "float32":
        faster = measure_peak(torch.device("cpu"), torch.float32) / flops
        if faster > 2:  # it has no instructions for the type
            return f"set trainer.mp: f32 (dtype=float32 for train.py): {faster:.0f} times as fast"
    return (
        "lower trainer.num_train_steps, model.num_layers, model.hidden_dim or model.seq_len,"
        " or train on a GPU"
    )
