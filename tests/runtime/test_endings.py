"""A process ends with its own exit code, whatever threads are in native code by then."""

import os
import subprocess
import sys

import pytest
from endings_program import count_finished

BUSY = """
import sys, threading, time
import torch
from ostro.core.errors import ConfigError
from ostro.runtime.entry_point import run_script

def work():  # as a loader does whose batch nobody waits for any more
    store, tensor = torch.distributed.HashStore(), torch.zeros(300_000)
    while True:
        tensor.add_(1)
        store.set("a", "b")

def command(words, signals):
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    print("done")
    if words == ["refuses"]:
        raise ConfigError("trainer.sed = 3 - is not a setting")
    if words == ["breaks"]:
        raise ValueError("broken")
    if words == ["exits"]:
        sys.exit(7)

run_script(command)
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("finishes", 0, ""),
        ("refuses", 2, "ostro: error: trainer.sed = 3 - is not a setting\n"),
        ("breaks", 1, "ValueError: broken\n"),
        ("exits", 7, ""),
    ],
)
def test_threads_in_native_code_do_not_abort_the_process(how, code, said):
    done = subprocess.run(
        [sys.executable, "-c", BUSY, how], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (code, "done\n"), done.stderr
    assert done.stderr.endswith(said) and "terminate" not in done.stderr


def test_what_was_registered_for_the_end_is_done():
    """Also what is not, such as a thread that still works and is no daemon."""
    program = """
import atexit, sys, threading, time
from ostro.runtime.entry_point import run_script
def late():
    time.sleep(0.3)
    print("thread")
def command(words, signals):
    atexit.register(print, "registered")
    threading.Thread(target=late).start()
    print("command")
run_script(command)
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "command\nthread\nregistered\n"), done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
def test_output_that_cannot_be_written_is_an_error():
    program = """
from ostro.runtime.entry_point import run_script
run_script(lambda words, signals: print("a short answer, which lies in the buffer to the end"))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=120, check=False, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "ostro: error: the output is lost: No space left on device\n"


@pytest.mark.dist
def test_finished_runs_end_well(tmp_path):
    said = []
    assert count_finished(2, tmp_path, said.append) == 2, said
