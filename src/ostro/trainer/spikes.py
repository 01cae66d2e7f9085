"""Batches that a run leaves out, and the spikes of its loss that make it go back: no effects.

All of it is a function of the losses by step, so a run that is repeated, or killed and resumed,
decides the same.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

from ostro.core.errors import Problem, at_least
from ostro.data.order.mixture import BatchSchedule

_MIN_DEVIATION = 1e-6


@dataclass(frozen=True)
class StepRange:
    """Some steps in a row."""

    first: int
    """The first step, counted from 0."""
    last: int
    """The last step, which belongs to them."""

    def problems(self) -> Iterator[Problem]:
        if self.first < 0:
            yield Problem("first", "must not be negative")
        if self.last < self.first:
            yield Problem("last", f"must be at least first = {self.first}", "it is inclusive")

    def __str__(self) -> str:
        one = self.first == self.last
        return f"step {self.first}" if one else f"steps {self.first} to {self.last}"


@dataclass(frozen=True)
class RecoverConfig:
    """After a spike of the loss, or one that is not finite: go back to the state before it, leave
    the batches out that led to it, and go on."""

    max_rollbacks: int = 3
    """How often to go back in the whole run; after that it stops."""
    window: int = 16
    """How many batches to leave out each time."""
    batches_before: int = 1
    """How many of these come before the first bad step: its loss may be the work of the update
    before it."""
    sigma_factor: float = 6.0
    """A loss is too high that is so many (population) standard deviations above the mean of those
    before it."""
    rolling_interval_length: int = 128
    """Number of past losses to compare with. None is too high before half of them are seen."""
    patience: int = 3
    """Losses in a row that must be too high to make a spike. One that is not finite is enough."""
    snapshot_every: int | None = None
    """Keep a copy of the state in the CPU's memory, a new one after every so many updates. Null:
    none; the run goes back to its newest checkpoint, or to its start."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(1, self, "max_rollbacks", "window", "patience")
        yield from at_least(1, self, "snapshot_every", advice="null switches it off")
        yield from at_least(2, self, "rolling_interval_length")
        if not 0 <= self.batches_before < max(self.window, 1):
            rule = f"must be at least 0 and below window = {self.window}"
            yield Problem("batches_before", rule, "the first bad step has to be left out too")
        if not self.sigma_factor > 0:
            yield Problem("sigma_factor", "must be above 0")


@dataclass(frozen=True)
class Spike:
    """Why a run cannot go on as it is."""

    step: int  # the first bad step
    reason: str  # what was seen there


class Recovery:
    """What a run leaves out, and what it remembers of its losses."""

    def __init__(self, config: RecoverConfig | None = None, skip_steps: Sequence[StepRange] = ()):
        self.config = config
        self.windows: list[StepRange] = []
        """What was left out after each roll-back so far."""
        self.suspects: list[int] = []
        """The last steps, if their losses are too high: a spike may have begun."""
        self._given = tuple(skip_steps)
        length = config.rolling_interval_length if config else 0
        self._losses: deque[float] = deque(maxlen=length)

    def skips(self, step: int) -> bool:
        """Whether the batch of this step is left out."""
        return any(part.first <= step <= part.last for part in (*self._given, *self.windows))

    def num_examples(self, schedule: BatchSchedule, stop: int) -> int:
        """Examples in the batches before step `stop`, without those that are left out."""
        total, end = schedule.offset(stop), 0
        for part in sorted((*self._given, *self.windows), key=lambda part: part.first):
            first, after = max(part.first, end), min(part.last + 1, stop)
            if first < after:
                total -= schedule.offset(after) - schedule.offset(first)
                end = after
        return total

    def observe(self, step: int, loss: float, norm: float, diverged: bool) -> Spike | None:
        """Take in the figures of the next step that was made; a spike if they complete one.

        `diverged`: loss or gradient norm are not finite, and the run should stop for that.
        """
        if diverged:
            return Spike(step, f"loss = {loss}, gradient norm = {norm}")
        if self.config is None:
            return None
        limit = self._limit(self.config.sigma_factor)
        if loss <= limit:
            self._losses.append(loss)
            self.suspects.clear()
            return None
        self.suspects.append(step)
        if len(self.suspects) < self.config.patience:
            return None
        reason = f"loss above {limit:.4f} until step {step}, where it is {loss:.4f}"
        return Spike(self.suspects[0], reason)

    def _limit(self, sigma_factor: float) -> float:
        losses = self._losses
        if len(losses) < max(2, (losses.maxlen or 0) // 2):
            return inf
        mean = sum(losses) / len(losses)
        deviation = sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses))
        return mean + sigma_factor * max(deviation, _MIN_DEVIATION)

    def window(self, spike: Spike) -> StepRange:
        """The steps to leave out because of a spike."""
        assert self.config is not None, "only a run with `recover` goes back"
        first = spike.step - self.config.batches_before
        return StepRange(max(first, 0), first + self.config.window - 1)

    def state_dict(self) -> dict[str, Any]:
        """The roll-backs, and the losses to compare with, as JSON values."""
        windows = [[window.first, window.last] for window in self.windows]
        return {"windows": windows, "losses": list(self._losses), "suspects": [*self.suspects]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take both over; of the losses the newest that fit."""
        self.windows = [StepRange(first, last) for first, last in state["windows"]]
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)
        self.suspects = list(state["suspects"])
