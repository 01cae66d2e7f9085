"""Start the processes of a run: local ones through torch's elastic launcher, or a SLURM job."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as run_launcher

from ostro.core.errors import ConfigError
from ostro.distributed.launchers import PORT, slurm_address


def launch(
    command: Sequence[str], num_local: int, num_nodes: int, environ: Mapping[str, str]
) -> None:
    """Run a Python script and its arguments in `num_local` processes on each of the machines.

    Called on every machine. More than one needs MASTER_ADDR and NODE_RANK in the environment, or
    SLURM's variables. Ends the process with the workers' exit code when they fail.
    """
    words = [f"--nproc_per_node={num_local}", f"--nnodes={num_nodes}"]
    if num_nodes == 1:
        words.append("--standalone")
    else:
        node = environ.get("NODE_RANK", environ.get("SLURM_NODEID"))
        host, _, port = (slurm_address(environ) or f":{PORT}").rpartition(":")
        host, port = environ.get("MASTER_ADDR", host), environ.get("MASTER_PORT", port)
        if node is None or not host:
            raise ConfigError(_how_to(command, num_nodes))
        words += [f"--node_rank={node}", f"--master_addr={host}", f"--master_port={port}"]
    try:
        run_launcher(parse_args([*words, *command]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(2 if 2 in codes else 1)


def _how_to(command: Sequence[str], num_nodes: int) -> str:
    lines = [
        f"  MASTER_ADDR=<address of machine 0> NODE_RANK={node} python3 {' '.join(command)}"
        for node in range(num_nodes)
    ]
    rule = "each machine must know the first one's address and its own number"
    start = f"num_nodes = {num_nodes} (--num_nodes) - {rule} - start on each machine:"
    return "\n".join([start, *lines])


@dataclass(frozen=True)
class SlurmJob:
    """A run as a SLURM job: one process for each GPU, on all nodes."""

    command: Sequence[str]  # what each process runs, from `ostro` on
    num_nodes: int  # machines
    num_local: int  # processes on each machine, each with a GPU of its own unless `on_cpu`
    on_cpu: bool = False  # ask for no GPUs
    num_cpus: int | None = None  # CPU cores for each process; None leaves it to the cluster
    max_restarts: int = 0  # how often torchrun starts all again after a failure; 0: without it
    options: Sequence[str] = ()  # more options of sbatch, as `partition=gpu`

    def script(self) -> str:
        """The batch script. The job's number is the run's id, so a requeued job resumes."""
        restarts = self.max_restarts > 0
        tasks = 1 if restarts else self.num_local
        asked = [f"nodes={self.num_nodes}", f"ntasks-per-node={tasks}"]
        asked += [] if self.on_cpu else [f"gpus-per-node={self.num_local}"]
        if self.num_cpus:
            asked += [f"cpus-per-task={self.num_cpus * self.num_local // tasks}"]
        # SIGTERM two minutes before the end of the time: the run saves, and goes on when requeued.
        asked += ["output=%x-%j.log", "open-mode=append", "requeue", "signal=TERM@120"]
        lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in [*asked, *self.options])]
        lines += ["set -euo pipefail", 'export RUN_ID="${RUN_ID:-slurm-$SLURM_JOB_ID}"']
        if self.num_cpus:  # srun does not take it from the job
            lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]
        words = shlex.join(self.command)
        if restarts:
            first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            lines += [f'export MASTER_ADDR="{first}"']
            lines += ["export MASTER_PORT=$((61440 + SLURM_JOB_ID % 4096))"]
            launcher = (
                f"torchrun --nnodes={self.num_nodes} --nproc_per_node={self.num_local}"
                f" --max_restarts={self.max_restarts} --node_rank=$SLURM_NODEID"
                f" --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --no_python {words}"
            )
            words = f"bash -c {shlex.quote(launcher)}"
        lines.append(f"srun --kill-on-bad-exit=1 {words}")
        return "\n".join(lines) + "\n"

    def submit(self) -> str:
        """Hand the script to sbatch; returns what that says."""
        try:
            done = subprocess.run(
                ["sbatch"], input=self.script(), capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise ConfigError(
                "ostro launch slurm - there is no sbatch on this machine - run it on a login node"
                " of the cluster, or with --dry_run to see the script"
            ) from None
        if done.returncode:
            raise ConfigError(f"ostro launch slurm - sbatch refused the job: {done.stderr.strip()}")
        return done.stdout.strip()
