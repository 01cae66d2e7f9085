"""Killed with signal 9 before every single operation of a save: nothing is ever lost or torn."""

import os
import subprocess
import sys
import textwrap

HERE = os.path.dirname(__file__)

SCRIPT = """
import os, shutil, signal, sys

from checkpoint_states import on_step, small_state

from ostro.checkpoint import CheckpointerConfig, find_latest, store
from ostro.io import filesystem

root = sys.argv[1]
OPERATIONS = [(store, "_write_file"), (filesystem, "flush_folder"), (filesystem, "move"),
              (filesystem, "remove"), (shutil, "rmtree"), (os, "rename"), (os, "fsync")]


def attempt(step, value, die_before):
    # In a child: save, and die before the operation of that number.
    done = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for module, name in OPERATIONS:
        setattr(module, name, counted(getattr(module, name)))
    checkpointer = CheckpointerConfig(root).build("me", "me")
    on_step(checkpointer, step, lambda: small_state(value), interrupted=True)
    os._exit(0)


def killed_at(step, value, die_before):
    shutil.rmtree(root, ignore_errors=True)
    on_step(
        CheckpointerConfig(root).build("me", "me"), 7, lambda: small_state(7), interrupted=True)
    child = os.fork()
    if child == 0:
        attempt(step, value, die_before)
    _, status = os.waitpid(child, 0)
    saved = find_latest(root)
    assert saved is not None, f"nothing left: killed before operation {die_before}"
    assert saved.values["step"] in (7, value), saved.values
    for group in saved.groups:
        saved.tensors(group)
    assert (saved.tensors("model")["weight"] == saved.values["step"]).all()
    survivor = saved.values["step"]
    on_step(
        CheckpointerConfig(root).build("me", "me"), 20, lambda: small_state(20), interrupted=True)
    assert os.listdir(os.path.join(root, "me")) == ["step-20"], os.listdir(os.path.join(root, "me"))
    return os.WIFSIGNALED(status), survivor


for step, value in ((7, 8), (9, 9)):  # replace a step; save the next one
    survivors, die_before, killed = [], 1, True
    while killed:
        killed, survivor = killed_at(step, value, die_before)
        survivors.append(survivor)
        die_before += 1
    assert survivors[0] == 7 and survivors[-1] == value
    assert survivors == sorted(survivors), survivors
    print(len(survivors), "points")
"""


def test_a_save_killed_anywhere_leaves_an_intact_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join([HERE, *sys.path]), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    points = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(points) == 2 and min(points) > 15
