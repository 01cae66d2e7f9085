"""`python3 src/train.py --config M --training_config T`: the GPT-3 style command line."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ostro.cli.aliases import NATIVE
from ostro.cli.arguments import explained, speaking, start_run
from ostro.cli.nanogpt import split_native
from ostro.cli.recognise import recognising
from ostro.compat.commands import Gpt3Dialect
from ostro.compat.gpt3 import settings
from ostro.compat.translation import Translation
from ostro.config import Loaded, help_text, load, script_folders
from ostro.core.errors import ConfigError, Problem, did_you_mean
from ostro.distributed.launch import launch
from ostro.distributed.launchers import find_rank_info
from ostro.lm_config import TrainLmConfig
from ostro.runtime.commands import STARTED_AS
from ostro.runtime.signals import Signals

MODEL_FOLDER = "configs/model_configs"
SMALL = "configs/training_configs/small_scale.yaml"
_USAGE = "usage: python3 src/train.py --config MODEL.yaml [--training_config FILE] [flags]\n"


def train(argv: list[str], signals: Signals, environ: Mapping[str, str] = os.environ) -> None:
    """Train as a model file, a training file and flags say."""
    if "-h" in argv or "--help" in argv:
        for title, cls in (
            (_USAGE, settings.Gpt3Flags),
            ("model file:\n", settings.Gpt3ModelConfig),
            ("training file:\n", settings.Gpt3TrainingConfig),
        ):
            print(f"{title}\n{help_text(cls)}\n")
        return
    is_dry = "--dry_run" in argv
    words = [word for word in argv if word != "--dry_run"]
    with recognising(words, "gpt3 model", "gpt3 training"):
        loaded, made, (num_local, num_nodes) = load_gpt3(words, environ)
    dialect = Gpt3Dialect(words, made)
    total = num_local * num_nodes
    if total > find_rank_info(environ).num_ranks and not is_dry:
        check_devices(loaded, num_local)
        explained(loaded, lambda: loaded.config.trainer.batch_plan(total))  # not in each worker
        os.environ[STARTED_AS] = shlex.join(dialect.program)  # not torchrun, for its workers
        launch([sys.argv[0], *argv], num_local, num_nodes, environ)
        return
    notices = [*made.notices, *loaded.notices]
    start_run(loaded, signals, is_dry=is_dry, num_devices=total, notices=notices, dialect=dialect)


def load_gpt3(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ
) -> tuple[Loaded[TrainLmConfig], Translation, tuple[int, int]]:
    """The native configuration of a command line, how it was translated, and its `processes`."""
    words = [word.replace("--local-rank", "--local_rank") for word in argv]
    words, native = split_native(words)
    flags = load(settings.Gpt3Flags, [], words)
    search = script_folders()
    notices = []
    model_file = _model_file(flags.config, search)
    training_file = flags.config.training_config
    if training_file is None:
        training_file = SMALL
        notices.append(f"no --training_config; using {SMALL}")
    model = load(settings.Gpt3ModelConfig, [model_file], search=search)
    training = load(settings.Gpt3TrainingConfig, [training_file], search=search)
    parts = settings.Gpt3Run(model, training, flags, Path(model_file).name.removesuffix(".yaml"))
    num_local, num_nodes = processes(flags.config, environ)
    made = settings.translate(parts, num_local * num_nodes)
    made.files["config"] = model_file
    made.notices[:0] = notices
    with speaking(Gpt3Dialect(argv, made)):
        whole = load(TrainLmConfig, [], native, layers=[made.layer], aliases=NATIVE, search=search)
    return whole, made, (num_local, num_nodes)


def _model_file(flags: settings.Gpt3Flags, search: Sequence[Path]) -> str:
    if flags.config is not None:
        if flags.model_size not in (None, Path(flags.config).stem):
            rule = f"--config names another model, {flags.config}"
            raise _wrong("model_size", rule, flags.model_size, "keep one")
        return flags.config
    if flags.model_size is None:
        advice = f"give a file of {MODEL_FOLDER}, or --model_size 125M"
        raise ConfigError(Problem("config", "is missing", advice))
    folders = [folder / MODEL_FOLDER for folder in [Path(), *search]]
    sizes = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    if flags.model_size not in sizes:
        advice = did_you_mean(flags.model_size, sizes)
        raise _wrong("model_size", f"must be one of {', '.join(sizes)}", flags.model_size, advice)
    return f"{MODEL_FOLDER}/{flags.model_size}.yaml"


def processes(flags: settings.Gpt3Flags, environ: Mapping[str, str]) -> tuple[int, int]:
    """Processes on each machine, and machines; must be what a launcher has started.

    One task of SLURM on each machine may still start the workers of its machine.
    """
    num_local = 1 if flags.gpus_per_node is None else flags.gpus_per_node
    num_nodes = 1 if flags.num_nodes is None else flags.num_nodes
    for name, count in (("gpus_per_node", num_local), ("num_nodes", num_nodes)):
        if count < 1:
            raise _wrong(name, "must be at least 1", count)
    rank_info = find_rank_info(environ)
    starts_workers = rank_info.launcher == "SLURM" and rank_info.num_local == 1 and num_local > 1
    if rank_info.launcher is None or (starts_workers and rank_info.num_ranks == num_nodes):
        return num_local, num_nodes
    started_local = rank_info.num_local or rank_info.num_ranks
    started = {"gpus_per_node": started_local, "num_nodes": rank_info.num_ranks // started_local}
    problems = [
        Problem(name, f"the launcher has started {count}", "leave it out", str(asked), f"--{name}")
        for name, count in started.items()
        if (asked := getattr(flags, name)) is not None and asked != count
    ]
    if problems:
        raise ConfigError(problems)
    return started["gpus_per_node"], started["num_nodes"]


def check_devices(loaded: Loaded[TrainLmConfig], num_local: int) -> None:
    """Refuse more processes than GPUs, and NCCL without any; on a CPU any number goes."""
    backend = loaded.config.trainer.distributed.backend
    num_gpus = torch.cuda.device_count()
    if backend == "nccl" and not num_gpus:
        rule = "nccl joins CUDA devices only, and this machine has none"
        raise _wrong("distributed_backend", rule, backend, "use gloo")
    if num_gpus and num_local > num_gpus and loaded.config.trainer.device != "cpu":
        raise _wrong("gpus_per_node", f"this machine has {num_gpus} GPUs", num_local)


def _wrong(flag: str, rule: str, value: object, advice: str = "") -> ConfigError:
    return ConfigError(Problem(flag, rule, advice, str(value), f"--{flag}"))
