"""A run's checkpointer with a clock that is set by hand."""

import json
import os
import re
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
from checkpoint_states import on_step, small_state

from ostro.checkpoint import (
    CheckpointerConfig,
    CheckpointInterval,
    entries,
    find_latest,
    load,
    scan,
    store,
    total_bytes,
)
from ostro.checkpoint.metadata import sealed
from ostro.core.errors import CheckpointError
from ostro.core.units import ByteSize
from ostro.io import filesystem


class Run:
    """A checkpointer, its clock, and how often it asked for the state."""

    def __init__(self, base, keep=(), seconds=10, run_id="me", **fields):
        interval = None if seconds is None else timedelta(seconds=seconds)
        keep = [CheckpointInterval(*pair) for pair in keep]
        config = CheckpointerConfig(str(base), interval, keep, **fields)
        assert not list(config.problems())
        self.now = 0.0
        self.asked = 0
        self.checkpointer = config.build(run_id, f"name of {run_id}", clock=lambda: self.now)
        self.folder = self.checkpointer.folder

    def step(self, step, now=None, **fields):
        """What was saved after `step`, as (step, kind)."""
        self.now = self.now if now is None else now

        def make_state():
            self.asked += 1
            return small_state(step)

        report = on_step(self.checkpointer, step, make_state, **fields)
        return None if report is None else (report.step, report.kind)

    def kinds(self):
        """Every checkpoint of the folder: step -> kind."""
        marks = [metadata for _, metadata in scan(self.folder)]
        return {m.step: "temporary" if m.is_temporary else "permanent" for m in marks}


def test_no_thread_is_left_when_a_save_is_done(tmp_path, monkeypatch):
    """A thread that is still ending when Python does aborts the process."""

    class Slow(Future):
        def set_result(self, result):
            super().set_result(result)
            time.sleep(0.5)

    monkeypatch.setattr("ostro.checkpoint.checkpointer.Future", Slow)
    run = Run(tmp_path)
    assert run.step(3, force=True) == (3, "permanent")
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]


def test_policy_without_time(tmp_path):
    run = Run(tmp_path, keep=[(2, 10), (5, 20), (10,)], seconds=None)
    for step in range(50):
        run.step(step)
    assert sorted(run.kinds()) == [2, 4, 6, 8, 10, 15, 20, 30, 40]
    assert set(run.kinds().values()) == {"permanent"}
    assert run.asked == 9


def test_policy_with_a_trailing_temporary_one(tmp_path):
    run = Run(tmp_path, keep=[(2, 10), (5, 20), (10,)])
    for step in range(50):
        run.step(step, now=10.0 * step)
    assert sorted(run.kinds()) == [2, 4, 6, 8, 10, 15, 20, 30, 40, 49]
    assert [step for step, kind in run.kinds().items() if kind == "temporary"] == [49]


def test_a_temporary_one_is_replaced_by_the_next(folder):
    run = Run(folder)
    assert run.step(1, now=10) == (1, "temporary")
    assert run.step(2, now=19) is None
    assert run.step(3, now=20) == (3, "temporary")
    assert run.kinds() == {3: "temporary"}
    assert run.asked == 2


def test_a_permanent_one_resets_the_timer_and_replaces_the_temporary(folder):
    run = Run(folder, keep=[(3,)])
    assert run.step(2, now=10) == (2, "temporary")
    assert run.step(3, now=15) == (3, "permanent")
    assert run.kinds() == {3: "permanent"}
    assert run.step(4, now=24) is None
    assert run.step(5, now=25) == (5, "temporary")
    assert run.kinds() == {3: "permanent", 5: "temporary"}


def test_step_0_is_not_saved_and_restarts_the_timer(tmp_path):
    run = Run(tmp_path, keep=[(1,)])
    assert run.step(0, now=500) is None
    run = Run(tmp_path)
    assert run.step(0, now=500) is None
    assert run.step(1, now=509) is None
    assert run.step(2, now=510) == (2, "temporary")
    assert run.step(0, force=True) == (0, "permanent")


def test_final_save_of_a_step_just_saved_as_temporary_survives(folder):
    run = Run(folder)
    assert run.step(9, now=10) == (9, "temporary")
    assert run.step(9, force=True) == (9, "permanent")
    assert run.kinds() == {9: "permanent"}
    assert run.step(10, now=30) == (10, "temporary")
    assert run.kinds() == {9: "permanent", 10: "temporary"}


def test_the_same_step_is_written_once(tmp_path):
    run = Run(tmp_path, keep=[(3,)])
    assert run.step(3) == (3, "permanent")
    assert run.step(3, force=True) is None
    assert run.step(4, interrupted=True) == (4, "temporary")
    assert run.step(4, interrupted=True) is None
    assert run.asked == 2


def test_an_interrupted_run_leaves_a_temporary_one_that_the_next_attempt_replaces(folder):
    run = Run(folder, seconds=None)
    assert run.step(0, interrupted=True) == (0, "temporary")
    again = Run(folder, keep=[(2,)], seconds=None)
    assert again.step(1) is None
    assert again.kinds() == {0: "temporary"}
    again.step(2)
    assert again.kinds() == {2: "permanent"}


def test_restart_forgets_no_temporary_one_of_its_own(folder):
    Run(folder).step(1, now=10)
    Run(folder, run_id="other").step(1, now=10)
    again = Run(folder)
    again.step(5, now=10)
    assert again.kinds() == {5: "temporary"}
    assert Run(folder, run_id="other").kinds() == {1: "temporary"}


def test_temporary_ones_of_another_run_in_the_same_folder_stay(tmp_path):
    """A folder that does not end with the id, by `${run_id}` inside its name."""
    Run(tmp_path / "x-${run_id}", run_id="a").step(1, now=10)
    os.rename(tmp_path / "x-a", tmp_path / "x-b")
    other = Run(tmp_path / "x-${run_id}", run_id="b")
    other.step(5, now=10)
    assert other.kinds() == {1: "temporary", 5: "temporary"}


def test_old_temporary_ones_stay_if_told_so(tmp_path):
    Run(tmp_path).step(1, now=10)
    again = Run(tmp_path, delete_old_temp_checkpoints=False)
    again.step(5, now=10)
    again.step(6, now=20)
    assert again.kinds() == {1: "temporary", 6: "temporary"}


def test_a_checkpoint_that_became_permanent_is_not_deleted(tmp_path):
    """Another process has marked the temporary one as to be kept."""
    run = Run(tmp_path)
    run.step(1, now=10)
    path = f"{run.folder}/step-1/metadata.json"
    fields = json.loads(Path(path).read_text()) | {"is_temporary": False}
    del fields["sha256"]
    Path(path).write_text(sealed(fields))
    run.step(2, now=20)
    assert run.kinds() == {1: "permanent", 2: "temporary"}


def test_newest_wins_although_the_clock_went_back(tmp_path, monkeypatch):
    Run(tmp_path, keep=[(1,)]).step(7)
    moment = time.time()
    monkeypatch.setattr(time, "time", lambda: moment - 3600)
    run = Run(tmp_path, keep=[(1,)])
    run.step(8)
    run.step(9)
    assert find_latest(run.folder).metadata.step == 9


@pytest.mark.parametrize(
    ("mode", "saved"),
    [("never", []), ("improved", [1, 3]), ("always", [1, 2, 3, 4])],
)
def test_save_after_evaluation(tmp_path, mode, saved):
    run = Run(tmp_path, seconds=None, save_after_eval=mode)
    results = {0: True, 1: True, 2: False, 3: True, 4: False, 5: None}
    found = [step for step, improved in results.items() if run.step(step, improved=improved)]
    assert found == saved


def test_the_best_one_stays_until_a_better_one(folder):
    run = Run(folder, save_after_eval="improved")
    run.step(1, improved=True)
    run.step(2, now=10, improved=False)
    run.step(3, now=20)
    assert sorted(run.kinds()) == [1, 3]
    again = Run(folder, save_after_eval="improved")
    again.step(4, now=10)
    assert sorted(again.kinds()) == [1, 4]
    again.step(5, improved=True)
    assert sorted(again.kinds()) == [5]
    again.step(6, force=True, improved=False)
    assert again.kinds() == {5: "temporary", 6: "permanent"}


def test_report_says_what_was_saved(tmp_path):
    run = Run(tmp_path)
    run.step(4, force=True)
    report = run.checkpointer.last
    assert report.path == f"{run.folder}/step-4"
    assert 0 < report.seconds < 10
    marks = load(report.path).metadata
    assert (marks.run_id, marks.run_name) == ("me", "name of me")


def test_a_failed_save_keeps_the_old_one_and_is_not_retried_at_every_step(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.step(1, now=10)
    real = store.tensor_pieces

    def failing(tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "tensor_pieces", failing)
    with pytest.raises(CheckpointError, match="disk is full"):
        run.step(2, now=20)
    assert run.kinds() == {1: "temporary"}
    monkeypatch.setattr(store, "tensor_pieces", real)
    assert run.step(3, now=21) is None
    assert run.step(4, now=30) == (4, "temporary")
    assert run.kinds() == {4: "temporary"}


def test_remains_of_a_killed_save_are_tidied_up(tmp_path):
    run = Run(tmp_path)
    run.step(1, now=10)
    run.step(2, force=True)
    os.makedirs(f"{run.folder}/.tmp-step-9-123/x")
    os.rename(f"{run.folder}/step-2", f"{run.folder}/.old-step-2-123")
    assert find_latest(run.folder).metadata.step == 2
    again = Run(tmp_path)
    again.step(3, force=True)
    assert sorted(os.listdir(run.folder)) == ["step-2", "step-3"]
    assert load(f"{run.folder}/step-2").values["step"] == 2


def test_a_checkpoint_set_aside_goes_once_its_successor_is_there(tmp_path):
    run = Run(tmp_path)
    run.step(2, force=True)
    os.rename(f"{run.folder}/step-2", f"{run.folder}/.old-step-2-123")
    Run(tmp_path).step(5, force=True)
    store.write(run.folder, small_state(8), step=2, is_temporary=False)
    os.makedirs(f"{run.folder}/.old-step-2-124")
    Run(tmp_path).step(6, force=True)
    assert sorted(os.listdir(run.folder)) == ["step-2", "step-5", "step-6"]
    assert load(f"{run.folder}/step-2").values["step"] == 8


def test_a_store_killed_while_it_moved_a_checkpoint_aside(folder):
    """Its copy is complete, the original has lost files: the copy takes its place again."""
    run = Run(folder)
    run.step(2, force=True)
    fs, path = fsspec.url_to_fs(run.folder)
    fs.copy(f"{path}/step-2", f"{path}/.old-step-2-123", recursive=True)
    fs.rm_file(f"{path}/step-2/metadata.json")
    assert find_latest(run.folder).metadata.step == 2
    Run(folder).step(6, force=True)
    assert filesystem.names(run.folder) == ["step-2", "step-6"]
    assert load(f"{run.folder}/step-2").values["step"] == 2


def test_what_was_uploaded_of_one_that_never_became_complete_goes():
    run = Run("memory://begun")
    fs, path = fsspec.url_to_fs(run.folder)
    fs.pipe_file(f"{path}/step-9/model.safetensors", b"half")
    fs.pipe_file(f"{path}/step-9/{filesystem.BEGUN}", b"{}")
    fs.pipe_file(f"{path}/notes/mine.txt", b"not a checkpoint")
    run.step(10, force=True)
    assert filesystem.names(run.folder) == ["notes", "step-10"]


def test_a_temporary_one_of_the_same_step_as_before_the_restart_stays(folder):
    Run(folder).step(7, now=10)
    again = Run(folder)
    assert again.step(7, now=10) == (7, "temporary")
    assert again.kinds() == {7: "temporary"}


def test_found_checkpoints_are_named_as_the_folder_was(folder):
    run = Run(folder)
    run.step(7, now=10)
    assert [path for path, _ in scan(folder)] == [f"{run.folder}/step-7"]


# A budget of bytes


def size_of_one(folder, **fields):
    run = Run(f"{folder}-measured", **fields)
    run.step(1, force=True)
    return entries(run.folder)[0].bytes


def steps_of(run):
    return sorted(int(re.search(r"step[-_](\d+)", e.path)[1]) for e in entries(run.folder))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_within_its_budget_a_run_keeps_the_newest_the_best_and_an_even_choice(
    tmp_path, form, caplog, monkeypatch
):
    monkeypatch.setattr("ostro.checkpoint.single_file._RESERVE", 1 << 12)  # these are as small
    size = size_of_one(tmp_path, format=form)
    most = ByteSize(5.5 * size)
    run = Run(tmp_path, keep=[(1,)], seconds=None, save_after_eval="improved", format=form,
              keep_bytes=most)  # fmt: skip
    with caplog.at_level("INFO"):
        for step in range(1, 33):
            assert run.step(step, improved=step in (2, 9)) == (step, "permanent")
            assert total_bytes(entries(run.folder)) <= most
    left = steps_of(run)
    assert 9 in left and 2 not in left and left[-1] == 32 and len(left) >= 4, left
    assert max(b - a for a, b in zip([0, *left], left, strict=False)) <= 15, left
    lines = [line for line in caplog.messages if line.startswith("deleted ")]
    assert len(lines) == 32 - len(left) and "bytes" in lines[0] and "keep_bytes" in lines[0]


def test_temporary_ones_make_room_first(folder):
    size = size_of_one(folder)
    Run(folder).step(5, now=10)
    run = Run(folder, keep=[(10,)], keep_bytes=ByteSize(3.5 * size),
              delete_old_temp_checkpoints=False)  # fmt: skip
    for step in (10, 20):
        run.step(step)
    assert run.kinds() == {5: "temporary", 10: "permanent", 20: "permanent"}
    run.step(30)
    assert run.kinds() == {10: "permanent", 20: "permanent", 30: "permanent"}


def test_the_newest_stays_although_it_is_temporary_until_its_successor_is_there(folder):
    size = size_of_one(folder)
    run = Run(folder, keep=[(10,)], keep_bytes=ByteSize(3.5 * size))
    for step, now in ((10, 0), (20, 0), (25, 10)):
        run.step(step, now=now)
    run.step(30)
    assert run.kinds() == {10: "permanent", 30: "permanent"}


def test_a_budget_for_less_than_two_is_refused_before_anything_goes(folder):
    size = size_of_one(folder)
    Run(folder, seconds=None).step(1, force=True)
    run = Run(folder, seconds=None, keep_bytes=ByteSize(1.5 * size))
    with pytest.raises(CheckpointError, match="newest and the best - raise it to that"):
        run.step(2, force=True)
    assert run.kinds() == {1: "permanent"}


def test_checkpoints_of_another_run_neither_count_nor_go(tmp_path):
    size = size_of_one(tmp_path)
    Run(tmp_path / "x-${run_id}", run_id="a").step(1, force=True)
    os.rename(tmp_path / "x-a", tmp_path / "x-b")
    budget = ByteSize(2.5 * size)
    other = Run(tmp_path / "x-${run_id}", keep=[(1,)], run_id="b", keep_bytes=budget)
    for step in (2, 3, 4):
        other.step(step)
    assert sorted(other.kinds()) == [1, 3, 4]


# One file for each checkpoint


def test_temporary_files_go_once_their_successor_is_there_also_after_a_kill(tmp_path):
    run = Run(tmp_path, format="file")
    run.step(1, force=True)
    run.step(2, now=10)
    run.step(3, now=20)
    open(f"{run.folder}/.tmp-step_4.pt-123", "w").close()
    assert sorted(os.listdir(run.folder)) == [
        ".tmp-step_4.pt-123", "latest_checkpoint.pt", "step_1.pt", "step_3.pt"
    ]  # fmt: skip
    Run(tmp_path, format="file", run_id="me").step(5, now=10)
    assert sorted(os.listdir(run.folder)) == ["latest_checkpoint.pt", "step_1.pt", "step_5.pt"]


def test_the_best_file_stays_until_a_better_one(tmp_path):
    run = Run(tmp_path, format="file", save_after_eval="improved")
    run.step(1, improved=True)
    run.step(2, now=10)
    run.step(3, now=20)
    assert steps_of(run) == [1, 3]
    again = Run(tmp_path, format="file", save_after_eval="improved")
    again.step(4, improved=True)
    assert steps_of(run) == [4]


# Saving while training goes on


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written until it is set."""
    opened, real = threading.Event(), store._write_file

    def waiting(url, content):
        assert opened.wait(30)
        return real(url, content)

    monkeypatch.setattr(store, "_write_file", waiting)
    yield opened
    opened.set()


def begin(run, step, state, **fields):
    due = run.checkpointer.due(step, **fields)
    run.checkpointer.save(step, due, lambda: state)


def test_what_is_saved_is_the_state_of_that_moment(folder, gate):
    run, state = Run(folder), small_state(1)
    begin(run, 1, state, interrupted=True)
    assert run.checkpointer.poll() is None
    assert run.kinds() == {}
    run.checkpointer.before_update()
    for tensors in state.tensors.values():
        for tensor in tensors.values():
            tensor.zero_()
    gate.set()
    report = run.checkpointer.wait()
    assert (report.step, run.checkpointer.last) == (1, report)
    assert run.checkpointer.wait() is None
    assert (load(report.path).tensors("model")["weight"] == 1).all()


def test_the_one_before_goes_only_when_its_successor_is_committed(folder, gate):
    run = Run(folder)
    gate.set()
    run.step(1, now=10)
    gate.clear()
    begin(run, 2, small_state(2), interrupted=True)
    assert run.kinds() == {1: "temporary"}
    gate.set()
    run.checkpointer.wait()
    assert run.kinds() == {2: "temporary"}


def test_no_temporary_one_is_due_while_one_is_written(tmp_path, gate):
    run = Run(tmp_path, keep=[(5,)])
    begin(run, 1, small_state(1), interrupted=True)
    run.now = 100
    assert run.checkpointer.due(2) is None
    assert run.checkpointer.due(5).kind == "permanent"
    gate.set()
    run.checkpointer.wait()
    assert run.checkpointer.due(2).kind == "temporary"


def test_a_failure_in_the_background_is_told_once(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.step(1, now=10)

    def failing(url, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_file", failing)
    begin(run, 2, small_state(2), interrupted=True)
    with pytest.raises(CheckpointError, match="disk is full"):
        run.checkpointer.wait()
    assert run.checkpointer.wait() is None
    assert (run.kinds(), run.checkpointer.last.step) == ({1: "temporary"}, 1)


def test_told_so_it_waits(tmp_path):
    run = Run(tmp_path, async_save=False)
    begin(run, 1, small_state(1), interrupted=True)
    assert run.kinds() == {1: "temporary"}
    assert run.checkpointer.poll().seconds > 0
