"""`ostro bench`: figures that add up, for a configuration that is left as it was."""

import json
import os

import pytest
from tiny_run import ostro, write_config


def bench(folder, *flags):
    """The figures and the table of a tiny configuration."""
    path = write_config(folder, model={"seq_len": 32, "hidden_dim": 32})
    out = folder / "bench.json"
    words = ("--config_path", path, "--rounds", "2", "--steps", "2", "--json", out)
    # Without a compiler nothing is compiled, which takes longer than all the rest.
    done = ostro("bench", *words, *flags, env={**os.environ, "PATH": "", "CXX": ""})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_figures_of_a_step_add_up(tmp_path):
    found, table = bench(tmp_path)
    step = found["seconds"]["eager"]
    assert found["mode"] == "eager" and list(found["seconds"]) == ["eager"]
    assert 0 < step["min"] <= step["median"] <= step["max"]
    assert found["tokens_per_second"] == pytest.approx(4 * 32 / step["median"])
    assert 0 < found["mfu"] < 1
    assert set(found["phases"]) == {"data", "forward", "backward", "update"}
    assert sum(found["phases"].values()) == pytest.approx(1)
    assert {"aten::mm", "aten::addmm"} & {row["name"] for row in found["operators"]}
    assert found["peak_bytes"] > 50e6
    assert "as configured" in table and "forward" in table
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "cache", "train.txt", "validation.txt", "bench.json"}


def test_a_checkpoint_of_the_configuration_is_not_touched(tmp_path):
    path = write_config(tmp_path)
    assert ostro("train", "--config_path", path).returncode == 0
    saved = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")}
    bench(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == saved


def test_a_round_of_nothing_is_refused(tmp_path):
    done = ostro("bench", "--config_path", write_config(tmp_path), "--steps", "0")
    assert done.returncode == 2
    assert "--steps" in done.stderr and "must be at least 1" in done.stderr
