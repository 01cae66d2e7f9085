"""`ostro <command>`: dispatch."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ostro import __version__
from ostro.core.errors import ConfigError, did_you_mean

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


COMMANDS = {
    "train": "ostro.cli.native:train",
    "launch": "ostro.cli.launch:launch",
    "eval": "ostro.cli.native:evaluate",
    "benchmark": "ostro.cli.benchmark:benchmark",
    "sample": "ostro.cli.native:sample",
    "export": "ostro.cli.export:export",
    "why": "ostro.cli.why:why",
    "plot": "ostro.cli.plot:plot",
    "cache": "ostro.cli.native:cache",
    "config": "ostro.cli.native:config",
    "schedule": "ostro.cli.native:schedule",
    "plan": "ostro.cli.native:plan",
    "checkpoint": "ostro.cli.checkpoint:checkpoint",
    "verify-resume": "ostro.cli.doctor:verify_resume",
    "chaos": "ostro.cli.doctor:chaos",
    "bench": "ostro.cli.doctor:bench",
}
"""Where each command is. It is imported once it is asked for: torch alone takes seconds."""
_ENTRY_POINT = "ostro.runtime.entry_point:entry_point"
_LEAVE_AFTER = "ostro.runtime.entry_point:leave_after"
_RECOGNISING = "ostro.cli.recognise:recognising"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv` and exit with its code.

    Without one the process's own arguments are taken, and nothing of it is left to run afterwards.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if argv is None and not _is_question(words):
        _load(_LEAVE_AFTER)(lambda: run_command(words))
    sys.exit(run_command(words))


def run_command(argv: list[str]) -> int:
    """Run a command; 0, or 2 for a mistake of the user's, 130 and 143 for signals."""
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if _is_question(argv):
        print(f"ostro {__version__}" if argv == ["--version"] else _USAGE)
        return 0 if argv else 2
    return _load(_ENTRY_POINT)(lambda signals: _dispatch(argv[0], argv[1:], signals), debug=debug)


def _is_question(argv: Sequence[str]) -> bool:
    """Whether this module answers by itself, without importing torch."""
    return not argv or argv[0] in ("-h", "--help", "help") or list(argv) == ["--version"]


def _dispatch(name: str, argv: list[str], signals: Any) -> None:
    if name not in COMMANDS:
        advice = did_you_mean(name, COMMANDS) or "`ostro --help` lists them"
        raise ConfigError(f"ostro {name} - no such command - {advice}")
    command = _load(COMMANDS[name])
    if (name, argv[:1]) == ("config", ["translate"]):  # it takes the files of others
        return command(argv, signals)
    with _load(_RECOGNISING)(argv, "native"):
        command(argv, signals)


def _load(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
