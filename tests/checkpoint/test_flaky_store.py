"""Checkpoints on an S3 server that fails: retried and right, or an error that says so."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_states import small_state
from flaky_store import KINDS, Faults, bucket, flaky_server

from ostro.checkpoint import find_latest, load, store, write
from ostro.checkpoint.folders import FolderStore, tidy_up
from ostro.core.errors import CheckpointError
from ostro.io import filesystem, retry
from ostro.io.retry import UnreachableError

pytestmark = pytest.mark.dist

_runs = itertools.count()


@pytest.fixture(scope="module")
def faults():
    return Faults()


@pytest.fixture(scope="module")
def server(faults):
    with (
        flaky_server(faults) as address,
        bucket(address, "bucket"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(retry, "FIRST_PAUSE", 0.05)
        yield address


@pytest.fixture
def run(server, faults, monkeypatch):
    """The folder of a run on a server that works; a test says when it does not."""
    monkeypatch.setattr(faults, "choose", lambda method, path: None)
    yield f"s3://bucket/runs/{next(_runs)}"
    faults.choose = lambda method, path: None


def save(folder, number, step=None, **fields):
    step = number if step is None else step
    return write(folder, small_state(number), step=step, is_temporary=False, **fields)


def names(folder):
    """What is left of a run's folder, files in it by name."""
    fs, path = filesystem.locate(folder)
    fs.invalidate_cache()
    return sorted({name.removeprefix(f"{path}/").split("/")[0] for name in fs.find(path)})


def assert_is(saved, number):
    saved.verify()
    for group, tensors in small_state(number).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(saved.tensors(group)[name], tensor)


def test_a_step_that_is_there_is_written_again(run):
    for number in (7, 8, 9):
        save(run, number, step=5)
        assert_is(load(f"{run}/step-5"), number)
        assert names(run) == ["step-5"]
    assert filesystem.BEGUN not in filesystem.names(f"{run}/step-5")


@pytest.mark.parametrize("kind", KINDS)
def test_faults_are_retried_and_what_is_saved_is_right(run, faults, kind):
    """16 faults of each of 8 kinds, at every third request while saving and restoring."""
    number, count = 0, itertools.count()
    before = faults.counts[kind]
    kinds = lambda method, path: kind if next(count) % 3 == 2 else None  # noqa: E731
    while faults.counts[kind] - before < 16:
        number += 1
        faults.choose = kinds
        save(run, number, step=number % 2)  # the second step 0 replaces the first
        faults.choose = lambda method, path: None
        assert_is(load(f"{run}/step-{number % 2}"), number)
        faults.choose = kinds
        assert_is(find_latest(run), number)
        assert number < 30, "the proxy injects nothing"
    faults.choose = lambda method, path: None
    tidy_up(run)
    assert set(names(run)) <= {"step-0", "step-1"}


@pytest.mark.parametrize("kind", ["500", "503", "reset before", "cut upload"])
def test_a_server_that_stays_away_is_an_error_and_older_checkpoints_stay(
    run, faults, monkeypatch, kind
):
    save(run, 1)
    monkeypatch.setattr(retry, "PATIENCE", 0.5)
    faults.choose = lambda method, path: kind if method == "PUT" or kind != "cut upload" else None
    with pytest.raises(CheckpointError, match="does not answer"):
        save(run, 2)
    if kind != "cut upload":  # what cannot be read is not damaged: nothing older is taken
        with pytest.raises(UnreachableError, match="does not answer"):
            find_latest(run)
    faults.choose = lambda method, path: None
    assert_is(find_latest(run), 1)


@pytest.mark.parametrize("stop", range(1, 14))
def test_a_save_that_ends_anywhere_leaves_one_of_both(run, faults, monkeypatch, stop):
    """The server goes away for good at the n-th request of replacing a checkpoint."""
    save(run, 1, step=5, timestamp=1000.0)
    monkeypatch.setattr(retry, "PATIENCE", 0.1)
    count = itertools.count(1)
    faults.choose = lambda method, path: "reset before" if next(count) > 3 * stop else None
    failed = False
    try:
        save(run, 2, step=5, timestamp=2000.0)
    except CheckpointError:
        failed = True
    faults.choose = lambda method, path: None
    found = find_latest(run)
    number = int(found.values["step"])
    assert number in (1, 2) if failed else number == 2
    assert_is(found, number)
    FolderStore(run, "", "", True, False, lambda need, step: None).prepare()
    assert names(run) == ["step-5"]
    assert_is(load(f"{run}/step-5"), number)


def test_parts_of_dead_uploads_are_given_up(run):
    fs, path = filesystem.locate(run)
    key = path.partition("/")[2]
    for name in (f"{key}/step-5/model.safetensors", f"{key}/else/file", "other/step-5/model"):
        fs.call_s3("create_multipart_upload", Bucket="bucket", Key=name)
    tidy_up(run)
    left = [upload["Key"] for upload in fs.list_multipart_uploads("bucket")]
    assert sorted(left) == sorted([f"{key}/else/file", "other/step-5/model"])
    fs.clear_multipart_uploads("bucket")


def test_what_was_begun_goes_and_a_copy_cut_short_stays(run):
    save(run, 1)
    for step, name in ((2, filesystem.BEGUN), (3, "model.safetensors")):
        store._write_file(f"{run}/step-{step}/{name}", b"x")
    assert find_latest(run).step == 1
    tidy_up(run)
    assert names(run) == ["step-1", "step-3"]
    filesystem.remove(f"{run}/step-1")
    with pytest.raises(CheckpointError, match=r"step-3/metadata\.json - is missing"):
        find_latest(run)


def test_large_files_go_in_parts(run, faults):
    state = small_state(1)
    big = {"weight": torch.arange(16_000_000, dtype=torch.float32)}
    count = itertools.count()
    faults.choose = lambda method, path: "500" if next(count) % 5 == 4 else None
    write(run, replace(state, tensors={**state.tensors, "model": big}), step=1, is_temporary=False)
    faults.choose = lambda method, path: None
    assert torch.equal(load(f"{run}/step-1").tensors("model")["weight"], big["weight"])
    assert not filesystem.locate(run)[0].list_multipart_uploads("bucket")


RESTORE = """
import os, signal, sys, tempfile
from ostro.checkpoint import load
saved = load(sys.argv[1])
saved.tensors("model")
print(saved._downloads.folder, flush=True)
if sys.argv[2] == "stay":
    sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_copy_and_a_living_one_keeps_its_own(run, tmp_path, monkeypatch):
    save(run, 1)
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", RESTORE, f"{run}/step-1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen([*words, "stay"], **pipes) as living:
        kept = Path(living.stdout.readline().strip())
        dead = subprocess.run([*words, "go"], capture_output=True, text=True, env=env, check=False)
        assert dead.returncode == -signal.SIGKILL
        left = Path(dead.stdout.strip())
        assert (left / "model.safetensors").exists()
        foreign = tmp_path / "ostro-checkpoint-locked-by-nobody.txt"
        foreign.touch()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        saved = load(f"{run}/step-1")
        assert not left.exists()
        assert (kept / "model.safetensors").exists()
        living.stdin.write("\n")
        living.stdin.close()
    del saved
    load(f"{run}/step-1")
    assert list(tmp_path.iterdir()) == [foreign]
