"""A run in which one rank hangs, or is late: `python hang_program.py HOW --config_path ...`.

`HANGS` says which rank; nothing hangs where HOW is `never`. `TELLS`, a folder, lets that rank send
SIGTERM to all others before.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ostro.cli.main import run_command
from ostro.runtime.phase import current_phase, listening

RANK = os.environ.get("RANK", "0")
IS_MINE = os.environ["HANGS"] == RANK
WHERE = {"loader": "load", "collective": "backward", "saves": "save"}  # else forward
FOLDER = Path(os.environ.get("TELLS", ""))
LATE = 8.0  # seconds


def hang(how: str) -> None:
    until = time.monotonic() + LATE
    if how == "collective":
        dist.barrier()  # which the others never come to
    elif how == "c_code":
        sum(itertools.repeat(0))  # holds on to Python's lock
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "computes":
        while time.monotonic() < until:
            torch.ones(400, 400) @ torch.ones(400, 400)
        return
    elif how == "saves":
        return time.sleep(LATE)
    elif how == "dies":
        while not (FOLDER / "saves").exists():
            time.sleep(0.1)
        os._exit(9)
    while True:
        time.sleep(1)


def tell_the_others() -> None:
    for file in FOLDER.glob("pid*"):
        if file.name != f"pid{RANK}":
            os.kill(int(file.read_text()), signal.SIGTERM)
    (FOLDER / "told").touch()


def main(how: str, words: list[str]) -> int:
    num_loads, is_over, tells = 0, False, "TELLS" in os.environ
    if tells:
        (FOLDER / f"pid{RANK}").write_text(str(os.getpid()))

    def listener(phase: str) -> None:
        nonlocal num_loads, is_over
        num_loads += phase == "load"
        late = num_loads > 4 if how == "loader" else current_phase().step >= 3
        here = phase == WHERE.get(how, "forward") and how != "never"
        if IS_MINE and late and here and not is_over:
            is_over = True
            if tells:
                tell_the_others()
            hang(how)
        if how == "dies" and phase == "save" and not (FOLDER / "saves").exists():
            (FOLDER / "saves").touch()
            time.sleep(3)
        if how == "never" and phase == "evaluation":
            time.sleep(2.5)

    with listening(listener):
        return run_command(["train", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
