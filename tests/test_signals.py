"""SIGTERM in every phase of a run: it ends soon, and goes on to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import torchrun_words

PROGRAM = Path(__file__).with_name("signals_program.py")
PHASES = ("data", "backward", "evaluation", "sample", "stage")


def found(words, signalled: int) -> list[dict]:
    """What the program found out, a line for each phase and rank."""
    environ = os.environ | {"SIGNALLED": str(signalled)}
    done = subprocess.run(
        words, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix("FOUND ")) for line in lines if "FOUND" in line]


def check(lines: list[dict], phases: tuple[str, ...], num_ranks: int) -> None:
    assert sorted(line["phase"] for line in lines) == sorted(phases * num_ranks)
    for line in lines:
        assert line["code"] == 143 and line["then"] == 0, line
        assert line.get("same", True), line
        assert line["seconds"] is None or line["seconds"] < 10, line
    assert sum(line["seconds"] is not None for line in lines) == len(phases)


def test_one_process(tmp_path):
    phases = (*PHASES, "ready", "forward", "update", "load", "save", "commit")
    check(found([sys.executable, str(PROGRAM), str(tmp_path), *phases], 0), phases, 1)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("signalled", "flags"), [(1, ()), (0, ("trainer.fsdp_axis=null",))], ids=["fsdp", "copies"]
)
def test_two_processes_of_which_one_gets_the_signal(tmp_path, signalled, flags):
    words = torchrun_words(2, PROGRAM, tmp_path, *PHASES, *flags)
    check(found(words, signalled), PHASES, 2)
