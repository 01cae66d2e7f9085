"""Who am I, and on which device: the processes of a run and their devices.

One process is the whole run for now; the settings that let several meet are read and checked
here, and a configuration that asks for more than one process is refused instead of ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ostro.errors import ConfigError, Problem


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run meet. Everything null is one process."""

    coordinator_address: str | None = None
    """`host:port` of the first process; null takes MASTER_ADDR and MASTER_PORT, or SLURM's."""
    num_processes: int | None = None
    """How many processes make up the run; null is what the launcher says, else one."""
    process_id: int | None = None
    """Index of this process, from 0; null is what the launcher says."""
    local_device_ids: int | list[int] | None = None
    """Devices of this process; null splits CUDA_VISIBLE_DEVICES over the local processes."""

    def problems(self) -> Iterator[Problem]:
        if self.num_processes is not None and self.num_processes != 1:
            yield Problem(
                "num_processes",
                "this version trains in one process",
                "remove the setting, or set it to 1",
            )
        if self.process_id not in (None, 0):
            yield Problem("process_id", "must be below num_processes = 1", "remove the setting")


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster that tokenises a corpus when a run spans hosts.

    A run on one host tokenises in a pool of local processes and never starts Ray.
    """

    address: str | None = None
    """Address of a running cluster; null starts one where one is needed."""
    start_workers: bool = True
    """Start the Ray workers on the hosts of the run; false expects them to be there."""
    auto_start_cluster: bool = True
    """Start a cluster of the machines of the run when it spans hosts."""

    def problems(self) -> Iterator[Problem]:
        if self.address is not None:
            yield Problem(
                "address",
                "tokenising over a Ray cluster is not available in this version",
                "remove the setting: local processes do the same work",
            )


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    """Index of this process, from 0."""
    num_ranks: int
    """Number of processes; each drives one device."""
    device: torch.device
    """The device of this process."""


def pick_device(name: str, require_accelerator: bool = False) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; anything else is a torch device that must exist."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = name.partition(":")[0]
    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": has_mps}
    if not known.get(kind, False):
        present = ", ".join(k for k, there in known.items() if there)
        rule = "this machine has no such device" if kind in known else "unknown kind of device"
        problem = Problem("trainer.device", rule, f"use auto or one of: {present}", value=name)
        raise ConfigError(problem)
    if require_accelerator and kind == "cpu":
        problem = Problem(
            "trainer.require_accelerator",
            "no CUDA or MPS device was found",
            "set it to false to train on the CPU",
            value="true",
        )
        raise ConfigError(problem)
    return torch.device(name)


def join(config: DistributedConfig, device: str, require_accelerator: bool) -> World:
    """Meet the other processes (none yet) and pick this one's device."""
    return World(rank=0, num_ranks=1, device=pick_device(device, require_accelerator))
