"""Settings that a run chooses by itself: once, at its first start. What goes on from one of its
checkpoints takes them over from the `config.yaml` there, so that it computes as the run did.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ostro import kernels
from ostro.checkpoint import Saved, SavedFile, read_settings
from ostro.core.errors import ConfigError
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.runtime.throughput import synchronize
from ostro.trainer.backends.torch import Engine
from ostro.trainer.config import BatchPlan, TrainerConfig

log = logging.getLogger("ostro")

_OPEN: Mapping[str, tuple[Any, type]] = {
    "num_threads": (None, int),
    "kernels": ("auto", str),
    "compile": ("auto", bool),
}
"""What leaves a setting open, and the type of what is chosen; in the order of choosing."""

_LEAST_COST = 5.0  # seconds that compiling takes at least
_ROUNDS = 5


def choose(
    trainer: TrainerConfig,
    world: World,
    saved: Saved | SavedFile | None,
    choices: Mapping[str, Callable[[TrainerConfig], Any]],
) -> TrainerConfig:
    """`trainer` with a value for everything that was left open; sets the number of threads.

    `choices`: what chooses a value, called on all ranks with what was chosen before; the first
    rank's counts. Raises `CheckpointError` where the settings in `saved` cannot be read.
    """
    known = world.from_first(_known(saved, world) if world.is_first else {})
    for name, (is_open, kind) in _OPEN.items():
        value: Any = getattr(trainer, name)
        if value == is_open and type(value) is type(is_open):
            value = known.get(name)
            if type(value) is not kind or (kind is int and value < 1):  # none, or a damaged file
                value = world.from_first(choices[name](trainer))
            trainer = replace(trainer, **{name: value})
        if name == "num_threads" and value != torch.get_num_threads():
            log.info("trainer.num_threads = %d, and torch had %d", value, torch.get_num_threads())
            torch.set_num_threads(value)
    return trainer


def _known(saved: Saved | SavedFile | None, world: World) -> dict[str, Any]:
    if saved is None or "config.yaml" not in saved.texts:
        return {}
    trainer = read_settings(saved.texts["config.yaml"], str(saved))["trainer"]
    known = {name: trainer[name] for name in _OPEN if name in trainer}
    if known.get("kernels") == "native" and kernels.unavailable_reason():
        del known["kernels"]  # made on a machine that could run them
    made_by = saved.values.get("made_by")
    if not isinstance(made_by, dict) or made_by.get("num_ranks") != world.num_ranks:
        known.pop("num_threads", None)  # the cores are shared by another number of processes
    return known


def compile_pays_off(
    build: Callable[[], Engine], plan: BatchPlan, seq_len: int, num_tokens: int, num_steps: int
) -> bool:
    """Whether compiling saves more time in `num_steps` steps than it costs, by a few micro-batches.

    `build` makes an engine whose model compiles; the run's own, made afterwards, is not touched,
    nor is the random state. What torch has learned of shapes is left for `torch.compiler.reset`.
    All ranks call it, and decide together.
    """
    with torch.random.fork_rng():
        engine = build()
        model, device, world = engine.state.model, engine.state.device, engine.world
        shape = (plan.micro_batch_size(0), seq_len)
        tokens = torch.randint(num_tokens, shape, device=device)

        def seconds(stance: str) -> float:
            with torch.compiler.set_stance(stance):
                synchronize(device)
                start = time.perf_counter()
                engine.backward(Batch(tokens, tokens), tokens.numel(), is_last=True)
                model.zero_grad()
                synchronize(device)
                return time.perf_counter() - start

        count = num_steps * plan.num_micro_batches(0)
        eager = min(seconds("force_eager") for _ in range(4))  # the first ones touch new memory
        if world.from_first(eager * count / 2 < _LEAST_COST):
            log.info("trainer.compile = auto: false, %d micro-batches of %.3f s", count, eager)
            return False
        first = seconds("default")
        pairs = [(seconds("force_eager"), seconds("default")) for _ in range(_ROUNDS)]
    eager, compiled = map(statistics.median, zip(*pairs, strict=True))
    pays = (eager - compiled) * count > first - compiled
    log.info(
        "trainer.compile = auto: %s, a micro-batch takes %.3f s and %.3f s compiled; compiling"
        " took %.1f s, and %d are to come",
        *(str(pays).lower(), eager, compiled, first - compiled, count),
    )
    return pays


def choose_kernels(trainer: TrainerConfig, device: torch.device) -> None:
    """Take what `trainer.kernels` says; `ConfigError` where that cannot run."""
    # Bits that do not depend on how a batch is split are a promise about torch's operators.
    wanted = trainer.kernels != "torch" and not trainer.deterministic_reduction
    wanted = wanted and device.type == "cpu"
    kernels.enable(wanted)
    reason = kernels.unavailable_reason() if wanted and trainer.kernels == "native" else None
    if reason:
        raise ConfigError(f"trainer.kernels = native - {reason} - or set trainer.kernels: auto")
