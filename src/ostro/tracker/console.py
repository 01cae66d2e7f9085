"""Figures on the terminal: a progress bar, or plain lines where the output is no terminal.

The lines go to the run's log file too, whatever the terminal shows: `tail -f` follows a run.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from ostro.core.units import format_count, format_duration
from ostro.tracker.tracker import RunInfo, Tracker, TrackerConfig

log = logging.getLogger("ostro")


@TrackerConfig.register_subclass("console")
@dataclass(frozen=True)
class ConsoleConfig(TrackerConfig):
    """A progress bar with loss, learning rate, tokens per second, MFU and time left; evaluations
    and samples are printed above it. Plain lines where the output is no terminal, and in the
    run's log file. Nothing of it where `trainer.log_level` is above INFO.
    """

    log_every: int | None = None
    """Steps between plain lines; null = whenever the trainer reports its speed, so every
    `trainer.log_interval` steps. A progress bar shows every step."""
    style: Literal["ostro", "nanogpt"] = "ostro"
    """nanogpt: the lines that nanoGPT prints, `iter 10: loss 3.2145, time 85.03ms, mfu 41.20%`, for
    multiples of `log_every` only; on a terminal too, without a bar."""
    on_terminal: bool = True
    """false: the lines go to the run's log file only."""

    def build(self, run: RunInfo) -> Tracker:
        from rich.console import Console

        return ConsoleTracker(self, run, Console())


class Pace:
    """How long the rest of a run takes, from the steps of the last while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, length: int = 64):
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=length)

    def mark(self, step: int) -> None:
        """Step `step` was seen now. Steps reported in one burst count as one mark."""
        now = self._clock()
        if self._marks and now - self._marks[-1][0] < 0.2:
            now, _ = self._marks.pop()
        self._marks.append((now, step))

    def seconds_for(self, num_steps: int) -> float | None:
        """The time that so many more steps will take; None while there is nothing to go by."""
        if len(self._marks) < 2:
            return None
        (start, first), (stop, last) = self._marks[0], self._marks[-1]
        return (stop - start) / (last - first) * num_steps if last > first else None


class ConsoleTracker(Tracker):
    """Shows the newest training figures in one line and prints all else above it."""

    name = "console"

    def __init__(self, config: ConsoleConfig, run: RunInfo, console: Any, pace: Pace | None = None):
        self._every = config.log_every
        self._style = config.style
        self._on_terminal = config.on_terminal
        self._run = run
        self._console = console
        self._pace = pace or Pace()
        self._figures: dict[str, float] = {}
        self._bar: Any = None
        self._task: Any = None
        self._rerouted: list[tuple[logging.StreamHandler, Any]] = []
        self._last_line = -1

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluation:
            as_nanogpt = self._style == "nanogpt"
            self._print((nanogpt_evaluation if as_nanogpt else evaluation_line)(evaluation, step))
        if len(evaluation) == len(metrics):
            return
        self._figures.update(metrics)
        self._pace.mark(step)
        has_bar = self._console.is_terminal and self._on_terminal and self._style == "ostro"
        if has_bar and not _is_quiet():
            self._show(step)
        if step != self._last_line and self._is_due(metrics, step):
            self._last_line = step
            self._print(self._step_line(step), on_terminal=not has_bar)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._print(f"{name} at step {step}:\n{text}")

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for handler, stream in self._rerouted:
            handler.setStream(stream)
        self._rerouted.clear()

    def _is_due(self, metrics: Mapping[str, float], step: int) -> bool:
        if self._style == "nanogpt":
            return "train/loss" in metrics and step % (self._every or 1) == 0
        if self._run.num_steps is not None and step == self._run.num_steps - 1:
            return True
        if self._every:
            return step % self._every == 0
        return "throughput/tokens_per_second" in metrics

    def _position(self, step: int) -> str:
        total = self._run.num_steps
        return f"{step}" if total is None else f"{step}/{total}"

    def _step_line(self, step: int) -> str:
        if self._style == "nanogpt":
            return nanogpt_line(self._figures, step)
        return f"step {self._position(step)}  {self._line(step)}"

    def _line(self, step: int) -> str:
        total = self._run.num_steps
        left = None if total is None else self._pace.seconds_for(total - 1 - step)
        return figures_line(self._figures, left)

    def _show(self, step: int) -> None:
        if self._bar is None:
            self._start_bar()
        texts = {"description": self._position(step), "figures": self._line(step)}
        self._bar.update(self._task, completed=step + 1, **texts)

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        plain = (sys.stdout, sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=self._run.num_steps, figures="")
        # While the bar stands, rich prints above it what goes through sys.stdout and sys.stderr.
        # Logging handlers hold on to the streams of before: hand them the new ones.
        for handler in logging.getLogger().handlers + logging.getLogger("ostro").handlers:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and stream in plain:
                new = sys.stdout if stream is plain[0] else sys.stderr
                self._rerouted.append((handler, stream))
                handler.setStream(new)

    def _print(self, text: str, on_terminal: bool = True) -> None:
        """Write a line to the log file, and to the terminal unless told otherwise."""
        log.info("%s", text, extra={"file_only": True})
        if on_terminal and self._on_terminal and not _is_quiet():
            # No markup: a sample may hold brackets. No wrapping: a log keeps its lines.
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _is_quiet() -> bool:
    """True where the run's log level hides what is merely informative."""
    return log.level > logging.INFO  # 0 in a program that set none


def figures_line(figures: Mapping[str, float], seconds_left: float | None) -> str:
    """`loss 3.21  lr 5.90e-04  12.3k tok/s  85 ms/step  MFU 41.2%  1m20s left`, as far as known.

    `throughput/mfu` is a percentage.
    """
    shown = {
        "train/loss": lambda loss: f"loss {loss:.4f}",
        "optim/learning_rate": lambda rate: f"lr {rate:.2e}",
        "throughput/tokens_per_second": lambda speed: f"{format_count(speed)} tok/s",
        "throughput/duration": lambda seconds: f"{1000 * seconds:.0f} ms/step",
        "throughput/mfu": lambda mfu: f"MFU {mfu:.1f}%",
    }
    figures = dict(figures)
    if math.isnan(figures.get("throughput/mfu", 0.0)):
        del figures["throughput/mfu"]  # more than the device's peak: see `Throughput`
    parts = [show(figures[name]) for name, show in shown.items() if name in figures]
    if seconds_left is not None:
        parts.append(f"{format_duration(timedelta(seconds=math.ceil(seconds_left)))} left")
    return "  ".join(parts)


def evaluation_line(metrics: Mapping[str, float], step: int) -> str:
    """`evaluation at step 500: loss 3.2145  bpb 1.12  wiki/loss 3.1`; times are left out."""
    parts = [
        f"{name.removeprefix('eval/')} {value:.4f}"
        for name, value in metrics.items()
        if not name.endswith("_time")
    ]
    return f"evaluation at step {step}: {'  '.join(parts)}"


def nanogpt_line(figures: Mapping[str, float], step: int) -> str:
    """A step as nanoGPT prints it; an MFU that is not known is -100 %, as at its first steps."""
    loss, seconds = figures["train/loss"], figures.get("throughput/duration", 0.0)
    mfu = figures.get("throughput/mfu", math.nan)
    mfu = -100.0 if math.isnan(mfu) else mfu
    return f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu:.2f}%"


def nanogpt_evaluation(metrics: Mapping[str, float], step: int) -> str:
    """An evaluation as nanoGPT prints it: `step 0: train loss 4.2874, val loss 4.2823`."""
    names = {"train": "eval/train/loss", "val": "eval/loss"}
    losses = [f"{split} loss {metrics[n]:.4f}" for split, n in names.items() if n in metrics]
    return f"step {step}: {', '.join(losses)}"
