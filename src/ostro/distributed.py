"""Who am I, how do I meet the others, and on which device: the processes of a run.

`torchrun` and its like say it in the environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT); `trainer.distributed` says it explicitly. Neither is one process.
"""

import contextlib
import importlib.util
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from ostro.errors import ConfigError, Problem

log = logging.getLogger("ostro")

Value = TypeVar("Value")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run meet. Null is what the launcher says, else one process."""

    coordinator_address: str | None = None
    """`host:port` of the first process; null takes MASTER_ADDR and MASTER_PORT."""
    num_processes: int | None = None
    """How many processes make up the run; null is what the launcher says, else one."""
    process_id: int | None = None
    """Index of this process, from 0; null is what the launcher says."""
    local_device_ids: int | list[int] | None = None
    """Devices of this process; null splits CUDA_VISIBLE_DEVICES over the local processes."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Library of the collectives: NCCL for CUDA devices, gloo for all others."""

    def problems(self) -> Iterator[Problem]:
        if self.num_processes is not None and self.num_processes < 1:
            yield Problem("num_processes", "must be at least 1")
        if self.process_id is not None:
            count = self.num_processes or 1
            if not 0 <= self.process_id < count:
                yield Problem("process_id", f"must be at least 0 and below num_processes = {count}")
        if self.coordinator_address is not None and ":" not in self.coordinator_address:
            yield Problem("coordinator_address", "must be host:port", "for example 10.0.0.1:29500")


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster that tokenises a corpus when a run spans hosts or names a cluster.

    A run on one host that names none tokenises with local workers and never starts Ray.
    """

    address: str | None = None
    """A running cluster: `host:port` or `auto` on one of its machines, `ray://host:port` from
    elsewhere; null starts one where one is needed."""
    start_workers: bool = True
    """Start the Ray workers on the hosts of the run; false starts the head only, and expects that
    you start the workers."""
    auto_start_cluster: bool = True
    """Start a cluster of the machines of the run when it spans hosts and Ray is installed."""

    def problems(self) -> Iterator[Problem]:
        if self.address not in (None, "auto") and not re.fullmatch(r".*[^:]:\d+", self.address):
            yield Problem("address", "must be host:port, ray://host:port or auto")

    @contextlib.contextmanager
    def cluster(self, world: "World") -> Iterator[str | None]:
        """The address of the cluster to tokenise on, started if need be for the length of a `with`
        block; None where local workers do it. All ranks enter and leave together."""
        if self.address is not None or world.num_hosts == 1 or not self.auto_start_cluster:
            yield self.address
            return
        with contextlib.ExitStack() as nodes:
            address = None
            if world.is_first and importlib.util.find_spec("ray"):
                import ray

                with socket.create_server(("", 0)) as free:
                    port = free.getsockname()[1]
                head = ("--head", f"--port={port}", "--include-dashboard=false")
                nodes.enter_context(_ray_node(*head))
                address = f"{ray.util.get_node_ip_address()}:{port}"
            address = world.from_first(address)
            if address is None and world.is_first:
                log.warning("Ray is not installed: every host tokenises for itself")
            is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
            if address and self.start_workers and is_first_here and not world.is_first:
                nodes.enter_context(_ray_node(f"--address={address}"))
            world.barrier()
            try:
                yield address
            finally:
                world.barrier()


@contextlib.contextmanager
def _ray_node(*options: str) -> Iterator[None]:
    """This host as a node of a Ray cluster."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
    said = ""
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet
    ) as process:
        try:
            assert process.stdout is not None, "it is a pipe"
            for line in process.stdout:
                said = line.strip() or said
                if "Ray runtime started" in line:
                    break
            else:
                advice = "set trainer.ray.auto_start_cluster: false to do without"
                raise ConfigError(Problem("trainer.ray", f"Ray did not start: {said}", advice))
            yield
        finally:
            process.terminate()


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

    @property
    def num_hosts(self) -> int:
        """Machines of the run, as the launcher says."""
        return max(1, self.num_ranks // int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks)))

    @property
    def is_first(self) -> bool:
        """True for the rank that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over the ranks that have different tokens, in place."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor, group=self.batch_group)
        return tensor

    def sum_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. The hosts wait for each other, not for devices."""
        if self.num_ranks == 1:
            return flag
        return bool(self.sum_all(torch.tensor(int(flag))))

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
        """Wait until every rank is here."""
        self.any(False)


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


@contextlib.contextmanager
def joined(config: DistributedConfig, device: str, require_accelerator: bool) -> Iterator[World]:
    """Meet the other processes for the length of a `with` block; see `join`."""
    world = join(config, device, require_accelerator)
    try:
        yield world
    finally:
        if dist.is_initialized():  # DeepSpeed makes a group even of one process
            dist.destroy_process_group()


def join(
    config: DistributedConfig,
    device: str,
    require_accelerator: bool,
    environ: Mapping[str, str] = os.environ,
) -> World:
    """Meet the other processes and pick this one's device: `cuda` is one GPU for each process."""
    rank, num_ranks = _place(config, environ)
    picked = pick_device(device, require_accelerator)
    if picked.type == "cuda" and num_ranks > 1:
        local = int(environ.get("LOCAL_RANK", rank % torch.cuda.device_count()))
        if local >= torch.cuda.device_count():
            rule = f"process {rank} would use GPU {local}; here are {torch.cuda.device_count()}"
            advice = "start fewer processes, or use trainer.device: cpu"
            raise ConfigError(Problem("trainer.device", rule, advice, device))
        picked = torch.device("cuda", local)
    if config.backend == "nccl" and picked.type != "cuda":
        rule = f"nccl joins CUDA devices only, and this process uses {picked.type}"
        advice = "use auto or gloo"
        raise ConfigError(Problem("trainer.distributed.backend", rule, advice, config.backend))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if num_ranks > 1:
        cuda = config.backend if config.backend != "auto" else "nccl"
        address = config.coordinator_address
        dist.init_process_group(
            f"cpu:gloo,cuda:{cuda}" if picked.type == "cuda" else "gloo",
            init_method=f"tcp://{address}" if address else "env://",
            rank=rank,
            world_size=num_ranks,
        )
    return World(picked, rank, num_ranks, data_rank=rank, num_data_ranks=num_ranks)


def _place(config: DistributedConfig, environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of ranks; `ConfigError` where settings and launcher disagree."""
    launched = {"num_processes": "WORLD_SIZE", "process_id": "RANK"}
    values, problems = {}, []
    for name, variable in launched.items():
        said = int(environ[variable]) if variable in environ else None
        asked = getattr(config, name)
        if said is not None and asked is not None and said != asked:
            rule = f"the launcher says {variable} = {said}"
            place = f"trainer.distributed.{name}"
            problems.append(Problem(place, rule, "remove the setting", str(asked)))
        values[name] = said if asked is None else asked
    num_ranks = values["num_processes"] or 1
    if num_ranks > 1 and values["process_id"] is None:
        rule = f"is missing, and there are num_processes = {num_ranks}"
        advice = "give each process its number from 0, or start them with torchrun"
        problems.append(Problem("trainer.distributed.process_id", rule, advice, "null"))
    if num_ranks > 1 and not config.coordinator_address and "MASTER_ADDR" not in environ:
        rule = "is missing, and there is no MASTER_ADDR"
        advice = "give host:port of the first process, or start them with torchrun"
        problems.append(Problem("trainer.distributed.coordinator_address", rule, advice, "null"))
    if problems:
        raise ConfigError(problems)
    return values["process_id"] or 0, num_ranks
