"""Which checkpoint a run starts from: newest, intact, and from the right folder."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from checkpoint_states import small_state
from fsspec.implementations.local import LocalFileSystem

from ostro.checkpoint import discovery, entries, find_latest, find_resume_source, scan, write
from ostro.checkpoint.discovery import Search
from ostro.checkpoint.single_file import FORMATS, point_to, write_file
from ostro.checkpoint.stamp import Stamp
from ostro.core.errors import CheckpointError
from ostro.io import filesystem


def save(folder, step, timestamp=None, **fields):
    fields = {"is_temporary": False, "timestamp": timestamp} | fields
    write(folder, small_state(step), step=step, **fields)
    return f"{folder}/step-{step}"


def found(path):
    saved = find_latest(path)
    return None if saved is None else saved.metadata.step


def test_found_at_its_folder_its_parent_and_from_far_above(folder):
    path = save(f"{folder}/gpt2/run1", 5)
    for above in (path, f"{path}/", f"{folder}/gpt2/run1", f"{folder}/gpt2", folder):
        assert found(above) == 5


def test_newest_by_commit_time_wins_over_the_higher_step(folder):
    save(folder, 20, timestamp=1000)
    save(f"{folder}/again", 10, timestamp=2000)
    assert found(folder) == 10


def test_higher_step_wins_at_the_same_time(folder):
    for step in (10, 30, 20):
        save(folder, step, timestamp=1000)
    assert found(folder) == 30
    assert [metadata.step for _, metadata in scan(folder)] == [30, 20, 10]


def test_temporary_and_permanent_ones_count_alike(folder):
    save(folder, 10, timestamp=1000)
    save(folder, 11, timestamp=1001, is_temporary=True)
    assert found(folder) == 11


def test_nothing_there(tmp_path):
    assert found(str(tmp_path)) is None
    assert found(str(tmp_path / "no/such/folder")) is None
    assert found("memory://no-such-store/run") is None


def test_an_unfinished_folder_does_not_count(tmp_path):
    run = str(tmp_path)
    save(run, 10, timestamp=1000)
    os.remove(f"{save(run, 20, timestamp=2000)}/metadata.json")
    os.rename(save(run, 30, timestamp=3000), f"{run}/.tmp-step-30-1")  # never committed
    assert found(run) == 10


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "garbage metadata"])
def test_a_damaged_newest_one_is_named_and_skipped(tmp_path, caplog, damage):
    run = str(tmp_path)
    save(run, 10, timestamp=1000)
    path = save(run, 20, timestamp=2000)
    name = "metadata.json" if damage == "garbage metadata" else "optimizer.safetensors"
    if damage == "truncated":
        os.truncate(f"{path}/{name}", 9)
    elif damage == "missing":
        os.remove(f"{path}/{name}")
    elif damage == "flipped":
        with open(f"{path}/{name}", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
    else:
        with open(f"{path}/{name}", "w") as file:
            file.write("{}}")
    assert found(run) == 10
    assert f"{path}/{name}" in caplog.text
    caplog.clear()
    shutil.rmtree(f"{run}/step-10")
    with pytest.raises(CheckpointError) as error:
        found(run)
    assert f"{run} - holds 1 checkpoint, and it cannot be used" in str(error.value)
    assert f"{path}/{name}" in str(error.value)


def test_one_that_goes_while_it_is_looked_at_is_skipped(tmp_path):
    """Another process may prune the folder."""
    older = save(str(tmp_path), 1)
    save(str(tmp_path), 2)
    real = LocalFileSystem.ls

    def ls(fs, path, **options):
        if path.endswith("step-2"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(fs, path, **options)

    with patch.object(LocalFileSystem, "ls", ls):
        assert str(find_latest(str(tmp_path))) == older


def test_a_path_that_is_no_folder_is_looked_up_as_a_run_name(folder):
    save(f"{folder}/gpt2/id1", 10, timestamp=1000, run_name="my_run")
    save(f"{folder}/gpt2/id2", 20, timestamp=1001, run_name="my_run")
    save(f"{folder}/gpt2/id3", 30, timestamp=1002, run_name="another")
    assert found(f"{folder}/gpt2/my_run") == 20
    assert found(f"{folder}/gpt2/another/") == 30
    assert found(f"{folder}/gpt2/nobody") is None


def test_a_relative_run_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("checkpoints/id1", 10, run_name="my_run")
    assert str(find_latest("checkpoints")) == "checkpoints/id1/step-10"
    assert found("my_run") == 10
    assert found("other") is None


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    save(str(tmp_path / "big/run"), 10)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/run").symlink_to(tmp_path / "big/run")
    (tmp_path / "here/loop").symlink_to(tmp_path / "here")
    assert found(str(tmp_path / "here")) == 10
    assert len(scan(str(tmp_path))) == 1


# The decision, with a search that is a dictionary

OWN, PATH, INIT = "runs/me", "runs/other", "runs/start"


def decide(there, **settings):
    found = {place: f"{place}/step-9" for place in there}
    with patch("ostro.checkpoint.decision.search", lambda place, world: Search(found.get(place))):
        return find_resume_source(OWN, **settings)


@pytest.mark.parametrize(
    ("load_checkpoint", "path", "init", "there", "source"),
    [
        # null: resume what there is, else initialize_from, else scratch
        (None, None, None, [OWN], "own"),
        (None, None, None, [], "scratch"),
        (None, None, INIT, [OWN, INIT], "own"),
        (None, None, INIT, [INIT], "initialize_from"),
        (None, PATH, None, [OWN, PATH], "own"),
        (None, PATH, None, [PATH], "load_checkpoint_path"),
        (None, PATH, INIT, [PATH, INIT], "load_checkpoint_path"),
        (None, PATH, None, [], "scratch"),
        (None, PATH, INIT, [INIT], "initialize_from"),
        # true: must resume
        (True, None, None, [OWN], "own"),
        (True, PATH, None, [PATH], "load_checkpoint_path"),
        (True, PATH, None, [OWN, PATH], "own"),
        # false: never resumes
        (False, None, None, [OWN], "scratch"),
        (False, PATH, None, [OWN, PATH], "scratch"),
        (False, None, INIT, [OWN, INIT], "initialize_from"),
    ],
)
def test_what_a_run_starts_from(load_checkpoint, path, init, there, source):
    decision = decide(
        there,
        load_checkpoint=load_checkpoint,
        load_checkpoint_path=path,
        initialize_from=init,
    )
    assert decision.source == source
    places = {"own": OWN, "load_checkpoint_path": PATH, "initialize_from": INIT}
    expected = None if source == "scratch" else f"{places[source]}/step-9"
    assert decision.saved == expected
    assert (expected or "scratch") in decision.message
    not_used = path is not None and (load_checkpoint is False or not {OWN, PATH} & set(there))
    assert [PATH in warning for warning in decision.warnings] == [True] * not_used


@pytest.mark.parametrize(
    ("settings", "there", "named"),
    [
        ({"load_checkpoint": True}, [], [OWN]),
        ({"load_checkpoint": True, "load_checkpoint_path": PATH}, [], [OWN, PATH]),
        ({"load_checkpoint": True, "initialize_from": INIT}, [INIT], [OWN]),
        ({"initialize_from": INIT}, [], [INIT]),
        ({"load_checkpoint": False, "initialize_from": INIT}, [OWN], [INIT]),
    ],
)
def test_what_is_an_error(settings, there, named):
    with pytest.raises(CheckpointError) as error:
        decide(there, **settings)
    for place in named:
        assert place in str(error.value)


def test_decision_on_real_folders(folder):
    save(f"{folder}/other", 3)
    decision = find_resume_source(f"{folder}/me", load_checkpoint_path=f"{folder}/other")
    assert (decision.source, decision.saved.metadata.step) == ("load_checkpoint_path", 3)
    save(f"{folder}/me", 4)
    decision = find_resume_source(f"{folder}/me", load_checkpoint_path=f"{folder}/other")
    assert (decision.source, decision.saved.metadata.step) == ("own", 4)


def test_a_file_may_point_to_a_folder(tmp_path):
    for step in (10, 20):
        point_to(Path(save(str(tmp_path), step)))
    pointer = tmp_path / "latest_checkpoint.pt"
    assert found(str(pointer)) == 20
    assert found(str(tmp_path)) == 20
    shutil.rmtree(tmp_path / "step-20")
    with pytest.raises(CheckpointError, match="step-20 - not found"):
        find_latest(str(pointer))


@pytest.mark.parametrize("text", ["{", '{"folder": 3}', '{"folder": "../step-10"}'])
def test_a_file_that_points_nowhere(tmp_path, text):
    path = tmp_path / "latest_checkpoint.pt"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"latest_checkpoint\.pt.*damaged"):
        find_latest(str(path))


# Files


def save_file(folder, name, step, timestamp=0.0, stamped=True, **values):
    """A checkpoint file; without a stamp it is what an older ostro wrote."""
    state = small_state(step)
    values = {"step": step + 1, **values} | ({"timestamp": timestamp} if timestamp else {})
    content = FORMATS["file"].pack(replace(state, values=values))
    path = Path(folder) / name
    write_file(path, content, Stamp(step, timestamp) if stamped else None)
    return str(path)


def turn_back(folder):
    """The newest file of the run gets the oldest time, as a copy may leave them."""
    for age, name in enumerate(sorted(os.listdir(folder), key=lambda n: -int(n[5:-3]))):
        os.utime(folder / name, (2e9 + age, 2e9 + age))


@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("timestamp", [0.0, 1e9])
def test_of_files_the_newest_is_that_by_what_is_in_them(tmp_path, stamped, timestamp):
    for step in (9, 10, 20, 15):
        time = timestamp and timestamp + step
        save_file(tmp_path, f"step_{step}.pt", step, time, stamped)
    turn_back(tmp_path)
    assert find_latest(str(tmp_path)).step == 20
    assert [entry.step for entry in entries(str(tmp_path))] == [20, 15, 10, 9]


def test_of_files_the_later_saved_wins_over_the_higher_step(tmp_path):
    save_file(tmp_path, "step_20.pt", 20, 1000.0)
    save_file(tmp_path, "step_10.pt", 10, 2000.0)
    save_file(tmp_path, "step_30.pt", 30, stamped=False)  # before times were written down
    assert [entry.step for entry in entries(str(tmp_path))] == [10, 20, 30]


def test_a_stamp_that_was_altered_does_not_count(tmp_path):
    path = Path(save_file(tmp_path, "step_20.pt", 20, 1000.0))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"step": 20, ', b'{"step": 99, '))
    assert path.read_bytes() != data
    assert Stamp.read(path) is None
    assert entries(str(tmp_path))[0].step == 20


def test_the_pointer_counts_where_the_file_it_was_is_gone(tmp_path):
    for step in (10, 20):
        point_to(Path(save_file(tmp_path, f"step_{step}.pt", step, 1000.0 + step)))
    assert len(entries(str(tmp_path))) == 2
    os.remove(tmp_path / "step_20.pt")
    assert find_latest(str(tmp_path)).path == str(tmp_path / "latest_checkpoint.pt")


@pytest.mark.parametrize(
    ("best", "interrupted", "newest"),
    [
        ((20, 1000.0), (30, 2000.0), "ckpt_interrupted.pt"),
        ((20, 3000.0), (30, 2000.0), "ckpt.pt"),
        ((40, 0.0), (30, 2000.0), "ckpt.pt"),  # nanoGPT went on, which writes down no time
        ((20, 0.0), (30, 2000.0), "ckpt_interrupted.pt"),
    ],
)
def test_of_nanogpts_two_files_the_newer_is_taken(tmp_path, best, interrupted, newest):
    os.utime(save_file(tmp_path, "ckpt.pt", *best), (1e9, 1e9))
    os.utime(save_file(tmp_path, "ckpt_interrupted.pt", *interrupted), (1e9, 1e9))
    assert find_latest(str(tmp_path)).path == str(tmp_path / newest)


# Checkpoints that cannot be used


def damage(folder, name="optimizer.safetensors"):
    for step in sorted(os.listdir(folder)):
        if os.path.exists(f"{folder}/{step}/{name}"):
            os.remove(f"{folder}/{step}/{name}")


def test_a_run_whose_checkpoints_are_all_damaged_stops(tmp_path):
    own = str(tmp_path / "me")
    for step in (10, 20):
        save(own, step, timestamp=1000 + step)
    damage(own)
    with pytest.raises(CheckpointError) as error:
        find_resume_source(own, elsewhere="--trainer.id me-2")
    message = str(error.value)
    for step in (10, 20):
        assert f"{own}/step-{step}/optimizer.safetensors - is missing" in message
    assert f"--trainer.id me-2 --trainer.initialize_from {own}/step-20" in message
    assert f"delete {own} first" in message
    with pytest.raises(CheckpointError, match="none of them can be resumed"):
        find_resume_source(str(tmp_path / "other"), load_checkpoint_path=own)


@pytest.mark.parametrize("name", ["metadata.json", "model.safetensors", "values.json"])
def test_no_weights_are_offered_that_are_not_intact(tmp_path, name):
    own = str(tmp_path / "me")
    save(own, 10)
    damage(own, name)
    with pytest.raises(CheckpointError, match=rf"step-10/{name} - is missing") as error:
        find_resume_source(own)
    assert "initialize_from" not in str(error.value)
    with pytest.raises(CheckpointError, match=rf"{name} - is missing(.|\n)*no weights are intact"):
        find_resume_source(str(tmp_path / "other"), initialize_from=own)


def test_weights_without_the_rest_are_found_where_they_do(folder):
    save(folder, 10, timestamp=1000)
    path = save(folder, 20, timestamp=2000)
    fs, root = filesystem.locate(path)
    fs.rm_file(f"{root}/optimizer.safetensors")
    assert found(folder) == 10
    newest = find_latest(folder, weights=True)
    assert newest.path == path
    assert newest.groups == ["model", "state"]
    assert newest.tensors("model")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors - is missing"):
        newest.tensors("optimizer")


def test_initialize_from_takes_weights_where_there_is_no_more(tmp_path):
    other, own = str(tmp_path / "other"), str(tmp_path / "me")
    path = save(other, 10)
    assert not find_resume_source(own, initialize_from=other).weights_only
    damage(other)
    decision = find_resume_source(own, initialize_from=other)
    assert decision.weights_only
    assert decision.resumed is None
    assert "initialising from the weights of" in decision.message
    assert f"{path}/optimizer.safetensors - is missing" in decision.message
    # What would be saved over its source begins elsewhere.
    with pytest.raises(CheckpointError, match=r"--trainer\.id b"):
        find_resume_source(
            other, initialize_from=path, load_checkpoint=False, elsewhere="--trainer.id b"
        )


def test_a_start_reads_markers_and_opens_one_checkpoint(tmp_path, monkeypatch):
    for step in range(1, 40):
        save(str(tmp_path), step, timestamp=1000 + step)
    read, opened = [], []
    real_read, real_load = filesystem._read, discovery.load
    monkeypatch.setattr(filesystem, "_read", lambda path: read.append(path) or real_read(path))
    monkeypatch.setattr(
        discovery, "load", lambda path, **how: opened.append(path) or real_load(path, **how)
    )
    assert found(str(tmp_path)) == 39
    assert opened == [f"{tmp_path}/step-39"]
    assert len([path for path in read if "step-" in path]) == 39
