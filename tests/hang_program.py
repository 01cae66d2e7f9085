"""A run in which one rank hangs, for tests: `python hang_program.py HOW --config_path ...`.

`HANGS` says which rank; nothing hangs where HOW is `never`.
"""

import itertools
import os
import sys
import time

import torch.distributed as dist

from ostro.cli.main import run_command
from ostro.phases import listening, place

IS_MINE = os.environ.get("RANK", "0") == os.environ["HANGS"]
WHERE = {"loader": "load", "python": "forward", "c_code": "forward", "collective": "backward"}


def hang(how: str) -> None:
    if how == "collective":
        dist.barrier()  # which the others never come to
    elif how == "c_code":
        sum(itertools.repeat(0))  # holds on to Python's lock
    while True:
        time.sleep(1)


def main(how: str, words: list[str]) -> int:
    num_loads = 0

    def listener(phase: str) -> None:
        nonlocal num_loads
        num_loads += phase == "load"
        late = num_loads > 4 if how == "loader" else place().step == 3
        if IS_MINE and late and phase == WHERE.get(how):
            hang(how)
        if how == "never" and phase == "evaluation":
            time.sleep(2.5)

    with listening(listener):
        return run_command(["train", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
