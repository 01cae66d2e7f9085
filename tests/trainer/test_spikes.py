"""Spikes: found in the losses alone, undone by going back, and by whichever way the same bits."""

import functools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ostro, read_metrics, torchrun, write_config

from ostro.checkpoint import find_latest
from ostro.data.order.mixture import BatchSchedule
from ostro.trainer.spikes import RecoverConfig, Recovery, StepRange


def observed(recovery: Recovery, losses, first: int = 0):
    """The spikes by the step that completes them."""
    found = {}
    for step, loss in enumerate(losses, first):
        spike = recovery.observe(step, loss, 1.0, loss != loss)
        if spike is not None:
            found[step] = spike.step
    return found


CONFIG = RecoverConfig(rolling_interval_length=8, sigma_factor=4, patience=3, window=5)


def test_a_spike_is_so_many_losses_in_a_row_that_are_far_above_the_last_ones():
    draw = random.Random(0)
    good = [3 + 0.1 * draw.random() for _ in range(20)]
    assert observed(Recovery(CONFIG), good) == {}
    assert observed(Recovery(CONFIG), [*good, 5, 5, *good, 5, 5, *good]) == {}
    assert observed(Recovery(CONFIG), [*good, 5, 5, 5]) == {22: 20}
    assert observed(Recovery(CONFIG), [3, 3.1, 3, 9, 9, 9]) == {}, "too few to compare with"
    assert observed(Recovery(), [*good, 5, 5, 5]) == {}, "only where it is asked for"


def test_one_loss_that_is_not_finite_is_enough():
    assert observed(Recovery(CONFIG), [float("nan")]) == {0: 0}
    assert observed(Recovery(), [float("nan")]) == {0: 0}, "a run without `recover` stops for it"


def test_a_recovery_that_is_saved_and_loaded_decides_the_same():
    draw = random.Random(1)
    losses = [3 + 0.1 * draw.random() for _ in range(20)] + [5, 5, 5]
    for cut in range(len(losses)):
        recovery, resumed = Recovery(CONFIG), Recovery(CONFIG)
        found = observed(recovery, losses[:cut])
        resumed.load_state_dict(json.loads(json.dumps(recovery.state_dict())))
        found |= observed(resumed, losses[cut:], cut)
        assert found == {22: 20}


def test_the_window_begins_before_the_first_bad_step_and_never_before_the_first():
    recovery = Recovery(CONFIG)
    assert recovery.window(recovery.observe(7, 1.0, 1.0, True)) == StepRange(6, 10)
    assert recovery.window(recovery.observe(0, 1.0, 1.0, True)) == StepRange(0, 3)


def test_examples_that_are_left_out_are_not_counted():
    schedule = BatchSchedule(((0, 4), (10, 8)))
    recovery = Recovery(CONFIG, [StepRange(8, 11), StepRange(2, 3)])
    recovery.windows = [StepRange(10, 12)]
    left_out = {2, 3, 8, 9, 10, 11, 12}
    for stop in range(20):
        steps = [step for step in range(stop) if step not in left_out]
        assert recovery.num_examples(schedule, stop) == sum(map(schedule.size, steps))
    assert [step for step in range(20) if recovery.skips(step)] == sorted(left_out)


NUM_STEPS = 40
TINY = {
    "model": {"resid_pdrop": 0.1},
    "optimizer": {"skip_bad_steps": {"rolling_interval_length": 8, "sigma_factor": 1000.0}},
    "trainer": {
        "num_train_steps": NUM_STEPS,
        "steps_per_eval": 10,
        "log_interval": 3,
        "per_device_parallelism": 2,
        "checkpointer": {"keep": [], "async_save": False},
    },
}
RECOVER = {
    "window": 6, "sigma_factor": 4.0, "rolling_interval_length": 8, "patience": 3
}  # fmt: skip
WINDOW = [23, 28]  # what is left out for a first bad step 24


def garbage(stop: int = 28) -> str:
    """A module that makes the batches of steps 24 to `stop` - 1 random tokens."""
    return f"""
import torch
from ostro.data.loader import Loader
batch = Loader.batch

def poisoned(loader, step):
    found = batch(loader, step)
    if 24 <= step < {stop}:
        draw = torch.Generator().manual_seed(step)
        found.tokens.random_(1, 257, generator=draw)
        found.targets.random_(1, 257, generator=draw)
    return found

Loader.batch = poisoned
"""


def nan_at(step: int) -> str:
    """A module that spoils a gradient."""
    return f"""
from ostro.trainer import TorchEngine
update = TorchEngine.update

def poisoned(engine, loss, *rest):
    if engine.state.step == {step}:
        parameter = next(engine.state.model.parameters())
        getattr(parameter.grad, "_local_tensor", parameter.grad).fill_(float("nan"))
    return update(engine, loss, *rest)

TorchEngine.update = poisoned
"""


def killed_at(call: int) -> str:
    """A module that kills the process before its so many-th update."""
    return f"""
import itertools, os, signal
from ostro.trainer import Trainer
step, calls = Trainer.train_step, itertools.count()

def train_step(trainer, *args):
    if next(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *args)

Trainer.train_step = train_step
"""


def train(folder: Path, poison: str, start: Callable = ostro, code: int = 0, **trainer: Any) -> str:
    """A run as a user starts it, with a module that spoils some steps; what it says."""
    path = write_config(folder, **TINY | {"trainer": TINY["trainer"] | trainer})
    (folder / "poison.py").write_text(poison)
    modules = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = start(
        "train",
        "--config_path",
        path,
        "--imports",
        "[poison]",
        env=os.environ | {"PYTHONPATH": modules},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = find_latest(str(folder / "checkpoints"))
    assert saved is not None and saved.values["step"] == NUM_STEPS
    groups = ("model", "optimizer", "state")
    return {f"{g}.{name}": t for g in groups for name, t in saved.tensors(g).items()}


def assert_same(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def rollbacks(folder: Path) -> list[tuple[int, int, list[int]]]:
    """From, to and window of each."""
    lines = (folder / "logs/tiny/metrics.jsonl").read_text().splitlines()
    found = [event for event in map(json.loads, lines) if event.get("event") == "rollback"]
    return [(event["from"], event["to"], event["window"]) for event in found]


def steps(folder: Path) -> list[int]:
    """Those of the checkpoints there are."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints/tiny").glob("step-*"))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """The run that leaves the window out from the start, though it is as spoilt."""
    folder = tmp_path_factory.mktemp("given")
    out = train(folder, garbage(), skip_steps=[{"first": WINDOW[0], "last": WINDOW[1]}])
    assert "Trained 34 steps" in out
    return folder


def test_batches_that_are_left_out_are_not_read_not_trained_on_and_have_no_figures(given):
    window = set(range(WINDOW[0], WINDOW[1] + 1))
    losses, skipped = read_metrics(given), read_metrics(given, "train/skipped_batch")
    assert set(skipped) == window and set(skipped.values()) == {1.0}
    assert set(losses) == set(range(NUM_STEPS)) - window
    assert max(list(losses.values())[10:]) < 4, "the garbage was not seen"
    for name in ("grad/norm/total", "optim/learning_rate", "optim/skipped_step"):
        assert read_metrics(given, name).keys() == losses.keys()
    assert read_metrics(given, "throughput/total_tokens")[39] == 34 * 4 * 16
    assert int(weights(given)["state.skip_step.count"]) == 34
    assert set(read_metrics(given, "eval/loss")) == {0, 10, 20, 30, 39}


CHECKPOINTS = {"checkpointer": {"keep": [{"every": 5}], "async_save": False}}
SNAPSHOTS = {"recover": {**RECOVER, "snapshot_every": 10}}


@pytest.mark.parametrize(
    ("settings", "to"),
    [
        ({}, 0),
        (CHECKPOINTS, 21),
        ({"checkpointer": {**CHECKPOINTS["checkpointer"], "format": "file"}}, 21),
        (SNAPSHOTS, 20),
        ({"recover": {**RECOVER, "snapshot_every": 4}}, 0),  # that of step 24 is too late
        ({"log_interval": 1}, 0),
    ],
    ids=["scratch", "checkpoint", "file", "snapshot", "late snapshot", "every step"],
)
def test_wherever_it_goes_back_to_a_run_ends_as_if_the_window_had_never_been(
    tmp_path, given, settings, to
):
    """Garbage raises the loss, all of it finite."""
    out = train(tmp_path, garbage(), **{"recover": RECOVER} | settings)
    reached = 27 if settings.get("log_interval") == 1 else 28
    assert rollbacks(tmp_path) == [(reached, to, WINDOW)]
    assert "step 24: loss above" in out and "steps 23 to 28 are left out" in out
    assert set(read_metrics(tmp_path, "train/skipped_batch")) == set(range(23, 29))
    assert_same(tmp_path, given)


def test_a_gradient_that_is_not_finite_is_undone_in_the_same_way(tmp_path, given):
    train(tmp_path, nan_at(24), recover=RECOVER, **CHECKPOINTS)
    assert rollbacks(tmp_path) == [(25, 21, WINDOW)]
    assert_same(tmp_path, given)


@pytest.mark.parametrize(
    ("call", "saved", "found"),
    [
        (26, [5, 10, 15, 20, 25], [(28, 21, WINDOW)]),  # the spike is saved, not yet seen
        (29, [5, 10, 15, 20], [(28, 21, WINDOW), (28, 21, WINDOW)]),  # after the roll-back
        (33, [5, 10, 15, 20, 25, 30], [(28, 21, WINDOW)]),  # after the window
    ],
)
def test_killed_at_any_time_a_run_decides_the_same(tmp_path, given, call, saved, found):
    settings = {"recover": RECOVER, **CHECKPOINTS}
    train(tmp_path, garbage() + killed_at(call), code=-signal.SIGKILL, **settings)
    assert steps(tmp_path) == saved
    train(tmp_path, garbage(), **settings)
    assert rollbacks(tmp_path) == found
    assert_same(tmp_path, given)


def test_after_so_many_rollbacks_it_stops_with_a_good_state_and_can_go_on(tmp_path):
    few = {**RECOVER, "window": 4, "max_rollbacks": 1}
    out = train(tmp_path, garbage(31), code=2, recover=few, **CHECKPOINTS)
    assert "again after 1 roll-backs that left out steps 23 to 26" in out
    assert "raise trainer.recover.max_rollbacks" in out and "Traceback" not in out
    assert steps(tmp_path)[-1] == 25, "before the second spike, which began at 27"
    train(tmp_path, garbage(31), recover={**few, "max_rollbacks": 2}, **CHECKPOINTS)
    assert [window for _, _, window in rollbacks(tmp_path)] == [[23, 26], [26, 29]]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("settings", "to"),
    [
        ({"fsdp_axis": "embed", "recover": {**RECOVER, "snapshot_every": 20}}, [0, 20]),
        ({"fsdp_axis": None, "recover": RECOVER, **CHECKPOINTS}, [6, 21]),
    ],
    ids=["FSDP, start and snapshot", "copies, checkpoints"],
)
def test_two_processes_go_back_together(tmp_path, settings, to):
    """First for a gradient that is not finite, then for garbage."""
    two, given = tmp_path / "two", tmp_path / "given"
    start = functools.partial(torchrun, 2)
    train(two, garbage() + nan_at(11), start, **settings)
    windows = [[10, 15], WINDOW]
    assert [(to, window) for _, to, window in rollbacks(two)] == list(zip(to, windows, strict=True))
    skip_steps = [{"first": first, "last": last} for first, last in windows]
    train(
        given, garbage() + nan_at(11), start, skip_steps=skip_steps, fsdp_axis=settings["fsdp_axis"]
    )
    assert_same(two, given)
