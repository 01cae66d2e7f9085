"""Learning-rate schedules: pure functions of the step, laid out as phases of one or more cycles.

    {[(re)warmup] -> [stable] -> [decay]} x cycles

The stable phase is what warm-up and decay leave of a cycle. Cycles with short or no re-warm-up
follow "Understanding Warmup-Stable-Decay Learning Rates" (WSD-S, arXiv:2410.05192).
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

from ostro.config import Choice
from ostro.core.errors import Problem
from ostro.core.units import resolve_steps


class LrScheduleConfig(Choice, ABC):
    """The shape of the decay phase. A bare name stands for it: `lr_schedule: cosine`."""

    default_type: ClassVar[str | None] = "cosine"
    needs_minimum: ClassVar[bool] = False
    """True where the formula has no meaning for a minimum of 0."""
    default_decay: ClassVar[float | None] = None
    """The part of a cycle that decays where `decay` is null; None: all that the warm-up leaves."""

    @abstractmethod
    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        """The learning rate `step` steps into a decay phase of `num_steps` > 0 steps.

        Must hold at `step >= num_steps` too: the last phase goes on after the end of the run.
        `warmup` is the length of the same cycle's warm-up.
        """


@LrScheduleConfig.register_subclass("constant")
@dataclass(frozen=True)
class ConstantSchedule(LrScheduleConfig):
    """Stays at the peak."""

    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        return peak


@LrScheduleConfig.register_subclass("linear")
@dataclass(frozen=True)
class LinearSchedule(LrScheduleConfig):
    """A straight line from the peak to the minimum."""

    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        return _on_a_line(step, num_steps, peak, minimum)


@LrScheduleConfig.register_subclass("wsd")
@dataclass(frozen=True)
class WsdSchedule(LrScheduleConfig):
    """Warm-up, stable, decay: at the peak, then a straight line to the minimum in the last fifth
    of the cycle, or as long as `decay` says.
    """

    default_decay: ClassVar[float | None] = 0.2

    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        return _on_a_line(step, num_steps, peak, minimum)


def _on_a_line(step: int, num_steps: int, peak: float, minimum: float) -> float:
    left = 1 - min(step, num_steps) / num_steps
    return peak * left + minimum * (1 - left)  # exact at both ends


@LrScheduleConfig.register_subclass("cosine")
@dataclass(frozen=True)
class CosineSchedule(LrScheduleConfig):
    """Half a cosine from the peak to the minimum (SGDR, arXiv:1608.03983)."""

    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        left = 0.5 * (1 + math.cos(math.pi * min(step, num_steps) / num_steps))
        return peak * left + minimum * (1 - left)  # exact at both ends


@LrScheduleConfig.register_subclass("inv_sqrt")
@dataclass(frozen=True)
class InvSqrtSchedule(LrScheduleConfig):
    """peak / sqrt(steps since the cycle's warm-up began / timescale), never above the peak.

    Flat for the first `timescale` steps; it need not reach the minimum, only never goes below.
    """

    timescale: float = 10000
    """Steps after which the learning rate starts to fall."""

    def problems(self) -> Iterator[Problem]:
        """A time scale of 0 or less has no meaning."""
        if not self.timescale > 0:
            yield Problem("timescale", "must be above 0")

    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        return max(peak * min(1.0, (max(step + warmup, 1) / self.timescale) ** -0.5), minimum)


@LrScheduleConfig.register_subclass("inv")
@dataclass(frozen=True)
class InvSchedule(LrScheduleConfig):
    """A hyperbola from the peak to the minimum: peak / (1 + (peak / minimum - 1) * progress)."""

    needs_minimum: ClassVar[bool] = True

    def decayed(self, step: int, num_steps: int, warmup: int, peak: float, minimum: float) -> float:
        if peak == 0:
            return 0.0
        progress = max(step, 1) / num_steps
        return max(peak * min(1.0, 1 / ((peak / minimum - 1) * progress + 1)), minimum)


PhaseKind = Literal["warmup", "rewarmup", "stable", "decay", "end"]
"""end: where the decay would have ended, after a warm-up that is longer than the schedule."""


@dataclass(frozen=True)
class Phase:
    """Steps `start` to `stop - 1` of a run."""

    kind: PhaseKind
    start: int
    stop: int
    first: float
    """The learning rate that the phase starts from (a warm-up: climbs from)."""
    cycle_warmup: int
    """Steps of warm-up or re-warm-up in the phase's cycle."""

    @property
    def num_steps(self) -> int:
        """The length of the phase."""
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: `schedule(step)`. Step k is the 0-based index of an update.

    The step at a boundary belongs to the new phase. After the last phase that phase goes on: a
    finished decay stays at its end.
    """

    peak: float
    minimum: float
    shape: LrScheduleConfig
    warmup_offset: int
    phases: tuple[Phase, ...]
    """All phases in order, without gaps; empty ones are left out."""
    warnings: tuple[str, ...]
    """What the user may not have meant, one sentence each."""

    def __call__(self, step: int) -> float:
        assert step >= 0, f"step {step} is negative"
        index = bisect_right(self.phases, step, key=lambda phase: phase.start) - 1
        phase = self.phases[index]
        since = step - phase.start
        if phase.kind == "stable":
            return self.peak
        if phase.kind == "end":
            return phase.first
        if phase.kind == "decay":
            return self.shape.decayed(
                since, phase.num_steps, phase.cycle_warmup, self.peak, self.minimum
            )
        offset = self.warmup_offset
        done = min(since + offset, phase.num_steps + offset) / (phase.num_steps + offset)
        return phase.first + (self.peak - phase.first) * done


def cycle_boundaries(
    cycles: int | list[int] | None, cycle_length: int | float | list[int] | None, num_steps: int
) -> list[int]:
    """Where the cycles of a run begin, and its end: 0, ..., `num_steps`.

    `cycles`: a number of equal cycles, or the steps at which cycles end. `cycle_length`: the
    length of every cycle, of which the last takes the remainder, or a list of lengths.
    """
    if isinstance(cycles, int):
        return [num_steps * i // cycles for i in range(cycles)] + [num_steps]
    if isinstance(cycles, list):
        inner = cycles
    elif isinstance(cycle_length, list):
        inner = list(accumulate(cycle_length))
    elif cycle_length is not None:
        length = resolve_steps(cycle_length, num_steps)
        inner = [i * length for i in range(1, num_steps // length)]
    else:
        inner = []
    return [0, *(step for step in inner if step != num_steps), num_steps]


def make_schedule(
    boundaries: list[int],
    *,
    peak: float,
    minimum: float,
    shape: LrScheduleConfig,
    warmup: int | float,
    decay: int | float | None,
    rewarmup: int | float,
    warmup_offset: int = 0,
) -> Schedule:
    """Lay out the phases of every cycle. An `int` is steps, a `float` a fraction of its cycle.

    A warm-up longer than its cycle is cut to the cycle, then a decay to what is left of it, with
    a warning. Not so with `warmup_offset` 1, nanoGPT's warm-up: it takes its time, and where
    nothing is left to decay in, the learning rate falls behind it to where that would have ended.
    """
    whole = resolve_steps(warmup, boundaries[-1])
    if warmup_offset and len(boundaries) == 2 and whole >= boundaries[-1]:
        lowest = shape.decayed(1, 1, whole, peak, minimum)
        return Schedule(peak, minimum, shape, warmup_offset, *_uncut(whole, boundaries[-1], lowest))
    phases: list[Phase] = []
    cut: list[str] = []
    flat: list[int] = []
    end = 0.0  # the learning rate that the previous cycle ended at
    for cycle, (start, stop) in enumerate(pairwise(boundaries)):
        length = stop - start
        ramp: PhaseKind = "rewarmup" if cycle else "warmup"
        wanted_warmup = resolve_steps(rewarmup if cycle else warmup, length)
        num_warmup = min(wanted_warmup, length)
        left = length - num_warmup
        wanted_decay = left if decay is None else resolve_steps(decay, length)
        num_decay = min(wanted_decay, left)
        if wanted_warmup > num_warmup or wanted_decay > num_decay:
            wanted = ramp if decay is None else f"{ramp} and decay"
            cut.append(
                f"cycle {cycle} has {length} steps, too few for {wanted}: {ramp} takes "
                f"{num_warmup} of {wanted_warmup} steps, decay {num_decay} of {wanted_decay}"
            )

        decay_start = stop - num_decay
        layout: list[tuple[PhaseKind, int, int, float]] = [
            (ramp, start, start + num_warmup, end),
            ("stable", start + num_warmup, decay_start, peak),
            ("decay", decay_start, stop, peak),
        ]
        for kind, first_step, last_step, first in layout:
            if last_step > first_step:
                phases.append(Phase(kind, first_step, last_step, first, num_warmup))

        end = last = peak
        if num_decay:
            end = shape.decayed(num_decay, num_decay, num_warmup, peak, minimum)
            last = shape.decayed(max(num_decay - 1, 1), num_decay, num_warmup, peak, minimum)
        if left and last == peak > minimum:
            flat.append(cycle)

    warnings = _warnings(cut, flat, num_cycles=len(boundaries) - 1)
    return Schedule(peak, minimum, shape, warmup_offset, tuple(phases), warnings)


def _uncut(warmup: int, num_steps: int, lowest: float) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    """The phases of a warm-up that takes as long as the schedule or longer, and a warning."""
    climb = Phase("warmup", 0, warmup, 0.0, warmup)
    end = Phase("end", warmup, warmup + 1, lowest, warmup)
    left = f"the warm-up takes {warmup} steps, and the schedule ends at {num_steps}: "
    return (climb, end), (left + "the learning rate does not decay, it drops",)


def _warnings(cut: list[str], flat: list[int], num_cycles: int) -> tuple[str, ...]:
    """One sentence for each kind of trouble, however many cycles have it."""
    warnings = []
    if cut:
        warnings.append(cut[0] + (f" ({len(cut) - 1} more cycles like it)" if cut[1:] else ""))
    if flat:
        where = f"{len(flat)} of {num_cycles} cycles" if num_cycles > 1 else "the whole run"
        warnings.append(
            f"the learning rate never leaves its peak in {where}; min_lr_ratio: 1 says you mean it"
        )
    return tuple(warnings)
