"""Start the local workers of a run through torch's elastic launcher."""

import sys
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as run_launcher

from ostro.errors import ConfigError

PORT = "29500"


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
        node, address = environ.get("NODE_RANK", environ.get("SLURM_NODEID")), _address(environ)
        if node is None or address is None:
            raise ConfigError(_how_to(command, num_nodes))
        port = environ.get("MASTER_PORT", PORT)
        words += [f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}"]
    try:
        run_launcher(parse_args([*words, *command]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(2 if 2 in codes else 1)


def _address(environ: Mapping[str, str]) -> str | None:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    return nodes.partition(",")[0] if nodes and "[" not in nodes else None


def _how_to(command: Sequence[str], num_nodes: int) -> str:
    lines = [
        f"  MASTER_ADDR=<address of machine 0> NODE_RANK={node} python3 {' '.join(command)}"
        for node in range(num_nodes)
    ]
    rule = "each machine must know the first one's address and its own number"
    start = f"num_nodes = {num_nodes} (--num_nodes) - {rule} - start on each machine:"
    return "\n".join([start, *lines])
