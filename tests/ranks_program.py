"""A program of several ranks, for tests: `python ranks_program.py MODE` in each process."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from ostro.core.errors import ConfigError
from ostro.distributed import DistributedConfig, open_process_group
from ostro.distributed.launchers import find_rank_info
from ostro.runtime.entry_point import entry_point


def main(mode: str, signals: object) -> None:
    """Sum over the ranks again and again; `mode` says which of them fails, when and how."""
    rank = find_rank_info(os.environ).rank
    if mode == "all_refuse" or (mode == "rank_1_refuses" and rank == 1):
        raise ConfigError("trainer.sed = 3 - is not a setting")
    if mode == "sum":  # twice, as a program that trains twice does
        with open_process_group(DistributedConfig(), "cpu", False) as world:
            world.barrier()
    with open_process_group(DistributedConfig(), "cpu", False) as world:
        for round_number in range(1000 if mode != "sum" else 1):
            if round_number == 5 and rank == 1 and mode.startswith("rank_1"):
                Path("died").write_text(str(time.time()))
                if mode == "rank_1_is_killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if mode == "rank_1_raises":
                    raise ValueError("broken")
            if round_number == 5 and mode == "all_refuse_later":
                raise ConfigError("trainer.train_batch_size = 4 - must be divisible by 3")
            total = int(world.sum(torch.tensor(world.rank + 1)))
        sys.stdout.write(f"rank {rank} of {world.num_ranks} on {world.num_hosts}: {total}\n")


if __name__ == "__main__":
    sys.exit(entry_point(lambda signals: main(sys.argv[1], signals)))
