"""How the processes of a run meet, as a user says it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from ostro.core.errors import Problem, at_least


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run meet. Null is what the launcher says, else one process."""

    coordinator_address: str | None = None
    """`host:port` of the first process; null takes MASTER_ADDR and MASTER_PORT, else the first
    node of the SLURM job."""
    num_processes: int | None = None
    """How many processes make up the run; null is what the launcher says, else one."""
    process_id: int | None = None
    """Index of this process, from 0; null is what the launcher says."""
    local_device_ids: int | list[int] | None = None
    """Device of this process, counted among those it sees; null splits CUDA_VISIBLE_DEVICES over
    the processes of the host and takes the first."""
    timeout: timedelta = timedelta(minutes=30)
    """How long to wait for the other processes, when they meet and in each exchange."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Library of the collectives: NCCL for CUDA devices, gloo for all others."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(1, self, "num_processes")
        if self.process_id is not None:
            count = self.num_processes or 1
            if not 0 <= self.process_id < count:
                yield Problem("process_id", f"must be at least 0 and below num_processes = {count}")
        address = self.coordinator_address
        if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
            yield Problem("coordinator_address", "must be host:port", "for example 10.0.0.1:29500")
        if isinstance(self.local_device_ids, list) and len(self.local_device_ids) != 1:
            rule = "a process drives one device"
            yield Problem("local_device_ids", rule, "start one process for each, with its own")
        if self.timeout <= timedelta():
            yield Problem("timeout", "must be longer than nothing", "for example 30m")
