"""Pre-training a language model: the whole run as a story, top to bottom."""

import contextlib
import dataclasses
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch

from ostro import kernels
from ostro.checkpoint import ResumeSource, Saved, SavedFile, alone_in, read_settings
from ostro.config import check, dump_yaml, public
from ostro.core.errors import CheckpointError, ConfigError, Problem
from ostro.core.units import format_bytes, format_count, format_duration
from ostro.data.text import LMData
from ostro.data.tokenizer import Tokenizer, tokenizer_from_text
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
from ostro.models.hf import read_weights
from ostro.models.lm_model import LmModel
from ostro.parallel import Mesh
from ostro.runtime.commands import Dialect, NativeDialect
from ostro.runtime.compile_cache import unusable_cache
from ostro.runtime.malloc import keep_freed_memory
from ostro.runtime.phase import current_phase
from ostro.runtime.run_log import folder_fault, logging_to
from ostro.runtime.signals import Interrupted, Signals
from ostro.runtime.throughput import Throughput, device_peak, measure_peak
from ostro.tracker import RunInfo, build_trackers, run_folder
from ostro.trainer import (
    BatchPlan,
    Callback,
    Engine,
    Evaluation,
    RollBack,
    Sampling,
    Saving,
    Snapshots,
    Trainer,
    TrainerConfig,
    TrainingDivergedError,
    TrainState,
    allocate,
    build_model,
    choose,
    choose_engine,
    choose_kernels,
    compile_pays_off,
    has_compiler,
    init_mesh,
    restore,
    resume_check,
    resume_source,
)
from ostro.trainer.interruption import compilation_marked
from ostro.trainer.next_steps import NextSteps
from ostro.trainer.rank_check import Fact, agreeing, facts_of_data, require_agreement
from ostro.trainer.state import load_weights

log = logging.getLogger("ostro")

_LONG = 1800  # seconds, of a run on a CPU
_CONFIG = "config.yaml"  # the resolved configuration; running it again resumes the run


def run(
    config: TrainLmConfig,
    signals: Signals | None = None,
    on_ready: Callable[[Trainer], None] = lambda trainer: None,
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
    with kernels.scope(), joining as world:
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
            config, trainer = build_trainer(
                config, plan, world, mesh, signals, origins, dialect.spoken
            )
            if world.is_first:  # not before: what was there stays if nothing could be resumed
                (log_dir / _CONFIG).write_text(dump_yaml(config))
            assert trainer.saving is not None, "every run can save"
            ending = NextSteps(
                config.trainer,
                log_dir / _CONFIG,
                trainer.saving.checkpointer.folder,
                trainer.saving.tokenizer,
                dialect,
                trackers(config),
                imports=config.imports,
                epoch=config.epoch,
                prompts=config.sample_prompts,
                has_documents=config.data.sampling != "windows",
            )
            _train(trainer, ending, on_ready)


def _train(trainer: Trainer, ending: NextSteps, on_ready: Callable[[Trainer], None]) -> None:
    """Train to the end, and say what to type next however that comes."""
    start, signals = time.perf_counter(), trainer.interruption.signals
    signals.go_on = lambda: _after_a_stop(trainer, ending)
    try:
        trainer.tracker.log_summary(_summary(trainer))
        on_ready(trainer)
        trainer.train()
    except (Interrupted, TrainingDivergedError) as stop:
        go_on = signals.go_on()
        log.info("%s", go_on)
        if isinstance(stop, TrainingDivergedError):
            ending.report_batch(stop.spike.step)
        if isinstance(stop, Interrupted):
            stop.go_on = go_on
        raise
    finally:
        trainer.tracker.finish()
    seconds = time.perf_counter() - start
    steps = range(trainer.first_step, trainer.state.step)
    num_steps = sum(not trainer.state.recovery.skips(step) for step in steps)
    if not trainer.config.eval_only:
        log.info("Trained %d steps in %.0f s", num_steps, seconds)
    if trainer.world.is_first and trainer.saving is not None:
        evaluation = trainer.saving.evaluation
        ending.report(evaluation.metrics, trainer.saving.has_checkpoint)


def _after_a_stop(trainer: Trainer, ending: NextSteps) -> str:
    """What to type next; the first rank alone says it, and knows what was saved."""
    if not trainer.world.is_first or trainer.saving is None:
        return ""
    return ending.after_a_stop(trainer.saving.has_checkpoint)


def build_trainer(
    config: TrainLmConfig,
    plan: BatchPlan,
    world: World,
    mesh: Mesh | None,
    signals: Signals,
    origins: Mapping[str, str],
    spoken: Callable[[str], str] = str,
) -> tuple[TrainLmConfig, Trainer]:
    """Everything a run needs, resumed where there is something to resume from.

    Returns the configuration with a value for all that was left open, too. `spoken`: what the log
    makes of a message.
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
    source = resume_source(trainer, checkpointer, world)
    config = choose_settings(config, plan, world, mesh, num_tokens, source.resumed, signals)
    if config.trainer.compile != trainer.compile:
        model = build_model(config.model, config.trainer, num_tokens, mesh)
    trainer = config.trainer
    if config.epoch:
        origins = {**origins, "trainer.num_train_steps": "epoch"}
    record = resume_check.record(world, num_tokens, tokenizer.fingerprint, data.contents, origins)
    if source.resumed is not None:
        check_resume(source.resumed, config, record, origins, world, spoken)
    state = allocate(model, config.optimizer, trainer, world.device)
    throughput = _throughput(config, num_tokens, world)

    def load_first(state: TrainState, source: ResumeSource) -> None:
        load_first_weights(config, num_tokens, state, source)

    if source.resumed is None:
        load_first(state, source)
    engine = make_engine(state)
    if source.resumed is not None:
        restore(trainer, engine, source.resumed, config.epoch)
    _announce(config, plan, state, throughput)
    run_info = _run_info(config, state.step)
    built = Trainer(
        trainer,
        plan,
        engine,
        config.optimizer.schedule(trainer.num_train_steps),
        max_grad_norm=config.optimizer.max_grad_norm,
        tracker=build_trackers(trackers(config) if world.is_first else [], run_info),
        throughput=throughput,
        train_data=data.train,
        signals=signals,
        rollback=RollBack(config.optimizer, load_first),
    )
    evaluation = Evaluation(data.validation, tokenizer.token_bytes())
    if engine.is_collective and world.num_ranks > 1:
        checkpointer.join()
    values = {**record, "data": data.fingerprint, "run_id": trainer.id}
    saving = Saving(
        checkpointer,
        evaluation,
        tokenizer,
        dump_yaml(config),
        values,
        has_checkpoint=source.source == "own",
    )
    built.saving = saving
    built.callbacks = [evaluation, *_own_callbacks(config, tokenizer, saving, run_info)]
    saving.require_room(built)
    return config, built


def _own_callbacks(
    config: TrainLmConfig, tokenizer: Tokenizer, saving: Saving, run: RunInfo
) -> Iterator[Callback]:
    """What follows the evaluation, in order: that which a run asks for."""
    if config.sample_prompts:
        yield Sampling(config.sample_prompts, config.sampling, tokenizer)
    yield saving
    recover = config.trainer.recover
    if recover is not None and recover.snapshot_every:
        yield Snapshots(recover.snapshot_every)
    for callback in config.trainer.callbacks:
        yield callback.build(run)


def load_first_weights(
    config: TrainLmConfig, num_tokens: int, state: TrainState, source: ResumeSource
) -> None:
    """The weights that a run starts from at step 0, if they are not random ones."""
    if source.saved is not None:
        load_weights(state.model, source.saved.tensors("model"), str(source.saved))
        return
    where = config.initialize_from_hf
    if isinstance(where, str):
        log.info("starting from the weights of %s", where)
        load_weights(state.model, read_weights(where, config.model, num_tokens), where)


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

    def kind_of_kernels(trainer: TrainerConfig) -> str:
        wanted = world.device.type == "cpu" and not trainer.deterministic_reduction
        if wanted and kernels.unavailable_reason():
            log.info("trainer.kernels = auto: torch, slower - %s", kernels.unavailable_reason())
        return kernels.active_kind()

    choices = {
        "num_threads": lambda _: torch.get_num_threads(),
        "kernels": kind_of_kernels,
        "compile": measure,
    }
    trainer = choose(config.trainer, world, saved, choices)
    choose_kernels(trainer, world.device)
    return dataclasses.replace(config, trainer=trainer)


def check_resume(
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


def _summary(trainer: Trainer) -> dict[str, float | str]:
    """Facts about the run that no step changes."""
    return trainer.throughput.summary() | {
        "parameter_count": trainer.state.num_parameters,
        "num_devices": trainer.world.num_ranks,
        "num_hosts": trainer.world.num_hosts,
        "backend": trainer.world.device.type,
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
    seq_len, num_steps = config.model.seq_len, config.trainer.num_train_steps
    log.info(
        f"batch: {batch} examples of {seq_len} tokens in micro-batches of {micro};"
        f" {num_steps} steps"
    )
    for warning in config.optimizer.schedule(config.trainer.num_train_steps).warnings:
        log.warning("%s", warning)
    log.info("%s peak: %.0f GFLOP/s (%s)", peak.kind, peak.flops / 1e9, peak.source)
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
    """What makes a run shorter on a CPU that reaches `flops` per second in type `compute`."""
    if compute != "float32":
        faster = measure_peak(torch.device("cpu"), torch.float32) / flops
        if faster > 2:  # it has no instructions for the type
            return f"set trainer.mp: f32 (dtype=float32 for train.py): {faster:.0f} times as fast"
    return (
        "lower trainer.num_train_steps, model.num_layers, model.hidden_dim or model.seq_len,"
        " or train on a GPU"
    )


def load_tokenizer(saved: Saved | SavedFile) -> Tokenizer:
    """The tokenizer that was saved with the checkpoint."""
    text = saved.texts.get("tokenizer.json")
    if text is None:
        raise CheckpointError(f"{saved.path} holds no tokenizer.json - save it with ostro train")
    eos_id = saved.values.get("eos_id")
    return tokenizer_from_text(text, eos_id, f"{saved.path}/tokenizer.json")


def load_model(
    saved: Saved | SavedFile, config: TrainLmConfig, tokenizer: Tokenizer, device: torch.device
) -> LmModel:
    """The model of `config` with the checkpoint's weights, in evaluation mode."""
    compute_dtype = getattr(torch, config.trainer.mp.compute)
    with torch.device(device):
        model = config.model.build(vocab_size(config, tokenizer), compute_dtype=compute_dtype)
    load_weights(model, saved.tensors("model"), str(saved.path))
    return model.eval()
