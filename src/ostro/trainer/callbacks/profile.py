"""Write a trace of some steps with torch's profiler, and print the operators that took longest."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ostro.core.errors import Problem, at_least
from ostro.runtime.throughput import synchronize
from ostro.tracker import RunInfo
from ostro.trainer.callbacks.callback import Callback, CallbackConfig, StepInfo
from ostro.trainer.trainer import Trainer

log = logging.getLogger("ostro")

_NUM_ROWS = 12


@CallbackConfig.register_subclass("profile")
@dataclass(frozen=True)
class ProfileConfig(CallbackConfig):
    """Profile some steps: a trace for chrome://tracing or Perfetto, and a table in the log."""

    start: int = 10
    """The first step to profile, counted from 0. The first steps of a process compile and fill
    caches; in a run that resumes later, its own first steps count."""
    steps: int = 3
    """How many steps to profile."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(1, self, "steps")
        if self.start < 0:
            yield Problem("start", "must not be negative")

    def build(self, run: RunInfo) -> Callback:
        return Profile(self, run.folder / "profile")


class Profile(Callback):
    """Profiles `steps` steps from `start` on, or from there in this process's part of the run."""

    def __init__(self, config: ProfileConfig, folder: Path):
        self._config, self._folder = config, folder
        self._profiler: profile | None = None
        self._first = self._last = -1

    def on_start(self, trainer: Trainer) -> None:
        start = self._config.start
        self._first = start if trainer.first_step <= start else trainer.first_step + start
        self._last = self._first + self._config.steps - 1

    def before_step(self, trainer: Trainer, step: int) -> None:
        if self._profiler is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU]
            if trainer.world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after_step(self, trainer: Trainer, info: StepInfo) -> None:
        if self._profiler is not None and (info.step >= self._last or info.is_last):
            self._write(trainer, info.step)

    def on_end(self, trainer: Trainer) -> None:
        if self._profiler is not None:  # interrupted on the way
            self._write(trainer, trainer.state.step)

    def _write(self, trainer: Trainer, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None, "it was started"
        synchronize(trainer.world.device)  # what the steps have begun on the device belongs to them
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        rank = torch.distributed.get_rank() if trainer.world.num_ranks > 1 else 0
        path = self._folder / f"steps-{self._first}-{step}-rank{rank}.json"
        profiler.export_chrome_trace(str(path))
        if trainer.world.is_first:
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profiler.key_averages().table(
                sort_by=order, row_limit=_NUM_ROWS, max_name_column_width=40
            )
            log.info("profiled steps %d to %d: %s\n%s", self._first, step, path, table)
