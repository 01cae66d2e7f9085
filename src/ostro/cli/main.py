"""`ostro <command>`: dispatch."""

import sys
from collections.abc import Callable, Sequence

from ostro.cli.benchmark import benchmark
from ostro.cli.checkpoint import checkpoint
from ostro.cli.doctor import bench, chaos, verify_resume
from ostro.cli.export import export
from ostro.cli.launch import launch
from ostro.cli.native import cache, config, evaluate, plan, sample, schedule, train
from ostro.cli.plot import plot
from ostro.cli.recognise import recognising
from ostro.cli.why import why
from ostro.core.errors import ConfigError, did_you_mean
from ostro.runtime.entry_point import entry_point, leave_after
from ostro.runtime.signals import Signals

_USAGE = """usage: ostro <command> [--config_path FILE] [--setting.name value ...]

commands:
  train       train a model
  launch      slurm: train on a cluster
  eval        evaluate a checkpoint on validation sets
  benchmark   score a checkpoint on benchmarks of lm-evaluation-harness
  sample      let a checkpoint write
  export      write a checkpoint as another program reads it
  plot        draw the losses of runs
  why         the documents of a batch, and the loss of each
  cache       tokenise the data of a configuration, and stop
  config      show: the resolved settings and where each came from; schema: for editors;
              translate: a configuration of nanoGPT or GPT-3 style files; diff: what one
              configuration, run or checkpoint changes of another
  plan        sharding: where every parameter lies on so many devices; step: what each holds
              and sends in an update
  schedule    the learning rate, evaluations and permanent checkpoints by step
  checkpoint  ls, verify, prune, diff and average checkpoints
  verify-resume
              kill and resume a run of this configuration; compare it with one that nothing hit
  chaos       hit runs of it in every phase, in every way; see that nothing is lost
  bench       how fast a configuration trains here, and where the time goes

`ostro <command> --help` lists what it takes. `--debug` shows tracebacks.
"""


COMMANDS: dict[str, Callable[[list[str], Signals], None]] = {
    "train": train, "launch": launch, "eval": evaluate, "benchmark": benchmark, "sample": sample,
    "export": export, "why": why, "plot": plot, "cache": cache, "config": config,
    "schedule": schedule, "plan": plan, "checkpoint": checkpoint, "verify-resume": verify_resume,
    "chaos": chaos, "bench": bench,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv` and exit with its code.

    Without one the process's own arguments are taken, and nothing of it is left to run afterwards.
    """
    if argv is None:
        leave_after(lambda: run_command(sys.argv[1:]))
    sys.exit(run_command(list(argv)))


def run_command(argv: list[str]) -> int:
    """Run a command; 0, or 2 for a mistake of the user's, 130 and 143 for signals."""
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0 if argv else 2
    return entry_point(lambda signals: _dispatch(argv[0], argv[1:], signals), debug=debug)


def _dispatch(name: str, argv: list[str], signals: Signals) -> None:
    command = COMMANDS.get(name)
    if command is None:
        advice = did_you_mean(name, COMMANDS) or "`ostro --help` lists them"
        raise ConfigError(f"ostro {name} - no such command - {advice}")
    if (name, argv[:1]) == ("config", ["translate"]):  # it takes the files of others
        return command(argv, signals)
    with recognising(argv, "native"):
        command(argv, signals)


if __name__ == "__main__":
    main()
