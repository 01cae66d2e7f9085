"""SIGTERM in every phase of a run: it ends soon, and goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_meeting import free_port
from tiny_run import read_metrics, torchrun_words, write_config

from ostro.checkpoint import find_latest
from ostro.cli.main import run_command

PROGRAM = Path(__file__).with_name("signals_program.py")
PHASES = ("data", "backward", "evaluation", "sample", "stage")

COMPILING = """
import os, signal, sys, threading
from ostro.cli.main import run_command
from ostro.phases import listening
def listener(phase):
    if phase == "compile":
        threading.Timer(2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        print("compiles", flush=True)
with listening(listener):
    sys.exit(run_command(["train", *sys.argv[1:]]))
"""
IN_C = """
import contextlib, hashlib, sys
from ostro.signals import Signals
with Signals() as signals:
    with signals.deferred(lambda: False) if sys.argv[1] == "True" else contextlib.nullcontext():
        print("begins", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, and Python is not asked meanwhile
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


@pytest.mark.dist
@pytest.mark.parametrize("is_split", [False, True], ids=["copies", "fsdp"])
def test_a_rank_that_waits_for_one_that_never_comes(tmp_path, is_split):
    """It leaves within seconds, and saves what it has: all of the state, where it is a copy."""
    trainer = {"num_train_steps": 100_000, "steps_per_eval": None, "log_interval": 1}
    path = write_config(tmp_path, trainer=trainer | {"fsdp_axis": "embed" if is_split else None})
    port, ranks = free_port(), []
    for rank in range(2):
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, "-m", "ostro.cli.main", "train", "--config_path", str(path)]
        with (tmp_path / f"out{rank}").open("w") as out:
            pipes = {"stdout": out, "stderr": out}
            ranks.append(subprocess.Popen(words, env=os.environ | environ, **pipes))
    first, second = ranks
    metrics = tmp_path / "logs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    try:
        while not (metrics.exists() and '"step": 20' in metrics.read_text()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        second.send_signal(signal.SIGSTOP)
        time.sleep(1)
        begin = time.monotonic()
        first.send_signal(signal.SIGTERM)
        code, seconds = first.wait(60), time.monotonic() - begin
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    text = (tmp_path / "out0").read_text()
    assert code == 143, text
    assert seconds < 15, text  # 10 where cores are free
    assert "stopped by SIGTERM, while this rank waited for others" in text
    saved = find_latest(str(tmp_path / "checkpoints"))
    if is_split:
        assert saved is None, "the other part is out of reach"
        return
    assert saved is not None and saved.values["step"] == max(read_metrics(tmp_path)) + 1, text
    more = ["--trainer.num_train_steps", str(saved.values["step"] + 1)]
    assert run_command(["train", "--config_path", str(path), *more]) == 0


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
