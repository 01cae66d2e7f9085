"""Who am I, how do I meet the others, and on which device: the processes of a run.

`trainer.distributed` says it explicitly; else the launcher does: torchrun, SLURM or MPI. Neither
is one process.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from ostro.core.errors import ConfigError, Problem
from ostro.distributed.config import DistributedConfig
from ostro.distributed.launchers import RankInfo, find_rank_info, visible_devices
from ostro.distributed.rendezvous import LostRankError, Rendezvous

Value = TypeVar("Value")
log = logging.getLogger("ostro")


@dataclass(frozen=True)
class World:
    """This process among those of the run. With one process every method is free."""

    device: torch.device
    """The device of this process."""
    rank: int = 0
    """Index of this process, from 0."""
    num_ranks: int = 1
    """Number of processes; each drives one device."""
    data_rank: int = 0
    """Which part of every batch is this process's."""
    num_data_ranks: int = 1
    """Into how many parts a batch is cut; fewer than processes where these share examples."""
    context_rank: int = 0
    """Which part of its sequences is this process's."""
    batch_group: dist.ProcessGroup | None = None
    """The processes that together have every token of a batch once; None is all."""
    local_rank: int | None = None
    """Index of this process on its machine, as the launcher says."""
    num_local: int | None = None
    """Processes on this machine, as the launcher says."""

    @property
    def num_hosts(self) -> int:
        """Machines of the run, as the launcher says; one where it does not."""
        return max(1, self.num_ranks // (self.num_local or self.num_ranks))

    @property
    def is_first(self) -> bool:
        """True for the rank that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over the ranks that have different tokens, in rank_info."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor, group=self.batch_group)
        return tensor

    def sum_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in rank_info."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: Value) -> Value:
        """The first rank's value, on all ranks."""
        if self.num_ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, on all ranks."""
        values = [value] * self.num_ranks
        if self.num_ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here. The hosts wait for each other, not for devices."""
        self.sum_all(torch.tensor(0))


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
        raise ConfigError(Problem("trainer.device", rule, f"use auto or one of: {present}", name))
    if require_accelerator and kind == "cpu":
        rule, advice = "no CUDA or MPS device was found", "set it to false to train on the CPU"
        raise ConfigError(Problem("trainer.require_accelerator", rule, advice, "true"))
    return torch.device(name)


@contextlib.contextmanager
def open_process_group(
    config: DistributedConfig,
    device: str,
    require_accelerator: bool,
    agree: Callable[[Rendezvous], None] = lambda rendezvous: None,
) -> Iterator[World]:
    """Meet the other processes for the length of a `with` block; see `join_process_group`.

    Raises `LostRankError` in place of the error with which an exchange breaks off.
    """
    world = join_process_group(config, device, require_accelerator, agree=agree)
    rendezvous, failed = Rendezvous.current if world.num_ranks > 1 else None, False
    try:
        yield world
    except Exception as error:
        failed = rendezvous is not None
        if rendezvous is not None and (said := rendezvous.explain(error)) is not error:
            raise said from error
        raise
    finally:
        # After an error the connections stay until this process ends: the others must not be cut
        # off, and complain, before it has said what went wrong. DeepSpeed makes a group of one too.
        if dist.is_initialized() and not failed:
            dist.destroy_process_group()


def join_process_group(
    config: DistributedConfig,
    device: str,
    require_accelerator: bool,
    environ: Mapping[str, str] = os.environ,
    agree: Callable[[Rendezvous], None] = lambda rendezvous: None,
) -> World:
    """Meet the other processes and pick this one's device: `cuda` is one GPU for each process.

    `agree` is called when all have met, before they make a process group: it may find that they
    do not belong together.
    """
    rank_info = rank_info_of(config, environ)
    rank, num_ranks = rank_info.rank or 0, rank_info.num_ranks
    picked = pick_device(device, require_accelerator)
    if picked.type == "cuda" and (num_ranks > 1 or picked.index is None):
        picked = torch.device("cuda", _gpu(config, rank_info, environ))
    if config.backend == "nccl" and picked.type != "cuda":
        rule = f"nccl joins CUDA devices only, and this process uses {picked.type}"
        advice = "use auto or gloo"
        raise ConfigError(Problem("trainer.distributed.backend", rule, advice, config.backend))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if num_ranks > 1:
        cuda = config.backend if config.backend != "auto" else "nccl"
        if (
            Rendezvous.current is None or Rendezvous.current.rank_info != rank_info
        ):  # else it was here before
            Rendezvous.current = Rendezvous(rank_info, config.timeout)
        store = Rendezvous.current.gather(config.timeout)
        agree(Rendezvous.current)
        try:
            dist.init_process_group(
                f"cpu:gloo,cuda:{cuda}" if picked.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=num_ranks,
                timeout=config.timeout,
            )
        except RuntimeError as error:
            raise LostRankError(
                f"all {num_ranks} processes came, but they cannot connect to each other ({error})"
                " - set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface"
                " that joins the hosts, as `ip addr` names it"
            ) from error
    return World(
        picked,
        rank,
        num_ranks,
        data_rank=rank,
        num_data_ranks=num_ranks,
        local_rank=rank_info.local_rank,
        num_local=rank_info.num_local,
    )


def _gpu(config: DistributedConfig, rank_info: RankInfo, environ: Mapping[str, str]) -> int:
    """Index of this process's GPU among those that torch sees."""
    asked, count = config.local_device_ids, torch.cuda.device_count()
    local = rank_info.rank or 0 if rank_info.local_rank is None else rank_info.local_rank
    if asked is not None:
        index = asked[0] if isinstance(asked, list) else asked
    elif rank_info.local_rank is None:
        index = local % count
    elif rank_info.launcher == "torchrun" or not (share := visible_devices(environ, rank_info)):
        index = local
    else:
        index = local * len(share) if count > 1 else 0  # SLURM may show each task its own alone
        if len(share) > 1:
            log.warning("this process has %d GPUs and drives one: start one for each", len(share))
    if index >= count:
        rule = f"process {rank_info.rank} would use GPU {index}; here are {count}"
        advice = "start fewer processes, or use trainer.device: cpu"
        raise ConfigError(Problem("trainer.device", rule, advice, "cuda"))
    return index


def rank_info_of(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> RankInfo:
    """Rank and number of ranks, by the settings, then the launcher; `ConfigError` at odds."""
    found, problems = find_rank_info(environ), []
    said = {"process_id": found.rank, "num_processes": found.num_ranks}
    merged = {}
    for (name, value), variable in zip(said.items(), found.names, strict=True):
        asked = getattr(config, name)
        if found.launcher and None not in (value, asked) and value != asked:
            rule = f"the launcher says {variable} = {value}"
            setting = f"trainer.distributed.{name}"
            problems.append(Problem(setting, rule, "remove the setting", str(asked)))
        merged[name] = value if asked is None else asked
    num_ranks, rank = merged["num_processes"], merged["process_id"]
    address = config.coordinator_address or found.address
    if num_ranks > 1 and (rank is None or (config.process_id is None and found.launcher is None)):
        rule = f"is missing, and there are num_processes = {num_ranks}"
        advice = "give each process its number from 0, or start them with torchrun"
        problems.append(Problem("trainer.distributed.process_id", rule, advice, "null"))
    if num_ranks > 1 and address is None:
        rule = "is missing, and there is no MASTER_ADDR"
        advice = "give host:port of the first process, or start them with torchrun"
        problems.append(Problem("trainer.distributed.coordinator_address", rule, advice, "null"))
    if problems:
        raise ConfigError(problems)
    origin = None
    if config.coordinator_address is None:
        origin = "MASTER_ADDR" if "MASTER_ADDR" in environ else found.launcher
    return replace(found, rank=rank, num_ranks=num_ranks, address=address, address_origin=origin)
