"""Callbacks of a run: what they are called for, and those that come with ostro."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, read_metrics, write_config

from ostro.checkpoint import find_latest
from ostro.cli.arguments import load_run
from ostro.cli.main import run_command
from ostro.lm_config import TrainLmConfig
from ostro.tracker import RunInfo
from ostro.train_lm import run
from ostro.trainer import Callback, TrainingDivergedError


class Recorder(Callback):
    """Writes down what it is called for."""

    def __init__(self):
        self.calls: list[tuple] = []

    def on_start(self, trainer):
        self.calls.append(("start", trainer.state.step))

    def before_step(self, trainer, step):
        self.calls.append(("before", step))

    def after_step(self, trainer, info):
        assert trainer.state.step == info.step + 1
        self.calls.append(("after", info.step))

    def after_evaluation(self, trainer, step, metrics):
        assert metrics["eval/loss"] > 0
        self.calls.append(("evaluation", step))

    def after_save(self, trainer, report):
        assert Path(report.path).exists()
        self.calls.append(("save", report.step))

    def on_end(self, trainer):
        self.calls.append(("end", trainer.state.step))


def recorded(tmp_path, **trainer) -> list[tuple]:
    """The calls of a run of six steps that evaluates after steps 0 and 3, and at the end."""
    path = write_config(tmp_path, trainer=trainer)
    recorder = Recorder()
    add = lambda trainer: trainer.callbacks.append(recorder)  # noqa: E731
    try:
        run(loaded(path), on_ready=add)
    except TrainingDivergedError:
        recorder.calls.append(("diverged",))
    return recorder.calls


def loaded(path) -> TrainLmConfig:
    return load_run(str(path), []).config


def test_what_a_callback_is_called_for(tmp_path):
    saving = {"keep": [{"every": 4}], "async_save": False}
    calls = recorded(tmp_path, checkpointer=saving, skip_steps=[{"first": 2, "last": 2}])
    assert [call for call in calls if call[0] == "before"] == [
        ("before", step) for step in (0, 1, 3, 4, 5)
    ], "not for a step that is skipped"
    assert [call for call in calls if call[0] == "after"] == [("after", step) for step in range(6)]
    assert [call for call in calls if call[0] == "evaluation"] == [
        ("evaluation", step) for step in (0, 3, 5)
    ]
    assert [call for call in calls if call[0] == "save"] == [("save", 4), ("save", 5)]
    assert calls[0] == ("start", 0) and calls[-1] == ("end", 6)
    assert calls.index(("after", 4)) > calls.index(("save", 4)), "saving comes first"


def test_the_end_comes_after_a_failure_too(tmp_path):
    class Failing(Callback):
        def after_step(self, trainer, info):
            if info.step == 2:
                raise RuntimeError("mine")

    path, recorder = write_config(tmp_path), Recorder()
    with pytest.raises(RuntimeError, match="mine"):
        run(loaded(path), on_ready=lambda trainer: trainer.callbacks.extend([recorder, Failing()]))
    assert recorder.calls[-1] == ("end", 3)


def test_the_example_logs_what_the_weights_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    path = write_config(tmp_path)
    words = ["--imports", "[weight_norm]", "--trainer.callbacks", "[{type: weight_norm, every: 4}]"]
    assert run_command(["train", "--config_path", str(path), *words]) == 0
    lines = map(json.loads, (tmp_path / "logs/tiny/metrics.jsonl").read_text().splitlines())
    norms = {line["step"]: line["weights/norm"] for line in lines if "weights/norm" in line}
    assert list(norms) == [0, 4, 5]
    weights = find_latest(str(tmp_path / "checkpoints")).tensors("model")
    expected = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(weight) for weight in weights.values()])
    )
    assert norms[5] == pytest.approx(float(expected), rel=1e-5)


def test_profile_writes_a_trace_and_changes_nothing(tmp_path, capsys):
    """The file is what Perfetto reads: events with names, times and durations."""
    (tmp_path / "plain").mkdir()
    assert run_command(["train", "--config_path", str(write_config(tmp_path / "plain"))]) == 0
    profiled = {"callbacks": [{"type": "profile", "start": 2, "steps": 2}]}
    path = write_config(tmp_path, trainer=profiled)
    assert run_command(["train", "--config_path", str(path)]) == 0
    trace = tmp_path / "logs/tiny/profile/steps-2-3-rank0.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("aten::mm" in str(name) or "aten::addmm" in str(name) for name in names)
    out = capsys.readouterr().out
    assert f"profiled steps 2 to 3: {trace}" in out and "Self CPU" in out
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "plain")


def test_profile_counts_from_where_a_run_resumes(tmp_path):
    path = write_config(tmp_path)
    assert run_command(["train", "--config_path", str(path)]) == 0
    more = ["--trainer.num_train_steps", "10", "--trainer.callbacks"]
    more += ["[{type: profile, start: 1, steps: 20}]"]
    assert run_command(["train", "--config_path", str(path), *more]) == 0
    assert (tmp_path / "logs/tiny/profile/steps-7-9-rank0.json").exists()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{type: profil}", "did you mean profile"),
        ("{type: profile, steps: 0}", "trainer.callbacks.0.steps = 0"),
        ("{type: profile, star: 1}", "did you mean start"),
    ],
)
def test_slips_are_named(entry, words, tmp_path, capsys):
    path = write_config(tmp_path)
    code = run_command(["train", "--config_path", str(path), "--trainer.callbacks", f"[{entry}]"])
    assert code == 2 and words in capsys.readouterr().err


def test_run_info_names_the_folder():
    assert RunInfo("a", "logs").folder == Path("logs/a")
