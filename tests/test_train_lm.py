"""Whole runs: what they leave, that they repeat to the bit, that they go on after a kill."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import merge, ostro, read_metrics, write_config

from ostro import kernels
from ostro.checkpoint import find_latest, load, store
from ostro.cli.main import run_command
from ostro.runtime.phase import listening
from ostro.train_lm import shorten_on_a_cpu
from ostro.trainer import Trainer


def train(path: Path, *flags: str) -> None:
    assert run_command(["train", "--config_path", str(path), *flags]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = find_latest(str(folder / "checkpoints"))
    assert saved is not None
    return {
        f"{group}.{name}": tensor
        for group in ("model", "optimizer", "state")
        for name, tensor in saved.tensors(group).items()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def test_a_run_id_of_the_environment_that_names_no_folder(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path, trainer={"id": None})
    monkeypatch.setenv("RUN_ID", "a/b")
    assert run_command(["train", "--config_path", str(path)]) == 2
    said = "error: trainer.id = a/b (RUN_ID in the environment) - names folders"
    assert said in capsys.readouterr().err


RUINED = {"optimizer": {"learning_rate": 1e30, "warmup": 0, "lr_schedule": "constant"}}


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_last_update_that_ruins_the_weights_is_not_saved(tmp_path, capsys, evaluates):
    """Its own loss and gradient are finite; only the next forward pass shows it."""
    trainer = {"num_train_steps": 3, "steps_per_eval": 3 if evaluates else None}
    train(write_config(tmp_path, trainer=trainer))
    path = write_config(tmp_path, trainer=trainer | {"num_train_steps": 4}, **RUINED)
    capsys.readouterr()
    assert run_command(["train", "--config_path", str(path)]) == 2
    said = capsys.readouterr().err
    assert "error: step 3: the weights that this update made give a loss that is not" in said
    assert "these weights are not saved, older checkpoints stay" in said
    assert math.isfinite(read_metrics(tmp_path)[3]), "of the weights before"
    assert [p.name for p in (tmp_path / "checkpoints" / "tiny").glob("step-*")] == ["step-2"]
    train(path, "--trainer.crash_on_nan", "false")
    assert (tmp_path / "checkpoints" / "tiny" / "step-3").exists(), "where that was asked for"


def test_a_run_leaves_metrics_log_config_and_checkpoint(tmp_path, capsys):
    train(write_config(tmp_path))
    losses = read_metrics(tmp_path)
    assert list(losses) == [0, 1, 2, 3, 4, 5]
    assert losses[5] < losses[0]
    assert list(read_metrics(tmp_path, "eval/loss")) == [0, 3, 5]
    assert read_metrics(tmp_path, "optim/learning_rate")[0] == 0
    assert set(read_metrics(tmp_path, "grad/norm/total")) == set(losses)
    saved = load(str(tmp_path / "checkpoints" / "tiny" / "step-5"))
    assert saved.values["step"] == 6
    assert yaml.safe_load(saved.texts["config.yaml"])["trainer"]["id"] == "tiny"
    assert "last evaluation" in (tmp_path / "logs" / "tiny" / "train.log").read_text()
    out = capsys.readouterr().out
    assert "ostro sample --checkpoint" in out


def test_a_run_says_why_it_is_slower_than_it_could_be(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_library", lambda: "there is no C++ compiler (c++)")
    train(write_config(tmp_path))
    logged = (tmp_path / "logs" / "tiny" / "train.log").read_text()
    assert "kernels = auto: torch, slower - there is no C++ compiler (c++)" in logged
    saved = load(str(tmp_path / "checkpoints" / "tiny" / "step-5"))
    assert saved is not None and "kernels: torch" in saved.texts["config.yaml"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    dropout = {"model": {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embed_pdrop": 0.1}}
    for name in ("a", "b"):
        train(write_config(tmp_path / name, **dropout))
    train(write_config(tmp_path / "c", **dropout), "--trainer.seed", "1")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    assert read_metrics(tmp_path / "a") != read_metrics(tmp_path / "c")


def test_accumulation_equals_the_whole_batch(tmp_path):
    for name, per_device in (("whole", "4"), ("parts", "1")):
        train(write_config(tmp_path / name), "--trainer.per_device_parallelism", per_device)
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_logged_loss_is_the_mean_over_target_tokens_of_the_batch(tmp_path):
    path = write_config(tmp_path)
    train(path, "--trainer.num_train_steps", "1", "--trainer.per_device_parallelism", "2")
    assert read_metrics(tmp_path)[0] == pytest.approx(math.log(257), rel=0.02)


RESUME = {
    "model": {"resid_pdrop": 0.1},
    "optimizer": {
        "cycles": 2,
        "skip_bad_steps": {"rolling_interval_length": 4, "sigma_factor": 2.0},
    },
    "trainer": {
        "num_train_steps": 10,
        "per_device_parallelism": 2,
        "checkpointer": {"keep": [{"every": 3}]},
    },
}


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """kill -9 after step 7, whose newest checkpoint is step 6: the same bits in the end."""
    train(write_config(tmp_path / "straight", **RESUME))
    path = write_config(tmp_path / "killed", **RESUME)
    (tmp_path / "killer.py").write_text(KILLER)
    killed = ostro("train", "--config_path", path, "--imports", "[killer]", cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(read_metrics(tmp_path / "killed")) == 7
    train(path)
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "killed"))
    straight, resumed = read_metrics(tmp_path / "straight"), read_metrics(tmp_path / "killed")
    assert straight == resumed


def test_muon_goes_on_bit_for_bit(tmp_path):
    changes = {"optimizer": {"type": "muon", "schedule_steps": 6, "weight_decay": 0.1}}
    train(write_config(tmp_path / "straight", **changes))
    path = write_config(tmp_path / "stopped", **changes)
    train(path, "--trainer.num_train_steps", "3")
    train(path)
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "stopped")


KILLER = """
import os, signal
from ostro.trainer import Trainer
step = Trainer.train_step
def train_step(self, index, batch):
    if index == 8:
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, index, batch)
Trainer.train_step = train_step
"""


@pytest.mark.parametrize(
    ("compute", "flops", "advice"),
    [
        (
            "bfloat16",
            1e9,
            "set trainer.mp: f32 (dtype=float32 for train.py): 60 times",
        ),
        ("bfloat16", 120e9, "lower trainer.num_train_steps"),
        ("float32", 1e9, "lower trainer.num_train_steps"),
    ],
)
def test_what_makes_a_long_run_on_a_cpu_shorter(monkeypatch, compute, flops, advice):
    monkeypatch.setattr("ostro.train_lm.measure_peak", lambda device, dtype: 60e9)
    assert shorten_on_a_cpu(compute, flops).startswith(advice)


def test_a_finished_run_that_is_started_again_leaves_everything_as_it_was(tmp_path, capsys):
    path = write_config(tmp_path)
    train(path)
    before = weights(tmp_path)
    train(path)
    assert "6 steps already: nothing is left to train" in capsys.readouterr().out
    assert_same(before, weights(tmp_path))
    assert run_command(["train", "--config_path", str(path), "--trainer.num_train_steps", "5"]) == 2
    assert "num_train_steps = 5" in capsys.readouterr().err


def test_a_saved_config_runs_again_as_it_is(tmp_path):
    path = write_config(tmp_path)
    train(path)
    before = read_metrics(tmp_path)
    saved = tmp_path / "logs" / "tiny" / "config.yaml"
    train(saved, "--trainer.num_train_steps", "8", "--optimizer.schedule_steps", "6")
    after = read_metrics(tmp_path)
    assert list(after) == list(range(8))
    assert {step: after[step] for step in before} == before


def test_nan_stops_with_the_weights_before_it_and_exit_code_2(tmp_path, capsys):
    path = write_config(tmp_path)
    (tmp_path / "poison.py").write_text(POISON)
    out = ostro("train", "--config_path", path, "--imports", "[poison]", cwd=tmp_path)
    assert out.returncode == 2, out.stderr
    assert "step 3" in out.stderr and "Traceback" not in out.stderr
    losses = read_metrics(tmp_path)
    assert losses[3] != losses[3]
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None and saved.values["step"] == 3
    reference = tmp_path / "reference"
    train(write_config(reference), "--trainer.num_train_steps", "3",
          "--optimizer.schedule_steps", "6")  # fmt: skip
    mine, theirs = weights(tmp_path), weights(reference)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine if n.startswith("model."))


def test_nan_is_left_out_when_told_to_go_on(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "poison.py").write_text(POISON)
    flags = ("--imports", "[poison]", "--trainer.crash_on_nan", "false")
    out = ostro("train", "--config_path", path, *flags, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    losses = read_metrics(tmp_path)
    assert losses[3] != losses[3] and losses[5] < losses[0]


POISON = """
from ostro.trainer import TrainState
judge = TrainState.judge
def poisoned(self, loss, norm):
    if self.step == 3:
        loss.fill_(float("nan"))
    return judge(self, loss, norm)
TrainState.judge = poisoned
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_a_checkpoint_and_says_how_to_go_on(tmp_path, signum, code):
    path = write_config(tmp_path, trainer={"num_train_steps": 100_000, "steps_per_eval": None})
    command = [sys.executable, "-m", "ostro.cli.main", "train", "--config_path", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "logs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and "train/loss" in metrics.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Resume with: python -m ostro.cli.main train --config_path" in out
    assert err.rstrip().endswith("logs/tiny/config.yaml") and "same command" not in err
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None
    assert saved.values["step"] == max(read_metrics(tmp_path)) + 1


def test_dry_run_agrees_with_the_real_run(tmp_path, capsys):
    path = write_config(tmp_path)
    assert run_command(["train", "--config_path", str(path), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "cache").exists() and not (tmp_path / "logs").exists()

    def number(label: str) -> int:
        line = next(line for line in lines if line.startswith(label))
        return int(line.removeprefix(label).split()[0])

    train(path)
    folder = tmp_path / "checkpoints" / "tiny" / "step-5"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert number("checkpoint size:") == pytest.approx(size, rel=0.01)
    model = load(str(folder)).tensors("model")
    assert number("parameters:") == sum(t.numel() for t in model.values())
    assert number("tokens to be seen:") == 6 * 4 * 16


def test_eval_command_repeats_the_last_evaluation(tmp_path, capsys):
    train(write_config(tmp_path))
    last = read_metrics(tmp_path, "eval/loss")[5]
    capsys.readouterr()
    assert run_command(["eval", "--checkpoint", str(tmp_path / "checkpoints")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval/loss"] == pytest.approx(last, rel=1e-6)
    assert metrics["eval/bpb"] > 0


def test_float16_trains_with_a_loss_scale_that_is_saved(tmp_path):
    train(write_config(tmp_path), "--trainer.mp", "p=f32,c=f16")
    losses = read_metrics(tmp_path)
    assert losses[5] < losses[0]
    assert "state.loss_scaler.scale" in weights(tmp_path)


def test_epoch_ends_the_run(tmp_path):
    train(write_config(tmp_path), "--trainer.num_train_steps", "100000", "--epoch", "1",
          "--trainer.train_batch_size", "64")  # fmt: skip
    text = (tmp_path / "train.txt").stat().st_size + 1
    assert len(read_metrics(tmp_path)) == text // 16 // 64


OFTEN = {"trainer": {"checkpointer": {"keep": [{"every": 2}]}}}
GUARDED = {
    "model": {"resid_pdrop": 0.1},
    "optimizer": {"skip_bad_steps": True},
    "trainer": {"mp": "p=f32,c=f16", "checkpointer": {}},
}


def test_a_save_that_fails_on_the_way_is_reported_and_training_goes_on(
    tmp_path, monkeypatch, capsys
):
    real = store._write_file

    def failing(url, content):
        if "step-2" in url:
            raise OSError(28, "No space left on device")
        return real(url, content)

    monkeypatch.setattr(store, "_write_file", failing)
    train(write_config(tmp_path, **OFTEN))
    out = capsys.readouterr().out
    assert "step-2 - the disk is full" in out and "training goes on" in out
    assert sorted(p.name for p in (tmp_path / "checkpoints/tiny").iterdir()) == ["step-4", "step-5"]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_is_saved_while_training_goes_on_is_the_state_of_its_step(tmp_path, form):
    """The copy begins only when the next gradients would long be there."""
    change = merge(OFTEN, GUARDED)
    change["trainer"]["checkpointer"] |= {"format": form, "async_save": False}
    train(write_config(tmp_path / "waits", **change))
    change["trainer"]["checkpointer"]["async_save"] = True
    with listening(lambda phase: phase == "stage" and time.sleep(0.5)):
        train(write_config(tmp_path / "overlaps", **change))
    name = "step-{}" if form == "folder" else "step_{}.pt"
    for step in (2, 4, 5):
        waited, overlapped = (
            find_latest(str(tmp_path / run / "checkpoints/tiny" / name.format(step)))
            for run in ("waits", "overlaps")
        )
        assert waited.values == overlapped.values and waited.values["step"] == step + 1
        for group in ("model", "optimizer", "state"):
            assert_same(waited.tensors(group), overlapped.tensors(group))


def test_a_run_that_crashes_leaves_the_checkpoint_that_was_being_written(tmp_path, monkeypatch):
    real_write, real_step = store._write_file, Trainer.train_step

    def slow(url, content):
        time.sleep(0.2)
        return real_write(url, content)

    def crashing(self, step, batch):
        if step == 3:
            raise KeyError("a mistake")
        return real_step(self, step, batch)

    monkeypatch.setattr(store, "_write_file", slow)
    monkeypatch.setattr(Trainer, "train_step", crashing)
    with pytest.raises(KeyError, match="a mistake"):
        train(write_config(tmp_path, **OFTEN))
    assert [p.name for p in (tmp_path / "checkpoints/tiny").iterdir()] == ["step-2"]
    assert find_latest(str(tmp_path / "checkpoints")).values["step"] == 3
