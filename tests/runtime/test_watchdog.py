"""Runs that hang: each rank writes where it is, and the one that holds up the others is named."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import TESTS, torchrun_words, write_config

from ostro.runtime.watchdog import Report, find_odd

PROGRAM = TESTS / "hang_program.py"
TRAINER = {"hang_timeout": "4s"}


def run(tmp_path: Path, how: str, hangs: int, words: list[str]) -> subprocess.CompletedProcess:
    path = write_config(tmp_path, trainer=TRAINER)
    return subprocess.run(
        [*words, how, "--config_path", str(path)],
        env=os.environ | {"HANGS": str(hangs)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


ALONE = [sys.executable, str(PROGRAM)]


def stacks(tmp_path: Path) -> dict[str, str]:
    files = (tmp_path / "logs" / "tiny").glob("hang-rank*.txt")
    return {file.name: file.read_text() for file in files}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "hangs", "why", "phase"),
    [
        ("loader", 1, "it waits for its batch", "data of step"),
        ("collective", 0, "it is in another collective", "backward of step 3"),
        ("python", 1, "it has not come to the collective", "forward of step 3"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(tmp_path, how, hangs, why, phase):
    done = run(tmp_path, how, hangs, torchrun_words(2, PROGRAM))
    assert done.returncode == 1
    assert f"the run hangs, for rank {hangs} ({why}" in done.stdout, done.stdout + done.stderr
    first, second = done.stdout.split("4 s - stacks are in")[1].splitlines()[1:3]
    assert first.startswith(f"  rank {hangs} ") and second.startswith(f"  rank {1 - hangs} ")
    assert phase in first and "hang_program.py" in first
    assert second.endswith("waits for the others") and "gloo:all_" in second
    found = stacks(tmp_path)
    assert sorted(found) == ["hang-rank0.txt", "hang-rank1.txt"]
    assert "in hang\n" in found[f"hang-rank{hangs}.txt"]
    assert all("gloo:" in text and "trainer.py" in text for text in found.values())
    assert "for rank" in (tmp_path / "logs" / "tiny" / "train.log").read_text()


@pytest.mark.dist
def test_a_rank_that_does_not_let_python_run(tmp_path):
    done = run(tmp_path, "c_code", 1, torchrun_words(2, PROGRAM))
    assert done.returncode == 1
    assert "for rank 1 (no answer: " in done.stdout, done.stdout + done.stderr
    assert list(stacks(tmp_path)) == ["hang-rank0.txt"]
    assert "in hang\n" in done.stderr, "where the other rank writes by itself"


def test_one_process_alone(tmp_path):
    done = run(tmp_path, "loader", 0, ALONE)
    assert done.returncode == 1
    assert "error: the run hangs - nothing was begun for trainer.hang_timeout = 4 s" in done.stdout
    assert "hang_program.py" in done.stdout
    assert "in hang\n" in stacks(tmp_path)["hang-rank0.txt"]


def test_a_long_evaluation_is_no_hang(tmp_path):
    done = run(tmp_path, "never", 0, ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert stacks(tmp_path) == {}


WAITS = Report(0, "here", "backward", 3, "a.py:1 in f", 9, "all_reduce of [[8]]", False, 40)


def test_who_is_named():
    four = [replace(WAITS, rank=rank) for rank in range(4)]
    assert find_odd(four, 4)[0] == []
    assert find_odd(four[:2], 4)[0] == [2, 3]
    behind = replace(WAITS, rank=2, num_collectives=8, is_finished=True)
    assert find_odd([*four[:2], behind, four[3]], 4)[0] == [2]
    elsewhere = replace(WAITS, rank=1, collective="barrier of []", times=400)
    assert find_odd([four[0], elsewhere, *four[2:]], 4)[0] == [1]
    new = replace(elsewhere, times=1)
    assert find_odd([four[0], new], 2)[0] == [1]
    starved = replace(WAITS, rank=3, phase="data", num_collectives=10)
    ready = [replace(report, phase="ready") for report in four[:3]]
    assert find_odd([*ready, starved], 4)[0] == [3]
