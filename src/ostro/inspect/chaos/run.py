"""`ostro chaos`: hit a run hundreds of times, in every phase, and see that nothing is lost.

Every fault strikes a run of its own. That run is then started again, as its user would, until it
is done, and what it leaves has to be, bit for bit, what a run left that nothing hit.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ostro.checkpoint import CheckpointInterval, Saved, find_latest
from ostro.config import dump_yaml
from ostro.core.errors import OstroError
from ostro.inspect.chaos import faults
from ostro.inspect.chaos.faults import DAMAGES, FRESH, KILLED_IN, Fault
from ostro.inspect.chaos.scenarios import Change, Scenario, stage, unchanged
from ostro.inspect.children import Ended, Orders, quiet, train
from ostro.inspect.differences import read_history
from ostro.lm_config import TrainLmConfig, replace_trainer

KINDS: dict[str, tuple[str, ...]] = {
    "kill -9": (*FRESH, *KILLED_IN),
    "SIGTERM": (*FRESH, *KILLED_IN),
    "full disk": ("save",),
    "truncated file": ("backward",),
    "flipped bit": ("backward",),
    "slow rank": ("data", "forward", "backward", "update"),
    "dead rank": ("data", "forward", "backward", "update"),
    "stalled rank": ("data", "forward", "backward", "update"),
    "NaN gradient": ("stop", "skip", "roll back"),
    "bad record": ("stop", "skip"),
    "unreachable tracker": ("start", "log"),
}
"""What is injected, and where."""
EVERY = 3
"""Updates between two checkpoints."""
_MARKER = re.compile(r"doctor: (.*); complete: (\S+),.* main thread in (\S+) of step (\d+)")


class ChaosError(OstroError):
    """Something was lost."""

    exit_code = 1


@dataclass
class Row:
    """A line of the table: all faults of one kind in one place."""

    injected: int = 0
    lost: int = 0  # the most updates that had to be made again
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What a run leaves that nothing hits."""

    files: Mapping[str, str]  # checksums of weights, optimizer and guards
    history: Mapping[int, Mapping[str, object]]
    counts: Mapping[str, int]  # how often each phase began


class Campaign:
    """Faults on one configuration."""

    def __init__(self, config: TrainLmConfig, folder: Path, num_steps: int, seed: int):
        self._config = replace_trainer(
            config, num_train_steps=num_steps, steps_per_eval=EVERY + 1, load_checkpoint=None
        )
        self._folder, self._seed = folder, seed
        self._references: dict[str, Reference] = {}

    def run(
        self,
        num_each: int,
        kinds: Mapping[str, Sequence[str]],
        report: Callable[[str], None] = print,
    ) -> dict[tuple[str, str], Row]:
        """Inject `num_each` faults into every place of every kind; returns the table."""
        rows: dict[tuple[str, str], Row] = {}
        started, hits = time.monotonic(), faults.plan(kinds, self._count, num_each, self._seed)
        for number, fault in enumerate(hits):
            row = rows.setdefault((fault.kind, fault.where), Row())
            folder = self._folder / f"{number:04}"
            row.injected += 1
            try:
                lost = self._trial(fault, folder)
                row.lost = max(row.lost, lost)
                shutil.rmtree(folder)
            except ChaosError as error:
                row.failures.append(f"{folder}: {fault}: {error}")
                report(f"failed: {row.failures[-1]}")
            if (number + 1) % 25 == 0:
                report(f"{number + 1} of {len(hits)} faults, {time.monotonic() - started:.0f} s")
        return rows

    def _count(self, kind: str, where: str) -> int:
        """How often a phase begins; what is no phase strikes at one of the backward passes."""
        if where == "import":
            return int(self._import(0, "", 0, [])[1])
        counts = self._reference(_like(kind, where)).counts
        return counts.get(where) or counts["backward"]

    def _reference(self, name: str, change: Change = unchanged) -> Reference:
        """What an undisturbed run leaves, with a change of its settings; made when needed."""
        if name not in self._references:
            folder, counted = self._folder / f"reference {name}", faults.Counted()
            folder.mkdir(parents=True)

            @contextlib.contextmanager
            def counting() -> Iterator[None]:
                yield
                (folder / "counts.json").write_text(json.dumps(counted.counts))

            orders = [Orders(counted, wrapper=counting)] + [Orders()] * (name == "two")
            config = change(self._in(folder, compiles=name == "compiled"))
            ended = train(config, folder / "output.log", orders)
            if any(one.code for one in ended):
                raise ChaosError(f"the undisturbed run failed:\n{ended[0].tail}")
            counts = json.loads((folder / "counts.json").read_text())
            self._references[name] = Reference(*_left(folder), counts)
        return self._references[name]

    def _in(
        self, folder: Path, *, compiles: bool = False, saves_async: bool = True
    ) -> TrainLmConfig:
        config = quiet(self._config, folder, [CheckpointInterval(EVERY)])
        checkpointer = dataclasses.replace(config.trainer.checkpointer, async_save=saves_async)
        return replace_trainer(config, checkpointer=checkpointer, compile=compiles)

    def _trial(self, fault: Fault, folder: Path) -> int:
        """Inject a fault and start again until the run is done; returns the updates lost."""
        folder.mkdir(parents=True)
        name, saves_async = _like(fault.kind, fault.where), fault.seed % 4 > 0
        config = self._in(folder, compiles=name == "compiled", saves_async=saves_async)
        scenario = stage(fault, config, folder)
        output = folder / "hit.log"
        if fault.where == "import":
            ended = [self._hit_import(fault, config, output.with_suffix(".yaml"))]
        else:
            ended = train(scenario.hit, output, scenario.orders, patience=300)
        codes = tuple(one.code for one in ended)
        if codes not in scenario.codes:
            expected = " or ".join(map(str, scenario.codes))
            raise ChaosError(f"ended with {codes}, not {expected}:\n{ended[0].tail}")
        made, complete = _reached(scenario, ended[0])
        damaged = fault.kind in DAMAGES and complete >= 0
        if damaged:
            output.write_text(faults.damage(fault, folder / "checkpoints") + "\n")
            if len(list((folder / "checkpoints").glob("step-*/metadata.json"))) == 1:
                self._start_over(scenario.again, folder, complete)
                made, complete, damaged = made - EVERY, -1, False
        lost = 0
        if any(codes):
            again = self._again(scenario.again, folder, len(codes))
            lost = _lost(made, complete, again, saves_async, damaged)
        reference = self._reference(name)
        if scenario.like != unchanged:
            reference = self._reference(scenario.name, scenario.like)
        _compare(reference, *_left(folder), scenario.ignored)
        return lost

    def _hit_import(self, fault: Fault, config: TrainLmConfig, path: Path) -> Ended:
        path.write_text(dump_yaml(config))
        words = ["train", "--config_path", str(path)]
        code, text = self._import(fault.nth, fault.kind, faults.SIGNALS[fault.kind], words)
        return Ended(code, text)

    def _import(self, nth: int, kind: str, signum: int, argv: list[str]) -> tuple[int, str]:
        code = faults.IMPORT_FAULT.format(nth=nth, kind=kind, signum=int(signum), argv=argv)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    def _start_over(self, config: TrainLmConfig, folder: Path, complete: int) -> None:
        """The only checkpoint is damaged: the run refuses to go on, and its advice is followed."""
        ended = train(config, folder / "refused.log", [Orders()], patience=300)[0]
        if ended.code != 2 or "holds 1 checkpoint, and it cannot be resumed" not in ended.output:
            raise ChaosError(f"the damaged step-{complete}, the only one, was not refused")
        shutil.rmtree(folder / "checkpoints")

    def _again(self, config: TrainLmConfig, folder: Path, num_ranks: int) -> Ended:
        """Start the run again, on a machine on which all is well."""
        ended = train(config, folder / "again.log", [Orders()] * num_ranks, patience=300)
        for one in ended:
            if one.code:
                raise ChaosError(f"started again, it ended with {one.code}:\n{one.tail}")
        return ended[0]


def _lost(made: int, complete: int, again: Ended, saves_async: bool, damaged: bool) -> int:
    """Updates that were made again; raises `ChaosError` if that is more than there may be."""
    found = re.search(r"resuming from \S*step-(\d+)", again.output)
    resumed = int(found[1]) if found else -1
    if damaged:
        if "skipping a damaged checkpoint" not in again.output or resumed >= complete:
            raise ChaosError(f"the damaged step-{complete} was not skipped and named")
        complete, made = resumed, made - EVERY  # what the damaged one held is lost
    if resumed < complete:
        raise ChaosError(f"step-{complete} was complete, and it went on from {resumed}")
    lost = max(made - resumed - 1, 0)
    if lost > EVERY * (2 if saves_async else 1) + 1:  # one save may be under way
        raise ChaosError(f"{lost} updates lost, and a save was due every {EVERY}")
    return lost


def _like(kind: str, where: str) -> str:
    """The undisturbed run that has as many phases as a fault's run."""
    return "two" if kind.endswith("rank") else "compiled" if where == "compile" else "one"


def _reached(scenario: Scenario, ended: Ended) -> tuple[int, int]:
    """Updates made and the newest complete checkpoint when it struck, as the log says."""
    if scenario.marker not in ended.output:
        raise ChaosError(f"the log does not say {scenario.marker!r}:\n{ended.tail}")
    if not (found := _MARKER.search(ended.output)):
        return 0, -1
    complete = -1 if found[2] == "none" else max(map(int, found[2].split(",")))
    return int(found[4]), complete


def _left(folder: Path) -> tuple[dict[str, str], dict[int, dict[str, object]]]:
    """Checksums of the newest checkpoint's tensors, and the figures of every step."""
    saved = find_latest(f"{folder}/checkpoints")
    if not isinstance(saved, Saved):
        raise ChaosError("no checkpoint is left")
    files = {n: r.sha256 for n, r in saved.metadata.files.items() if n.endswith(".safetensors")}
    return files, read_history(folder / "logs" / "metrics.jsonl")


def _compare(
    reference: Reference,
    files: Mapping[str, str],
    history: Mapping[int, Mapping[str, object]],
    ignored: range,
) -> None:
    different = [name for name in reference.files if files.get(name) != reference.files[name]]
    if different:
        raise ChaosError(f"{', '.join(different)} differ from the undisturbed run's")
    for step, figures in reference.history.items():
        if step not in ignored and history.get(step) != figures:
            raise ChaosError(f"step {step} logged {history.get(step)}, undisturbed {figures}")


def table(rows: Mapping[tuple[str, str], Row]) -> Iterator[str]:
    """The outcome as text."""
    yield f"{'fault':20} {'in':12} {'injected':>8} {'lost':>5} {'failed':>7}"
    for (kind, where), row in rows.items():
        numbers = f"{row.injected:8} {row.lost:5} {len(row.failures):7}"
        yield f"{kind:20} {where:12} {numbers}"
    injected = sum(row.injected for row in rows.values())
    failed = sum(len(row.failures) for row in rows.values())
    yield f"{injected} faults, {failed} failures; lost: the most updates that were made again"
