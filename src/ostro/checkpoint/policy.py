"""When a checkpoint is due, of which kind, and how many there will be: values only, no effects.

A *permanent* checkpoint is due at steps chosen by the `keep` intervals and is never deleted. A
*temporary* one is due when `save_interval` has passed since the last save of either kind, and at
multiples of `save_every`; it is deleted once the next save is complete.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from ostro.core.errors import Problem

Kind = Literal["permanent", "temporary"]


@dataclass(frozen=True)
class CheckpointInterval:
    """Keep a permanent checkpoint every so many steps, up to a step."""

    every: int
    """Steps between permanent checkpoints: those whose number is a multiple of this."""
    until: int | None = None
    """Last step this interval covers (inclusive); null, in the last entry only: no end."""


@dataclass(frozen=True)
class Policy:
    """Which steps deserve a checkpoint. Steps are 0-based indices of updates."""

    keep: tuple[CheckpointInterval, ...] = (CheckpointInterval(10_000),)
    """Intervals with increasing `until`; past the last one nothing more is kept."""
    save_interval: timedelta | None = timedelta(minutes=15)
    """Time without a save after which a temporary one is due; None: never."""
    save_every: int | None = None
    """Steps between temporary ones, whatever time has passed; None: by time alone."""

    def is_permanent(self, step: int) -> bool:
        """Whether the keep intervals want `step`. Never true of step 0."""
        for interval in self.keep:
            if interval.until is None or step <= interval.until:
                return step > 0 and step % interval.every == 0
        return False

    def due(self, step: int, elapsed: float, *, force: bool = False) -> Kind | None:
        """The kind of checkpoint due after `step`, `elapsed` seconds after the last save."""
        if force or self.is_permanent(step):
            return "permanent"
        if step == 0:
            return None
        if self.save_every is not None and step % self.save_every == 0:
            return "temporary"
        if self.save_interval is None:
            return None
        return "temporary" if elapsed >= self.save_interval.total_seconds() else None

    def permanent_steps(self, last: int) -> list[int]:
        """The steps from 1 to `last` inclusive that the keep intervals want."""
        return [step for step in range(1, last + 1) if self.is_permanent(step)]

    def kept_steps(self, num_steps: int) -> list[int]:
        """The steps whose checkpoints a run of `num_steps` leaves: the last one is always kept."""
        last = num_steps - 1
        steps = self.permanent_steps(last)
        return steps if steps[-1:] == [last] else [*steps, last]


def keep_problems(keep: Sequence[CheckpointInterval]) -> Iterator[Problem]:
    """What is wrong with a list of keep intervals; settings relative to its owner."""
    covered = 0
    for index, interval in enumerate(keep):
        name = f"keep.{index}"
        if interval.every < 1:
            yield Problem(f"{name}.every", "must be at least 1 step")
        if interval.until is None:
            if index < len(keep) - 1:
                yield Problem(
                    f"{name}.until",
                    "must be given: only the last interval may be open",
                    "the intervals after it would never be reached",
                )
        elif interval.until <= covered:
            rule = f"must be greater than {covered}, where the interval before it ends"
            yield Problem(f"{name}.until", rule if covered else "must be at least 1")
        else:
            covered = interval.until
