"""The commands of `ostro`: each turns its words into a configuration and calls one function."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ostro.checkpoint import Saved, SavedFile, find_latest, read_settings
from ostro.cli.arguments import Parser, explained, load_run, sampling_flags, start_run
from ostro.cli.plot import pyplot_for, save_figure
from ostro.cli.translate import translate
from ostro.config import format_tree, json_schema, load, public
from ostro.core.errors import CheckpointError, ConfigError, DataError, Problem
from ostro.core.redaction import redact
from ostro.distributed import World, pick_device
from ostro.distributed.launchers import find_rank_info
from ostro.evaluation.losses import evaluate as evaluate_sets
from ostro.generate.sampling import SamplingConfig, complete_all
from ostro.inspect.plan import describe_sharding, draw
from ostro.inspect.simulated_step import simulate_step
from ostro.lm_config import TrainLmConfig
from ostro.runtime.commands import NativeDialect
from ostro.runtime.run_log import logging_to_terminal
from ostro.runtime.signals import Signals
from ostro.train_lm import build_data, load_model, load_tokenizer
from ostro.trainer import TrainerConfig
from ostro.trainer.callbacks import StepInfo, is_due
from ostro.trainer.resume_check import compare

MODEL = ("model", "trainer.mp", "vocab_size")
"""What a model is made of: sections of the configuration in a checkpoint."""
DATA = (
    *MODEL,
    "data",
    "data_seed",
    "epoch",
    "sample_prompts",
    "sampling",
    *(f"trainer.{name.name}" for name in fields(TrainerConfig) if name.name != "tracker"),
)
"""What a model and its data are made of: neither the optimizer nor a tracker."""


def train(argv: list[str], signals: Signals) -> None:
    """`ostro train`: train a model."""
    parser = Parser("train", "Train a language model.")
    parser.add_config_path()
    parser.add_argument("--dry_run", action="store_true", help="say what would happen, and stop")
    options, flags = parser.parse(argv)
    loaded = load_run(options.config_path, flags, trust=options.trust)
    num_devices = max(find_rank_info(os.environ).num_ranks, loaded.config.trainer.min_devices)
    dialect = NativeDialect(argv)
    start_run(loaded, signals, is_dry=options.dry_run, num_devices=num_devices, dialect=dialect)


def cache(argv: list[str], signals: Signals) -> None:
    """`ostro cache`: tokenise the data of a configuration, and stop."""
    parser = Parser("cache", "Tokenise the data of a configuration into its cache, and stop.")
    parser.add_config_path()
    about = "compare all of a finished cache with its checksums; build nothing"
    parser.add_argument("--verify", action="store_true", help=about)
    options, flags = parser.parse(argv)
    config = load_run(options.config_path, flags, trust=options.trust).config
    verify = options.verify
    with logging_to_terminal():
        tokenizer = config.data.build_tokenizer(must_exist=verify)
        data = build_data(config, tokenizer, must_exist=verify, verify=verify)
    for name, part in {**data.train.sources, **data.validation}.items():
        windows = getattr(part, "windows", part)
        print(f"{name}: {windows.num_tokens} tokens, {windows.num_windows} windows")


def config(argv: list[str], signals: Signals) -> None:
    """`ostro config show | schema | translate | diff`."""
    if argv[:1] == ["translate"]:
        return translate(argv[1:])
    if argv[:1] == ["diff"]:
        return diff(argv[1:])
    about = (
        "show: the resolved settings with origins; schema: for editors; translate: from others;"
        " diff: of two."
    )
    parser = Parser("config", about)
    parser.add_argument("what", choices=["show", "schema", "translate", "diff"])
    parser.add_config_path(required=False)
    options, flags = parser.parse(argv)
    if options.what == "schema":
        parser.refuse(flags)
        print(json.dumps(json_schema(TrainLmConfig), indent=2))
        return
    print(format_tree(load_run(options.config_path, flags, trust=options.trust)))


def diff(argv: list[str]) -> None:
    """`ostro config diff A B`: what a run with the settings of B changes of one with those of A."""
    about = "Say what B changes of A, and what a run that goes on would do about it."
    parser = Parser("config diff", about, settings=None)
    kinds = "a configuration, a run's folder, or a checkpoint"
    parser.add_argument("runs", nargs=2, metavar="A B", help=kinds)
    parser.add_imports()
    options, _ = parser.parse(argv)
    (before, was), (after, now) = (_side(run, options.trust) for run in options.runs)
    changes = compare(after, now, before, was, {})
    print(redact("\n".join(map(str, changes))) or "nothing that counts is different")


def _side(path: str, trust: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Settings as plain values, and what a checkpoint holds besides; a file holds nothing."""
    saved = None if path.endswith((".yaml", ".yml")) else find_latest(path, weights=True)
    if saved is not None and "config.yaml" in saved.texts:
        return read_settings(saved.texts["config.yaml"], str(saved)), saved.values
    file = f"{path}/config.yaml" if Path(path).is_dir() else path
    return public(load_run(file, [], trust=trust).config), {}


def schedule(argv: list[str], signals: Signals) -> None:
    """`ostro schedule`: learning rates, evaluations and permanent checkpoints by step."""
    parser = Parser("schedule", "Print the learning rate, evaluations and kept checkpoints.")
    parser.add_config_path()
    parser.add_argument("--at", metavar="0,10,999", help="steps to print; default: 11 even ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw the learning rate into an image")
    options, flags = parser.parse(argv)
    config = load_run(options.config_path, flags, trust=options.trust).config
    num_steps = config.trainer.num_train_steps
    rate = config.optimizer.schedule(num_steps)
    if options.plot:
        plot([rate(step) for step in range(num_steps)], options.plot)
    steps = _steps(options.at, num_steps)
    every = config.trainer.steps_per_eval
    evaluate_at = [
        step
        for step in range(num_steps)
        if every is not None and is_due(every, StepInfo(step, step == num_steps - 1))
    ]
    keep = config.trainer.checkpointer.policy.kept_steps(num_steps)
    if options.json:
        rates = {str(step): rate(step) for step in steps}
        print(json.dumps({"learning_rate": rates, "evaluate": evaluate_at, "keep": keep}))
        return
    for warning in rate.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for step in steps:
        print(f"step {step:>9}  {rate(step):.6g}")
    print("\n".join(draw(rate, num_steps)))
    print(f"evaluate after steps: {_short(evaluate_at)}")
    print(f"permanent checkpoints after steps: {_short(keep)}")


def plan(argv: list[str], signals: Signals) -> None:
    """`ostro plan sharding | step`: where every parameter would lie, and what a step would send."""
    about = "sharding: where each parameter lies; step: play one update of the first device."
    parser = Parser("plan", about)
    parser.add_argument("what", choices=["sharding", "step"])
    parser.add_config_path()
    parser.add_argument("--devices", type=int, metavar="N", help="devices of the run")
    options, flags = parser.parse(argv)
    loaded = load_run(options.config_path, flags, trust=options.trust)
    num_devices = options.devices or loaded.config.trainer.min_devices
    if options.what == "step":
        lines = explained(loaded, lambda: simulate_step(loaded.config, num_devices)).lines()
    else:
        lines = explained(loaded, lambda: list(describe_sharding(loaded.config, num_devices)))
    for line in lines:
        print(line)


def _steps(text: str | None, num_steps: int) -> list[int]:
    if text is None:
        return sorted({round(i * (num_steps - 1) / 10) for i in range(11)})
    try:
        steps = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        rule = "must be step numbers separated by commas"
        raise ConfigError(Problem("--at", rule, "for example --at 0,10,999", text)) from None
    if any(step < 0 for step in steps):
        raise ConfigError(Problem("--at", "steps must not be negative", value=text))
    return steps


def _short(steps: list[int]) -> str:
    if len(steps) <= 12:
        return ", ".join(map(str, steps)) or "none"
    first, last = (", ".join(map(str, part)) for part in (steps[:6], steps[-3:]))
    return f"{first}, ..., {last} ({len(steps)} in all)"


def plot(rates: list[float], path: str) -> None:
    """Draw the learning rate by step into an image file."""
    figure, axes = pyplot_for(path, "--plot").subplots(figsize=(8, 4.5))
    axes.plot(rates)
    axes.set(xlabel="step", ylabel="learning rate")
    save_figure(figure, path, "--plot")


def sample(argv: list[str], signals: Signals) -> None:
    """`ostro sample`: let a checkpoint write."""
    parser = Parser("sample", "Let a checkpoint go on with one or more texts.", SamplingConfig)
    parser.add_checkpoint()
    parser.add_argument("--prompt", action="append", help="text to go on with; may be repeated")
    parser.add_count("num_samples", "texts to write for each prompt; default 1", default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    options, flags = parser.parse(argv)
    sampling = load(SamplingConfig, [], sampling_flags(flags)).config
    prompts = [prompt for prompt in options.prompt or [""] for _ in range(options.num_samples)]
    device = pick_device(options.device)
    saved = open_checkpoint(options.checkpoint)
    tokenizer = load_tokenizer(saved)
    model = load_model(saved, saved_config(saved, options), tokenizer, device)
    for text in complete_all(model, tokenizer, prompts, sampling):
        print(text)


def evaluate(argv: list[str], signals: Signals) -> None:
    """`ostro eval`: metrics of a checkpoint on validation sets."""
    parser = Parser("eval", "Evaluate a checkpoint on the validation sets of a configuration.")
    parser.add_checkpoint()
    parser.add_config_path(required=False)
    options, flags = parser.parse(argv)
    saved = open_checkpoint(options.checkpoint)
    if options.config_path is None:
        config = saved_config(saved, options, flags, DATA)
    else:
        config = load_run(options.config_path, flags, trust=options.trust).config
    device = pick_device(config.trainer.device)
    tokenizer = load_tokenizer(saved)
    model = load_model(saved, config, tokenizer, device)
    data = build_data(config, tokenizer)
    if not data.validation:
        raise DataError("data has no validation set - set data.validation_urls, for example")
    metrics = evaluate_sets(
        model,
        data.validation,
        batch_size=config.trainer.batch_plan(config.trainer.min_devices).eval_batch_size,
        token_bytes=tokenizer.token_bytes(),
        world=World(device),
        max_batches=config.trainer.max_eval_batches,
    )
    print(json.dumps(metrics, indent=2))


def open_checkpoint(path: str, flag: str = "--checkpoint") -> Saved | SavedFile:
    """The newest checkpoint at or below `path`, which `flag` gave, whose weights are intact."""
    saved = find_latest(path, weights=True)
    if saved is None:
        raise CheckpointError(
            f"{flag} {path} - no complete checkpoint there or below -"
            " give a checkpoint's folder (step-<k>) or one that contains some"
        )
    return saved


def saved_config(
    saved: Saved | SavedFile,
    options: Namespace | None = None,
    flags: Sequence[str] = (),
    sections: Sequence[str] = MODEL,
) -> TrainLmConfig:
    """Those sections of the configuration that was saved with a checkpoint; all else is default.

    Its `imports` are honoured where the `options` say `--trust`.
    """
    if "config.yaml" not in saved.texts:
        raise CheckpointError(f"{saved} - holds no config.yaml - it was not saved by a run")
    text, trust = saved.texts["config.yaml"], options is not None and options.trust
    file = f"{saved.path}/config.yaml"
    return load_run(file, flags, text, sections=sections, trust=trust).config
