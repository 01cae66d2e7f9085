"""A run resumes from a checkpoint and a cache that an earlier version wrote, kept as files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ostro.cli.main import run_command

KEPT = Path(__file__).with_name("kept")
LOSSES = {3: 5.24197244644165, 4: 5.1015825271606445, 5: 5.012915134429932}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy in which the run was stopped after step 2, and its cache's times have changed."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_resumes_from_what_an_earlier_version_wrote(folder, capsys):
    """With the same batches, and the same losses but for what another CPU rounds otherwise."""
    cache = {path.name: path.read_bytes() for path in Path("cache/train").iterdir()}
    assert run_command(["train", "--config_path", "config.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "resuming from checkpoints/kept/step-2" in printed
    changes = [line for line in printed.split("model:")[0].splitlines() if " was " in line]
    # The code is another: nothing else is said to have changed.
    assert "tokenised" not in printed and all("made_by." in line for line in changes), printed
    assert {name: Path("cache/train", name).read_bytes() for name in cache} == cache
    lines = map(json.loads, Path("logs/kept/metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert losses == pytest.approx(LOSSES, rel=1e-6)
    expected = load_file("model-after-step-5.safetensors")
    found = load_file("checkpoints/kept/step-5/model.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
