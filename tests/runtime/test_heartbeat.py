"""A signal while another rank is late, which is waited for, or hangs, which is not."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from tiny_run import TESTS, free_port, read_metrics, write_config

from ostro.checkpoint import find_latest
from ostro.cli.main import run_command
from ostro.trainer import Trainer, TrainingDivergedError
from ostro.trainer.spikes import RecoverConfig, Spike

PROGRAM = TESTS / "hang_program.py"
STOPPED = "stopped by SIGTERM, while this rank waited for others"


def stop(tmp_path: Path, how: str, hangs: int, is_split: bool, **saving) -> tuple[Path, list[str]]:
    """Two ranks, of which one hangs or is late, and the other gets a signal just before.

    Returns the configuration and what they print; the late one is killed if it still is there.
    """
    trainer = {"num_train_steps": 100_000, "steps_per_eval": None, "log_interval": 1}
    trainer |= {"fsdp_axis": "embed" if is_split else None, "checkpointer": saving}
    path = write_config(tmp_path, trainer=trainer)
    port, ranks = free_port(), []
    for rank in range(2):
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environ |= {"HANGS": str(hangs), "TELLS": str(tmp_path)}
        words = [sys.executable, str(PROGRAM), how, "--config_path", str(path)]
        with (tmp_path / f"out{rank}").open("w") as out:
            pipes = {"stdout": out, "stderr": out}
            ranks.append(subprocess.Popen(words, env=os.environ | environ, **pipes))
    try:
        code = ranks[1 - hangs].wait(120)
        seconds = time.time() - (tmp_path / "told").stat().st_mtime
        if how in ("computes", "saves"):
            assert ranks[hangs].wait(30) == 143
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    texts = [(tmp_path / f"out{rank}").read_text() for rank in range(2)]
    assert code == 143, texts
    assert seconds < 15, seconds  # 10 where cores are free
    return path, texts


def goes_on(path: Path, step: int) -> bool:
    more = ["--trainer.num_train_steps", str(step + 1)]
    return run_command(["train", "--config_path", str(path), *more]) == 0


@pytest.mark.dist
@pytest.mark.parametrize("how", ["stopped", "c_code", "python", "collective", "dies"])
def test_a_rank_that_hangs_is_left(tmp_path, how):
    """Within seconds, and what is left saves what it has: all of the state, where it is a copy.

    One that dies meanwhile breaks the exchange that the main thread waits in: no reason to end.
    """
    path, texts = stop(tmp_path, how, 1, is_split=False)
    assert STOPPED in texts[0], texts
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None and saved.values["step"] == 3 == max(read_metrics(tmp_path)) + 1
    assert goes_on(path, 3)


@pytest.mark.dist
def test_parts_are_not_saved_without_the_others(tmp_path):
    _, texts = stop(tmp_path, "stopped", 0, is_split=True)  # which keeps the store, too
    assert STOPPED in texts[1], texts
    assert find_latest(str(tmp_path / "checkpoints")) is None


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "hangs", "is_split", "saving"),
    [
        ("computes", 1, True, {}),
        ("saves", 0, False, {"save_every": 2, "async_save": False}),
        ("saves", 0, True, {"save_every": 2, "async_save": True}),
    ],
    ids=["computes", "saves", "saves beside"],
)
def test_a_rank_that_is_late_is_waited_for(tmp_path, how, hangs, is_split, saving):
    """All stop together, and all is saved."""
    path, texts = stop(tmp_path, how, hangs, is_split, **saving)
    assert not any(STOPPED in text for text in texts), texts
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None and saved.values["step"] == max(read_metrics(tmp_path)) + 1
    assert goes_on(path, saved.values["step"])


@pytest.mark.parametrize("recover", [None, RecoverConfig()])
def test_a_state_to_go_back_from_is_not_saved_alone(recover):
    trainer = MagicMock()
    trainer.state.step = 4
    trainer.config.recover = recover
    trainer.flush.side_effect = TrainingDivergedError(Spike(3, "loss = nan"))
    Trainer.save_alone(trainer)
    assert trainer.saving.save_alone.call_count == (recover is None)
