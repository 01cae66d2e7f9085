"""Schedules against tables worked out by hand from the formulas."""

import math

import pytest

from ostro.core.errors import ConfigError
from ostro.optim import AdamConfig, LrScheduleConfig, Schedule
from ostro.optim.schedule import cycle_boundaries


def shape(name: str, **fields: float) -> LrScheduleConfig:
    return LrScheduleConfig.get_choice_class(name)(**fields)


def schedule(num_steps: int, lr_schedule: str = "cosine", **fields) -> Schedule:
    return AdamConfig(lr_schedule=shape(lr_schedule), **fields).schedule(num_steps)


def assert_values(found: Schedule, expected: dict[int, float]) -> None:
    """Six significant digits, as the tables give them."""
    assert {step: found(step) for step in expected} == pytest.approx(expected, rel=5e-6)


def test_cosine_table():
    found = schedule(1000, learning_rate=6e-4)
    assert found(0) == 0.0
    assert found(10) == 6e-4, "the peak is exact"
    assert_values(
        found,
        {1: 6e-5, 5: 3e-4, 9: 5.4e-4, 11: 5.99999e-4, 257: 5.21222e-4, 505: 3.3e-4}
        | {752: 1.39384e-4, 999: 6.00014e-5},
    )


def test_linear_table():
    found = schedule(1000, "linear", learning_rate=6e-4)
    assert_values(found, {505: 3.3e-4, 752: 1.95273e-4, 999: 6.05455e-5, 1000: 6e-5, 5000: 6e-5})


def test_stable_phase_table():
    found = schedule(1000, "linear", learning_rate=1e-3, warmup=100, decay=0.2)
    assert_values(
        found,
        {99: 9.9e-4, 100: 1e-3, 400: 1e-3, 800: 1e-3, 801: 9.955e-4, 900: 5.5e-4, 999: 1.045e-4},
    )
    assert [(phase.kind, phase.start, phase.stop) for phase in found.phases] == [
        ("warmup", 0, 100),
        ("stable", 100, 800),
        ("decay", 800, 1000),
    ]


def test_wsd_is_a_linear_decay_of_a_fifth():
    linear = schedule(1000, "linear", learning_rate=1e-3, warmup=100, decay=0.2)
    found = schedule(1000, "wsd", learning_rate=1e-3, warmup=100)
    assert [found(step) for step in range(1000)] == [linear(step) for step in range(1000)]
    assert found.phases == linear.phases and found.warnings == ()
    given = schedule(1000, "wsd", learning_rate=1e-3, warmup=100, decay=50)
    assert given.phases[-1].start == 950
    cycles = schedule(1000, "wsd", learning_rate=1e-3, warmup=100, cycles=2)
    assert [(p.kind, p.num_steps) for p in cycles.phases if p.kind == "decay"] == [
        ("decay", 100)
    ] * 2


def test_rewarmup_table():
    found = schedule(
        1000,
        "linear",
        learning_rate=1e-2,
        min_lr_ratio=0.2,
        cycles=2,
        warmup=0.2,
        rewarmup=0.05,
    )
    assert_values(
        found,
        {100: 1e-2, 300: 6e-3, 499: 2.02e-3, 500: 2e-3, 512: 5.84e-3, 524: 9.68e-3, 525: 1e-2}
        | {526: 9.98316e-3, 999: 2.01684e-3},
    )
    kinds = [phase.kind for phase in found.phases]
    assert kinds == ["warmup", "decay", "rewarmup", "decay"]


def test_cycle_length_fraction_table():
    found = schedule(1000, "linear", learning_rate=1e-3, cycle_length=0.25, warmup=0.01)
    assert_values(
        found,
        {0: 0, 1: 5e-4, 2: 1e-3, 249: 1.03629e-4, 250: 1e-3, 499: 1.036e-4, 500: 1e-3, 750: 1e-3},
    )


def test_warmup_lengths():
    # A fraction is truncated: 0.29 * 100 is a little less than 29 in binary.
    assert [phase.stop for phase in schedule(100, warmup=0.29).phases] == [28, 100]
    assert [phase.stop for phase in schedule(100, warmup=1).phases] == [1, 100]
    whole = schedule(100, warmup=1.0, learning_rate=1.0)
    assert [phase.stop for phase in whole.phases] == [100]
    assert (whole(50), whole(100), whole(1000)) == (0.5, 1.0, 1.0)
    assert [phase.stop for phase in schedule(100, warmup=20.0).phases] == [20, 100]


def test_warmup_offset():
    # nanoGPT: learning_rate * (it + 1) / (warmup_iters + 1)
    found = schedule(100, warmup=9, warmup_offset=1, learning_rate=1.0)
    assert [found(step) for step in range(10)] == [(step + 1) / 10 for step in range(9)] + [1.0]


def nanogpts(step: int, warmup: int, decay: int, peak: float, lowest: float) -> float:
    """nanoGPT's schedule, from its formulas."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > decay or decay <= warmup:
        return lowest
    share = (step - warmup) / (decay - warmup)
    return lowest + 0.5 * (1 + math.cos(math.pi * share)) * (peak - lowest)


@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 11, 25, 100])
def test_the_warmup_of_nanogpt_is_never_cut(warmup):
    """Also beyond the end of its decay, and beyond the run."""
    settings = {"warmup": warmup, "warmup_offset": 1, "schedule_steps": 10, "learning_rate": 1.0}
    found = schedule(50, **settings, min_lr_ratio=0.1)
    expected = [nanogpts(step, warmup, 10, 1.0, 0.1) for step in range(60)]
    assert [found(step) for step in range(60)] == pytest.approx(expected, rel=1e-12)
    assert any("does not decay" in text for text in found.warnings) == (warmup >= 10)


def test_schedule_steps():
    # nanoGPT's lr_decay_iters, shorter and longer than the run.
    short = schedule(1000, schedule_steps=600, learning_rate=1.0)
    assert_values(short, {599: 0.1000063, 600: 0.1, 999: 0.1})
    long = schedule(1000, "linear", schedule_steps=2000, warmup=0, learning_rate=1.0)
    assert long(999) == pytest.approx(1 - 0.9 * 999 / 2000)


@pytest.mark.parametrize(
    ("cycles", "cycle_length", "expected"),
    [
        (None, None, [0, 1000]),
        (1, None, [0, 1000]),
        (3, None, [0, 333, 666, 1000]),
        (4, None, [0, 250, 500, 750, 1000]),
        ([300, 700], None, [0, 300, 700, 1000]),
        ([300, 700, 1000], None, [0, 300, 700, 1000]),
        ([], None, [0, 1000]),
        (None, 250, [0, 250, 500, 750, 1000]),
        (None, 300, [0, 300, 600, 1000]),
        (None, 600, [0, 1000]),
        (None, 5000, [0, 1000]),
        (None, 0.25, [0, 250, 500, 750, 1000]),
        (None, 1 / 3, [0, 333, 666, 1000]),
        (None, 1.0, [0, 1000]),
        (None, 500.0, [0, 500, 1000]),
        (None, [300, 400], [0, 300, 700, 1000]),
        (None, [300, 700], [0, 300, 1000]),
    ],
)
def test_cycle_boundaries(cycles, cycle_length, expected):
    assert cycle_boundaries(cycles, cycle_length, 1000) == expected
    found = AdamConfig(cycles=cycles, cycle_length=cycle_length).schedule(1000)
    ends = [phase.stop for phase in found.phases if phase.kind == "decay"]
    assert [0, *ends] == expected


def test_each_cycle_ends_near_its_minimum_and_the_next_starts_at_the_boundary():
    found = schedule(1000, "linear", cycles=[300, 700], warmup=0, learning_rate=1.0)
    for boundary in (300, 700):
        assert found(boundary - 1) < 0.11
        assert found(boundary) == 1.0


def test_inv_sqrt_is_flat_for_its_timescale():
    found = AdamConfig(lr_schedule=shape("inv_sqrt", timescale=100), learning_rate=1.0, warmup=50)
    values = found.schedule(1000)
    assert values(60) == values(100) == 1.0
    assert values(400) == pytest.approx(0.5)
    assert values(900) == pytest.approx(1 / 3)
    assert values(10**9) == 0.1, "the minimum is a floor"


def test_inv():
    found = schedule(1000, "inv", learning_rate=1.0, min_lr_ratio=0.1, warmup=0)
    assert_values(found, {0: 1 / 1.009, 1: 1 / 1.009, 500: 1 / 5.5, 1000: 0.1, 2000: 0.1})
    assert schedule(10, "inv", learning_rate=0.0)(5) == 0.0


def test_too_long_phases_are_cut_with_a_warning():
    found = schedule(100, "linear", learning_rate=1e-3, warmup=80, decay=50)
    assert [(phase.kind, phase.num_steps) for phase in found.phases] == [
        ("warmup", 80),
        ("decay", 20),
    ]
    assert found(49) == pytest.approx(6.125e-4)
    assert found(50) == pytest.approx(6.25e-4), "no jump"
    assert found.warnings == (
        "cycle 0 has 100 steps, too few for warmup and decay: "
        "warmup takes 80 of 80 steps, decay 20 of 50",
    )
    found = schedule(100, cycles=4, warmup=40, rewarmup=30)
    assert [phase.num_steps for phase in found.phases] == [25, 25, 25, 25]
    assert len(found.warnings) == 1
    assert "(3 more cycles like it)" in found.warnings[0]


@pytest.mark.parametrize("name", ["constant", "inv_sqrt"])
def test_a_schedule_that_stays_at_its_peak_warns(name):
    found = schedule(1000, name, cycles=2)
    assert "never leaves its peak in 2 of 2 cycles" in found.warnings[0]
    assert found(400) == found(999) == 1e-4
    assert schedule(1000, name, cycles=2, min_lr_ratio=1.0).warnings == ()


def test_decay_of_nothing_stays_at_the_peak_and_warns():
    found = schedule(1000, decay=0)
    assert found(999) == found(2000) == 1e-4
    assert "the whole run" in found.warnings[0]


@pytest.mark.parametrize("name", ["linear", "cosine", "inv"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 1000])
def test_usual_schedules_do_not_warn(name, num_steps):
    assert schedule(num_steps, name).warnings == ()


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("warmup", {"warmup": 1.5}),
        ("warmup", {"warmup": -0.1}),
        ("warmup", {"warmup": float("nan")}),
        ("decay", {"decay": -1}),
        ("rewarmup", {"rewarmup": 2.5}),
        ("learning_rate", {"learning_rate": -1e-3}),
        ("learning_rate", {"learning_rate": float("nan")}),
        ("min_lr_ratio", {"min_lr_ratio": 1.5}),
        ("min_lr_ratio", {"min_lr_ratio": 0.0, "lr_schedule": shape("inv")}),
        ("cycle_length", {"cycles": 2, "cycle_length": 100}),
        ("cycles", {"cycles": 0}),
        ("cycles", {"cycles": 101}),
        ("cycles", {"cycles": [50, 30]}),
        ("cycles", {"cycles": [30, 30]}),
        ("cycles", {"cycles": [0, 30]}),
        ("cycles", {"cycles": [30, 101]}),
        ("cycle_length", {"cycle_length": [60, 60]}),
        ("cycle_length", {"cycle_length": [60, 0]}),
        ("cycle_length", {"cycle_length": 0}),
        ("cycle_length", {"cycle_length": -5}),
        ("cycle_length", {"cycle_length": 0.001}),
        ("cycle_length", {"cycle_length": 1.5}),
        ("schedule_steps", {"schedule_steps": 0}),
    ],
)
def test_bad_settings_are_named(setting, fields):
    with pytest.raises(ConfigError) as caught:
        AdamConfig(**fields).schedule(100)
    assert [problem.setting for problem in caught.value.problems] == [setting]


def test_timescale_must_be_positive():
    problems = list(shape("inv_sqrt", timescale=0).problems())
    assert [problem.setting for problem in problems] == ["timescale"]
