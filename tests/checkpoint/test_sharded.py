"""Checkpoints that several ranks save together: on a disk and behind a real S3 API."""

import os
import shutil
import subprocess
import sys
import uuid

import pytest
import torch
from flaky_store import Faults, bucket, flaky_server
from safetensors.torch import load_file
from tiny_run import read_metrics, write_config

from ostro.checkpoint import find_latest, load
from ostro.cli.main import run_command
from ostro.core.errors import CheckpointError

pytestmark = pytest.mark.dist

MAPPINGS = ["plain", "replicated", "fsdp1", "fsdp2", "fsdp4", "hsdp", "tensor", "fsdp x tensor"]


@pytest.fixture(scope="module")
def s3():
    """An empty folder of an S3 server on this machine."""
    with flaky_server(Faults()) as address, bucket(address, "sharded"):
        yield f"s3://sharded/runs-{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, s3):
    """What four processes left, and what they said."""
    folder = tmp_path_factory.mktemp("sharded")
    script = os.path.join(os.path.dirname(__file__), "sharded_ranks.py")
    done = subprocess.run(
        [sys.executable, script, str(folder), s3],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.parametrize("saver", MAPPINGS)
def test_every_mapping_loads_what_another_saved(saved, saver):
    """Bit-equal weights, moments and step counts; the comparing is done by the ranks."""
    for loader in MAPPINGS:
        assert f"{saver} -> {loader}\n" in saved[1]


@pytest.mark.parametrize(
    "what", ["failed", "failed to write a file", "damage", "went on fsdp4 folder",
             "went on fsdp4 file", "went on fsdp x tensor folder"],
)  # fmt: skip
def test_on_all_four_ranks(saved, what):
    assert f"{what}\n" in saved[1]


def files(folder, mapping):
    names = os.listdir(folder / "mappings" / mapping / "step-4")
    return sorted(name for name in names if name.startswith("model"))


def test_one_file_for_each_rank_that_holds_something(saved):
    for mapping in ("plain", "replicated", "fsdp1"):
        assert files(saved[0], mapping) == ["model.safetensors"]
    assert files(saved[0], "hsdp") == files(saved[0], "fsdp2")
    four = [f"model-0000{rank}-of-00004.safetensors" for rank in range(4)]
    assert files(saved[0], "fsdp4") == files(saved[0], "tensor") == four
    shard = load_file(saved[0] / "mappings/fsdp4/step-4" / four[3])
    assert shard["up.weight"].shape == (1, 4), "the rest of ten rows"
    assert "down.weight" not in shard, "three rows for four ranks"


def test_the_newest_on_s3_is_found_and_is_whole(saved, s3):
    found = find_latest(s3)
    assert found is not None
    assert found.path == f"{s3}/me/step-6"
    assert found.tensors("model")["up.weight"].shape == (10, 4)


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint of four ranks, to be damaged."""
    return shutil.copytree(saved[0] / "mappings" / "fsdp4" / "step-4", tmp_path / "step-4")


def test_a_missing_shard_is_named(copy):
    os.remove(copy / "optimizer-00002-of-00004.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer-00002-of-00004\.safetensors - is miss"):
        load(str(copy))
    with pytest.raises(CheckpointError, match="cannot be used"):
        find_latest(str(copy))
    assert find_latest(str(copy), weights=True).groups == ["model", "state"]


def test_a_flipped_byte_is_named_when_its_shard_is_read(copy):
    with open(copy / "model-00001-of-00004.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    opened = load(str(copy))
    opened.verify(0, 4)
    assert opened.tensors("optimizer")
    for read in (lambda: opened.verify(1, 4), lambda: opened.tensors("model")):
        with pytest.raises(CheckpointError, match=r"model-00001-of-00004\.safetensors - is dam"):
            read()


def test_an_index_that_does_not_cover_a_tensor_is_named(copy):
    opened = load(str(copy))
    opened._shards["model"]["up.weight"]["pieces"].pop()
    with pytest.raises(CheckpointError, match=r"shards\.json - is damaged: 'model'"):
        opened.stored("model")


def test_of_an_older_format_nothing_is_asked(saved, tmp_path):
    """One rank writes what it always wrote."""
    text = (saved[0] / "mappings/plain/step-4/metadata.json").read_text()
    assert "shards.json" not in text
    assert torch.equal(
        load(str(saved[0] / "mappings/plain/step-4")).tensors("model")["up.bias"],
        load(str(saved[0] / "mappings/fsdp2/step-4")).tensors("model")["up.bias"],
    )


def test_a_run_goes_on_from_what_it_left_on_s3(s3, tmp_path, capsys):
    path = write_config(tmp_path, trainer={"checkpointer": {"base_path": f"{s3}/${{run_id}}"}})
    for num_steps in ("4", "8"):
        steps = ["--trainer.num_train_steps", num_steps, "--optimizer.schedule_steps", "8"]
        assert run_command(["train", "--config_path", str(path), *steps]) == 0
    assert f"resuming from {s3}/tiny/step-3" in capsys.readouterr().out
    alone = tmp_path / "alone"
    steps = ["--trainer.num_train_steps", "8", "--optimizer.schedule_steps", "8"]
    assert run_command(["train", "--config_path", str(write_config(alone)), *steps]) == 0
    assert read_metrics(tmp_path) == read_metrics(alone)
