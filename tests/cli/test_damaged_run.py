"""What a user can do with a run whose checkpoints lost their optimizer: whole commands."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from tiny_run import write_config

from ostro.cli.main import run_command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration of a run of six steps, and its two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    keep = {"checkpointer": {"keep": [{"every": 2}]}}
    path = write_config(folder, trainer={"num_train_steps": 4, **keep})
    assert run_command(["train", "--config_path", str(path)]) == 0
    return folder


@pytest.fixture
def damaged(trained, tmp_path, monkeypatch):
    """A copy of the run's checkpoints without optimizers, in a folder of its own."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder)
    for file in folder.rglob("optimizer.safetensors"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    return folder


def train(trained, *flags):
    return run_command(["train", "--config_path", str(trained / "config.yaml"), *flags])


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_command_stops_and_what_it_says_can_be_typed(trained, damaged, capsys):
    base = ["--trainer.checkpointer.base_path", "checkpoints/${run_id}"]
    before = contents(damaged)
    assert train(trained, *base) == 2
    said = capsys.readouterr().err
    assert contents(damaged) == before
    for step in (2, 3):
        assert f"checkpoints/tiny/step-{step}/optimizer.safetensors - is missing" in said
    advice = next(line for line in said.splitlines() if "from these weights alone" in line)
    flags = advice.partition(", with ")[2].split()
    assert flags == ["--trainer.id", "tiny-2", "--trainer.initialize_from",
                     "checkpoints/tiny/step-3"]  # fmt: skip
    assert train(trained, *base, *flags) == 0
    said = capsys.readouterr().out
    assert "initialising from the weights of checkpoints/tiny/step-3" in said
    assert (damaged / "tiny-2/step-3/optimizer.safetensors").exists()
    assert contents(damaged / "tiny") == {k: v for k, v in before.items() if "/tiny/" in k}


def test_weights_are_enough_to_sample_evaluate_and_export(damaged, capsys):
    checkpoint = ["--checkpoint", str(damaged)]
    assert run_command(["sample", *checkpoint, "--prompt", "the", "--max_new_tokens", "3"]) == 0
    assert run_command(["eval", *checkpoint]) == 0
    assert run_command(["export", *checkpoint, "--to", "hf", "--output", "hf"]) == 0
    capsys.readouterr()
    assert run_command(["checkpoint", "verify", str(damaged)]) == 2
    said = capsys.readouterr()
    assert said.out.count("weights  ") == 2
    assert "2 of 2 checkpoints are damaged, all but the weights of 2" in said.err


def test_files_resume_from_the_newest_whatever_their_times_say(trained, tmp_path, capsys):
    base = ["--trainer.checkpointer.base_path", f"{tmp_path}/${{run_id}}",
            "--trainer.checkpointer.format", "file"]  # fmt: skip
    assert train(trained, *base) == 0
    newest, older = (tmp_path / "tiny" / name for name in ("step_3.pt", "step_2.pt"))
    kept = older.read_bytes()
    os.utime(newest, (1e9, 1e9))
    capsys.readouterr()
    assert train(trained, *base, "--trainer.num_train_steps", "5") == 0
    assert f"resuming from {newest}" in capsys.readouterr().out
    assert older.read_bytes() == kept
