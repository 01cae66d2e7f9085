"""SIGTERM in every phase of a run: it ends soon, and goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import TESTS, read_metrics, torchrun_words, write_config

from ostro.checkpoint import find_latest

PROGRAM = TESTS / "signals_program.py"
PHASES = ("data", "backward", "evaluation", "sample", "stage")

COMPILING = """
import os, signal, sys, threading
from ostro.cli.main import run_command
from ostro.runtime.phase import listening
def listener(phase):
    if phase == "compile":
        threading.Timer(2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        print("compiles", flush=True)
with listening(listener):
    sys.exit(run_command(["train", *sys.argv[1:]]))
"""
IN_C = """
import contextlib, hashlib, sys
from ostro.runtime.signals import Signals
with Signals() as signals:
    with signals.deferred(lambda: False) if sys.argv[1] == "True" else contextlib.nullcontext():
        print("begins", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, and Python is not asked meanwhile
"""
LEAVING = """
import hashlib, time
from ostro.runtime.signals import Signals
def leave():
    print("leaves", flush=True)
    time.sleep(100)
with Signals() as signals, signals.deferred(lambda: False, leave, is_stuck=lambda: True):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


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


SLOW = """
import sys, time
from ostro.checkpoint import store
from ostro.cli.main import main

def write_slowly(url, content, write=store._write_file):
    time.sleep(3 if url.endswith("model.safetensors") else 0)
    return write(url, content)

store._write_file = write_slowly
main()
"""


@pytest.mark.dist
def test_no_rank_leaves_while_the_first_saves(tmp_path):
    """torchrun ends all workers when one has ended, and a second signal abandons the save."""
    trainer = {"num_train_steps": 100_000, "steps_per_eval": None, "log_interval": 1}
    path = write_config(tmp_path, trainer=trainer | {"fsdp_axis": None})
    (tmp_path / "slow.py").write_text(SLOW)
    words = torchrun_words(2, str(tmp_path / "slow.py"), "train", "--config_path", str(path))
    metrics = tmp_path / "logs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(words, stdout=out, stderr=out)
        try:
            while not (metrics.exists() and '"step": 5' in metrics.read_text()):
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
            for pid in map(int, children.split()):
                if b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGTERM)
            launcher.wait(60)
        finally:
            launcher.kill()
            launcher.wait()
    text = (tmp_path / "out").read_text()
    assert "second signal" not in text
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None and saved.values["step"] == max(read_metrics(tmp_path)) + 1, text


def test_a_compilation_is_broken_off(tmp_path):
    path = write_config(tmp_path, trainer={"compile": True})
    words = [sys.executable, "-c", COMPILING, "--config_path", str(path)]
    environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "it is a pipe"
        assert any(line == "compiles\n" for line in process.stdout)
        begin = time.monotonic()
        assert process.wait(120) == 143
    assert time.monotonic() - begin < 12


@pytest.mark.parametrize("is_deferred", [False, True])
def test_c_code_does_not_keep_the_process(is_deferred):
    """One signal ends it, or where something may be lost a second one."""
    words = [sys.executable, "-c", IN_C, str(is_deferred)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        time.sleep(1)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if is_deferred:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(9.5)
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert time.monotonic() - begin < 12


def test_a_second_signal_ends_a_slow_leave():
    with subprocess.Popen([sys.executable, "-c", LEAVING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"leaves\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert time.monotonic() - begin < 5
