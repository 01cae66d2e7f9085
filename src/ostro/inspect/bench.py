"""How fast a configuration trains here, and where the time of its steps goes."""

import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ostro.checkpoint import CheckpointerConfig
from ostro.data.loader import Loader
from ostro.distributed import open_process_group
from ostro.lm_config import TrainLmConfig, replace_trainer
from ostro.runtime.malloc import keep_freed_memory
from ostro.runtime.phase import listening
from ostro.runtime.signals import Signals
from ostro.runtime.throughput import synchronize
from ostro.train_lm import build_trainer
from ostro.trainer import Trainer, choose_kernels, has_compiler, init_mesh
from ostro.trainer.rank_check import agreeing

_WARM_UP = 5  # updates until no memory is new any more
_TOP = 12
# A run that finds nothing, and tells nobody.
_ALONE = {"id": "bench", "tracker": [], "progress": False, "load_checkpoint": False,
          "load_checkpoint_path": None, "initialize_from": None}  # fmt: skip


def bench(config: TrainLmConfig, num_steps: int, rounds: int) -> dict[str, Any]:
    """Train for a while, leave nothing behind, and say what was measured, as plain JSON.

    Each of the rounds makes `num_steps` updates eagerly and as many compiled; which of the two the
    configuration asks for is `mode`. In that mode, too: a round with a clock at every phase, and
    two updates under torch's profiler. Shares are of a step; times are seconds.
    """
    own = "compiled" if config.trainer.compile is True and has_compiler() else "eager"
    stances = {"eager": "force_eager"} | ({"compiled": "default"} if has_compiler() else {})
    found: dict[str, list[float]] = {mode: [] for mode in stances}
    with _trainer(config) as trainer, _steps(trainer) as train:
        device = trainer.world.device
        with torch.compiler.set_stance(stances[own]):
            train(_WARM_UP)
            phases = _by_phase(device, lambda: train(num_steps))
            operators = _by_operator(lambda: train(2))
            peak = _peak_memory(device)  # before the other mode takes some
        for number in range(rounds + 1):
            for mode, stance in stances.items():
                with torch.compiler.set_stance(stance):
                    seconds = train(num_steps)
                found[mode] += [seconds] if number else []  # the first one warms up
        throughput, plan = trainer.throughput, trainer.plan
    tokens = plan.schedule.size(0) * throughput.seq_len / median(found[own])
    flops, whole = 3 * throughput.flops_per_token * tokens, sum(phases.values())
    return {
        "mode": own,
        "seconds": {
            mode: {"min": min(values), "median": median(values), "max": max(values)}
            for mode, values in found.items()
        },
        "tokens_per_second": tokens,
        "mfu": flops / (throughput.peak.flops * throughput.num_devices),
        "peak_flops": throughput.peak.flops,
        "peak_source": throughput.peak.source,
        "phases": {name: seconds / whole for name, seconds in phases.items()},
        "operators": operators,
        "peak_bytes": peak,
        "device": throughput.peak.kind,
        "threads": torch.get_num_threads(),
    }


def report(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `bench` as lines of text."""
    own = result["mode"]
    for mode, seconds in result["seconds"].items():
        low, middle, high = (1000 * seconds[k] for k in ("min", "median", "max"))
        asked = "  as configured" if mode == own else ""
        yield f"{mode:9} {middle:9.1f} ms a step ({low:.1f} to {high:.1f}){asked}"
    yield f"{result['tokens_per_second']:,.0f} tokens/s, {result['mfu']:.1%} of the"
    peak = f"{result['peak_flops'] / 1e9:,.0f} GFLOP/s ({result['peak_source']})"
    yield f"  {peak} that matrix products reach on this device ({result['device']})"
    yield f"{result['peak_bytes'] / 1e6:,.0f} MB at most"
    yield from ("", f"{'phase':48}  share")
    yield from (f"{name:48} {share:6.1%}" for name, share in result["phases"].items())
    yield from ("", f"{'operator':48}  share   ms a step    calls")
    for row in result["operators"]:
        figures = f"{row['share']:6.1%} {1000 * row['seconds']:11.2f} {row['calls']:8g}"
        yield f"{row['name'][:48]:48} {figures}"


@contextmanager
def _trainer(config: TrainLmConfig) -> Iterator[Trainer]:
    """The run of a configuration, with nothing to resume from, to save or to report."""
    trainer = config.trainer
    with (
        open_process_group(
            trainer.distributed,
            trainer.device,
            trainer.require_accelerator,
            agree=agreeing(config, {}),
        ) as world,
        tempfile.TemporaryDirectory(prefix="ostro-bench-") as folder,
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        choose_kernels(trainer, world.device)
        saved, given = CheckpointerConfig(f"{folder}/saved"), {**_ALONE, "log_dir": folder}
        config = replace(config, initialize_from_hf=None)
        config = replace_trainer(config, **given, checkpointer=saved, compile=has_compiler())
        world, mesh = init_mesh(config.trainer, world)
        plan = config.trainer.batch_plan(world.num_ranks)
        _, built = build_trainer(config, plan, world, mesh, Signals(), {})
        built.callbacks = []
        yield built


@contextmanager
def _steps(trainer: Trainer) -> Iterator[Callable[[int], float]]:
    """Makes so many more updates, with the loop and the loader of a run; seconds per update."""
    world = trainer.world
    assert trainer.train_data is not None, "a run has some"
    ranks = {"rank": world.data_rank, "num_ranks": world.num_data_ranks}
    loader = Loader(trainer.train_data, trainer.plan.schedule, **ranks)
    with closing(loader.batches(count())) as batches:

        def train(num_steps: int) -> float:
            last = trainer.state.step + num_steps
            trainer.config = replace(trainer.config, num_train_steps=last)
            start = time.perf_counter()
            trainer.fit(batches)
            synchronize(world.device)
            return (time.perf_counter() - start) / num_steps

        yield train


def _by_phase(device: torch.device, action: Callable[[], object]) -> dict[str, float]:
    """Seconds that the main thread spends in each phase, the device waited for between them."""
    spent: Counter[str] = Counter()
    phase, since = "", time.perf_counter()

    def begin(name: str) -> None:
        nonlocal phase, since
        if threading.current_thread() is threading.main_thread():
            synchronize(device)
            now = time.perf_counter()
            spent[phase] += now - since
            phase, since = name, now

    with listening(begin):
        action()
        begin("")
    return {name: seconds for name, seconds in spent.items() if name}


def _by_operator(action: Callable[[], object]) -> list[dict[str, Any]]:
    """The operators that take most of the device's time in two updates."""
    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    with profile(activities=activities) as profiler:
        action()
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    spent = [(getattr(each, name), each) for each in profiler.key_averages()]
    whole = sum(time for time, _ in spent) or 1
    return [
        {"name": e.key, "share": t / whole, "seconds": t / 2e6, "calls": e.count / 2}
        for t, e in sorted(spent, key=lambda each: -each[0])[:_TOP]
    ]


def _peak_memory(device: torch.device) -> int:
    """Most bytes in use at once: of the GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
