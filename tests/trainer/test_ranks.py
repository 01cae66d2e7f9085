"""Several processes train as one does."""

import os
import signal
import subprocess
import time

import pytest
import torch
from tiny_run import ostro, read_metrics, torchrun, torchrun_words, write_config

from ostro.checkpoint import find_latest
from ostro.cli.main import run_command
from ostro.core.errors import ConfigError
from ostro.distributed import DistributedConfig, join_process_group

pytestmark = pytest.mark.dist

CHANGES = {
    "model": {"embed_pdrop": 0.1, "resid_pdrop": 0.1},
    "optimizer": {"max_grad_norm": 0.5, "skip_bad_steps": 4},
    "trainer": {
        "num_train_steps": 12,
        "train_batch_size": 8,
        "per_device_parallelism": 2,
        "steps_per_eval": 5,
    },
}


def test_two_processes_give_the_losses_of_one(tmp_path):
    """With dropout and accumulation: micro-batches are the same, whoever computes them."""
    for name, evaluated in (("one", 4), ("two", 2)):
        changes = CHANGES | {"trainer": CHANGES["trainer"] | {
            "per_device_eval_parallelism": evaluated}}  # fmt: skip
        path = write_config(tmp_path / name, **changes)
        words = ("train", "--config_path", path)
        done = ostro(*words) if name == "one" else torchrun(2, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("saved ") == 1, "one process writes and talks"
    for metric in ("train/loss", "grad/norm/total", "eval/loss", "eval/bpb"):
        alone = read_metrics(tmp_path / "one", metric)
        together = read_metrics(tmp_path / "two", metric)
        assert alone.keys() == together.keys()
        assert together == pytest.approx(alone, rel=1e-5), metric
    saved = [find_latest(str(tmp_path / name / "checkpoints")) for name in ("one", "two")]
    first, second = (checkpoint.tensors("model") for checkpoint in saved)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_with_other_processes_and_another_mapping(tmp_path):
    """One process, four that hold parts, one again: the losses of a run that never stopped.

    Evaluations come right before the saves: they must not change what is saved.
    """
    changes = {"model": {"num_heads": 4}, "optimizer": {"schedule_steps": 6}}
    straight = write_config(tmp_path / "one", **changes)
    assert run_command(["train", "--config_path", str(straight)]) == 0
    path = write_config(tmp_path / "mixed", **changes)
    words = ["train", "--config_path", str(path), "--trainer.num_train_steps"]
    assert run_command([*words, "2"]) == 0
    split = ["--trainer.tensor_parallel_axes", "[mlp, heads, vocab]", "--trainer.model_axis_size=2"]
    done = torchrun(4, *words, "4", *split)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny/step-1" in done.stdout
    assert run_command([*words, "6"]) == 0
    shards = tmp_path / "mixed/checkpoints/tiny/step-3"
    assert len(list(shards.glob("optimizer-*-of-00004.safetensors"))) == 4
    alone, mixed = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "mixed")
    assert mixed == pytest.approx(alone, rel=1e-5)


def test_a_signal_stops_all_ranks_after_the_same_update(tmp_path):
    path = write_config(tmp_path, trainer={"num_train_steps": 100_000, "steps_per_eval": None})
    words = torchrun_words(2, "-m", "ostro.cli.main", "train", "--config_path", path)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "logs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 20' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None, out
    last = max(read_metrics(tmp_path))
    assert saved.values["step"] == last + 1
    assert f"stopped after {last + 1} of" in out


KILLER = """
import os
from ostro.trainer import Trainer
train_step = Trainer.train_step

def killed(trainer, step, batch):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return train_step(trainer, step, batch)

Trainer.train_step = killed
"""


def test_a_killed_rank_is_restarted_and_the_run_ends_as_if_nothing_had_been(tmp_path, monkeypatch):
    """No id is given: the launcher's workers agree on the first attempt's."""
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("RUN_ID", raising=False)
    changes = CHANGES | {"trainer": CHANGES["trainer"] | {
        "id": None, "checkpointer": {"keep": [{"every": 5}], "async_save": False}}}  # fmt: skip
    runs = []
    for name, imports in (("whole", []), ("killed", ["killer"])):
        config = write_config(tmp_path / name, **changes, imports=imports)
        words = torchrun_words(2, "-m", "ostro.cli.main", "train", "--config_path", config)
        words.insert(3, "--max_restarts=1")
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs.append(subprocess.Popen(words, **pipe))
    _, out = (run.communicate(timeout=180)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0], out
    (folder,) = (tmp_path / "killed" / "checkpoints").iterdir()
    assert out.count(f"run {folder.name} on cpu") == 2, out
    assert f"resuming from {folder}/step-5" in out
    whole, killed = (find_latest(str(tmp_path / name)) for name in ("whole", "killed"))
    assert killed.values["step"] == 12
    for group in ("model", "optimizer"):
        expected, found = whole.tensors(group), killed.tensors(group)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("config", "environ", "device", "part"),
    [
        ({"backend": "nccl"}, {}, "cpu", "nccl joins CUDA devices only"),
        ({"num_processes": 2}, {}, "cpu", "process_id = null"),
        ({"num_processes": 3}, {"WORLD_SIZE": "2", "RANK": "0"}, "cpu", "WORLD_SIZE = 2"),
        ({}, {"WORLD_SIZE": "2", "RANK": "0"}, "cpu", "MASTER_ADDR"),
    ],
)
def test_what_cannot_meet_is_refused(config, environ, device, part):
    with pytest.raises(ConfigError, match=part):
        join_process_group(DistributedConfig(**config), device, False, environ)
