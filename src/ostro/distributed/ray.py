"""A Ray cluster that tokenises: one that runs, or one that the hosts of a run start."""

import contextlib
import importlib.util
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ostro.core.errors import ConfigError, Problem
from ostro.distributed.process_group import World

log = logging.getLogger("ostro")


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
            if address and self.start_workers and world.local_rank == 0 and not world.is_first:
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
