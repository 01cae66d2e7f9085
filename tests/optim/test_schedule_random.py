"""Schedules against a second implementation that walks through a run step by step."""

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ostro.optim import AdamConfig, LrScheduleConfig


def in_steps(value, length):
    """A float up to 1 is a share of the length, all else a count."""
    if isinstance(value, float) and value <= 1.0:
        return math.floor(value * length)
    return int(value)


def starts_a_cycle(config: AdamConfig, step: int, run: int) -> bool:
    """Whether a cycle begins at a step after 0, asked one step at a time."""
    if isinstance(config.cycles, list):
        return step in config.cycles
    if config.cycles is not None:
        # The share of the run that is over passes a multiple of 1 / cycles at this step.
        return any(step == math.floor(run * i / config.cycles) for i in range(1, config.cycles))
    if isinstance(config.cycle_length, list):
        while step > 0 and (lengths := config.cycle_length):
            step, config = step - lengths[0], replace(config, cycle_length=lengths[1:])
        return step == 0
    if config.cycle_length is not None:
        length = in_steps(config.cycle_length, run)
        return step % length == 0 and run - step >= length
    return False


def fallen(config: AdamConfig, done: int, steps: int, climb: int) -> float:
    """The share of the peak that is left after `done` of `steps` steps of decay."""
    low, part = config.min_lr_ratio, min(done / steps, 1.0)
    match LrScheduleConfig.get_choice_name(type(config.lr_schedule)):
        case "constant":
            return 1.0
        case "linear":
            return 1.0 + (low - 1.0) * part
        case "cosine":  # (1 + cos x) / 2 is the square of cos x/2
            return low + (1.0 - low) * math.cos(math.pi / 2 * part) ** 2
        case "inv_sqrt":
            age = max(1, done + climb)
            return max(low, min(1.0, math.sqrt(config.lr_schedule.timescale / age)))
        case "inv":
            return max(low, low * steps / ((1 - low) * max(done, 1) + low * steps))
    raise AssertionError("unknown schedule")


def walk(config: AdamConfig, run: int, extra: int) -> list[float]:
    """The learning rate of each step of the run and of `extra` steps after it, by walking."""
    run = config.schedule_steps or run
    starts = [0, *(step for step in range(1, run) if starts_a_cycle(config, step, run))]
    top, climb = config.learning_rate, in_steps(config.warmup, run)
    if config.warmup_offset and len(starts) == 1 and climb >= run:  # nanoGPT's is never cut
        ramp = [top * (step + 1) / (climb + 1) for step in range(climb)]
        return [*ramp, *[top * fallen(config, 1, 1, climb)] * (run + extra)][: run + extra]
    rates: list[float] = []
    bottom = 0.0
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else run
        length = free = stop - start
        climb = min(free, in_steps(config.rewarmup if number else config.warmup, length))
        free -= climb
        fall = free if config.decay is None else min(free, in_steps(config.decay, length))
        hold = free - fall

        rate, top, falling = bottom, config.learning_rate, 0
        for position in range(length + (extra if stop == run else 0)):
            if position < climb:
                part = (position + config.warmup_offset) / (climb + config.warmup_offset)
                rate = (1 - part) * bottom + part * top
            elif position < climb + hold or fall == 0:
                rate = top
            else:
                rate = top * fallen(config, falling, fall, climb)
                falling += 1
            rates.append(rate)
        bottom = top * fallen(config, fall, fall, climb) if fall else top
    return rates


lengths = st.one_of(st.integers(0, 60), st.floats(0, 1), st.integers(2, 40).map(float))


@st.composite
def runs(draw):
    run = draw(st.integers(1, 120))
    laid_out = draw(st.none() | st.integers(1, 150))
    steps = laid_out or run
    cycles = cycle_length = None
    match draw(st.sampled_from(["one", "count", "minima", "length", "share", "lengths"])):
        case "count":
            cycles = draw(st.integers(1, min(steps, 12)))
        case "minima":
            cycles = sorted(draw(st.sets(st.integers(1, steps), max_size=6)))
        case "length":
            cycle_length = draw(st.integers(1, steps + 20))
        case "share":
            cycle_length = draw(st.floats(1 / steps, 1).filter(lambda x: int(x * steps) > 0))
        case "lengths":
            cycle_length, left = [], steps
            while left and draw(st.booleans()):
                cycle_length.append(draw(st.integers(1, left)))
                left -= cycle_length[-1]
    name = draw(st.sampled_from(["constant", "linear", "cosine", "inv_sqrt", "inv"]))
    fields = {"timescale": draw(st.floats(1, 100))} if name == "inv_sqrt" else {}
    config = AdamConfig(
        learning_rate=draw(st.sampled_from([1.0, 6e-4, 0.02])),
        min_lr_ratio=draw(st.floats(0.01 if name == "inv" else 0.0, 1)),
        warmup=draw(lengths),
        decay=draw(st.none() | lengths),
        rewarmup=draw(lengths),
        cycles=cycles,
        cycle_length=cycle_length,
        lr_schedule=LrScheduleConfig.get_choice_class(name)(**fields),
        warmup_offset=draw(st.sampled_from([0, 1])),
        schedule_steps=laid_out,
    )
    return config, run


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(runs())
def test_a_thousand_random_schedules(config_and_run):
    config, run = config_and_run
    schedule = config.schedule(run)
    expected = walk(config, run, extra=7)
    found = [schedule(step) for step in range(len(expected))]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * config.learning_rate)
    if schedule.phases[-1].kind == "end":
        return
    ends = [phase.stop for phase in schedule.phases]
    assert [0, *ends] == [*(phase.start for phase in schedule.phases), config.schedule_steps or run]
