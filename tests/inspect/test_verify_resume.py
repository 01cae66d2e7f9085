"""`ostro verify-resume`: exact where resuming is, and every planted defect is caught and named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import ostro, write_config, write_text

HERE = Path(__file__).parent
FULL = {
    "model": {"embed_pdrop": 0.1, "resid_pdrop": 0.1},
    "optimizer": {
        "cycles": 2,
        "min_lr_ratio": 0.1,
        "weight_decay": 0.1,
        "skip_bad_steps": {"rolling_interval_length": 4},
    },
    "trainer": {"num_train_steps": 40, "train_batch_size": 8, "per_device_parallelism": 2},
}


def full_config(folder: Path, **more: object) -> Path:
    """A tiny run with all that resuming could get wrong: shuffle, mixture, accumulation, dropout,
    skip-step, cycles of the learning rate."""
    path = write_config(folder, **FULL)
    config = yaml.safe_load(path.read_text())
    data = config["data"]
    del data["train_urls"], data["validation_urls"]
    texts = {name: str(write_text(folder / f"{name}.txt", 1500, i)) for i, name in enumerate("ab")}
    data["configs"] = {name: {"train_urls": [text]} for name, text in texts.items()}
    data |= {
        "train_weights": {"a": 0.7, "b": 0.3},
        "mixture_block_size": 16,
        "num_validation_sequences": 4,
    }
    config["trainer"] |= more
    path.write_text(yaml.safe_dump(config))
    return path


def test_resuming_is_exact_also_from_one_rank_to_two_and_back(tmp_path):
    path = full_config(tmp_path, deterministic_reduction=True)
    done = ostro("verify-resume", "--config_path", path, "--steps", "4", "--ranks", "1,2,1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("agree bit for bit\n")


def test_without_a_fixed_order_of_sums_other_ranks_give_nearly_the_same(tmp_path):
    path = full_config(tmp_path)
    done = ostro("verify-resume", "--config_path", path, "--steps", "3", "--ranks", "2,1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("agree to 1e-05\n")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What the check says of each defect."""
    folder = tmp_path_factory.mktemp("defects")
    path = full_config(folder, mp="p=f32,c=float16")
    done = subprocess.run(
        [sys.executable, str(HERE / "defects_program.py"), str(path), str(folder / "work")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        ("dropped random state", "random state: random.torch: max"),
        ("position off by one", "step and data position: step: 4 -> 5"),
        ("lost moments", "optimizer: "),
        ("lost scaler", "loss scaler: loss_scaler.num_good: max"),
        ("cleared skip window", "skip-step window: skip_step.count: max"),
        ("stale config", "configuration: optimizer.learning_rate: 0.01 -> 0.5"),
    ],
)
def test_a_planted_defect_is_caught_and_named(verdicts, defect, named):
    assert f"first difference: {named}" in verdicts[defect]


def test_nothing_is_found_where_nothing_is_wrong(verdicts):
    assert verdicts["none"] == "found nothing"


def test_a_run_too_short_to_be_cut_is_refused(tmp_path):
    done = ostro("verify-resume", "--config_path", write_config(tmp_path), "--steps", "4")
    assert done.returncode == 2
    assert "trainer.num_train_steps = 6" in done.stderr and "lower --steps" in done.stderr
