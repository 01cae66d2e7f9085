"""`ostro checkpoint ls | verify | prune | diff | average`."""

import sys
from collections.abc import Sequence
from datetime import datetime

from ostro import checkpoint as checkpoints
from ostro.cli.arguments import Parser
from ostro.cli.native import open_checkpoint
from ostro.core.errors import CheckpointError, ConfigError, Problem, did_you_mean
from ostro.core.redaction import redact
from ostro.core.units import ByteSize, format_bytes
from ostro.io.filesystem import is_folder
from ostro.runtime.signals import Signals

_USAGE = """usage: ostro checkpoint <what> ...

  ls PATH           every complete checkpoint at or below a folder, newest first
  verify PATH       compare every file of them with its checksum
  prune PATH        delete some: --keep_every STEPS --keep_last N --keep_bytes 200GB
  diff A B          settings, values and tensors that two of them do not have in common
  average A B ...   one with the mean of their weights, in --output DIR

A path is a folder, a file, or a URL.
"""


def checkpoint(argv: list[str], signals: Signals) -> None:
    """`ostro checkpoint`: look at checkpoints, and tidy them up."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return
    action = _ACTIONS.get(argv[0])
    if action is None:
        advice = did_you_mean(argv[0], _ACTIONS) or "`ostro checkpoint --help` lists them"
        raise ConfigError(f"ostro checkpoint {argv[0]} - no such command - {advice}")
    action(argv[1:])


def _ls(argv: Sequence[str]) -> None:
    parser = Parser("checkpoint ls", "List checkpoints, newest first.", None)
    parser.add_imports()
    parser.add_argument("path", metavar="PATH")
    found = _found(parser.parse(argv)[0].path)
    print(f"{'step':>9}  {'saved':19}  {'kind':9}  {'size':>9}  {'loss':>8}  {'run':12}  path")
    for entry in found:
        loss = checkpoints.open_entry(entry).values.get("eval_loss")
        shown = "" if loss is None else f"{loss:.4f}"
        saved = "-"  # a file of nanoGPT's does not say when
        if entry.timestamp:
            saved = datetime.fromtimestamp(entry.timestamp).isoformat(" ", "seconds")
        size = format_bytes(entry.bytes)
        print(f"{entry.step:>9}  {saved:19}  {_kind(entry):9}  {size:>9}  {shown:>8}"
              f"  {entry.run_id:12}  {redact(entry.path)}")  # fmt: skip
    print(f"{len(found)} checkpoints, {format_bytes(checkpoints.total_bytes(found))}")


def _verify(argv: Sequence[str]) -> None:
    parser = Parser("checkpoint verify", "Compare every file with its checksum.", None)
    parser.add_imports()
    parser.add_argument("path", metavar="PATH")
    path = parser.parse(argv)[0].path
    verdicts = []
    for verdict in checkpoints.verified(path):
        verdicts.append(verdict)
        line = f"intact   {verdict.path}"
        if verdict.fault:
            line = f"damaged  {verdict.fault}"
            if verdict.has_weights:
                line = f"weights  {verdict.fault}; the weights are intact"
        print(redact(line), flush=True)
    if not verdicts:
        raise _nothing(path)
    damaged = [verdict for verdict in verdicts if verdict.fault]
    num_weights = sum(verdict.has_weights for verdict in damaged)
    if damaged:
        usable = "sample, eval, export, benchmark and trainer.initialize_from take those"
        among = f", all but the weights of {num_weights} ({usable})" if num_weights else ""
        raise CheckpointError(
            f"{path} - {len(damaged)} of {len(verdicts)} checkpoints are damaged{among} - a run"
            " skips these when it resumes; delete them, or copy them here again"
        )


def _prune(argv: Sequence[str]) -> None:
    parser = Parser("checkpoint prune", "Delete checkpoints that were not asked for.", None)
    parser.add_imports()
    parser.add_argument("path", metavar="PATH")
    parser.add_count("keep_every", "permanent ones of these", metavar="STEPS")
    parser.add_count("keep_last", "and so many of the newest")
    parser.add_argument("--keep_bytes", metavar="SIZE", help="within so much, as 200GB, per run")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options, _ = parser.parse(argv)
    wishes = {name: getattr(options, name) for name in ("keep_every", "keep_last", "keep_bytes")}
    if set(wishes.values()) == {None}:
        advice = "give --keep_every, --keep_last, --keep_bytes, or several"
        raise ConfigError(f"ostro checkpoint prune - nothing says what to keep - {advice}")
    if options.keep_bytes is not None:
        try:
            wishes["keep_bytes"] = ByteSize.from_text(options.keep_bytes)
        except ValueError as error:
            problem = Problem("--keep_bytes", str(error), value=options.keep_bytes)
            raise ConfigError(problem) from None
    found = _found(options.path)
    runs = [[e for e in found if e.run_id == name] for name in {e.run_id: None for e in found}]
    doomed = [entry for run in runs for entry in checkpoints.to_prune(run, **wishes)]
    for entry in doomed:
        size, path = format_bytes(entry.bytes), redact(entry.path)
        print(f"{entry.step:>9}  {_kind(entry):9}  {size:>9}  {path}")
    size = format_bytes(checkpoints.total_bytes(doomed))
    print(f"{len(doomed)} of {len(found)} checkpoints to delete, {size}")
    if not doomed or not (options.yes or _agrees()):
        return
    for entry in doomed:
        checkpoints.delete(entry, "ostro checkpoint prune")
    print(f"deleted {len(doomed)} checkpoints, {size}")


def _agrees() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("ostro checkpoint prune - there is no terminal to ask on - add --yes")
    return input("delete them? [y/N] ").strip().lower() in ("y", "yes")


def _diff(argv: Sequence[str]) -> None:
    parser = Parser("checkpoint diff", "Say what two checkpoints do not have in common.", None)
    parser.add_imports()
    parser.add_argument("paths", metavar="PATH", nargs=2)
    first, second = (_open(path) for path in parser.parse(argv)[0].paths)
    print(redact(f"{first} -> {second}"))
    lines = list(map(str, checkpoints.differences(first, second)))
    print(redact("\n".join(lines)) or "no difference")


def _average(argv: Sequence[str]) -> None:
    about = "Write a checkpoint with the mean of the weights, in float64, of several."
    parser = Parser("checkpoint average", about, None)
    parser.add_imports()
    parser.add_argument("paths", metavar="PATH", nargs="+")
    parser.add_argument("--output", metavar="DIR", required=True, help="a folder not there yet")
    options, _ = parser.parse(argv)
    if is_folder(options.output):
        rule, advice = "is there already", "name a new folder, outside the run's own"
        raise ConfigError(Problem("--output", rule, advice, options.output))
    saved = [_open(path) for path in options.paths]
    newest = max(saved, key=lambda each: each.step)
    for each in saved:
        folder = str(each).rpartition("/")[0]
        if f"{options.output}/".startswith(f"{folder}/"):
            rule = f"a run that has its checkpoints in {folder} would go on from the average"
            raise ConfigError(Problem("--output", rule, "name a folder elsewhere", options.output))
    state = checkpoints.average(saved)
    checkpoints.write(options.output, state, step=newest.step, is_temporary=False)
    where = redact(f"{options.output}/step-{newest.step}")
    print(f"wrote {where}: the mean weights of {len(saved)} checkpoints")
    rest = ", ".join(group for group in state.tensors if group != "model") or "nothing"
    print(redact(f"not averaged, but of {newest}: {rest}, step, config.yaml, tokenizer"))


def _open(path: str):
    return open_checkpoint(path, "ostro checkpoint")


def _found(path: str) -> list[checkpoints.Entry]:
    found = checkpoints.entries(path)
    if not found:
        raise _nothing(path)
    return found


def _nothing(path: str) -> CheckpointError:
    return CheckpointError(f"{path} - no complete checkpoint there or below - give another path")


def _kind(entry: checkpoints.Entry) -> str:
    return ("temporary" if entry.is_temporary else "permanent") + ("*" if entry.is_best else "")


_ACTIONS = {"ls": _ls, "verify": _verify, "prune": _prune, "diff": _diff, "average": _average}
