"""A short campaign of `ostro chaos`, and that it sees what is lost."""

import re
import subprocess
import sys

import pytest
from tiny_run import ostro

from ostro.inspect.chaos.faults import Fault, plan

HIT = [
    "kill -9@data",
    "kill -9@update",
    "kill -9@save",
    "kill -9@commit",
    "SIGTERM@forward",
    "SIGTERM@evaluation",
    "SIGTERM@save",
    "SIGTERM@import",
    "full disk",
    "truncated file",
    "flipped bit",
    "unreachable tracker@log",
    "dead rank@backward",
    "NaN gradient@stop",
    "NaN gradient@roll back",
    "bad record@skip",
]


@pytest.mark.cli
def test_nothing_is_lost_by_any_fault(tmp_path):
    only = [word for hit in HIT for word in ("--only", hit)]
    done = ostro("chaos", "--each", "1", "--seed", "7", *only, "--folder", tmp_path, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(.{20}) (.{12}) +1 +\d+ +0$", done.stdout, re.MULTILINE)
    assert len(rows) == len(HIT), done.stdout
    assert f"{len(HIT)} faults, 0 failures" in done.stdout


DEFECT = """
import sys
from ostro.checkpoint import saved as checkpoints
from ostro.cli.main import main
from ostro.trainer import TrainState

if sys.argv[1] == "moments":
    load = TrainState.load
    def lossy(state, saved):
        load(state, saved)
        for values in state.optimizer.state.values():
            values["exp_avg"].zero_()
    TrainState.load = lossy
else:
    checkpoints.Saved._verified_file = lambda saved, name: f"{saved.path}/{name}"
main(["chaos", "--each", "3", *sys.argv[2:]])
"""


@pytest.mark.cli
@pytest.mark.parametrize(
    ("defect", "hit", "seen"),
    [
        ("moments", "kill -9@forward", "model.safetensors"),
        ("checksums", "flipped bit", "was not skipped and named"),
    ],
)
def test_a_planted_defect_is_seen(tmp_path, defect, hit, seen):
    words = [sys.executable, "-c", DEFECT, defect, "--only", hit, "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: " in done.stdout and seen in done.stdout


def test_the_plan_is_a_function_of_the_seed():
    kinds = {"kill -9": ["forward"], "flipped bit": ["backward"]}
    faults, again, other = (plan(kinds, lambda kind, where: 40, 20, seed) for seed in (1, 1, 2))
    assert faults == again != other
    assert all(isinstance(fault, Fault) and 1 <= fault.nth <= 40 for fault in faults)
    assert {fault.nth for fault in faults if fault.kind == "flipped bit"} <= set(range(26, 41))
    assert len({fault.nth for fault in faults if fault.kind == "kill -9"}) > 5


def test_an_unknown_fault_is_refused(tmp_path):
    done = ostro("chaos", "--only", "kil -9", "--folder", tmp_path)
    assert done.returncode == 2
    assert "did you mean kill -9?" in done.stderr
