"""One run at a time in a folder."""

import os
import subprocess
import sys

import pytest
import torch

from ostro.checkpoint import alone_in, lock
from ostro.core.errors import CheckpointError
from ostro.distributed import World

WORLD = World(torch.device("cpu"))

HOLDER = """
import sys, time, torch
from ostro.checkpoint import alone_in
from ostro.distributed import World
with alone_in(sys.argv[1], World(torch.device("cpu"))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_told_which_process_has_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)
    folder = str(tmp_path / "new" / "run")
    with alone_in(folder, WORLD):
        holder = f"run - process {os.getpid()} trains this run"
        with pytest.raises(CheckpointError, match=holder), alone_in(folder, WORLD):
            pass
        with alone_in(str(tmp_path / "other"), WORLD):
            pass
    with alone_in(folder, WORLD):
        assert os.listdir(folder) == []


def test_a_killed_process_leaves_no_lock(tmp_path):
    folder = str(tmp_path)
    words = [sys.executable, "-c", HOLDER, folder]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        with alone_in(folder, WORLD):
            pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    inside, fault = str(tmp_path / "x" / "run"), "x/run - cannot be opened: .*base_path"
    with pytest.raises(CheckpointError, match=fault), alone_in(inside, WORLD):
        pass


def test_a_store_is_not_held():
    with alone_in("memory://held", WORLD), alone_in("memory://held", WORLD):
        pass
