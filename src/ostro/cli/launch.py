"""`ostro launch slurm`: a run as a job of a cluster."""

from ostro.cli.arguments import Parser, explained, load_run
from ostro.core.errors import ConfigError, Problem
from ostro.core.redaction import redact
from ostro.distributed.launch import SlurmJob
from ostro.runtime.signals import Signals

_OPTIONS = {
    "partition": "NAME", "account": "NAME", "qos": "NAME", "time": "HH:MM:SS", "mem": "SIZE",
    "job_name": "NAME",
}  # fmt: skip


def launch(argv: list[str], signals: Signals) -> None:
    """`ostro launch slurm`: submit a run to SLURM, or with `--dry_run` print the script."""
    parser = Parser("launch", "slurm: train as a SLURM job, one process for each GPU.")
    parser.add_argument("where", choices=["slurm"])
    parser.add_config_path()
    parser.add_count("nodes", "machines; default 1", default=1)
    parser.add_count("gpus_per_node", "GPUs of each")
    parser.add_count("processes_per_node", "on machines without GPUs")
    parser.add_count("cpus_per_process", "cores for each process")
    about = "start all processes again after a failure, so often; default 0"
    parser.add_count("max_restarts", about, default=0, least=0)
    for name, metavar in _OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help="as sbatch has it")
    about = "any other option of sbatch, may be repeated"
    parser.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help=about)
    parser.add_argument("--dry_run", action="store_true", help="print the script, and stop")
    options, flags = parser.parse(argv)
    num_local = options.gpus_per_node or options.processes_per_node
    if (options.gpus_per_node is None) == (options.processes_per_node is None):
        advice = "give one of the two: --gpus_per_node 8"
        rule = "GPUs or processes of each machine must be known"
        raise ConfigError(Problem("--gpus_per_node, --processes_per_node", rule, advice))
    for word in flags:
        if redact(word) != word:
            advice = "write ${NAME} for an environment variable in its place"
            raise ConfigError(Problem(word, "would stand in the script of the job", advice))
    loaded = load_run(options.config_path, flags, trust=options.trust)
    explained(loaded, lambda: loaded.config.trainer.batch_plan(options.nodes * num_local))
    trust = ["--trust"] if options.trust else []
    named = {name: getattr(options, name) for name in _OPTIONS}
    named["job_name"] = named["job_name"] or "ostro"
    job = SlurmJob(
        ["ostro", "train", "--config_path", options.config_path, *trust, *flags],
        options.nodes,
        num_local,
        on_cpu=options.gpus_per_node is None,
        num_cpus=options.cpus_per_process,
        max_restarts=options.max_restarts,
        options=[
            *(f"{name.replace('_', '-')}={value}" for name, value in named.items() if value),
            *(option.removeprefix("--") for option in options.sbatch),
        ],
    )
    print(job.script() if options.dry_run else job.submit())
