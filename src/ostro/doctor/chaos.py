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
from ostro.doctor.children import Ended, Orders, quiet, train
from ostro.doctor.differences import read_history
from ostro.doctor.faults import (
    DAMAGES,
    FRESH,
    IMPORT_FAULT,
    KILLED_IN,
    SIGNALS,
    Counted,
    Fault,
    Strike,
    damage,
    plan,
)
from ostro.errors import OstroError
from ostro.lm_config import TrainLmConfig, replace_trainer
from ostro.tracker import JsonLoggerConfig, NoopConfig, Tracker

KINDS: dict[str, tuple[str, ...]] = {
    "kill -9": (*FRESH, *KILLED_IN),
    "SIGTERM": (*FRESH, *KILLED_IN),
    "full disk": ("save",),
    "truncated file": ("backward",),
    "flipped bit": ("backward",),
    "slow rank": ("data", "forward", "backward", "update"),
    "dead rank": ("data", "forward", "backward", "update"),
    "unreachable tracker": ("start", "log"),
}
"""What is injected, and where."""
EVERY = 3
"""Updates between two checkpoints."""
_MARKER = re.compile(r"doctor: (.*); complete: (\S+), .*the main thread in (\S+) of step (\d+)")


class ChaosError(OstroError):
    """Something was lost."""

    exit_code = 1


@dataclass
class Row:
    """A line of the table: all faults of one kind in one place."""

    injected: int = 0
    reached: int = 0
    lost: int = 0
    """The most updates that had to be made again."""
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What a run leaves that nothing hits."""

    files: Mapping[str, str]
    """Checksums of weights, optimizer and guards."""
    history: Mapping[int, Mapping[str, object]]
    counts: Mapping[str, int]
    """How often each phase began."""


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
        started, faults = time.monotonic(), plan(kinds, self._count, num_each, self._seed)
        for number, fault in enumerate(faults):
            row = rows.setdefault((fault.kind, fault.where), Row())
            folder = self._folder / f"{number:04}"
            row.injected += 1
            try:
                lost = self._trial(fault, folder)
                row.reached += 1
                row.lost = max(row.lost, lost)
                shutil.rmtree(folder)
            except ChaosError as error:
                row.failures.append(f"{folder}: {fault}: {error}")
                report(f"failed: {row.failures[-1]}")
            if (number + 1) % 25 == 0:
                report(f"{number + 1} of {len(faults)} faults, {time.monotonic() - started:.0f} s")
        return rows

    def _count(self, kind: str, where: str) -> int:
        """How often a phase begins; what is no phase strikes at one of the backward passes."""
        if where == "import":
            return int(self._import(0, "", 0, [])[1])
        counts = self._reference(_like(kind, where)).counts
        return counts.get(where) or counts["backward"]

    def _reference(self, name: str) -> Reference:
        """The undisturbed run on one process, on two, or compiled; made when it is needed."""
        if name not in self._references:
            folder, counted = self._folder / f"reference-{name}", Counted()
            (folder / "counts.json").parent.mkdir(parents=True)

            @contextlib.contextmanager
            def counting() -> Iterator[None]:
                yield
                (folder / "counts.json").write_text(json.dumps(counted.counts))

            orders = [Orders(counted, wrapper=counting)] + [Orders()] * (name == "two")
            config = self._variant(name, folder)
            ended = train(config, folder / "output.log", orders)
            if any(one.code for one in ended):
                raise ChaosError(f"the undisturbed run failed:\n{_tail(ended[0].output)}")
            counts = json.loads((folder / "counts.json").read_text())
            self._references[name] = Reference(*_left(folder), counts)
        return self._references[name]

    def _variant(self, name: str, folder: Path, saves_async: bool = True) -> TrainLmConfig:
        config = quiet(self._config, folder, [CheckpointInterval(EVERY)])
        checkpointer = dataclasses.replace(config.trainer.checkpointer, async_save=saves_async)
        config = replace_trainer(config, checkpointer=checkpointer, compile=name == "compiled")
        return config

    def _trial(self, fault: Fault, folder: Path) -> int:
        """Inject a fault and start again until the run is done; returns the updates lost."""
        folder.mkdir(parents=True)
        name = _like(fault.kind, fault.where)
        reference, two = self._reference(name), name == "two"
        saves_async = fault.seed % 4 > 0
        config = self._variant(name, folder, saves_async)
        strike = Strike(_times(fault), folder / "checkpoints")
        if fault.kind == "unreachable tracker":
            config = replace_trainer(config, tracker=[JsonLoggerConfig(), NoopConfig()])
            hit = [Orders(wrapper=lambda: _unreachable(fault))]
        else:
            hit = [Orders()] * two + [Orders(strike)]
        output = folder / "hit.log"
        ended = self._hit(fault, config, hit, output)
        made, complete = _reached(fault, ended[0].output)
        codes = [one.code for one in ended]
        _expect_code(fault, codes)
        if fault.kind in DAMAGES and complete >= 0:
            output.write_text(damage(fault, folder / "checkpoints") + "\n")
        lost = 0
        if any(codes):
            again = self._again(config, folder, 1 + two)
            lost = self._check_resume(fault, made, complete, again, saves_async)
        _compare(reference, *_left(folder))
        return lost

    def _hit(
        self, fault: Fault, config: TrainLmConfig, orders: list[Orders], output: Path
    ) -> list[Ended]:
        if fault.where != "import":
            return train(config, output, orders, patience=300)
        path = output.with_suffix(".yaml")
        path.write_text(dump_yaml(config))
        words = ["train", "--config_path", str(path)]
        code, text = self._import(fault.nth, fault.kind, SIGNALS[fault.kind], words)
        return [Ended(code, text, 0.0)]

    def _import(self, nth: int, kind: str, signum: int, argv: list[str]) -> tuple[int, str]:
        code = IMPORT_FAULT.format(nth=nth, kind=kind, signum=int(signum), argv=argv)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    def _again(self, config: TrainLmConfig, folder: Path, num_ranks: int) -> Ended:
        """Start the run again, on a machine on which all is well."""
        ended = train(config, folder / "again.log", [Orders()] * num_ranks, patience=300)
        for one in ended:
            if one.code:
                raise ChaosError(f"started again, it ended with {one.code}:\n{_tail(one.output)}")
        return ended[0]

    def _check_resume(
        self, fault: Fault, made: int, complete: int, again: Ended, saves_async: bool
    ) -> int:
        found = re.search(r"resuming from \S*step-(\d+)", again.output)
        resumed = int(found[1]) if found else -1
        if fault.kind in DAMAGES and complete >= 0:
            if "skipping a damaged checkpoint" not in again.output or resumed >= complete:
                raise ChaosError(f"the damaged step-{complete} was not skipped and named")
            complete = resumed  # the one before; that there is one is checked by what is lost
            made -= EVERY
        if resumed < complete:
            raise ChaosError(f"step-{complete} was complete, and it went on from {resumed}")
        lost = max(made - resumed - 1, 0)
        if lost > EVERY * (2 if saves_async else 1) + 1:  # one save may be under way
            raise ChaosError(f"{lost} updates lost, and a save was due every {EVERY}")
        return lost


def _like(kind: str, where: str) -> str:
    """The undisturbed run that a fault's run is compared with."""
    return "two" if kind.endswith("rank") else "compiled" if where == "compile" else "one"


def _times(fault: Fault) -> Fault:
    """Damage needs two checkpoints: its run is killed in the last updates."""
    return dataclasses.replace(fault, kind="kill -9") if fault.kind in DAMAGES else fault


def _reached(fault: Fault, output: str) -> tuple[int, int]:
    """Updates made and the newest complete checkpoint when it struck, as the log says."""
    if fault.kind == "unreachable tracker":
        if "tracker noop failed" not in output:
            raise ChaosError("the log has no word of the tracker")
        return 0, -1
    if not (found := _MARKER.search(output)):
        raise ChaosError(f"the log has no marker of the fault:\n{_tail(output)}")
    complete = -1 if found[2] == "none" else max(map(int, found[2].split(",")))
    return int(found[4]), complete


def _expect_code(fault: Fault, codes: list[int]) -> None:
    """What each kind of fault must end a run with."""
    allowed: dict[str, tuple[tuple[int, ...], ...]] = {
        "kill -9": ((-9,),),
        "truncated file": ((-9,),),
        "flipped bit": ((-9,),),
        "SIGTERM": ((143,), (0,)),  # 0: it came too late to stop anything
        "full disk": ((0,), (2,)),  # 2: the last save of the run failed
        "slow rank": ((0, 0),),
        "dead rank": ((1, -9),),
        "unreachable tracker": ((0,),),
    }
    expected = allowed[fault.kind]
    if fault.kind == "SIGTERM" and fault.where == "import":
        expected = ((143,), (-15,))  # before our handlers are there
    if tuple(codes) not in expected:
        raise ChaosError(f"ended with {codes}, not {' or '.join(map(str, expected))}")


def _left(folder: Path) -> tuple[dict[str, str], dict[int, dict[str, object]]]:
    """Checksums of the newest checkpoint's tensors, and the figures of every step."""
    saved = find_latest(f"{folder}/checkpoints")
    if not isinstance(saved, Saved):
        raise ChaosError("no checkpoint is left")
    files = {n: r.sha256 for n, r in saved.metadata.files.items() if n.endswith(".safetensors")}
    return files, read_history(folder / "logs" / "metrics.jsonl")


def _compare(
    reference: Reference, files: Mapping[str, str], history: Mapping[int, Mapping[str, object]]
) -> None:
    different = [name for name in reference.files if files.get(name) != reference.files[name]]
    if different:
        raise ChaosError(f"{', '.join(different)} differ from the undisturbed run's")
    for step, figures in reference.history.items():
        if history.get(step) != figures:
            raise ChaosError(f"step {step} logged {history.get(step)}, undisturbed {figures}")


@contextlib.contextmanager
def _unreachable(fault: Fault) -> Iterator[None]:
    """In the child: the tracker `noop` stands for a service that cannot be reached."""
    draw, build = fault.draw, NoopConfig.build

    class Unreachable(Tracker):
        name = "noop"

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            if draw.random() < 0.7:
                raise ConnectionError("the service cannot be reached")

        def finish(self) -> None:
            raise TimeoutError("the service does not answer")

    def start(self: NoopConfig, run: object) -> Tracker:
        if fault.where == "start":
            raise ConnectionError("the service cannot be reached")
        return Unreachable()

    NoopConfig.build = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        NoopConfig.build = build  # type: ignore[method-assign]


def table(rows: Mapping[tuple[str, str], Row]) -> Iterator[str]:
    """The outcome as text."""
    yield f"{'fault':20} {'in':12} {'injected':>8} {'reached':>8} {'lost':>5} {'failed':>7}"
    for (kind, where), row in rows.items():
        numbers = f"{row.injected:8} {row.reached:8} {row.lost:5} {len(row.failures):7}"
        yield f"{kind:20} {where:12} {numbers}"
    injected = sum(row.injected for row in rows.values())
    failed = sum(len(row.failures) for row in rows.values())
    yield f"{injected} faults, {failed} failures; lost: the most updates that were made again"


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])
