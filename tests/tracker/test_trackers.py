"""Composite, JSON lines, TensorBoard, and a tracker of one's own."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from ostro.tracker import (
    CompositeTracker,
    JsonLoggerConfig,
    NoopConfig,
    RunInfo,
    TensorboardConfig,
    Tracker,
    TrackerConfig,
    WandbConfig,
    build_trackers,
    run_folder,
)


class Recorder(Tracker):
    """Keeps what it gets; fails in the methods it is told to."""

    def __init__(self, *failing: str):
        self.failing = failing
        self.calls: list[str] = []
        self.metrics: list[tuple[int, dict]] = []

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.failing:
            raise OSError("disk full")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._note("log")
        self.metrics.append((step, dict(metrics)))

    def log_summary(self, values):
        self._note("log_summary")

    def log_text(self, name, text, step):
        self._note("log_text")

    def finish(self):
        self._note("finish")

    def state(self):
        self._note("state")
        return {"id": 7}


class Failing(Recorder):
    name = "flaky"


def use_all(tracker: Tracker) -> None:
    tracker.log({"train/loss": math.nan}, 3)
    tracker.log({"train/loss": 1.0}, 4)
    tracker.log_summary({})
    tracker.log_text("sample", "text", 4)
    tracker.finish()


def test_composite_hands_everything_on():
    recorders = [Recorder(), Recorder()]
    composite = CompositeTracker(recorders)
    assert composite.state() == {"Recorder": {"id": 7}}
    use_all(composite)
    for recorder in recorders:
        assert recorder.calls == ["state", "log", "log", "log_summary", "log_text", "finish"]
        assert math.isnan(recorder.metrics[0][1]["train/loss"])
        assert recorder.metrics[1] == (4, {"train/loss": 1.0})


def test_a_failing_tracker_is_named_once_and_the_others_go_on(caplog):
    failing, other = Failing("log", "finish"), Recorder()
    use_all(CompositeTracker([failing, other]))
    assert other.calls == failing.calls, "the failing one is still tried"
    assert [record.getMessage() for record in caplog.records] == [
        "tracker flaky failed (OSError: disk full); the run goes on",
        "tracker flaky failed 3 times",
    ]


@dataclass(frozen=True)
class BrokenConfig(TrackerConfig):
    def build(self, run: RunInfo) -> Tracker:
        raise ConnectionError("no route to host")


def test_a_tracker_that_cannot_start_is_left_out(caplog, tmp_path):
    run = RunInfo("r1", log_dir=str(tmp_path))
    tracker = build_trackers([BrokenConfig(), JsonLoggerConfig()], run)
    tracker.log({"train/loss": 1.0}, 0)
    tracker.finish()
    assert (tmp_path / "r1" / "metrics.jsonl").exists()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "tracker BrokenConfig failed (ConnectionError: no route to host); the run goes on"
    ]


def test_interrupts_are_not_swallowed():
    class Interrupted(Recorder):
        def log(self, metrics, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompositeTracker([Interrupted()]).log({}, 0)


def test_registered_names():
    assert TrackerConfig.default_choice_name() == "wandb"
    assert TrackerConfig.get_choice_class("wandb") is WandbConfig
    names = {"console", "json_logger", "noop", "tensorboard", "wandb"}
    assert names <= set(TrackerConfig.get_known_choices())


def test_noop_takes_everything():
    use_all(build_trackers(NoopConfig(), RunInfo("r1")))


def test_a_tracker_of_ones_own(monkeypatch):
    monkeypatch.setattr(TrackerConfig, "_choice_registry", dict(TrackerConfig.get_known_choices()))
    built = []

    @TrackerConfig.register_subclass("mine")
    @dataclass(frozen=True)
    class MyConfig(TrackerConfig):
        color: str = "blue"
        """A setting of it."""

        def build(self, run: RunInfo) -> Tracker:
            built.append((self.color, run.id, run.config))
            return Recorder()

    config = TrackerConfig.get_choice_class("mine")(color="red")
    tracker = build_trackers([config, NoopConfig()], RunInfo("r1", config={"a": 1}))
    tracker.log({"train/loss": 2.0}, 1)
    assert built == [("red", "r1", {"a": 1})]
    assert tracker.trackers[0].metrics == [(1, {"train/loss": 2.0})]


def test_run_folder():
    assert str(run_folder("logs", "r1")) == "logs/r1"
    assert str(run_folder("logs/${run_id}/tb", "r1")) == "logs/r1/tb"
    assert str(RunInfo("r1", log_dir="a/${run_id}").folder) == "a/r1"


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path):
    run = RunInfo("r1", log_dir=str(tmp_path), config={"seed": 0})
    tracker = JsonLoggerConfig().build(run)
    path = tmp_path / "r1" / "metrics.jsonl"
    tracker.log({"train/loss": 3.5, "optim/learning_rate": 0.0}, 0)
    assert len(read_lines(path)) == 2, "each event is there at once"
    tracker.log({"train/loss": math.nan, "grad": math.inf, "low": -math.inf}, 1)
    tracker.log({"eval/loss": np.float32(2.5)}, 1)
    tracker.log_summary({"parameter_count": 5})
    tracker.log_text("sample", 'é "x"\n', 1)
    tracker.finish()

    assert '"train/loss": NaN, "grad": Infinity, "low": -Infinity' in path.read_text()
    lines = read_lines(path)
    assert math.isnan(lines[2].pop("train/loss"))
    assert lines == [
        {"step": 0, "event": "start", "run": "r1", "config": {"seed": 0}},
        {"step": 0, "train/loss": 3.5, "optim/learning_rate": 0.0},
        {"step": 1, "grad": math.inf, "low": -math.inf},
        {"step": 1, "eval/loss": 2.5},
        {"step": 1, "event": "summary", "values": {"parameter_count": 5}},
        {"step": 1, "event": "text", "name": "sample", "text": 'é "x"\n'},
        {"step": 1, "event": "finish"},
    ]


def test_json_lines_of_a_resumed_run_are_appended(tmp_path):
    path = tmp_path / "r1" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 0, "train/loss": 3.0}\n{"step": 1, "trai')  # killed while writing
    run = RunInfo("r1", log_dir=str(tmp_path), resume=True, start_step=1)
    tracker = JsonLoggerConfig().build(run)
    tracker.log({"train/loss": 2.0}, 1)
    tracker.finish()
    first, broken, *rest = path.read_text().splitlines()
    assert json.loads(first) == {"step": 0, "train/loss": 3.0}
    assert broken == '{"step": 1, "trai'
    assert [json.loads(line) for line in rest] == [
        {"step": 1, "event": "resume", "run": "r1", "config": {}},
        {"step": 1, "train/loss": 2.0},
        {"step": 1, "event": "finish"},
    ]


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_files(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "tensorboard")
    run = RunInfo("r1", config={"seed": 0})
    tracker = TensorboardConfig(logdir=str(tmp_path)).build(run)
    for step, loss in enumerate([3.0, math.nan, 2.0, 1.5]):
        tracker.log({"train/loss": loss, "optim/learning_rate": 0.5}, step)
    tracker.log_text("sample", "# not a heading\nx", 3)
    tracker.log_summary({"parameter_count": 5})
    tracker.finish()

    found = read_events(tmp_path / "r1")
    assert set(found.Tags()["scalars"]) == {"train/loss", "optim/learning_rate"}
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses[0] == (0, 3.0)
    assert losses[1][0] == 1
    assert math.isnan(losses[1][1])
    assert losses[2:] == [(2, 2.0), (3, 1.5)]
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
    }
    assert texts["sample/text_summary"] == "    # not a heading\n    x"
    assert '"seed": 0' in texts["config/text_summary"]
    assert '"parameter_count": 5' in texts["summary/text_summary"]

    run = RunInfo("r1", resume=True, start_step=2)
    tracker = TensorboardConfig(logdir=str(tmp_path / "${run_id}")).build(run)
    tracker.log({"train/loss": 9.0}, 2)
    tracker.finish()
    losses = [
        (event.step, event.value) for event in read_events(tmp_path / "r1").Scalars("train/loss")
    ]
    assert [step for step, _ in losses] == [0, 1, 2], "what a lost attempt wrote is hidden"
    assert losses[2] == (2, 9.0)


def test_the_same_id_started_anew_or_rolled_back_is_one_curve(tmp_path):
    for losses in ([5.0, 4.0, 3.0], [2.0, 1.0]):
        tracker = TensorboardConfig(logdir=str(tmp_path)).build(RunInfo("r1"))
        for step, loss in enumerate(losses):
            tracker.log({"train/loss": loss}, step)
        if len(losses) == 2:
            tracker.log_event("rollback", {"from": 2, "to": 1}, 1)
            tracker.log({"train/loss": 7.0}, 1)
        tracker.finish()
    found = [
        (event.step, event.value) for event in read_events(tmp_path / "r1").Scalars("train/loss")
    ]
    assert found == [(0, 2.0), (1, 7.0)]
