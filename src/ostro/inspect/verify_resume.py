"""`ostro verify-resume`: train N updates, kill, resume, train N more; compare with 2N in one go.

The run is the user's own but for where it writes. What is compared, bit by bit: the state right
after it was restored with what had been saved; then every batch, every logged figure, and in the
end weights, optimizer, guards, random state and position with those of a run that nothing hit.
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ostro.checkpoint import CheckpointInterval, Saved, find_latest, write
from ostro.core.errors import ConfigError, OstroError, Problem
from ostro.inspect import differences
from ostro.inspect.children import Orders, quiet, sleep_on, strike, train
from ostro.lm_config import TrainLmConfig
from ostro.runtime.phase import current_phase
from ostro.trainer import Trainer

RELATIVE = 1e-5
"""What losses and tensors may differ by, of their size, when the number of ranks changes."""


class NotExactError(OstroError):
    """A resumed run is another than the one that nothing hit."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    """How many updates each part makes, and in how many processes."""

    num_steps: int  # updates of each part
    ranks: tuple[int, ...] = (1, 1)  # processes of each; after each but the last all are killed

    @property
    def total(self) -> int:
        """Updates of the run."""
        return self.num_steps * len(self.ranks)

    def check(self, config: TrainLmConfig) -> None:
        """`ConfigError` where the run cannot be cut like that."""
        if len(self.ranks) < 2 or min(self.ranks) < 1:
            rule = "must be two numbers of processes or more"
            raise ConfigError(Problem("--ranks", rule, "for example 1,2,1", str(self.ranks)))
        if (have := config.trainer.num_train_steps) < self.total:
            rule = f"must be at least {self.total} for {len(self.ranks)} parts of {self.num_steps}"
            raise ConfigError(Problem("trainer.num_train_steps", rule, "lower --steps", str(have)))
        for num_ranks in self.ranks:
            config.trainer.batch_plan(num_ranks)


def verify_resume(
    config: TrainLmConfig, plan: Plan, folder: Path, report: Callable[[str], None] = print
) -> None:
    """Run the check below `folder`; raises `NotExactError` that names the first difference."""
    plan.check(config)
    changes = len(set(plan.ranks)) > 1
    tolerance = RELATIVE if changes and not config.trainer.deterministic_reduction else 0.0
    whole = _Part(config, folder / "undisturbed", "undisturbed", plan.total, is_last=True)
    report(f"undisturbed: {plan.total} updates in {_processes(plan.ranks[0])}")
    whole.train(plan.ranks[0])
    reference = whole.newest()
    history = differences.read_history(whole.folder / "logs" / "metrics.jsonl")
    history = _with_batches(history, whole)
    for index, num_ranks in enumerate(plan.ranks):
        stop = (index + 1) * plan.num_steps
        part = _Part(config, folder / "killed", f"part-{index}", stop, stop == plan.total)
        end = "" if part.is_last else ", then kill -9"
        report(f"part {index + 1}: to update {stop} in {_processes(num_ranks)}{end}")
        saved = part.newest() if index else None
        part.train(num_ranks)
        if saved is not None:
            _expect(_restored(part, saved, whole), "was not restored as it was saved", report)
        own = differences.read_history(part.folder / "logs" / "metrics.jsonl")
        steps = range(stop - plan.num_steps, stop)
        found = differences.of_histories(history, _with_batches(own, part), steps, tolerance)
        when = f"after resuming at step {steps.start}" if index else "before anything was killed"
        _expect(found, f"is not the same {when}", report)
    found = differences.of_checkpoints(reference, part.newest(), tolerance)
    _expect(found, f"is not the same after {plan.total} updates", report)
    exact = "bit for bit" if not tolerance else f"to {tolerance:g}"
    report(f"resuming is exact: figures, weights, optimizer, guards and position agree {exact}")


def _processes(num: int) -> str:
    return "one process" if num == 1 else f"{num} processes"


def _expect(found: Iterator[str], what: str, report: Callable[[str], None]) -> None:
    lines = list(found)
    for line in lines[:8]:
        report(f"  differs: {line}")
    if len(lines) > 8:
        report(f"  and {len(lines) - 8} more")
    if lines:
        raise NotExactError(f"resuming is not exact: {what} - first difference: {lines[0]}")


class _Part:
    """Some updates of a run, in one or more processes."""

    def __init__(self, config: TrainLmConfig, folder: Path, name: str, stop: int, is_last: bool):
        keep = [] if is_last else [CheckpointInterval(stop - 1, stop - 1)]
        self.config = quiet(config, folder, keep)
        self.folder, self.name, self.stop, self.is_last = folder, name, stop, is_last

    @property
    def start_folder(self) -> Path:
        """Where the state goes that this part begins with."""
        return self.folder / self.name

    def newest(self) -> Saved:
        """The newest checkpoint of the run."""
        saved = find_latest(f"{self.folder}/checkpoints")
        if not isinstance(saved, Saved):
            raise NotExactError(f"{self.folder} - no intact checkpoint is left")
        return saved

    def train(self, num_ranks: int) -> None:
        """Make the updates, and end as planned."""
        output = self.folder / f"{self.name}.log"
        orders = [self._orders(rank) for rank in range(num_ranks)]
        first = train(self.config, output, orders, grace=0)[0]
        planned = (0, 128 + signal.SIGTERM) if self.is_last else (-signal.SIGKILL,)
        if first.code not in planned:
            raise NotExactError(f"{output} - a process ended with {first.code}:\n{first.tail}")

    def _orders(self, rank: int) -> Orders:
        return Orders(_Ending(self.stop, self.is_last, rank), lambda s: self._watch(s, rank))

    def _watch(self, trainer: Trainer, rank: int) -> None:
        """In the child: keep what it begins with, and which batches it sees."""
        self.start_folder.mkdir(exist_ok=True)
        (self.start_folder / f"recipe-{rank}.json").write_text(json.dumps(_recipe(trainer)))
        if trainer.state.step:
            group = None
            if trainer.engine.is_collective and trainer.world.num_ranks > 1:
                group = dist.new_group(backend="gloo")
            if group is not None or rank == 0:
                assert trainer.saving is not None, "every run can save"
                state = trainer.saving.make_state(trainer, self.start_folder / "shards")
                write(f"{self.start_folder}", state, step=trainer.state.step - 1,
                      is_temporary=True, group=group)  # fmt: skip
        batches = open(self.start_folder / f"batches-{rank}.jsonl", "w", buffering=1)  # noqa: SIM115
        make = trainer.train_step

        def train_step(step: int, batch: Any) -> Any:
            digest = hashlib.sha256(batch.tokens.numpy().tobytes())
            digest.update(batch.targets.numpy().tobytes())
            batches.write(json.dumps([step, digest.hexdigest()[:16]]) + "\n")
            return make(step, batch)

        trainer.train_step = train_step


class _Ending:
    """In the child: ends it after update `stop`, or kills it two updates later."""

    def __init__(self, stop: int, is_last: bool, rank: int):
        self._stop, self._is_last, self._rank = stop, is_last, rank
        self._commits = 0

    def __call__(self, phase: str) -> None:
        if phase == "commit":
            self._commits += 1
        if threading.current_thread() is not threading.main_thread():
            return
        step = current_phase().step
        if self._is_last:
            if phase == "update" and step == self._stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # makes it, saves, and leaves
        elif phase == "backward" and step > self._stop:
            if self._rank:
                sleep_on()  # until the first is dead, and this one killed
            while self._commits < 3:  # the save goes on in its own thread
                time.sleep(0.005)
            strike(signal.SIGKILL, "kill -9")


def _recipe(trainer: Trainer) -> dict[str, Any]:
    """What the updates are made with, by name."""
    state = trainer.state
    plain = (bool, int, float, str, list, tuple)
    recipe: dict[str, Any] = {
        "trainer.seed": state.seed,
        "trainer.mp": str(trainer.config.mp),
        "optimizer.max_grad_norm": trainer.max_grad_norm,
        "optimizer.skip_bad_steps": str(state.skip_step and state.skip_step.config),
    }
    for index, group in enumerate(state.optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "lr") and isinstance(value, plain):
                recipe[f"optimizer group {index} {key}"] = value
    for step in range(state.step, min(state.step + 100, trainer.config.num_train_steps)):
        recipe[f"learning rate of step {step:06}"] = trainer.schedule(step)
        recipe[f"batch size of step {step:06}"] = trainer.plan.schedule.size(step)
    return recipe


def _restored(part: _Part, saved: Saved, whole: _Part) -> Iterator[str]:
    """What a resumed part begins with, against what had been saved and how the run began."""
    now = find_latest(str(part.start_folder))
    if not isinstance(now, Saved):
        yield "step and data position: it started from scratch"
        return
    yield from differences.of_checkpoints(saved, now)
    old, new = (json.loads((p.start_folder / "recipe-0.json").read_text()) for p in (whole, part))
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            yield f"configuration: {key} in use was {old[key]}, is {new[key]}"


def _with_batches(history: dict[int, dict[str, Any]], part: _Part) -> dict[int, dict[str, Any]]:
    """The figures, with the digest of each batch where one process has seen all of it."""
    files = list(part.start_folder.glob("batches-*.jsonl"))
    if len(files) > 1:
        return history
    for line in files[0].read_text().splitlines():
        step, digest = json.loads(line)
        history.setdefault(step, {})["batch"] = digest
    return history


def check_ranks(text: str) -> tuple[int, ...]:
    """`1,2,1` as numbers of processes."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        rule = "must be numbers of processes separated by commas"
        raise ConfigError(Problem("--ranks", rule, "for example 1,2,1", text)) from None
