"""Which process of a run this is, read from what a launcher has put into the environment.

Pure functions of an environment; nothing is started or connected here. `torchrun` comes first,
then SLURM's `srun`, then MPI, else there is one process.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, repeat

from ostro.core.errors import ConfigError, Problem
from ostro.core.units import expand_braces

PORT = 29500
"""Port of the first process where nothing says another: torchrun's own default."""

_MPI = (  # rank, number of ranks, both on the host: Open MPI, MVAPICH 2 and 3; MPICH, Intel MPI
    *(
        tuple(f"{name}_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        for name in ("OMPI", "MV2", "MVP")
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class RankInfo:
    """A process among those of its run, as the launcher says. The default is a run of one."""

    launcher: str | None = None
    """`torchrun`, `SLURM` or `MPI`; None: no launcher started this process."""
    rank: int | None = 0
    """Index of this process, from 0. None: there are several and nothing says which this is."""
    num_ranks: int = 1
    """Processes of the run."""
    local_rank: int | None = None
    """Index of this process on its host."""
    num_local: int | None = None
    """Processes on this host."""
    address: str | None = None
    """`host:port` where the processes meet."""
    hosts: tuple[str, ...] = ()
    """The host of each rank, where the launcher tells."""
    names: tuple[str, str] = ("RANK", "WORLD_SIZE")
    """The variables that rank and number of ranks were read from, for messages."""
    has_agent: bool = False
    """Whether a launcher that outlives this process keeps the store they meet in."""
    attempt: int = 0
    """How often that launcher has restarted the processes."""
    address_origin: str | None = None
    """Where the address comes from, if not from the settings; for messages."""


def find_rank_info(environ: Mapping[str, str]) -> RankInfo:
    """This process's rank, as its launcher says; `ConfigError` where a variable is no number."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        if (found := _slurm(environ) or _mpi(environ)) is not None:
            return found
        if "WORLD_SIZE" not in environ:
            return RankInfo(address=_master(environ))
    return RankInfo(
        "torchrun",
        _number(environ, "RANK"),
        _number(environ, "WORLD_SIZE") or 1,
        _number(environ, "LOCAL_RANK"),
        _number(environ, "LOCAL_WORLD_SIZE"),
        _master(environ),
        has_agent=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT") or 0,
    )


def slurm_address(environ: Mapping[str, str]) -> str | None:
    """`host:port` of a SLURM job: its first node, and a port that its number gives."""
    nodes = slurm_nodes(environ)
    job = _number(environ, "SLURM_JOB_ID", "SLURM_JOBID")
    return f"{nodes[0]}:{61440 + (job or 0) % 4096}" if nodes else None


def slurm_nodes(environ: Mapping[str, str]) -> list[str]:
    """The nodes of the job step, else of the job; `n[08-10,12]` is n08, n09, n10, n12."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    text = next((environ[name] for name in names if environ.get(name)), "")
    words = re.findall(r"(?:\[[^]]*\]|[^,\[])+", text)
    return [node for word in words for node in expand_braces(_with_braces(word))]


def _with_braces(word: str) -> str:
    def braces(match: re.Match[str]) -> str:
        parts = re.sub(r"(\d+)-(\d+)", r"{\1..\2}", match[1])
        return f"{{{parts}}}" if "," in parts else parts

    return re.sub(r"\[([^]]*)\]", braces, word)


def visible_devices(environ: Mapping[str, str], rank_info: RankInfo) -> list[str] | None:
    """This process's share of CUDA_VISIBLE_DEVICES, which the processes of a host split evenly.

    None where the variable or the number of processes is not known. A single device is this
    process's own: SLURM may show each task its GPU alone.
    """
    listed = [part for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if not listed or rank_info.num_local is None:
        return None
    if len(listed) == 1:
        return listed
    size, rest = divmod(len(listed), rank_info.num_local)
    if rest:
        rule = (
            f"{rank_info.num_local} processes on this host cannot share {len(listed)} GPUs evenly"
        )
        advice = "start as many as there are GPUs, or set trainer.distributed.local_device_ids"
        raise ConfigError(Problem("CUDA_VISIBLE_DEVICES", rule, advice, ",".join(listed)))
    start = (rank_info.local_rank or 0) * size
    return listed[start : start + size]


def _slurm(environ: Mapping[str, str]) -> RankInfo | None:
    """The task of `srun`. The shell of a job has a task's variables too, but is one process."""
    in_step = "SLURM_STEP_NODELIST" in environ or "SLURM_STEP_NUM_TASKS" in environ
    in_script = environ.get("ENVIRONMENT") == "BATCH" and not in_step
    counted = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    num_ranks = _number(environ, counted) or 1
    if "SLURM_PROCID" not in environ or in_script or num_ranks == 1:
        return None
    nodes = slurm_nodes(environ)
    written = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    tasks = list(
        chain.from_iterable(
            repeat(int(count), int(times or 1))
            for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", written)
        )
    )
    by_node = dict(zip(nodes, tasks, strict=False))
    in_blocks = environ.get("SLURM_DISTRIBUTION", "block").startswith("block")
    hosts = tuple(node for node, count in by_node.items() for _ in range(count))
    return RankInfo(
        "SLURM",
        _number(environ, "SLURM_PROCID"),
        num_ranks,
        _number(environ, "SLURM_LOCALID"),
        by_node.get(environ.get("SLURMD_NODENAME", ""), tasks[0] if len(set(tasks)) == 1 else None),
        _master(environ) or slurm_address(environ),
        hosts if in_blocks and len(hosts) == num_ranks else (),
        ("SLURM_PROCID", counted),
    )


def _mpi(environ: Mapping[str, str]) -> RankInfo | None:
    for rank, size, local_rank, local_size in _MPI:
        if rank in environ and (num_ranks := _number(environ, size) or 1) > 1:
            num_local = _number(environ, local_size)
            here = f"127.0.0.1:{environ.get('MASTER_PORT', PORT)}"
            return RankInfo(
                "MPI",
                _number(environ, rank),
                num_ranks,
                _number(environ, local_rank),
                num_local,
                _master(environ) or (here if num_local == num_ranks else None),
                names=(rank, size),
            )
    return None


def _master(environ: Mapping[str, str]) -> str | None:
    if "MASTER_ADDR" not in environ:
        return None
    return f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', PORT)}"


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return None
    if not environ[name].strip().isdigit():
        rule = "must be a whole number: the launcher sets it"
        raise ConfigError(Problem(name, rule, "unset it, or start with torchrun", environ[name]))
    return int(environ[name])
